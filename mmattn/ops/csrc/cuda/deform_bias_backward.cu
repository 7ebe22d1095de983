// deform_bias_backward: deform_attention's gradients by the bias table and by the positions of the
// keys.
//
// A block has KEYS keys of one head and a chunk of the queries, which pass through shared memory. A
// thread owns a key, with its vectors in registers (or, where d is large, a part of them), and
// makes the probabilities again from the saved log-sum-exp. From one query to the next in a row of
// the map a key's place in the table moves by a cell or less: what falls to the cell's four corners
// adds up in registers, and goes to the block's table when the place leaves the cell.
#include "depth.h"

#include <algorithm>
#include <cmath>

namespace mmattn {
namespace {

constexpr int THREADS = 128;
constexpr int STAGE = 64;  // queries in shared memory at a time
constexpr int64_t CHUNK =
    16 * STAGE;  // queries of a block, enough to outweigh the table's way to memory
// The block's table is in shared memory where it leaves that much to others, and else the result
// itself.
constexpr int64_t SHARED_BYTES = 96 * 1024;

struct Shape {
  int64_t batch, heads, groups, queries, keys;
  int64_t tiles, chunks;  // of keys, of queries
  int height, width;      // of the table
  Depth depth;
  bool shared_table;

  Shape(
      const Tensor& q,
      const Tensor& table,
      const Tensor& key_positions,
      std::initializer_list<const Tensor*> tensors)
      : batch(q.size(0)),
        heads(q.size(1)),
        groups(key_positions.size(1)),
        queries(q.size(2)),
        keys(key_positions.size(2)),
        height(static_cast<int>(table.size(1))),
        width(static_cast<int>(table.size(2))),
        depth(q.size(3), "deform_attention", tensors) {
    tiles = ceil_div(keys, THREADS / depth.parts);
    chunks = ceil_div(queries, CHUNK);
  }

  int64_t blocks() const { return batch * heads * tiles * chunks; }
};

// A query in shared memory, beside its vectors.
template <class A>
struct Query {
  A y, x;  // of the grid
  A log_sum, delta;
};

// The cell of the table that a key's place is in, with the bias at its corners and what has been
// added up for them: (y, x), (y, x + 1), (y + 1, x), (y + 1, x + 1). A corner outside the table has
// no bias.
template <class A>
struct Cell {
  const A* table;
  A* grad;                            // of the table, shared with other threads
  int64_t row_stride, column_stride;  // of `table`
  int height, width;
  int y = -2, x = -2;
  A bias[4] = {}, sum[4] = {};

  __device__ bool inside(int dy, int dx) const {
    return y + dy >= 0 && y + dy < height && x + dx >= 0 && x + dx < width;
  }
  __device__ void read(int dy, int dx) {
    bias[2 * dy + dx] =
        inside(dy, dx) ? __ldg(table + (y + dy) * row_stride + (x + dx) * column_stride) : A(0);
  }
  __device__ void write(int dy, int dx) {
    A& share = sum[2 * dy + dx];
    if (share != 0 && inside(dy, dx)) atomicAdd(grad + (y + dy) * width + x + dx, share);
    share = 0;
  }

  __device__ void move_to(int new_y, int new_x) {
    if (new_y == y && new_x == x) return;
    write(0, 0);
    write(1, 0);
    if (new_y == y && new_x == x + 1) {  // the right corners become the left ones
      sum[0] = sum[1];
      sum[2] = sum[3];
      bias[0] = bias[1];
      bias[2] = bias[3];
      sum[1] = sum[3] = 0;
      x = new_x;
    } else {
      write(0, 1);
      write(1, 1);
      y = new_y;
      x = new_x;
      read(0, 0);
      read(1, 0);
    }
    read(0, 1);
    read(1, 1);
  }
};

// Displacement -> the table's cells, as in bilinear.h. What is farther than a cell from the table,
// and NaN, is two cells before it, where all corners are outside.
template <class A>
__device__ inline A to_table(A displacement, int size) {
  const A cells = (displacement / 2 + 1) / 2 * (size - 1);
  return cells >= -1 && cells <= static_cast<A>(size) ? cells : A(-2);
}

// delta = the sum of grad * out over the channels; a warp for each query.
template <class T>
__global__ void
deltas(View<const T, 4> grad, View<const T, 4> out, View<Accumulate<T>, 3> delta, Shape s) {
  using A = Accumulate<T>;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * (THREADS / WARP) + threadIdx.x / WARP;
  if (index >= s.batch * s.heads * s.queries) return;
  const int64_t query = index % s.queries, head = index / s.queries % s.heads,
                b = index / s.queries / s.heads;
  A sum = 0;
  for (int64_t c = threadIdx.x % WARP; c < s.depth.d; c += WARP) {
    sum += static_cast<A>(*grad.at(b, head, query, c)) * static_cast<A>(*out.at(b, head, query, c));
  }
  sum = warp_sum(sum);
  if (threadIdx.x % WARP == 0) *delta.at(b, head, query) = sum;
}

template <class T>
__global__ void __launch_bounds__(THREADS, std::is_same_v<T, double> ? 2 : 4) differentiate_bias(
    View<const T, 4> grad,
    View<const T, 4> q,
    View<const T, 4> k,
    View<const T, 4> v,
    View<const Accumulate<T>, 3> table,
    View<const Accumulate<T>, 2> query_grid,
    View<const Accumulate<T>, 4> key_positions,
    View<const Accumulate<T>, 3> lse,
    View<const Accumulate<T>, 3> delta,
    Accumulate<T> scale,
    View<Accumulate<T>, 3> grad_table,      // zero at first
    View<Accumulate<T>, 6> grad_positions,  // a share for each chunk and head
    Shape s) {
  using A = Accumulate<T>;
  MMATTN_DYNAMIC_SHARED(A, shared);
  A* const vectors = shared;                          // (STAGE, channels): scale * q
  A* const ups = vectors + STAGE * s.depth.channels;  // (STAGE, channels): grad
  Query<A>* const staged = reinterpret_cast<Query<A>*>(ups + STAGE * s.depth.channels);
  A* const block_table = reinterpret_cast<A*>(staged + STAGE);

  const int64_t chunk = blockIdx.x % s.chunks, tile = blockIdx.x / s.chunks % s.tiles;
  const int64_t head = blockIdx.x / s.chunks / s.tiles % s.heads;
  const int64_t b = blockIdx.x / s.chunks / s.tiles / s.heads;
  const int64_t heads_of_group = s.heads / s.groups, group = head / heads_of_group;
  const int part = threadIdx.x % s.depth.parts;
  const int64_t key = tile * (THREADS / s.depth.parts) + threadIdx.x / s.depth.parts;
  const bool exists = key < s.keys;
  const bool counts = exists && part == 0;  // of a key's lanes, which all come to the same

  const int size = s.height * s.width;
  if (s.shared_table) {
    for (int i = threadIdx.x; i < size; i += THREADS) block_table[i] = 0;
  }
  A key_vector[CHANNELS], value[CHANNELS], at_y = 0, at_x = 0, by_y = 0, by_x = 0;
  read_token<T, A>(k.at(b, head, key), k.stride[3], part, A(1), key_vector, s.depth, exists);
  read_token<T, A>(v.at(b, head, key), v.stride[3], part, A(1), value, s.depth, exists);
  if (exists) {
    at_y = *key_positions.at(b, group, key, 0);
    at_x = *key_positions.at(b, group, key, 1);
  }
  A* const result = grad_table.at(head);
  Cell<A> cell{
      table.at(head),
      s.shared_table ? block_table : result,
      table.stride[1],
      table.stride[2],
      s.height,
      s.width};

  const int packs = s.depth.channels / PACK<A>, c = threadIdx.x % packs * PACK<A>;
  const int64_t end = (chunk + 1) * CHUNK < s.queries ? (chunk + 1) * CHUNK : s.queries;
  for (int64_t first = chunk * CHUNK; first < end; first += STAGE) {
    const int count = static_cast<int>(first + STAGE < end ? STAGE : end - first);
    __syncthreads();
    for (int n = threadIdx.x / packs; n < count; n += THREADS / packs) {
      using P = Pack<A, PACK<A>>;
      *reinterpret_cast<P*>(vectors + n * s.depth.channels + c) =
          read_pack<A>(q.at(b, head, first + n), q.stride[3], c, scale, s.depth);
      *reinterpret_cast<P*>(ups + n * s.depth.channels + c) =
          read_pack<A>(grad.at(b, head, first + n), grad.stride[3], c, A(1), s.depth);
    }
    for (int n = threadIdx.x; n < count; n += THREADS) {
      staged[n] = {
          *query_grid.at(first + n, 0),
          *query_grid.at(first + n, 1),
          *lse.at(b, head, first + n),
          *delta.at(b, head, first + n)};
    }
    __syncthreads();
    for (int n = 0; n < count; ++n) {
      const A dot = product(key_vector, vectors + n * s.depth.channels, part, s.depth);
      const A dp = product(value, ups + n * s.depth.channels, part, s.depth);
      if (!counts) continue;
      const Query<A> query = staged[n];
      const A table_y = to_table(query.y - at_y, s.height),
              table_x = to_table(query.x - at_x, s.width);
      const A floor_y = std::floor(table_y), floor_x = std::floor(table_x);
      cell.move_to(static_cast<int>(floor_y), static_cast<int>(floor_x));
      const A y = table_y - floor_y, x = table_x - floor_x;
      const A upper = cell.bias[0] + x * (cell.bias[1] - cell.bias[0]);
      const A lower = cell.bias[2] + x * (cell.bias[3] - cell.bias[2]);
      const A left = cell.bias[0] + y * (cell.bias[2] - cell.bias[0]);
      const A right = cell.bias[1] + y * (cell.bias[3] - cell.bias[1]);
      const A bias = upper + y * (lower - upper);
      const A ds = std::exp(dot + bias - query.log_sum) * (dp - query.delta);
      by_y += ds * (lower - upper);
      by_x += ds * (right - left);
      cell.sum[0] += ds * (1 - y) * (1 - x);
      cell.sum[1] += ds * (1 - y) * x;
      cell.sum[2] += ds * y * (1 - x);
      cell.sum[3] += ds * y * x;
    }
  }
  cell.move_to(-2, -2);
  if (counts) {
    A* to = grad_positions.at(chunk, b, group, head % heads_of_group, key);
    to[0] = -by_y * (s.height - 1) / 4;
    to[1] = -by_x * (s.width - 1) / 4;
  }
  if (s.shared_table) {
    __syncthreads();
    for (int i = threadIdx.x; i < size; i += THREADS) {
      if (block_table[i] != 0) atomicAdd(result + i, block_table[i]);
    }
  }
}

std::tuple<Tensor, Tensor> deform_bias_backward(
    const Tensor& grad,
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& table,
    const Tensor& query_grid,
    const Tensor& key_positions,
    const Tensor& out,
    const Tensor& lse,
    double scale) {
  Shape s(q, table, key_positions, {&grad, &q, &k, &v});
  const ScalarType accumulate = accumulate_dtype(q.scalar_type());
  for (const Tensor* tensor : {&table, &query_grid, &key_positions, &lse}) {
    STD_TORCH_CHECK(
        tensor->scalar_type() == accumulate,
        "deform_bias_backward: table, query_grid, key_positions and lse must be ",
        torch::headeronly::toString(accumulate),
        ", got ",
        torch::headeronly::toString(tensor->scalar_type()));
  }
  Tensor grad_table = zeros({s.heads, s.height, s.width}, q, accumulate);
  Tensor shares =
      empty({s.chunks, s.batch, s.groups, s.heads / s.groups, s.keys, 2}, q, accumulate);
  if (shares.numel() > 0) {
    dispatch(q.scalar_type(), [&](auto type) {
      using T = typename decltype(type)::type;
      using A = Accumulate<T>;
      Tensor delta = empty({s.batch, s.heads, s.queries}, q, accumulate);
      launch(
          deltas<T>,
          dim3(ceil_div(delta.numel(), THREADS / WARP)),
          dim3(THREADS),
          0,
          q,
          view<const T, 4>(grad),
          view<const T, 4>(out),
          view<A, 3>(delta),
          s);
      const int64_t stage_bytes = STAGE * (2 * s.depth.channels * sizeof(A) + sizeof(Query<A>));
      const int64_t table_bytes = int64_t{s.height} * s.width * sizeof(A);
      s.shared_table = stage_bytes + table_bytes <= SHARED_BYTES;
      launch(
          differentiate_bias<T>,
          dim3(s.blocks()),
          dim3(THREADS),
          stage_bytes + (s.shared_table ? table_bytes : 0),
          q,
          view<const T, 4>(grad),
          view<const T, 4>(q),
          view<const T, 4>(k),
          view<const T, 4>(v),
          view<const A, 3>(table),
          view<const A, 2>(query_grid),
          view<const A, 4>(key_positions),
          view<const A, 3>(lse),
          view<const A, 3>(delta),
          scale,
          view<A, 3>(grad_table),
          view<A, 6>(shares),
          s);
    });
  }
  const int64_t over[] = {0, 3};
  return {grad_table, torch::stable::sum(shares, over)};
}

}  // namespace
}  // namespace mmattn

MMATTN_CUDA_OPERATORS(m) {
  m.impl("deform_bias_backward", TORCH_BOX(&mmattn::deform_bias_backward));
}
