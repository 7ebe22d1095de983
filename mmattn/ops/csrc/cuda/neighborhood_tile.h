// Tools of neighborhood_attention's CUDA kernels: a block has a tile of one head's map.
//
// PARTS adjacent lanes share a token, each with 32 of its channels in registers; a segment of
// `columns` such tokens is part of a row of the map, and a warp is one segment or several. What the
// tile's tokens need of others passes through shared memory a few rows of the map at a time, as
// numbers of the accumulating type. Nothing is added atomically.
#pragma once

#include "../neighborhood.h"
#include "depth.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace mmattn {
namespace {

constexpr int THREADS = 128;
constexpr int LARGEST_KERNEL = 21;
constexpr int64_t STAGE_BYTES = 40 * 1024;  // of shared memory for rows, where one row is not more

struct Shape {
  int64_t batch, height, width, heads;
  Depth depth;
  int kernel, offsets;
  int columns, rows;  // tokens of a tile
  int64_t tiles_y, tiles_x;
  int stride;  // of tokens in shared memory, so that a quarter of a warp reads from all banks

  Shape(const Tensor& q, int64_t kernel_size, std::initializer_list<const Tensor*> maps)
      : batch(q.size(0)),
        height(q.size(1)),
        width(q.size(2)),
        heads(q.size(3)),
        depth(q.size(4), "neighborhood_attention", maps),
        kernel(static_cast<int>(kernel_size)),
        offsets(2 * kernel - 1) {
    STD_TORCH_CHECK(
        kernel_size <= LARGEST_KERNEL,
        "neighborhood_attention on CUDA takes kernel_size up to ",
        LARGEST_KERNEL,
        ", got ",
        kernel_size,
        "; MMATTN_OPS=reference has no limit");
    for (columns = 8; columns < width && columns * depth.parts < WARP;) columns *= 2;
    rows = THREADS / depth.parts / columns;
    tiles_y = ceil_div(height, rows);
    tiles_x = ceil_div(width, columns);
    stride = depth.channels + 4 * depth.parts;
  }

  int64_t blocks() const { return batch * heads * tiles_y * tiles_x; }
};

// Where a thread is.
struct Place {
  int64_t b, head, tile, y0, x0, y, x;  // the tile's first token and the thread's own
  int part;
  bool inside;

  __device__ explicit Place(const Shape& s) {
    const int64_t tiles = s.tiles_y * s.tiles_x;
    tile = blockIdx.x % tiles;
    head = blockIdx.x / tiles % s.heads;
    b = blockIdx.x / tiles / s.heads;
    y0 = tile / s.tiles_x * s.rows;
    x0 = tile % s.tiles_x * s.columns;
    const int token = threadIdx.x / s.depth.parts;
    part = threadIdx.x % s.depth.parts;
    y = y0 + token / s.columns;
    x = x0 + token % s.columns;
    inside = y < s.height && x < s.width;
  }
};

// A range of tokens along both axes.
struct Region {
  int64_t top, bottom, left, right;  // the last two of each axis are not in it

  __device__ int columns() const { return static_cast<int>(right - left); }
};

__device__ inline int64_t last_of_tile(int64_t first, int count, int64_t n) {
  return (first + count < n ? first + count : n) - 1;
}

// The tokens in the windows of a tile's queries.
__device__ inline Region seen_by(const Place& at, const Shape& s) {
  const int64_t y1 = last_of_tile(at.y0, s.rows, s.height),
                x1 = last_of_tile(at.x0, s.columns, s.width);
  return {
      window_start(at.y0, s.height, s.kernel),
      window_start(y1, s.height, s.kernel) + s.kernel,
      window_start(at.x0, s.width, s.kernel),
      window_start(x1, s.width, s.kernel) + s.kernel};
}

// The most columns of either region.
int64_t region_columns(const Shape& s) {
  return std::min<int64_t>(s.width, s.columns + 2 * (s.kernel - 1));
}

template <class T, class A>
__device__ void
read_token(const View<const T, 5>& map, const Place& at, A scale, A* to, const Shape& s) {
  const T* token = map.at(at.b, at.y, at.x, at.head);
  read_token<T, A>(token, map.stride[4], at.part, scale, to, s.depth, at.inside);
}

template <class T, class A>
__device__ void
write_token(const View<T, 5>& map, const Place& at, A scale, const A* from, const Shape& s) {
  if (!at.inside) return;
  T* token = map.at(at.b, at.y, at.x, at.head);
#pragma unroll
  for (int n = 0; n < CHANNELS / PACK<A>; ++n) {
    const int c = channel_of<A>(n, at.part, s.depth);
    Pack<T, PACK<A>> pack;
#pragma unroll
    for (int i = 0; i < PACK<A>; ++i) pack.value[i] = static_cast<T>(scale * from[n * PACK<A> + i]);
    if (s.depth.packed) {
      if (c < s.depth.d) *reinterpret_cast<Pack<T, PACK<A>>*>(token + c) = pack;
    } else {
#pragma unroll
      for (int i = 0; i < PACK<A>; ++i)
        if (c + i < s.depth.d) token[c + i] = pack.value[i];
    }
  }
}

// Rows [y, y + rows) of a region of a map to shared memory, (rows, columns, stride).
template <class T, class A>
__device__ void stage(
    const View<const T, 5>& map,
    const Place& at,
    const Region& region,
    int64_t y,
    int rows,
    A scale,
    A* to,
    const Shape& s) {
  const int columns = region.columns(), packs = s.depth.channels / PACK<A>;
  const int c = threadIdx.x % packs * PACK<A>;
  for (int row = 0; row < rows; ++row) {
    const T* first = map.at(at.b, y + row, region.left, at.head);
    for (int x = threadIdx.x / packs; x < columns; x += THREADS / packs) {
      *reinterpret_cast<Pack<A, PACK<A>>*>(to + (row * columns + x) * s.stride + c) =
          read_pack<A>(first + x * map.stride[2], map.stride[4], c, scale, s.depth);
    }
  }
}

// mine += weight * token
template <class A>
__device__ inline void add(A* mine, A weight, const A* token, int part, const Depth& depth) {
#pragma unroll
  for (int n = 0; n < CHANNELS / PACK<A>; ++n) {
    const auto other =
        *reinterpret_cast<const Pack<A, PACK<A>>*>(token + channel_of<A>(n, part, depth));
#pragma unroll
    for (int i = 0; i < PACK<A>; ++i) mine[n * PACK<A> + i] += weight * other.value[i];
  }
}

// Rows of a region that are staged at a time, where a row takes so many bytes.
int rows_of_stage(int64_t bytes) {
  return static_cast<int>(std::max<int64_t>(1, STAGE_BYTES / bytes));
}

}  // namespace
}  // namespace mmattn
