// The greatest of some numbers, sorted, the lower place first among equals.
#pragma once

#include "../common.h"
#include "vec.h"

#include <algorithm>
#include <bit>

namespace mmattn {
namespace {

template <class A>
using OrderOf = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;

// An integer with the order of the floating-point number; both zeros are equal.
template <class A>
inline OrderOf<A> order_of(A x) {
  using Order = OrderOf<A>;
  const Order bits = std::bit_cast<Order>(x + A(0));
  return bits ^ ((bits >> (8 * sizeof(A) - 1)) & std::numeric_limits<Order>::max());
}

// Chooses with vectors and without branches on the numbers: those of a partial sort are
// mispredicted.
template <class A>
class Choice {
 public:
  using Order = OrderOf<A>;
  // Of a candidate that comes after all others.
  static constexpr Order LAST = std::numeric_limits<Order>::min() + 1;

  Choice(int64_t candidates, int64_t kept)
      : candidates_(candidates),
        kept_(kept),
        padded_(pad_to_lanes<Order>(candidates)),
        order_(kept == 0 ? 0 : padded_),
        taken_(kept == 0 ? 0 : candidates + 1),  // what is not taken is overwritten by what is next
        own_(pad_to_lanes<Order>(kept)),
        before_(own_.size()),
        places_(kept) {
    own_.fill(NOTHING);
  }

  // To be filled in for all candidates.
  Order* order() const { return order_; }

  // The places of those that are kept, the greatest first.
  const int32_t* choose() const {
    for (int64_t n = candidates_; n < padded_; ++n) order_[n] = NOTHING;
    const Order* all = order_;
    const Order least = least_taken();
    int64_t equals = kept_ - count_if([=](Vec<Order> x) { return x > least; });
    const bool all_equals = count_if([=](Vec<Order> x) { return x >= least; }) == kept_;
    int64_t taken = 0;
    if (all_equals) {
      for (int64_t n = 0; n < candidates_; ++n) {
        taken_[taken] = static_cast<int32_t>(n);
        taken += all[n] >= least;
      }
    } else {
      for (int64_t n = 0; n < candidates_; ++n) {
        const bool is_equal = all[n] == least && equals > 0;
        equals -= is_equal;
        taken_[taken] = static_cast<int32_t>(n);
        taken += all[n] > least || is_equal;
      }
    }
    if (kept_ > MOST_RANKED)
      sort();
    else
      rank();
    return places_;
  }

 private:
  static constexpr Order NOTHING = std::numeric_limits<Order>::min();
  // Up to so many are sorted by counting for each how many come before it.
  static constexpr int64_t MOST_RANKED = 128;

  template <class F>
  int64_t count_if(const F& holds) const {
    Vec<Order> sum = {};
    for (int64_t n = 0; n < padded_; n += LANES<Order>)
      sum -= holds(load<Order>(order_ + n));  // true is -1
    return sum_of_lanes<Order>(sum);
  }

  // By bisection: the kept-th greatest, or a lower number than that which exactly as many are not
  // below.
  Order least_taken() const {
    Order low = order_[0], high = order_[0];
    for (int64_t n = 1; n < candidates_; ++n) {
      low = std::min(low, order_[n]);
      high = std::max(high, order_[n]);
    }
    using Distance = std::make_unsigned_t<Order>;
    int64_t not_below = candidates_;
    while (low < high && not_below != kept_) {
      const Distance half = (static_cast<Distance>(high) - static_cast<Distance>(low) - 1) / 2 + 1;
      const Order middle = static_cast<Order>(static_cast<Distance>(low) + half);
      const int64_t count = count_if([=](Vec<Order> x) { return x >= middle; });
      if (count >= kept_) {
        low = middle;
        not_below = count;
      } else {
        high = middle - 1;
      }
    }
    return low;
  }

  void rank() const {
    for (int64_t r = 0; r < kept_; ++r) own_[r] = order_[taken_[r]];
    for (int64_t first = 0; first < kept_; first += LANES<Order>) {
      const Vec<Order> mine = load<Order>(own_ + first);
      Vec<Order> before = {}, place;
      for (int64_t l = 0; l < LANES<Order>; ++l) place[l] = static_cast<Order>(first + l);
      for (int64_t r = 0; r < kept_; ++r) {
        const Vec<Order> other = Vec<Order>{} + own_[r];
        before -= (other > mine) | ((other == mine) & (place > static_cast<Order>(r)));
      }
      store<Order>(before_ + first, before);
    }
    for (int64_t r = 0; r < kept_; ++r) places_[before_[r]] = taken_[r];
  }

  void sort() const {
    const Order* all = order_;
    std::copy_n(&taken_[0], kept_, &places_[0]);
    std::sort(&places_[0], &places_[0] + kept_, [=](int32_t a, int32_t b) {
      return all[a] > all[b] || (all[a] == all[b] && a < b);
    });
  }

  int64_t candidates_, kept_, padded_;
  Buffer<Order> order_;
  Buffer<int32_t> taken_;       // the places of those that are kept, ascending
  Buffer<Order> own_, before_;  // their orders, and how many come before each
  Buffer<int32_t> places_;
};

}  // namespace
}  // namespace mmattn
