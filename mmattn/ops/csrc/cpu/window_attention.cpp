// window_attention: softmax attention within the windows of a map, read and written in place.
#include "../checks.h"
#include "attention.h"

namespace mmattn {
namespace {

// What Swin adds to the scores of tokens that the cyclic shift brought into one window.
constexpr int SHIFT_MASK = -100;
// Groups of windows with sums of their own for the gradients that all windows share, at most this
// many over all heads: work is cut by the shapes alone, so that results do not depend on threads.
constexpr int64_t GROUPS = 32;

struct Shape {
  int64_t batch, height, width, heads, d, window, shift, rows, columns, tokens, windows;
  bool shared_query;

  Shape(const Tensor& q, const Tensor& k, int64_t window, int64_t shift)
      : batch(k.size(0)),
        height(k.size(1)),
        width(k.size(2)),
        heads(k.size(3)),
        d(k.size(4)),
        window(window),
        shift(shift),
        rows(ceil_div(height, window)),
        columns(ceil_div(width, window)),
        tokens(window * window),
        windows(batch * rows * columns),
        shared_query(q.size(1) != height || q.size(2) != width) {}

  int64_t image(int64_t i) const { return i / (rows * columns); }
};

struct Token {
  int64_t y, x;
  bool inside;
  int region;  // tokens of different regions are no neighbors in the map
};

// The tokens of a window, and which of them are queries.
struct Window {
  std::vector<Token> tokens;
  std::vector<int64_t> queries;
  bool mixed = false;  // has tokens of several regions

  Window(const Shape& s, int64_t i) {
    const int64_t top = i / s.columns % s.rows * s.window, left = i % s.columns * s.window;
    const int64_t height = s.rows * s.window, width = s.columns * s.window;
    tokens.reserve(s.tokens);
    queries.reserve(s.tokens);
    const auto region = [&](int64_t place, int64_t side) {
      return s.shift ? int(place >= side - s.window) + int(place >= side - s.shift) : 0;
    };
    for (int64_t n = 0; n < s.tokens; ++n) {
      const int64_t row = top + n / s.window, column = left + n % s.window;
      const int64_t y = (row + s.shift) % height, x = (column + s.shift) % width;
      const bool inside = y < s.height && x < s.width;
      tokens.push_back({y, x, inside, 3 * region(row, height) + region(column, width)});
      mixed = mixed || tokens[n].region != tokens[0].region;
      if (inside) queries.push_back(n);
    }
  }
};

// The inputs of both directions.
template <class T>
struct Inputs {
  using A = Accumulate<T>;
  View<const T, 5> q, k, v;
  View<const A, 3> bias;
  View<const T, 2> pad_k, pad_v;
  const Shape& s;

  const T* query(int64_t image, int64_t h, const Window& window, int64_t n) const {
    const Token& t = window.tokens[n];
    return s.shared_query ? q.at(image, n / s.window, n % s.window, h) : q.at(image, t.y, t.x, h);
  }

  void read_key(int64_t image, int64_t h, const Token& t, A* to_k, A* to_v, int64_t padded) const {
    read_row(t.inside ? k.at(image, t.y, t.x, h) : pad_k.at(h), to_k, s.d, padded);
    read_row(t.inside ? v.at(image, t.y, t.x, h) : pad_v.at(h), to_v, s.d, padded);
  }

  void write_bias(
      int64_t h,
      const Window& w,
      int64_t i0,
      int64_t rows,
      int64_t j0,
      int64_t keys,
      A* scores,
      int64_t row) const {
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t n = w.queries[i0 + i];
      const A* from = bias.at(h, n, j0);
      A* to = scores + i * row;
      std::copy(from, from + keys, to);
      if (!w.mixed) continue;
      for (int64_t j = 0; j < keys; ++j)
        if (w.tokens[j0 + j].region != w.tokens[n].region) to[j] += SHIFT_MASK;
    }
  }
};

template <class T>
Inputs<T> inputs_of(
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& bias,
    const Tensor& pad_k,
    const Tensor& pad_v,
    const Shape& s) {
  return {
      view<const T, 5>(q),
      view<const T, 5>(k),
      view<const T, 5>(v),
      view<const Accumulate<T>, 3>(bias),
      view<const T, 2>(pad_k),
      view<const T, 2>(pad_v),
      s};
}

std::tuple<Tensor, Tensor> window_attention(
    const Tensor& q_,
    const Tensor& k_,
    const Tensor& v_,
    const Tensor& bias_,
    const Tensor& pad_k_,
    const Tensor& pad_v_,
    int64_t window_size,
    int64_t shift) {
  check_window_attention(q_, k_, v_, bias_, pad_k_, pad_v_, window_size, shift);
  const Tensor q = with_dense_rows(q_), k = with_dense_rows(k_), v = with_dense_rows(v_);
  const Tensor bias = with_dense_rows(bias_), pad_k = with_dense_rows(pad_k_),
               pad_v = with_dense_rows(pad_v_);
  const Shape s(q, k, window_size, shift);
  Tensor out = empty({s.batch, s.height, s.width, s.heads, s.d}, v, v.scalar_type());
  Tensor lse = empty({s.batch, s.height, s.width, s.heads}, v, accumulate_dtype(v.scalar_type()));
  dispatch(v.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Accumulate<T>;
    const Inputs<T> in = inputs_of<T>(q, k, v, bias, pad_k, pad_v, s);
    const auto result = view<T, 5>(out);
    const auto sums = view<A, 4>(lse);
    const A scale = 1 / std::sqrt(static_cast<A>(s.d));
    torch::stable::parallel_for(0, s.windows, 1, [&](int64_t begin, int64_t end) {
      Workspace<A> w(s.d, s.tokens, false);
      for (int64_t i = begin; i < end; ++i) {
        const Window window(s, i);
        const int64_t image = s.image(i);
        for (int64_t h = 0; h < s.heads; ++h) {
          read_keys<A>(w, s.tokens, [&](int64_t j, A* to_k, A* to_v) {
            in.read_key(image, h, window.tokens[j], to_k, to_v, w.width);
          });
          attend<A>(
              w,
              window.queries.size(),
              s.tokens,
              [&](int64_t n, A* to) {
                read_row(in.query(image, h, window, window.queries[n]), to, s.d, w.width, scale);
              },
              [&](auto... tile) { in.write_bias(h, window, tile...); },
              [&](int64_t n, const A* row, A factor, A lse) {
                const Token& t = window.tokens[window.queries[n]];
                write_row(row, result.at(image, t.y, t.x, h), s.d, factor);
                *sums.at(image, t.y, t.x, h) = lse;
              });
        }
      }
    });
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> window_attention_backward(
    const Tensor& grad_,
    const Tensor& q_,
    const Tensor& k_,
    const Tensor& v_,
    const Tensor& bias_,
    const Tensor& pad_k_,
    const Tensor& pad_v_,
    int64_t window_size,
    int64_t shift,
    const Tensor& out,
    const Tensor& lse) {
  check_window_attention(q_, k_, v_, bias_, pad_k_, pad_v_, window_size, shift);
  const ScalarType dtype = v_.scalar_type(), accumulate = accumulate_dtype(dtype);
  const int64_t batch = v_.size(0), height = v_.size(1), width = v_.size(2), heads = v_.size(3);
  check_tensor("grad_out", grad_, {batch, height, width, heads, v_.size(4)}, dtype);
  check_tensor("out", out, {batch, height, width, heads, v_.size(4)}, dtype);
  check_tensor("lse", lse, {batch, height, width, heads}, accumulate);
  const Tensor grad = with_dense_rows(grad_);
  const Tensor q = with_dense_rows(q_), k = with_dense_rows(k_), v = with_dense_rows(v_);
  const Tensor bias = with_dense_rows(bias_), pad_k = with_dense_rows(pad_k_),
               pad_v = with_dense_rows(pad_v_);
  const Shape s(q, k, window_size, shift);
  const std::vector<int64_t> map{s.batch, s.height, s.width, s.heads, s.d};
  const std::vector<int64_t> one_window{s.batch, s.window, s.window, s.heads, s.d};
  const int64_t groups = std::min(s.windows, ceil_div(GROUPS, std::max<int64_t>(s.heads, 1)));
  const auto first_of = [&](int64_t group) { return s.windows * group / groups; };
  Tensor dq = empty(s.shared_query ? one_window : map, q, dtype);
  Tensor dk = empty(map, k, dtype), dv = empty(map, v, dtype);
  Tensor dbias = empty({s.heads, s.tokens, s.tokens}, bias, accumulate);
  Tensor dpad_k = empty({s.heads, s.d}, k, dtype), dpad_v = empty({s.heads, s.d}, v, dtype);
  // A group's windows may belong to several images, and an image's windows to several groups.
  std::vector<int64_t> first_slot(groups + 1, 0);
  for (int64_t group = 0; group < groups; ++group)
    first_slot[group + 1] =
        first_slot[group] + s.image(first_of(group + 1) - 1) - s.image(first_of(group)) + 1;
  dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Accumulate<T>;
    const Inputs<T> in = inputs_of<T>(q, k, v, bias, pad_k, pad_v, s);
    const auto upstream = view<const T, 5>(grad);
    const auto result = view<const T, 5>(out);
    const auto sums = view<const A, 4>(lse);
    const auto to_q = view<T, 5>(dq), to_k = view<T, 5>(dk), to_v = view<T, 5>(dv);
    const A scale = 1 / std::sqrt(static_cast<A>(s.d));
    const int64_t width = pad_to_lanes<A>(s.d), square = s.tokens * s.tokens;
    const Buffer<A> bias_parts(groups * s.heads * square), pad_parts(groups * s.heads * 2 * s.d);
    const Buffer<A> query_parts(s.shared_query ? first_slot[groups] * s.heads * s.tokens * s.d : 0);
    torch::stable::parallel_for(0, groups * s.heads, 1, [&](int64_t begin, int64_t end) {
      Workspace<A> w(s.d, s.tokens, true);
      const Buffer<A> dq_rows(s.tokens * width);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t group = task / s.heads, h = task % s.heads;
        A* bias_sum = bias_parts + task * square;
        A* pad_sum = pad_parts + task * 2 * s.d;
        std::fill(bias_sum, bias_sum + square, A(0));
        std::fill(pad_sum, pad_sum + 2 * s.d, A(0));
        int64_t slot = first_slot[group] - 1, previous = -1;
        for (int64_t i = first_of(group); i < first_of(group + 1); ++i) {
          const Window window(s, i);
          const int64_t image = s.image(i), queries = window.queries.size();
          dq_rows.fill(0);
          attend_backward<A>(
              w,
              queries,
              s.tokens,
              [&](int64_t j, A* k_row, A* v_row) {
                in.read_key(image, h, window.tokens[j], k_row, v_row, w.width);
              },
              [&](int64_t n, A* q_row, A* grad_row, A& lse, A& delta) {
                const Token& t = window.tokens[window.queries[n]];
                read_row(in.query(image, h, window, window.queries[n]), q_row, s.d, width, scale);
                read_row(upstream.at(image, t.y, t.x, h), grad_row, s.d, width);
                const T* o = result.at(image, t.y, t.x, h);
                lse = *sums.at(image, t.y, t.x, h);
                delta = 0;
                for (int64_t c = 0; c < s.d; ++c) delta += grad_row[c] * static_cast<A>(o[c]);
              },
              [&](auto... tile) { in.write_bias(h, window, tile...); },
              [&](int64_t i0,
                  int64_t rows,
                  int64_t j0,
                  int64_t keys,
                  const A* dscores,
                  int64_t row) {
                for (int64_t n = 0; n < rows; ++n) {
                  A* to = bias_sum + window.queries[i0 + n] * s.tokens + j0;
                  for (int64_t j = 0; j < keys; ++j) to[j] += dscores[n * row + j];
                }
              },
              dq_rows + 0,
              [&](int64_t j, const A* dk_row, const A* dv_row) {
                const Token& t = window.tokens[j];
                if (t.inside) {
                  write_row(dk_row, to_k.at(image, t.y, t.x, h), s.d);
                  write_row(dv_row, to_v.at(image, t.y, t.x, h), s.d);
                } else {
                  for (int64_t c = 0; c < s.d; ++c) pad_sum[c] += dk_row[c];
                  for (int64_t c = 0; c < s.d; ++c) pad_sum[s.d + c] += dv_row[c];
                }
              });
          if (!s.shared_query) {
            for (int64_t n = 0; n < queries; ++n) {
              const Token& t = window.tokens[window.queries[n]];
              write_row(dq_rows + n * width, to_q.at(image, t.y, t.x, h), s.d, scale);
            }
            continue;
          }
          const bool next_image = image != previous;
          slot += next_image;
          previous = image;
          A* query_sum = query_parts + (slot * s.heads + h) * s.tokens * s.d;
          if (next_image) std::fill(query_sum, query_sum + s.tokens * s.d, A(0));
          for (int64_t n = 0; n < queries; ++n)
            for (int64_t c = 0; c < s.d; ++c)
              query_sum[window.queries[n] * s.d + c] += dq_rows[n * width + c] * scale;
        }
      }
    });
    sum_parts<A>(bias_parts, groups, s.heads * square, view<A, 3>(dbias).data);
    const Buffer<A> pads(s.heads * 2 * s.d);
    sum_parts<A>(pad_parts, groups, s.heads * 2 * s.d, pads + 0);
    const auto to_pad_k = view<T, 2>(dpad_k), to_pad_v = view<T, 2>(dpad_v);
    for (int64_t h = 0; h < s.heads; ++h) {
      write_row(pads + h * 2 * s.d, to_pad_k.at(h), s.d);
      write_row(pads + (h * 2 + 1) * s.d, to_pad_v.at(h), s.d);
    }
    if (!s.shared_query) return;
    torch::stable::parallel_for(0, s.batch * s.heads, 1, [&](int64_t begin, int64_t end) {
      const Buffer<A> sum(s.tokens * s.d);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t image = task / s.heads, h = task % s.heads;
        sum.fill(0);
        for (int64_t group = 0; group < groups; ++group) {
          const int64_t slot = first_slot[group] + image - s.image(first_of(group));
          if (slot < first_slot[group] || slot >= first_slot[group + 1]) continue;
          const A* part = query_parts + (slot * s.heads + h) * s.tokens * s.d;
          for (int64_t c = 0; c < sum.size(); ++c) sum[c] += part[c];
        }
        for (int64_t n = 0; n < s.tokens; ++n)
          write_row(sum + n * s.d, to_q.at(image, n / s.window, n % s.window, h), s.d);
      }
    });
  });
  return {dq, dk, dv, dbias, dpad_k, dpad_v};
}

}  // namespace
}  // namespace mmattn

STABLE_TORCH_LIBRARY_IMPL(mmattn, CPU, m) {
  m.impl("window_attention", TORCH_BOX(&mmattn::window_attention));
  m.impl("window_attention_backward", TORCH_BOX(&mmattn::window_attention_backward));
}
