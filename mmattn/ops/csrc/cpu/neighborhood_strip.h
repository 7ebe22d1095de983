// Tools of neighborhood_attention's CPU kernels: a task has a strip of query rows of one head.
//
// It goes down the rows and keeps those rows of keys and values that the current windows cover, as
// numbers of the accumulating type: rows of channels, for sums over keys, and transposed, so that
// the scores of adjacent keys are one vector.
#pragma once

#include "../checks.h"
#include "../neighborhood.h"
#include "vec.h"

#include <algorithm>
#include <cmath>

// Vectors wider than the registers are passed between functions of one file only.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace mmattn {
namespace {

// Keys of one vector of scores. The published kernel, 7, fits; wider ones take several for a row.
constexpr int64_t GROUP = 8;

template <class A>
struct GroupOf {
  typedef A type __attribute__((vector_size(GROUP * sizeof(A))));
};
template <class A>
using Group = typename GroupOf<A>::type;

template <class A>
inline Group<A> load_group(const A* from) {
  Group<A> v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

template <class A>
inline void store_group(A* to, const Group<A>& v) {
  std::memcpy(to, &v, sizeof(v));
}

inline int64_t pad_to_groups(int64_t n) { return ceil_div(n, GROUP) * GROUP; }

struct Shape {
  int64_t batch, height, width, heads, d, kernel, offsets;
  int64_t strip_rows, strips;
  // Scores of a window: `kernel` rows of `row`, together padded to `window`.
  int64_t row, window;
  int64_t channels;  // d, padded
  int64_t columns;   // of a transposed row of the map, padded for the groups that begin at its end
  int64_t bias_row;  // of the bias table, padded likewise

  Shape(const Tensor& q, int64_t kernel, int64_t lanes)
      : batch(q.size(0)),
        height(q.size(1)),
        width(q.size(2)),
        heads(q.size(3)),
        d(q.size(4)),
        kernel(kernel),
        offsets(2 * kernel - 1),
        // By shapes alone, so that results do not depend on threads. No fewer: Backward takes every
        // second strip at a time, and windows at the lower border are shifted by up to kernel / 2
        // rows.
        strip_rows(std::max<int64_t>(8, 3 * kernel / 2)),
        strips(ceil_div(height, strip_rows)),
        row(pad_to_groups(kernel)),
        window(ceil_div(kernel * row, lanes) * lanes),
        channels(ceil_div(d, lanes) * lanes),
        columns(pad_to_groups(width + GROUP)),
        bias_row(offsets + GROUP) {}

  int64_t top(int64_t y) const { return window_start(y, height, kernel); }
  int64_t left(int64_t x) const { return window_start(x, width, kernel); }
};

// Calls task(b, head, strip) for every `step`-th strip, beginning with `first`, in parallel.
template <class F>
void for_each_strip(const Shape& s, int64_t first, int64_t step, const F& task) {
  const int64_t strips = ceil_div(s.strips - first, step);
  torch::stable::parallel_for(0, s.batch * s.heads * strips, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      task(i / strips / s.heads, i / strips % s.heads, first + i % strips * step);
    }
  });
}

// `scale` times a token's vector as numbers of the accumulating type, zero up to `channels`.
template <class T, class A>
inline void read_token(const T* from, int64_t stride, A* to, const Shape& s, A scale = 1) {
  if (stride == 1) {
    for (int64_t c = 0; c < s.d; ++c) to[c] = static_cast<A>(from[c]) * scale;
  } else {
    for (int64_t c = 0; c < s.d; ++c) to[c] = static_cast<A>(from[c * stride]) * scale;
  }
  for (int64_t c = s.d; c < s.channels; ++c) to[c] = 0;
}

// (width, channels)
template <class T, class A>
void read_row(
    const View<const T, 5>& map,
    int64_t b,
    int64_t y,
    int64_t head,
    A* to,
    const Shape& s,
    A scale = 1) {
  for (int64_t x = 0; x < s.width; ++x) {
    read_token(map.at(b, y, x, head), map.stride[4], to + x * s.channels, s, scale);
  }
}

// (width, channels) -> (d, columns)
template <class A>
void transpose_row(const A* from, A* to, const Shape& s) {
  for (int64_t x = 0; x < s.width; ++x)
    for (int64_t c = 0; c < s.d; ++c) to[c * s.columns + x] = from[x * s.channels + c];
  for (int64_t c = 0; c < s.d; ++c)
    for (int64_t x = s.width; x < s.columns; ++x) to[c * s.columns + x] = 0;
}

// Calls f(number of vectors, first channel) for all channels, the number a compile-time constant.
template <class A, class F>
inline void for_channels(int64_t channels, const F& f) {
  int64_t c = 0;
  for (; c + 4 * LANES<A> <= channels; c += 4 * LANES<A>) f(std::integral_constant<int, 4>{}, c);
  if (c + 2 * LANES<A> <= channels) {
    f(std::integral_constant<int, 2>{}, c);
    c += 2 * LANES<A>;
  }
  if (c < channels) f(std::integral_constant<int, 1>{}, c);
}

// scores = the products of a vector with ROWS rows of keys, (d, columns) each, from column `left`
// on.
template <int ROWS, class A>
inline void
multiply_rows(const A* vector, const A* const* keys, int64_t left, A* scores, const Shape& s) {
  for (int64_t g = 0; g < s.row; g += GROUP) {
    Group<A> sum[ROWS] = {};
    for (int64_t c = 0; c < s.d; ++c) {
      const int64_t at = c * s.columns + left + g;
      for (int r = 0; r < ROWS; ++r) sum[r] += vector[c] * load_group(keys[r] + at);
    }
    for (int r = 0; r < ROWS; ++r) store_group(scores + r * s.row + g, sum[r]);
  }
}

// scores (kernel, row) = the products of a vector with the keys of the window that begins at
// `left`.
template <class A>
inline void
multiply(const A* vector, const A* const* keys, int64_t left, A* scores, const Shape& s) {
  int64_t r = 0;
  for (; r + 7 <= s.kernel; r += 7) multiply_rows<7>(vector, keys + r, left, scores + r * s.row, s);
  for (; r + 3 <= s.kernel; r += 3) multiply_rows<3>(vector, keys + r, left, scores + r * s.row, s);
  for (; r < s.kernel; ++r) multiply_rows<1>(vector, keys + r, left, scores + r * s.row, s);
}

// Adds the bias to the scores of query (y, x); places beyond the window get -infinity.
template <class A>
inline void add_bias(A* scores, const A* bias, int64_t y, int64_t x, const Shape& s) {
  using G = Group<A>;
  const A* from = bias + (s.top(y) - y + s.kernel - 1) * s.bias_row + s.left(x) - x + s.kernel - 1;
  G place = {0, 1, 2, 3, 4, 5, 6, 7};
  const G outside = G{} - std::numeric_limits<A>::infinity();
  for (int64_t r = 0; r < s.kernel; ++r) {
    for (int64_t g = 0; g < s.row; g += GROUP) {
      const G sum = load_group(scores + r * s.row + g) + load_group(from + r * s.bias_row + g);
      store_group<A>(scores + r * s.row + g, place + A(g) < A(s.kernel) ? sum : outside);
    }
  }
}

// out = the sum of the rows of tokens, (width, channels) each, over the window that begins at
// `left`.
template <class A>
inline void
weigh(const A* weights, const A* const* rows, int64_t left, A* out, A scale, const Shape& s) {
  for_channels<A>(s.channels, [&](auto vectors, int64_t c) {
    constexpr int N = vectors;
    // Two sums, as one would wait for each of its additions.
    Vec<A> even[N] = {}, odd[N] = {};
    for (int64_t r = 0; r < s.kernel; ++r) {
      const A* w = weights + r * s.row;
      const A* row = rows[r] + left * s.channels + c;
      for (int64_t j = 0; j + 1 < s.kernel; j += 2) {
        for (int n = 0; n < N; ++n) {
          even[n] += w[j] * load(row + j * s.channels + n * LANES<A>);
          odd[n] += w[j + 1] * load(row + (j + 1) * s.channels + n * LANES<A>);
        }
      }
      const int64_t last = s.kernel - 1;  // the kernel is odd
      for (int n = 0; n < N; ++n) even[n] += w[last] * load(row + last * s.channels + n * LANES<A>);
    }
    for (int n = 0; n < N; ++n) store<A>(out + c + n * LANES<A>, (even[n] + odd[n]) * scale);
  });
}

// The rows of a map that the current windows cover: row y is in place y % kernel.
template <class A>
struct Rows {
  int64_t size;
  Buffer<A> memory;
  std::vector<const A*> ordered;  // from the window's top

  Rows(int64_t kernel, int64_t size) : size(size), memory(kernel * size), ordered(kernel) {}
  A* operator[](int64_t y) const {
    return memory + y % static_cast<int64_t>(ordered.size()) * size;
  }
  void order(int64_t top) {
    for (size_t r = 0; r < ordered.size(); ++r) ordered[r] = (*this)[top + r];
  }
};

// A head's bias, its rows padded.
template <class A>
void read_bias(const View<const A, 3>& rpb, int64_t head, A* to, const Shape& s) {
  for (int64_t y = 0; y < s.offsets; ++y)
    for (int64_t x = 0; x < s.bias_row; ++x)
      to[y * s.bias_row + x] = x < s.offsets ? *rpb.at(head, y, x) : A(0);
}

}  // namespace
}  // namespace mmattn
