// deform_sample: a map read bilinearly, each group of channels at its own positions.
#include "../bilinear.h"
#include "../checks.h"

#include <algorithm>

namespace mmattn {
namespace {

// Channels that one task takes: the work is cut by the shapes alone, so that results do not depend
// on threads.
constexpr int64_t CHANNELS = 32;
// Points whose corners are at hand at a time.
constexpr int64_t POINTS = 64;

struct Shape {
  int64_t batch, groups, depth, height, width, points, parts;

  Shape(const Tensor& x, const Tensor& positions)
      : batch(x.size(0)),
        groups(positions.size(1)),
        depth(x.size(1) / groups),
        height(x.size(2)),
        width(x.size(3)),
        points(positions.size(2)),
        parts(ceil_div(depth, CHANNELS)) {}
};

// A corner outside the map has no weight and stands at the map's first cell, so that it can be
// read.
template <class A>
struct Point {
  int64_t offset[4];
  A weight[4], dy[4], dx[4];
};

template <class A>
Point<A> locate(const A* position, const Shape& s, int64_t row, int64_t column) {
  const Corners<A> corners(position[0], position[1], s.height, s.width);
  Point<A> point;
  for (int i = 0; i < 4; ++i) {
    const bool inside = corners.inside(i);
    point.offset[i] = inside ? corners.row[i / 2] * row + corners.column[i % 2] * column : 0;
    point.weight[i] = inside ? corners.weight(i) : A(0);
    point.dy[i] = inside ? corners.weight_dy(i) * (s.height - 1) / 2 : A(0);
    point.dx[i] = inside ? corners.weight_dx(i) * (s.width - 1) / 2 : A(0);
  }
  return point;
}

// Calls task(b, g, first channel, channels, part) for each part of each group, in parallel.
template <class F>
void for_each_part(const Shape& s, const F& task) {
  torch::stable::parallel_for(0, s.batch * s.groups * s.parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t part = i % s.parts, g = i / s.parts % s.groups, b = i / s.parts / s.groups;
      const int64_t first = part * CHANNELS;
      task(b, g, g * s.depth + first, std::min(CHANNELS, s.depth - first), part);
    }
  });
}

// Calls f(stride of channels), the stride a compile-time constant where channels lie side by side.
template <class F>
void with_channel_stride(int64_t stride, const F& f) {
  if (stride == 1)
    f(std::integral_constant<int64_t, 1>{});
  else
    f(stride);
}

Tensor deform_sample(const Tensor& x, const Tensor& positions) {
  check_deform_sample(x, positions);
  const Shape s(x, positions);
  const bool channel_last = x.stride(1) == 1 && x.size(1) > 1;
  const int64_t channels = x.size(1);
  Tensor out = channel_last
      ? torch::stable::transpose(empty({s.batch, s.points, channels}, x, x.scalar_type()), 1, 2)
      : empty({s.batch, channels, s.points}, x, x.scalar_type());
  dispatch(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Accumulate<T>;
    const auto map = view<const T, 4>(x);
    const auto where = view<const A, 4>(positions);
    const auto result = view<T, 3>(out);
    for_each_part(s, [&](int64_t b, int64_t g, int64_t first, int64_t count, int64_t) {
      const T* cells = map.at(b, first);
      Point<A> block[POINTS];
      for (int64_t start = 0; start < s.points; start += POINTS) {
        const int64_t size = std::min(POINTS, s.points - start);
        for (int64_t n = 0; n < size; ++n) {
          const A* p = where.at(b, g, start + n);
          const A position[] = {p[0], p[where.stride[3]]};
          block[n] = locate(position, s, map.stride[2], map.stride[3]);
        }
        const auto read = [&](const Point<A>& p, const T* cell) {
          A sum = 0;
          for (int i = 0; i < 4; ++i) sum += p.weight[i] * static_cast<A>(cell[p.offset[i]]);
          return static_cast<T>(sum);
        };
        if (channel_last) {
          for (int64_t n = 0; n < size; ++n) {
            T* to = result.at(b, first, start + n);
            for (int64_t c = 0; c < count; ++c) to[c] = read(block[n], cells + c);
          }
        } else {
          for (int64_t c = 0; c < count; ++c) {
            T* to = result.at(b, first + c, start);
            for (int64_t n = 0; n < size; ++n) to[n] = read(block[n], cells + c * map.stride[1]);
          }
        }
      }
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> deform_sample_backward(
    const Tensor& grad,
    const Tensor& x,
    const Tensor& positions,
    const Tensor& sampled) {
  check_deform_sample(x, positions);
  for (const auto& [name, tensor] : {std::pair{"grad_sampled", &grad}, {"sampled", &sampled}})
    check_tensor(name, *tensor, {x.size(0), x.size(1), positions.size(2)}, x.scalar_type());
  const Shape s(x, positions);
  const ScalarType accumulate = accumulate_dtype(x.scalar_type());
  const bool channel_last = x.stride(1) == 1 && x.size(1) > 1;
  Tensor dx = channel_last
      ? torch::stable::transpose(
            torch::stable::transpose(
                zeros({s.batch, s.height, s.width, x.size(1)}, x, accumulate), 2, 3),
            1,
            2)
      : zeros({s.batch, x.size(1), s.height, s.width}, x, accumulate);
  // The parts of a group each have their share of the positions' gradient.
  Tensor shares = empty({s.parts, s.batch, s.groups, s.points, 2}, x, accumulate);
  dispatch(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Accumulate<T>;
    const auto map = view<const T, 4>(x);
    const auto where = view<const A, 4>(positions);
    const auto upstream = view<const T, 3>(grad);
    const auto map_grad = view<A, 4>(dx);
    const auto share = view<A, 5>(shares);
    for_each_part(s, [&](int64_t b, int64_t g, int64_t first, int64_t count, int64_t part) {
      const T* cells = map.at(b, first);
      A* gradients = map_grad.at(b, first);
      for (int64_t n = 0; n < s.points; ++n) {
        const A* p = where.at(b, g, n);
        const A position[] = {p[0], p[where.stride[3]]};
        const Point<A> from = locate(position, s, map.stride[2], map.stride[3]);
        const Point<A> to = locate(position, s, map_grad.stride[2], map_grad.stride[3]);
        const T* g0 = upstream.at(b, first, n);
        A up[CHANNELS], dy = 0, dx = 0;
        for (int64_t c = 0; c < count; ++c) up[c] = static_cast<A>(g0[c * upstream.stride[1]]);
        with_channel_stride(map.stride[1], [&](auto from_stride) {
          with_channel_stride(map_grad.stride[1], [&](auto to_stride) {
            for (int i = 0; i < 4; ++i) {
              const T* cell = cells + from.offset[i];
              A* gradient = gradients + to.offset[i];
              A dot = 0;
#pragma omp simd reduction(+ : dot)
              for (int64_t c = 0; c < count; ++c)
                dot += up[c] * static_cast<A>(cell[c * from_stride]);
              for (int64_t c = 0; c < count; ++c) gradient[c * to_stride] += up[c] * to.weight[i];
              dy += dot * from.dy[i];
              dx += dot * from.dx[i];
            }
          });
        });
        A* out = share.at(part, b, g, n);
        out[0] = dy;
        out[1] = dx;
      }
    });
  });
  const int64_t over[] = {0};
  return {torch::stable::to(dx, x.scalar_type()), torch::stable::sum(shares, over)};
}

}  // namespace
}  // namespace mmattn

STABLE_TORCH_LIBRARY_IMPL(mmattn, CPU, m) {
  m.impl("deform_sample", TORCH_BOX(&mmattn::deform_sample));
  m.impl("deform_sample_backward", TORCH_BOX(&mmattn::deform_sample_backward));
}
