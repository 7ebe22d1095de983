// Gradients of neighborhood_attention.
//
//   differentiate  a thread owns a query: its gradient, and the gradient of the bias
//   collect        a thread owns a key: its and its value's gradients, from the queries that see it
//
// Both recompute the probabilities from the saved log-sum-exp.
#include "neighborhood_tile.h"

namespace mmattn {
namespace {

// The queries whose windows have one of a tile's tokens.
__device__ inline Region seeing(const Place& at, const Shape& s) {
  const int64_t y1 = last_of_tile(at.y0, s.rows, s.height),
                x1 = last_of_tile(at.x0, s.columns, s.width);
  return {
      first_attending(at.y0, s.kernel),
      last_attending(y1, s.height, s.kernel) + 1,
      first_attending(at.x0, s.kernel),
      last_attending(x1, s.width, s.kernel) + 1};
}

// Likewise of a map of single numbers, (rows, columns).
template <class A>
__device__ void stage(
    const View<const A, 4>& map,
    const Place& at,
    const Region& region,
    int64_t y,
    int rows,
    A* to) {
  const int columns = region.columns();
  for (int i = threadIdx.x; i < rows * columns; i += THREADS) {
    to[i] = *map.at(at.b, y + i / columns, region.left + i % columns, at.head);
  }
}

template <class T>
__global__ void __launch_bounds__(THREADS) differentiate(
    View<const T, 5> grad,
    View<const T, 5> q,
    View<const T, 5> k,
    View<const T, 5> v,
    View<const Accumulate<T>, 3> rpb,
    Accumulate<T> scale,
    View<const T, 5> out,
    View<const Accumulate<T>, 4> lse,
    View<T, 5> dq,
    View<Accumulate<T>, 4> delta,  // the sum of grad * out over a token's channels
    View<Accumulate<T>, 5> dbias,  // a share for each tile
    Shape s,
    int stage_rows) {
  using A = Accumulate<T>;
  MMATTN_DYNAMIC_SHARED(A, shared);
  const Place at(s);
  const Region region = seen_by(at, s);
  const int columns = region.columns(), table = s.offsets * s.offsets;
  A* keys = shared;
  A* values = keys + stage_rows * columns * s.stride;
  // The bias's gradient by each warp.
  A* tables = values + stage_rows * columns * s.stride;
  A* mine = tables + threadIdx.x / WARP * table;
  const int segment = s.columns * s.depth.parts;
  for (int i = threadIdx.x; i < THREADS / WARP * table; i += THREADS) tables[i] = 0;

  const int64_t top = window_start(at.y, s.height, s.kernel);
  const int64_t left = window_start(at.x, s.width, s.kernel);
  A query[CHANNELS], up[CHANNELS], sum[CHANNELS] = {};
  read_token(out, at, A(1), query, s);
  read_token(grad, at, A(1), up, s);
  A mean = 0;
#pragma unroll
  for (int i = 0; i < CHANNELS; ++i) mean += up[i] * query[i];
  for (int lane = 1; lane < s.depth.parts; lane *= 2)
    mean += __shfl_xor_sync(0xffffffffu, mean, lane);
  read_token(q, at, scale, query, s);
  const A log_sum = at.inside ? *lse.at(at.b, at.y, at.x, at.head) : A(0);
  if (at.inside && at.part == 0) *delta.at(at.b, at.y, at.x, at.head) = mean;

  for (int64_t y = region.top; y < region.bottom; y += stage_rows) {
    const int rows =
        static_cast<int>(y + stage_rows < region.bottom ? stage_rows : region.bottom - y);
    __syncthreads();
    stage<T, A>(k, at, region, y, rows, A(1), keys, s);
    stage<T, A>(v, at, region, y, rows, A(1), values, s);
    __syncthreads();
    for (int row = 0; row < rows; ++row) {
      const bool sees_row = at.inside && y + row >= top && y + row < top + s.kernel;
      if (__ballot_sync(0xffffffffu, sees_row) == 0) continue;
      // By offset, not by place in the window: so a segment's queries all add to one entry of the
      // table.
      for (int offset = 1 - s.kernel; offset < s.kernel; ++offset) {
        const int64_t x = at.x + offset;
        const bool sees = sees_row && x >= left && x < left + s.kernel;
        if (__ballot_sync(0xffffffffu, sees) == 0) continue;
        const int token = row * columns + (sees ? static_cast<int>(x - region.left) : 0);
        const A dot = product(query, keys + token * s.stride, at.part, s.depth);
        const A dp = product(up, values + token * s.stride, at.part, s.depth);
        A ds = 0;
        if (sees) {
          const A bias = *rpb.at(at.head, y + row - at.y + s.kernel - 1, offset + s.kernel - 1);
          ds = std::exp(dot + bias - log_sum) * (dp - mean);
          add(sum, ds, keys + token * s.stride, at.part, s.depth);
        }
        // All lanes of a token have ds; one of them counts.
        A of_segment = at.part == 0 ? ds : A(0);
        for (int lane = segment / 2; lane > 0; lane /= 2) {
          of_segment += __shfl_xor_sync(0xffffffffu, of_segment, lane);
        }
        // Segments of a warp are rows of the map one after another: their entries differ.
        const int64_t down = y + row - at.y + s.kernel - 1;
        if (threadIdx.x % segment == 0 && down >= 0 && down < s.offsets) {
          mine[down * s.offsets + offset + s.kernel - 1] += of_segment;
        }
        __syncwarp();
      }
    }
  }
  write_token(dq, at, scale, sum, s);
  __syncthreads();
  for (int i = threadIdx.x; i < table; i += THREADS) {
    A share = 0;
    for (int warp = 0; warp < THREADS / WARP; ++warp) share += tables[warp * table + i];
    *dbias.at(at.b, at.tile, at.head, i / s.offsets, i % s.offsets) = share;
  }
}

template <class T>
__global__ void __launch_bounds__(THREADS) collect(
    View<const T, 5> grad,
    View<const T, 5> q,
    View<const T, 5> k,
    View<const T, 5> v,
    View<const Accumulate<T>, 3> rpb,
    Accumulate<T> scale,
    View<const Accumulate<T>, 4> lse,
    View<const Accumulate<T>, 4> delta,
    View<T, 5> dk,
    View<T, 5> dv,
    Shape s,
    int stage_rows) {
  using A = Accumulate<T>;
  MMATTN_DYNAMIC_SHARED(A, shared);
  const Place at(s);
  const Region region = seeing(at, s);
  const int columns = region.columns();
  A* queries = shared;
  A* ups = queries + stage_rows * columns * s.stride;
  A* log_sums = ups + stage_rows * columns * s.stride;
  A* means = log_sums + stage_rows * columns;

  A key[CHANNELS], value[CHANNELS], sum_k[CHANNELS] = {}, sum_v[CHANNELS] = {};
  read_token(k, at, A(1), key, s);
  read_token(v, at, A(1), value, s);
  const int64_t top = first_attending(at.y, s.kernel),
                bottom = last_attending(at.y, s.height, s.kernel);
  const int64_t left = first_attending(at.x, s.kernel),
                right = last_attending(at.x, s.width, s.kernel);
  for (int64_t y = region.top; y < region.bottom; y += stage_rows) {
    const int rows =
        static_cast<int>(y + stage_rows < region.bottom ? stage_rows : region.bottom - y);
    __syncthreads();
    stage<T, A>(q, at, region, y, rows, scale, queries, s);
    stage<T, A>(grad, at, region, y, rows, A(1), ups, s);
    stage<A>(lse, at, region, y, rows, log_sums);
    stage<A>(delta, at, region, y, rows, means);
    __syncthreads();
    for (int row = 0; row < rows; ++row) {
      const bool seen_by_row = at.inside && y + row >= top && y + row <= bottom;
      for (int64_t x = left;; ++x) {
        const bool seen = seen_by_row && x <= right;
        if (__ballot_sync(0xffffffffu, seen) == 0) break;
        const int token = row * columns + (seen ? static_cast<int>(x - region.left) : 0);
        const A dot = product(key, queries + token * s.stride, at.part, s.depth);
        const A dp = product(value, ups + token * s.stride, at.part, s.depth);
        if (!seen) continue;
        const A bias = *rpb.at(at.head, at.y - y - row + s.kernel - 1, at.x - x + s.kernel - 1);
        const A p = std::exp(dot + bias - log_sums[token]);
        add(sum_k,
            p * (dp - means[token]),
            queries + token * s.stride,
            at.part,
            s.depth);  // q is scaled
        add(sum_v, p, ups + token * s.stride, at.part, s.depth);
      }
    }
  }
  write_token(dk, at, A(1), sum_k, s);
  write_token(dv, at, A(1), sum_v, s);
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
  const Shape s(q, kernel_size, {&grad, &q, &k, &v, &out});
  const ScalarType dtype = q.scalar_type(), accumulate = accumulate_dtype(dtype);
  const std::vector<int64_t> size = {s.batch, s.height, s.width, s.heads, s.depth.d};
  Tensor dq = empty(size, q, dtype), dk = empty(size, q, dtype), dv = empty(size, q, dtype);
  Tensor delta = empty({s.batch, s.height, s.width, s.heads}, q, accumulate);
  Tensor shares =
      empty({s.batch, s.tiles_y * s.tiles_x, s.heads, s.offsets, s.offsets}, q, accumulate);
  if (dq.numel() > 0) {
    dispatch(dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      using A = Accumulate<T>;
      const int64_t row_bytes = region_columns(s) * 2 * s.stride * sizeof(A);
      const int stage_rows = rows_of_stage(row_bytes);
      launch(
          differentiate<T>,
          dim3(s.blocks()),
          dim3(THREADS),
          stage_rows * row_bytes + THREADS / WARP * s.offsets * s.offsets * sizeof(A),
          q,
          view<const T, 5>(grad),
          view<const T, 5>(q),
          view<const T, 5>(k),
          view<const T, 5>(v),
          view<const A, 3>(rpb),
          scale,
          view<const T, 5>(out),
          view<const A, 4>(lse),
          view<T, 5>(dq),
          view<A, 4>(delta),
          view<A, 5>(shares),
          s,
          stage_rows);
      const int64_t collect_bytes = row_bytes + region_columns(s) * 2 * sizeof(A);
      const int collect_rows = rows_of_stage(collect_bytes);
      launch(
          collect<T>,
          dim3(s.blocks()),
          dim3(THREADS),
          collect_rows * collect_bytes,
          q,
          view<const T, 5>(grad),
          view<const T, 5>(q),
          view<const T, 5>(k),
          view<const T, 5>(v),
          view<const A, 3>(rpb),
          scale,
          view<const A, 4>(lse),
          view<const A, 4>(delta),
          view<T, 5>(dk),
          view<T, 5>(dv),
          s,
          collect_rows);
    });
  }
  const int64_t over[] = {0, 1};
  return {dq, dk, dv, torch::stable::sum(shares, over)};
}

}  // namespace
}  // namespace mmattn

MMATTN_CUDA_OPERATORS(m) {
  m.impl("neighborhood_attention_backward", TORCH_BOX(&mmattn::neighborhood_attention_backward));
}
