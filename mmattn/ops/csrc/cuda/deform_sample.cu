// deform_sample: a map read bilinearly, each group of channels at its own positions.
#include "../bilinear.h"
#include "launch.h"

namespace mmattn {
namespace {

constexpr int ROWS = 8;  // warps of a block

struct Shape {
  int64_t batch, groups, depth, height, width, points;

  Shape(const Tensor& x, const Tensor& positions)
      : batch(x.size(0)),
        groups(positions.size(1)),
        depth(x.size(1) / groups),
        height(x.size(2)),
        width(x.size(3)),
        points(positions.size(2)) {}
};

template <class T, class A>
__device__ A
read(const T* cells, const Corners<A>& corners, int corner, int64_t row, int64_t column) {
  if (!corners.inside(corner)) return A(0);
  return static_cast<A>(cells[corners.row[corner / 2] * row + corners.column[corner % 2] * column]);
}

// Lanes are channels where these lie side by side, and points otherwise.
template <class T, bool CHANNEL_LAST>
__global__ void sample(
    View<const T, 4> x,
    View<const Accumulate<T>, 4> positions,
    View<T, 3> out,
    Shape s,
    int64_t blocks) {
  using A = Accumulate<T>;
  const int points_per_block = CHANNEL_LAST ? ROWS : WARP;
  const int64_t bg = blockIdx.x / blocks, b = bg / s.groups, g = bg % s.groups;
  const int64_t point =
      blockIdx.x % blocks * points_per_block + (CHANNEL_LAST ? threadIdx.y : threadIdx.x);
  if (point >= s.points) return;
  const A* p = positions.at(b, g, point);
  const Corners<A> corners(p[0], p[positions.stride[3]], s.height, s.width);
  const int step = CHANNEL_LAST ? WARP : ROWS;
  for (int64_t c = CHANNEL_LAST ? threadIdx.x : threadIdx.y; c < s.depth; c += step) {
    const T* cells = x.at(b, g * s.depth + c);
    A sum = 0;
    for (int i = 0; i < 4; ++i)
      sum += corners.weight(i) * read(cells, corners, i, x.stride[2], x.stride[3]);
    *out.at(b, g * s.depth + c, point) = static_cast<T>(sum);
  }
}

// A warp for each point, its lanes are channels.
template <class T>
__global__ void sample_backward(
    View<const T, 3> grad,
    View<const T, 4> x,
    View<const Accumulate<T>, 4> positions,
    View<Accumulate<T>, 4> dx,
    View<Accumulate<T>, 4> dpositions,
    Shape s,
    int64_t blocks) {
  using A = Accumulate<T>;
  const int64_t bg = blockIdx.x / blocks, b = bg / s.groups, g = bg % s.groups;
  const int64_t point = blockIdx.x % blocks * ROWS + threadIdx.y;
  if (point >= s.points) return;
  const A* p = positions.at(b, g, point);
  const Corners<A> corners(p[0], p[positions.stride[3]], s.height, s.width);
  A by_y = 0, by_x = 0;
  for (int64_t c = threadIdx.x; c < s.depth; c += WARP) {
    const int64_t channel = g * s.depth + c;
    const T* cells = x.at(b, channel);
    const A up = static_cast<A>(*grad.at(b, channel, point));
    for (int i = 0; i < 4; ++i) {
      if (!corners.inside(i)) continue;
      const A value = read(cells, corners, i, x.stride[2], x.stride[3]);
      by_y += up * value * corners.weight_dy(i);
      by_x += up * value * corners.weight_dx(i);
      atomicAdd(
          dx.at(b, channel, corners.row[i / 2], corners.column[i % 2]), up * corners.weight(i));
    }
  }
  by_y = warp_sum(by_y);
  by_x = warp_sum(by_x);
  if (threadIdx.x == 0) {
    *dpositions.at(b, g, point, 0) = by_y * (s.height - 1) / 2;
    *dpositions.at(b, g, point, 1) = by_x * (s.width - 1) / 2;
  }
}

bool is_channel_last(const Tensor& x) { return x.stride(1) == 1 && x.size(1) > 1; }

Tensor channel_last_zeros(const Tensor& x, ScalarType dtype) {
  Tensor memory = zeros({x.size(0), x.size(2), x.size(3), x.size(1)}, x, dtype);
  return torch::stable::transpose(torch::stable::transpose(memory, 2, 3), 1, 2);
}

Tensor deform_sample(const Tensor& x, const Tensor& positions) {
  const Shape s(x, positions);
  const bool channel_last = is_channel_last(x);
  Tensor out = channel_last
      ? torch::stable::transpose(empty({s.batch, s.points, x.size(1)}, x, x.scalar_type()), 1, 2)
      : empty({s.batch, x.size(1), s.points}, x, x.scalar_type());
  const int64_t blocks = ceil_div(s.points, channel_last ? ROWS : WARP);
  if (out.numel() == 0) return out;
  dispatch(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Accumulate<T>;
    launch(
        channel_last ? sample<T, true> : sample<T, false>,
        dim3(s.batch * s.groups * blocks),
        dim3(WARP, ROWS),
        0,
        x,
        view<const T, 4>(x),
        view<const A, 4>(positions),
        view<T, 3>(out),
        s,
        blocks);
  });
  return out;
}

std::tuple<Tensor, Tensor> deform_sample_backward(
    const Tensor& grad,
    const Tensor& x,
    const Tensor& positions,
    const Tensor& sampled) {
  const Shape s(x, positions);
  const ScalarType accumulate = accumulate_dtype(x.scalar_type());
  Tensor dx = is_channel_last(x) ? channel_last_zeros(x, accumulate)
                                 : zeros({s.batch, x.size(1), s.height, s.width}, x, accumulate);
  Tensor dpositions = empty({s.batch, s.groups, s.points, 2}, x, accumulate);
  const int64_t blocks = ceil_div(s.points, ROWS);
  if (dpositions.numel() > 0) {
    dispatch(x.scalar_type(), [&](auto type) {
      using T = typename decltype(type)::type;
      using A = Accumulate<T>;
      launch(
          sample_backward<T>,
          dim3(s.batch * s.groups * blocks),
          dim3(WARP, ROWS),
          0,
          x,
          view<const T, 3>(grad),
          view<const T, 4>(x),
          view<const A, 4>(positions),
          view<A, 4>(dx),
          view<A, 4>(dpositions),
          s,
          blocks);
    });
  }
  return {torch::stable::to(dx, x.scalar_type()), dpositions};
}

}  // namespace
}  // namespace mmattn

MMATTN_CUDA_OPERATORS(m) {
  m.impl("deform_sample", TORCH_BOX(&mmattn::deform_sample));
  m.impl("deform_sample_backward", TORCH_BOX(&mmattn::deform_sample_backward));
}
