// Gradients of neighborhood_attention.
#include "neighborhood_strip.h"

namespace mmattn {
namespace {

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
  View<A, 5> dbias;   // a share for each strip

  // What a task works in.
  struct Scratch {
    Rows<A> keys, transposed_keys, transposed_values, dk, dv;
    Buffer<A> bias, dbias;
    Buffer<A> q, grad, row;  // (width, channels); q is scaled
    Buffer<A> p, ds;         // (width, window): of one row of queries
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
      for (Rows<A>* rows : {&w.keys, &w.transposed_keys, &w.transposed_values})
        rows->order(s.top(y));
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
    for (int64_t c = 0; c < s.channels; c += LANES<A>)
      products += load(up + c) * load(w.result + c);
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
    for (int64_t i = s.kernel * s.row; i < s.window; ++i)
      p[i] = -std::numeric_limits<A>::infinity();
  }

  // Neighboring queries whose windows move along have the same offsets: their sum is added at once.
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

  // What the queries of row y add to the gradients of the keys and values in row r of their
  // windows.
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
  check_neighborhood_attention(q, k, v, rpb, kernel_size);
  const ScalarType dtype = q.scalar_type(), accumulate = accumulate_dtype(dtype);
  const int64_t batch = q.size(0), height = q.size(1), width = q.size(2), heads = q.size(3);
  check_tensor("grad_out", grad, {batch, height, width, heads, q.size(4)}, dtype);
  check_tensor("out", out, {batch, height, width, heads, q.size(4)}, dtype);
  check_tensor("lse", lse, {batch, height, width, heads}, accumulate);
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
    // The windows of a strip's queries reach into the next strip, never further: those of every
    // second strip share no keys, and may add to the gradients of theirs at the same time.
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

}  // namespace
}  // namespace mmattn

STABLE_TORCH_LIBRARY_IMPL(mmattn, CPU, m) {
  m.impl("neighborhood_attention_backward", TORCH_BOX(&mmattn::neighborhood_attention_backward));
}
