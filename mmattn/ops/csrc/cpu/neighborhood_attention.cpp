// neighborhood_attention: each token attends to the kernel x kernel ones around it, with a bias by offset.
//
// A task has a strip of the query rows of one head. It goes down the rows and keeps those rows of keys
// and values that the current windows cover, as numbers of the accumulating type: rows of channels, for
// sums over keys, and transposed, so that the scores of neighbouring keys are one vector.
#include "../neighborhood.h"
#include "operators.h"
#include "vec.h"

#include <algorithm>
#include <cmath>

// Vectors wider than the registers are passed between this file's own functions only.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace mmattn::MMATTN_ISA {
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
  int64_t columns;  // of a transposed row of the map, padded for the groups that begin at its end
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
        // second strip at a time, and windows at the lower border are shifted by up to kernel / 2 rows.
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
  torch::stable::parallel_for(
      0, s.batch * s.heads * strips, 1, [&](int64_t begin, int64_t end) {
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
void read_row(const View<const T, 5>& map, int64_t b, int64_t y, int64_t head, A* to, const Shape& s, A scale = 1) {
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

// scores = the products of a vector with ROWS rows of keys, (d, columns) each, from column `left` on.
template <int ROWS, class A>
inline void multiply_rows(const A* vector, const A* const* keys, int64_t left, A* scores, const Shape& s) {
  for (int64_t g = 0; g < s.row; g += GROUP) {
    Group<A> sum[ROWS] = {};
    for (int64_t c = 0; c < s.d; ++c) {
      const int64_t at = c * s.columns + left + g;
      for (int r = 0; r < ROWS; ++r) sum[r] += vector[c] * load_group(keys[r] + at);
    }
    for (int r = 0; r < ROWS; ++r) store_group(scores + r * s.row + g, sum[r]);
  }
}

// scores (kernel, row) = the products of a vector with the keys of the window that begins at `left`.
template <class A>
inline void multiply(const A* vector, const A* const* keys, int64_t left, A* scores, const Shape& s) {
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

// out = the sum of the rows of tokens, (width, channels) each, over the window that begins at `left`.
template <class A>
inline void weigh(
    const A* weights, const A* const* rows, int64_t left, A* out, A scale, const Shape& s) {
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
  A* operator[](int64_t y) const { return memory + y % static_cast<int64_t>(ordered.size()) * size; }
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

template <class T, class A>
struct Forward {
  const Shape& s;
  View<const T, 5> q, k, v;
  View<const A, 3> rpb;
  A scale;
  View<T, 5> out;
  View<A, 4> lse;

  void operator()(int64_t b, int64_t head, int64_t strip) const {
    const int64_t first = strip * s.strip_rows, end = std::min(first + s.strip_rows, s.height);
    Rows<A> keys(s.kernel, s.d * s.columns), values(s.kernel, s.width * s.channels);
    Buffer<A> bias(s.offsets * s.bias_row), scores(s.window);
    Buffer<A> row(s.width * s.channels), query(s.channels), result(s.channels);
    read_bias<A>(rpb, head, bias, s);
    scores.fill(-std::numeric_limits<A>::infinity());
    int64_t have = s.top(first);
    for (int64_t y = first; y < end; ++y) {
      const int64_t top = s.top(y);
      for (; have < top + s.kernel; ++have) {
        read_row<T, A>(k, b, have, head, row, s);
        transpose_row<A>(row, keys[have], s);
        read_row<T, A>(v, b, have, head, values[have], s);
      }
      keys.order(top);
      values.order(top);
      for (int64_t x = 0; x < s.width; ++x) {
        read_token<T, A>(q.at(b, y, x, head), q.stride[4], query, s, scale);
        multiply<A>(query, keys.ordered.data(), s.left(x), scores, s);
        add_bias<A>(scores, bias, y, x, s);
        Vec<A> most_of_lanes = load<A>(scores);
        for (int64_t i = LANES<A>; i < s.window; i += LANES<A>) {
          const Vec<A> next = load(scores + i);
          most_of_lanes = next > most_of_lanes ? next : most_of_lanes;
        }
        const A most = max_of_lanes<A>(most_of_lanes);
        Vec<A> sums = {};
        for (int64_t i = 0; i < s.window; i += LANES<A>) {
          const Vec<A> p = exp<A>(load(scores + i) - most);
          store<A>(scores + i, p);
          sums += p;
        }
        const A sum = sum_of_lanes<A>(sums);
        weigh<A>(scores, values.ordered.data(), s.left(x), result, 1 / sum, s);
        T* to = out.at(b, y, x, head);
        for (int64_t c = 0; c < s.d; ++c) to[c] = static_cast<T>(result[c]);
        *lse.at(b, y, x, head) = most + std::log(sum);
        // The padding of the window is zero now, where it must be -infinity.
        for (int64_t i = s.kernel * s.row; i < s.window; ++i)
          scores[i] = -std::numeric_limits<A>::infinity();
      }
    }
  }
};

template <class T, class A>
struct Backward {
  const Shape& s;
  View<const T, 5> grad, q, k, v;
  View<const A, 3> rpb;
  A scale;
  View<const T, 5> out;
  View<const A, 4> lse;
  View<T, 5> dq;
  View<A, 5> dk, dv;  // zero at first; strips add to them
  View<A, 5> dbias;  // a share for each strip

  // What a task works in.
  struct Scratch {
    Rows<A> keys, transposed_keys, transposed_values, dk, dv;
    Buffer<A> bias, dbias;
    Buffer<A> q, grad, row;  // (width, channels); q is scaled
    Buffer<A> p, ds;  // (width, window): of one row of queries
    Buffer<A> result;

    explicit Scratch(const Shape& s)
        : keys(s.kernel, s.width * s.channels),
          transposed_keys(s.kernel, s.d * s.columns),
          transposed_values(s.kernel, s.d * s.columns),
          dk(s.kernel, s.width * s.channels),
          dv(s.kernel, s.width * s.channels),
          bias(s.offsets * s.bias_row),
          dbias(s.offsets * s.bias_row),
          q(s.width * s.channels),
          grad(s.width * s.channels),
          row(s.width * s.channels),
          p(s.width * s.window),
          ds(s.width * s.window),
          result(s.channels) {}
  };

  void operator()(int64_t b, int64_t head, int64_t strip) const {
    const int64_t first = strip * s.strip_rows, end = std::min(first + s.strip_rows, s.height);
    Scratch w(s);
    read_bias<A>(rpb, head, w.bias, s);
    w.dbias.fill(0);
    w.p.fill(-std::numeric_limits<A>::infinity());
    w.ds.fill(0);
    int64_t have = s.top(first);
    for (int64_t y = first; y < end; ++y) {
      for (; have < s.top(y) + s.kernel; ++have) {
        if (have >= s.top(first) + s.kernel) write_gradients(w, b, head, have - s.kernel);
        read_row<T, A>(k, b, have, head, w.keys[have], s);
        transpose_row<A>(w.keys[have], w.transposed_keys[have], s);
        read_row<T, A>(v, b, have, head, w.row, s);
        transpose_row<A>(w.row, w.transposed_values[have], s);
        std::fill_n(w.dk[have], w.dk.size, A(0));
        std::fill_n(w.dv[have], w.dv.size, A(0));
      }
      for (Rows<A>* rows : {&w.keys, &w.transposed_keys, &w.transposed_values}) rows->order(s.top(y));
      read_row<T, A>(q, b, y, head, w.q, s, scale);
      read_row<T, A>(grad, b, y, head, w.grad, s);
      for (int64_t x = 0; x < s.width; ++x) differentiate_query(w, b, head, y, x);
      for (int64_t r = 0; r < s.kernel; ++r) {
        add_to_bias(w, r, y);
        add_to_keys(w, r, y);
      }
    }
    for (int64_t y = have - s.kernel; y < have; ++y) write_gradients(w, b, head, y);
    for (int64_t y = 0; y < s.offsets; ++y)
      for (int64_t x = 0; x < s.offsets; ++x)
        *dbias.at(head, b, strip, y, x) = w.dbias[y * s.bias_row + x];
  }

  // p and ds of a query, and its gradient.
  void differentiate_query(Scratch& w, int64_t b, int64_t head, int64_t y, int64_t x) const {
    using G = Group<A>;
    A* p = w.p + x * s.window;
    A* ds = w.ds + x * s.window;
    const A* up = w.grad + x * s.channels;
    multiply<A>(w.q + x * s.channels, w.transposed_keys.ordered.data(), s.left(x), p, s);
    add_bias<A>(p, w.bias, y, x, s);
    multiply<A>(up, w.transposed_values.ordered.data(), s.left(x), ds, s);
    read_token<T, A>(out.at(b, y, x, head), out.stride[4], w.result, s);
    Vec<A> products = {};
    for (int64_t c = 0; c < s.channels; c += LANES<A>) products += load(up + c) * load(w.result + c);
    const A delta = sum_of_lanes<A>(products), log_sum = *lse.at(b, y, x, head);
    for (int64_t i = 0; i < s.window; i += LANES<A>) {
      store<A>(p + i, exp<A>(load(p + i) - log_sum));
    }
    const G place = {0, 1, 2, 3, 4, 5, 6, 7};
    for (int64_t i = 0; i < s.kernel * s.row; i += GROUP) {
      const G value = load_group(p + i) * (load_group(ds + i) - delta);
      // Beyond the window is the product with some other value, which may be infinite.
      store_group<A>(ds + i, place + A(i % s.row) < A(s.kernel) ? value : G{});
    }
    weigh<A>(ds, w.keys.ordered.data(), s.left(x), w.result, scale, s);
    T* to = dq.at(b, y, x, head);
    for (int64_t c = 0; c < s.d; ++c) to[c] = static_cast<T>(w.result[c]);
    for (int64_t i = s.kernel * s.row; i < s.window; ++i) p[i] = -std::numeric_limits<A>::infinity();
  }

  // Neighbouring queries whose windows move along have the same offsets: their sum is added at once.
  void add_to_bias(Scratch& w, int64_t r, int64_t y) const {
    A* row = w.dbias + (s.top(y) + r - y + s.kernel - 1) * s.bias_row;
    for (int64_t x = 0; x < s.width;) {
      const int64_t offset = s.left(x) - x;
      int64_t end = x + 1;
      while (end < s.width && s.left(end) - end == offset) ++end;
      for (int64_t g = 0; g < s.row; g += GROUP) {
        A* to = row + offset + s.kernel - 1 + g;
        Group<A> sum = load_group(to);
        for (int64_t i = x; i < end; ++i) sum += load_group(w.ds + i * s.window + r * s.row + g);
        store_group(to, sum);
      }
      x = end;
    }
  }

  // What the queries of row y add to the gradients of the keys and values in row r of their windows.
  void add_to_keys(Scratch& w, int64_t r, int64_t y) const {
    A* to_k = w.dk[s.top(y) + r];
    A* to_v = w.dv[s.top(y) + r];
    for (int64_t x = 0; x < s.width; ++x) {
      const int64_t begin = first_attending(x, s.kernel);
      const int64_t end = last_attending(x, s.width, s.kernel) + 1;
      for_channels<A>(s.channels, [&](auto vectors, int64_t c) {
        constexpr int N = vectors;
        const int64_t at = x * s.channels + c;
        Vec<A> sum_k[N], sum_v[N];
        for (int n = 0; n < N; ++n) {
          sum_k[n] = load(to_k + at + n * LANES<A>);
          sum_v[n] = load(to_v + at + n * LANES<A>);
        }
        for (int64_t i = begin; i < end; ++i) {
          const int64_t place = i * s.window + r * s.row + x - s.left(i);
          const A p = w.p[place], ds = w.ds[place];
          const int64_t from = i * s.channels + c;
          for (int n = 0; n < N; ++n) {
            sum_k[n] += ds * load(w.q + from + n * LANES<A>);
            sum_v[n] += p * load(w.grad + from + n * LANES<A>);
          }
        }
        for (int n = 0; n < N; ++n) {
          store<A>(to_k + at + n * LANES<A>, sum_k[n]);
          store<A>(to_v + at + n * LANES<A>, sum_v[n]);
        }
      });
    }
  }

  // No more windows of the strip have key row y.
  void write_gradients(Scratch& w, int64_t b, int64_t head, int64_t y) const {
    for (int64_t x = 0; x < s.width; ++x) {
      A* to_k = dk.at(b, y, x, head);
      A* to_v = dv.at(b, y, x, head);
      for (int64_t c = 0; c < s.d; ++c) to_k[c] += w.dk[y][x * s.channels + c];
      for (int64_t c = 0; c < s.d; ++c) to_v[c] += w.dv[y][x * s.channels + c];
    }
  }
};

}  // namespace

std::tuple<Tensor, Tensor> neighborhood_attention(
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& rpb,
    int64_t kernel_size,
    double scale) {
  const std::vector<int64_t> size(q.sizes().begin(), q.sizes().end());
  Tensor out = empty(size, q, q.scalar_type());
  Tensor lse = empty({size.begin(), size.end() - 1}, q, accumulate_dtype(q.scalar_type()));
  dispatch(q.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Accumulate<T>;
    const Shape s(q, kernel_size, LANES<A>);
    const Forward<T, A> forward{
        s,
        view<const T, 5>(q),
        view<const T, 5>(k),
        view<const T, 5>(v),
        view<const A, 3>(rpb),
        static_cast<A>(scale),
        view<T, 5>(out),
        view<A, 4>(lse)};
    for_each_strip(s, 0, 1, forward);
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> neighborhood_attention_backward(
    const Tensor& grad,
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& rpb,
    int64_t kernel_size,
    double scale,
    const Tensor& out,
    const Tensor& lse) {
  const ScalarType dtype = q.scalar_type(), accumulate = accumulate_dtype(dtype);
  const std::vector<int64_t> size(q.sizes().begin(), q.sizes().end());
  Tensor dq = empty(size, q, dtype);
  Tensor dk = zeros(size, q, accumulate), dv = zeros(size, q, accumulate);
  Tensor dbias = zeros({rpb.size(0), rpb.size(1), rpb.size(2)}, q, accumulate);
  dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Accumulate<T>;
    const Shape s(q, kernel_size, LANES<A>);
    Tensor shares = empty({s.heads, s.batch, s.strips, s.offsets, s.offsets}, q, accumulate);
    const Backward<T, A> backward{
        s,
        view<const T, 5>(grad),
        view<const T, 5>(q),
        view<const T, 5>(k),
        view<const T, 5>(v),
        view<const A, 3>(rpb),
        static_cast<A>(scale),
        view<const T, 5>(out),
        view<const A, 4>(lse),
        view<T, 5>(dq),
        view<A, 5>(dk),
        view<A, 5>(dv),
        view<A, 5>(shares)};
    // The windows of a strip's queries reach into the next strip, never further: those of every second
    // strip share no keys, and may add to the gradients of theirs at the same time.
    for (int64_t first : {0, 1}) for_each_strip(s, first, 2, backward);
    const int64_t entries = s.offsets * s.offsets;
    const A* from = static_cast<const A*>(shares.data_ptr());
    A* to = static_cast<A*>(dbias.data_ptr());
    for (int64_t head = 0; head < s.heads; ++head, to += entries)
      for (int64_t i = 0; i < s.batch * s.strips; ++i, from += entries)
        for (int64_t n = 0; n < entries; ++n) to[n] += from[n];
  });
  return {dq, torch::stable::to(dk, dtype), torch::stable::to(dv, dtype), dbias};
}

}  // namespace mmattn::MMATTN_ISA
