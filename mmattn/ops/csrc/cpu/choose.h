// The greatest of some numbers, sorted, the lower place first among equals.
#pragma once

#include "vec.h"

#include <algorithm>
#include <bit>

namespace mmattn::MMATTN_ISA {
namespace {

template <class A>
using OrderOf = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;

// An integer that orders numbers as they are ordered; both zeros are one.
template <class A>
inline OrderOf<A> order_of(A x) {
  using Order = OrderOf<A>;
  const Order bits = std::bit_cast<Order>(x + A(0));
  return bits ^ ((bits >> (8 * sizeof(A) - 1)) & std::numeric_limits<Order>::max());
}

// Chooses by the order alone, and without branches on it: a partial sort's are mispredicted all the time.
template <class A>
class Choice {
  using Order = OrderOf<A>;

 public:
  Choice(int64_t candidates, int64_t kept)
      : candidates_(candidates),
        kept_(kept),
        // One more, as what is not taken is overwritten by what is next.
        order(kept == 0 ? 0 : candidates),
        taken_(kept == 0 ? 0 : candidates + 1),
        places(kept) {}

 private:
  const int64_t candidates_, kept_;

 public:
  const Buffer<Order> order;  // of the candidates, to be filled in

 private:
  const Buffer<int32_t> taken_;

 public:
  const Buffer<int32_t> places;  // that were chosen, the greatest first

  // Overwrites `order`.
  void choose() const {
    const Order least = least_taken();
    const Order* all = order;
    int64_t equals = kept_ - count([=](Order x) { return x > least; });
    // In the order of their places.
    int64_t taken = 0;
    for (int64_t n = 0; n < candidates_; ++n) {
      const bool is_equal = all[n] == least && equals > 0;
      equals -= is_equal;
      taken_[taken] = static_cast<int32_t>(n);
      taken += all[n] > least || is_equal;
    }
    if (kept_ > MOST_COUNTED)
      sort();
    else
      rank();
  }

 private:
  // Up to so many are sorted by counting for each how many come before it.
  static constexpr int64_t MOST_COUNTED = 128;

  template <class F>
  int64_t count(const F& holds) const {
    const Order* all = order;
    Order sum = 0;
    for (int64_t n = 0; n < candidates_; ++n) sum += holds(all[n]) ? 1 : 0;
    return sum;
  }

  // The kept-th greatest, by bisection; or another number that as many are not below.
  Order least_taken() const {
    const Order* all = order;
    Order low = all[0], high = all[0];
    for (int64_t n = 1; n < candidates_; ++n) {
      low = std::min(low, all[n]);
      high = std::max(high, all[n]);
    }
    using Distance = std::make_unsigned_t<Order>;
    int64_t above = candidates_;  // that are not below `low`
    while (low < high && above != kept_) {
      const Distance half = (static_cast<Distance>(high) - static_cast<Distance>(low) - 1) / 2 + 1;
      const Order middle = static_cast<Order>(static_cast<Distance>(low) + half);
      const int64_t not_below = count([=](Order x) { return x >= middle; });
      if (not_below >= kept_) {
        low = middle;
        above = not_below;
      } else {
        high = middle - 1;
      }
    }
    return low;
  }

  void rank() const {
    Order* own = order;  // taken_ ascends, so that nothing is overwritten before it is read
    for (int64_t r = 0; r < kept_; ++r) own[r] = own[taken_[r]];
    for (int64_t r = 0; r < kept_; ++r) {
      const Order mine = own[r];
      Order before = 0;
      for (int64_t n = 0; n < r; ++n) before += own[n] >= mine ? 1 : 0;
      for (int64_t n = r + 1; n < kept_; ++n) before += own[n] > mine ? 1 : 0;
      places[before] = taken_[r];
    }
  }

  void sort() const {
    std::copy_n(static_cast<int32_t*>(taken_), kept_, static_cast<int32_t*>(places));
    const Order* all = order;
    std::sort(places + 0, places + kept_, [=](int32_t a, int32_t b) {
      return all[a] > all[b] || (all[a] == all[b] && a < b);
    });
  }
};

}  // namespace
}  // namespace mmattn::MMATTN_ISA
