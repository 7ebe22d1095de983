// Products of quadtree_level: four queries and gathered families of four keys.
//
// The 16 numbers of a family of keys lie together, query by query: number 4q + c belongs to query q
// and child c. So whatever is done with them fills whole vectors, without a transposition.
#pragma once

#include "../quadtree.h"
#include "vec.h"

#include <utility>

namespace mmattn {
namespace {

constexpr int PAIRS = FAMILY * FAMILY;

// Families of keys or values of one item, as rows of type A that are zero from `depth` to `width`.
// They are read where they are if they are that already, and else from a copy in the task's memory.
template <class T>
class Gathered {
  using A = Accumulate<T>;

 public:
  Gathered(const QuadtreeShape& s, View<const T, 4> tokens)
      : s_(s),
        tokens_(tokens),
        width_(pad_to_lanes<A>(s.depth)),
        in_place_(std::is_same_v<T, A> && width_ == s.depth),
        copy_(in_place_ ? 0 : s.candidates * width_),
        families_(s.families) {}

  void gather(int64_t b, int64_t h, const int64_t* parents) {
    for (int64_t i = 0; i < s_.families; ++i) {
      const T* rows = tokens_.at(b, FAMILY * parents[i], h);
      if constexpr (std::is_same_v<T, A>) {
        if (in_place_) {
          families_[i] = rows;
          continue;
        }
      }
      A* copy = copy_ + i * FAMILY * width_;
      families_[i] = copy;
      for (int c = 0; c < FAMILY; ++c) {
        for (int64_t n = 0; n < s_.depth; ++n)
          copy[c * width_ + n] = static_cast<A>(rows[c * tokens_.stride[1] + n]);
        for (int64_t n = s_.depth; n < width_; ++n) copy[c * width_ + n] = 0;
      }
    }
  }

  const A* family(int64_t i) const { return families_[i]; }
  int64_t row() const { return in_place_ ? tokens_.stride[1] : width_; }

 private:
  const QuadtreeShape& s_;
  View<const T, 4> tokens_;
  int64_t width_;
  bool in_place_;
  Buffer<A> copy_;
  Buffer<const A*> families_;
};

// Rows of an item's four queries, or of their gradients, times a factor; (4, width), zero from
// `depth` on.
template <class T>
void read_rows(
    const View<const T, 5>& x,
    const QuadtreeShape& s,
    QuadtreeItem at,
    Accumulate<T> factor,
    Accumulate<T>* rows) {
  using A = Accumulate<T>;
  const int64_t width = pad_to_lanes<A>(s.depth);
  for (int q = 0; q < FAMILY; ++q) {
    const T* from = x.at(at.b, at.p, q, at.h);
    for (int64_t n = 0; n < s.depth; ++n) rows[q * width + n] = static_cast<A>(from[n]) * factor;
    for (int64_t n = s.depth; n < width; ++n) rows[q * width + n] = 0;
  }
}

#ifdef __clang__
#define MMATTN_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define MMATTN_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Lanes{__VA_ARGS__})
#endif

// Lane l: of a where bit STEP of l is 0, of b where it is 1; there, the sum of the lanes that
// differ in that bit.
template <int STEP, class A, size_t... L>
inline Vec<A> fold(Vec<A> a, Vec<A> b, std::index_sequence<L...>) {
  using Lanes [[maybe_unused]] = Vec<std::conditional_t<sizeof(A) == 4, int32_t, int64_t>>;
  const Vec<A> low = MMATTN_SHUFFLE(a, b, ((L & STEP ? LANES<A> : 0) + (L & ~STEP))...);
  const Vec<A> high = MMATTN_SHUFFLE(a, b, ((L & STEP ? LANES<A> : 0) + (L | STEP))...);
  return low + high;
}

// Lane l: the sum of the lanes of sums[l].
template <class A, int STEP = LANES<A> / 2>
inline Vec<A> sum_each(Vec<A>* sums) {
#pragma GCC unroll 8
  for (int i = 0; i < STEP; ++i)
    sums[i] = fold<STEP, A>(sums[i], sums[i + STEP], std::make_index_sequence<LANES<A>>());
  if constexpr (STEP > 1)
    return sum_each<A, STEP / 2>(sums);
  else
    return sums[0];
}

// out (families, 16): the products of the four rows and the rows of each family.
template <class T>
void multiply(
    const Accumulate<T>* rows,
    const Gathered<T>& x,
    const QuadtreeShape& s,
    Accumulate<T>* out) {
  using A = Accumulate<T>;
  const int64_t width = pad_to_lanes<A>(s.depth), x_row = x.row();
  for (int64_t i = 0; i < s.families; ++i) {
    const A* family = x.family(i);
#pragma GCC unroll 8
    for (int first = 0; first < PAIRS; first += LANES<A>) {
      Vec<A> sums[LANES<A>] = {};
      for (int64_t n = 0; n < width; n += LANES<A>) {
#pragma GCC unroll 16
        for (int l = 0; l < LANES<A>; ++l) {
          const int q = (first + l) / FAMILY, c = (first + l) % FAMILY;
          sums[l] += load(rows + q * width + n) * load(family + c * x_row + n);
        }
      }
      store<A>(out + i * PAIRS + first, sum_each<A>(sums));
    }
  }
}

// VECTORS vectors of each of the four sums over all families, kept in registers.
template <int VECTORS, class T>
void weigh_columns(
    const Accumulate<T>* weights,
    const Gathered<T>& x,
    const QuadtreeShape& s,
    int64_t n,
    Accumulate<T>* out) {
  using A = Accumulate<T>;
  const int64_t width = pad_to_lanes<A>(s.depth), x_row = x.row();
  Vec<A> sums[FAMILY][VECTORS] = {};
  for (int64_t i = 0; i < s.families; ++i) {
    const A* family = x.family(i) + n;
#pragma GCC unroll 4
    for (int c = 0; c < FAMILY; ++c) {
      Vec<A> row[VECTORS];
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) row[v] = load(family + c * x_row + v * LANES<A>);
#pragma GCC unroll 4
      for (int q = 0; q < FAMILY; ++q) {
        const A weight = weights[i * PAIRS + q * FAMILY + c];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) sums[q][v] += row[v] * weight;
      }
    }
  }
#pragma GCC unroll 4
  for (int q = 0; q < FAMILY; ++q)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) store<A>(out + q * width + n + v * LANES<A>, sums[q][v]);
}

// out (4, width): for each query, the sum of all rows, each with its weight.
template <class T>
void weigh(
    const Accumulate<T>* weights,
    const Gathered<T>& x,
    const QuadtreeShape& s,
    Accumulate<T>* out) {
  using A = Accumulate<T>;
#ifdef __AVX512F__
  constexpr int WIDE = 4;  // of 32 registers half are sums
#else
  constexpr int WIDE = 2;
#endif
  const int64_t width = pad_to_lanes<A>(s.depth);
  int64_t n = 0;
  for (; n + WIDE * LANES<A> <= width; n += WIDE * LANES<A>)
    weigh_columns<WIDE>(weights, x, s, n, out);
  for (; n + 2 * LANES<A> <= width; n += 2 * LANES<A>) weigh_columns<2>(weights, x, s, n, out);
  for (; n < width; n += LANES<A>) weigh_columns<1>(weights, x, s, n, out);
}

// Adds to the rows (4, depth) of a family of keys: for each child, the sum of the queries' rows
// with its weights.
template <class A>
void add_rows(
    const A* __restrict weights,
    const A* __restrict rows,
    int64_t width,
    int64_t depth,
    A* __restrict family) {
  A* __restrict child0 = family;
  A* __restrict child1 = family + depth;
  A* __restrict child2 = family + 2 * depth;
  A* __restrict child3 = family + 3 * depth;
  const auto sum = [=](int64_t n, int c) {
    A total = 0;
    for (int q = 0; q < FAMILY; ++q) total += weights[q * FAMILY + c] * rows[q * width + n];
    return total;
  };
  for (int64_t n = 0; n < depth; ++n) {
    child0[n] += sum(n, 0);
    child1[n] += sum(n, 1);
    child2[n] += sum(n, 2);
    child3[n] += sum(n, 3);
  }
}

// Softmax of numbers (families, 16), in place: of each query over all candidates, or over each
// family alone. -inf becomes 0, even where there is nothing else.
template <class A>
void softmax(A* numbers, int64_t families, bool each_family) {
  constexpr A INFINITE = std::numeric_limits<A>::infinity();
  const int64_t group = each_family ? 1 : families;
  for (int64_t begin = 0; begin < families; begin += group) {
    A* own = numbers + begin * PAIRS;
    A most[PAIRS], sum[PAIRS];
#pragma GCC unroll 8
    for (int l = 0; l < PAIRS; l += LANES<A>) {
      Vec<A> greatest = load(own + l);
      for (int64_t i = 1; i < group; ++i) {
        const Vec<A> other = load(own + i * PAIRS + l);
        greatest = other > greatest ? other : greatest;
      }
      store<A>(most + l, greatest);
    }
    for (int q = 0; q < PAIRS; q += FAMILY) {
      const A greatest =
          std::max(std::max(most[q], most[q + 1]), std::max(most[q + 2], most[q + 3]));
      for (int c = 0; c < FAMILY; ++c) most[q + c] = greatest == -INFINITE ? A(0) : greatest;
    }
#pragma GCC unroll 8
    for (int l = 0; l < PAIRS; l += LANES<A>) {
      const Vec<A> greatest = load(most + l);
      Vec<A> total = {};
      for (int64_t i = 0; i < group; ++i) {
        const Vec<A> e = exp<A>(load(own + i * PAIRS + l) - greatest);
        total += e;
        store<A>(own + i * PAIRS + l, e);
      }
      store<A>(sum + l, total);
    }
    for (int q = 0; q < PAIRS; q += FAMILY) {
      const A total = (sum[q] + sum[q + 1]) + (sum[q + 2] + sum[q + 3]);
      for (int c = 0; c < FAMILY; ++c) sum[q + c] = total == 0 ? A(0) : 1 / total;
    }
#pragma GCC unroll 8
    for (int l = 0; l < PAIRS; l += LANES<A>) {
      const Vec<A> inverse = load(sum + l);
      for (int64_t i = 0; i < group; ++i)
        store<A>(own + i * PAIRS + l, load(own + i * PAIRS + l) * inverse);
    }
  }
}

}  // namespace
}  // namespace mmattn
