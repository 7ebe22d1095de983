// neighborhood_attention: each token attends to the kernel x kernel ones around it, with a bias by
// offset. A thread owns a query: online softmax from one row of keys to the next.
#include "neighborhood_tile.h"

namespace mmattn {
namespace {

template <class T>
__global__ void __launch_bounds__(THREADS) attend(
    View<const T, 5> q,
    View<const T, 5> k,
    View<const T, 5> v,
    View<const Accumulate<T>, 3> rpb,
    Accumulate<T> scale,
    View<T, 5> out,
    View<Accumulate<T>, 4> lse,
    Shape s,
    int stage_rows) {
  using A = Accumulate<T>;
  MMATTN_DYNAMIC_SHARED(A, shared);
  const Place at(s);
  const Region region = seen_by(at, s);
  const int columns = region.columns();
  A* keys = shared;
  A* values = keys + stage_rows * columns * s.stride;
  A* scores =
      values + stage_rows * columns * s.stride + threadIdx.x;  // of a row: (kernel, THREADS)

  const int64_t top = window_start(at.y, s.height, s.kernel);
  const int64_t left = window_start(at.x, s.width, s.kernel);
  A query[CHANNELS], sum[CHANNELS] = {}, most = -std::numeric_limits<A>::infinity(), total = 0;
  read_token(q, at, scale, query, s);
  for (int64_t y = region.top; y < region.bottom; y += stage_rows) {
    const int rows =
        static_cast<int>(y + stage_rows < region.bottom ? stage_rows : region.bottom - y);
    __syncthreads();
    stage<T, A>(k, at, region, y, rows, A(1), keys, s);
    stage<T, A>(v, at, region, y, rows, A(1), values, s);
    __syncthreads();
    for (int row = 0; row < rows; ++row) {
      // Lanes of one token agree but a warp may diverge; every lane must reach the shuffle.
      const bool sees = at.inside && y + row >= top && y + row < top + s.kernel;
      if (__ballot_sync(0xffffffffu, sees) == 0) continue;
      const int first = row * columns + (sees ? static_cast<int>(left - region.left) : 0);
      const A* bias = sees
          ? rpb.at(at.head, y + row - at.y + s.kernel - 1, left - at.x + s.kernel - 1)
          : nullptr;
      A most_of_row = -std::numeric_limits<A>::infinity();
      for (int j = 0; j < s.kernel; ++j) {
        const A dot = product(query, keys + (first + j) * s.stride, at.part, s.depth);
        if (!sees) continue;
        const A score = dot + bias[j * rpb.stride[2]];
        scores[j * THREADS] = score;
        most_of_row = score > most_of_row ? score : most_of_row;
      }
      if (!sees) continue;
      const A next = most_of_row > most ? most_of_row : most;
      const A shrink = std::exp(most - next);
      most = next;
      total *= shrink;
#pragma unroll
      for (int i = 0; i < CHANNELS; ++i) sum[i] *= shrink;
      for (int j = 0; j < s.kernel; ++j) {
        const A p = std::exp(scores[j * THREADS] - most);
        total += p;
        add(sum, p, values + (first + j) * s.stride, at.part, s.depth);
      }
    }
  }
  write_token(out, at, 1 / total, sum, s);
  if (at.inside && at.part == 0) *lse.at(at.b, at.y, at.x, at.head) = most + std::log(total);
}

std::tuple<Tensor, Tensor> neighborhood_attention(
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& rpb,
    int64_t kernel_size,
    double scale) {
  const Shape s(q, kernel_size, {&q, &k, &v});
  Tensor out = empty({s.batch, s.height, s.width, s.heads, s.depth.d}, q, q.scalar_type());
  Tensor lse = empty({s.batch, s.height, s.width, s.heads}, q, accumulate_dtype(q.scalar_type()));
  if (out.numel() == 0) return {out, lse};
  dispatch(q.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Accumulate<T>;
    const int64_t row_bytes = region_columns(s) * 2 * s.stride * sizeof(A);
    const int stage_rows = rows_of_stage(row_bytes);
    launch(
        attend<T>,
        dim3(s.blocks()),
        dim3(THREADS),
        stage_rows * row_bytes + s.kernel * THREADS * sizeof(A),
        q,
        view<const T, 5>(q),
        view<const T, 5>(k),
        view<const T, 5>(v),
        view<const A, 3>(rpb),
        scale,
        view<T, 5>(out),
        view<A, 4>(lse),
        s,
        stage_rows);
  });
  return {out, lse};
}

}  // namespace
}  // namespace mmattn

MMATTN_CUDA_OPERATORS(m) {
  m.impl("neighborhood_attention", TORCH_BOX(&mmattn::neighborhood_attention));
}
