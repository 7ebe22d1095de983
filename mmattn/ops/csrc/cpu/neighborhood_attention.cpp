// neighborhood_attention: each token attends to the kernel x kernel ones around it, with a bias by
// offset.
#include "neighborhood_strip.h"

namespace mmattn {
namespace {

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

std::tuple<Tensor, Tensor> neighborhood_attention(
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& rpb,
    int64_t kernel_size,
    double scale) {
  check_neighborhood_attention(q, k, v, rpb, kernel_size);
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

}  // namespace
}  // namespace mmattn

STABLE_TORCH_LIBRARY_IMPL(mmattn, CPU, m) {
  m.impl("neighborhood_attention", TORCH_BOX(&mmattn::neighborhood_attention));
}
