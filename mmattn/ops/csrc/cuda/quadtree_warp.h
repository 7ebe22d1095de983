// Tools of quadtree_level's CUDA kernels: a warp works on one parent of one head at a time.
//
// The scores of its candidates are in shared memory, four numbers a candidate, one for each query;
// rows of keys and values are read in place, 16 bytes a lane.
#pragma once

#include "../quadtree.h"
#include "launch.h"

#include <cassert>
#include <limits>

namespace mmattn {
namespace {

constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr int MOST_WARPS = 4;
// What any GPU gives to a block. Where the candidates of one parent need more, memory of the device
// serves.
constexpr int64_t SHARED_BYTES = 96 * 1024;
// Blocks that share the device's memory then.
constexpr int64_t MOST_BLOCKS = 1024;

// A candidate's numbers for the four queries.
template <class A>
struct alignas(16) Four {
  A query[FAMILY];
};

template <class T, int N>
struct alignas(N * sizeof(T)) Pack {
  T x[N];
};

struct Parents {
  View<const int64_t, 4> indices;
  View<const bool, 1> padding;

  __device__ int64_t parent(QuadtreeItem at, int64_t i) const {
    return *indices.at(at.b, at.p, i, at.h);
  }
  __device__ int64_t key(QuadtreeItem at, int64_t candidate) const {
    return FAMILY * parent(at, candidate / FAMILY) + candidate % FAMILY;
  }
  __device__ bool outside(QuadtreeItem at, int64_t candidate) const {
    return padding.data != nullptr && *padding.at(key(at, candidate));
  }
};

// Lanes that read a row together, N numbers each: at least 4, one for each query's sum.
struct Lanes {
  int of_row, rows;  // rows at a time
  int row, part;     // which of them this lane reads, and which part of it

  __device__ Lanes(int64_t depth, int n) : of_row(FAMILY) {
    while (of_row < WARP && of_row * n < depth) of_row *= 2;
    rows = WARP / of_row;
    row = threadIdx.x / of_row;
    part = threadIdx.x % of_row;
  }
};

template <int N, class T>
__device__ void load(const T* from, Accumulate<T> factor, Accumulate<T>* to) {
  const Pack<T, N> pack = *reinterpret_cast<const Pack<T, N>*>(from);
  for (int i = 0; i < N; ++i) to[i] = static_cast<Accumulate<T>>(pack.x[i]) * factor;
}

// numbers: for each candidate the products of its row of `tokens` with the four rows of x, times a
// factor.
template <int N, class T>
__device__ void multiply(
    const View<const T, 5>& x,
    Accumulate<T> factor,
    const View<const T, 4>& tokens,
    const Parents& parents,
    const QuadtreeShape& s,
    QuadtreeItem at,
    Four<Accumulate<T>>* numbers) {
  using A = Accumulate<T>;
  const Lanes lanes(s.depth, N);
  const int64_t first = lanes.part * N, step = lanes.of_row * N;
  const bool one_step = s.depth <= step;
  A rows[FAMILY][N];
  const auto load_rows = [&](int64_t c) {
#pragma unroll
    for (int q = 0; q < FAMILY; ++q) load<N>(x.at(at.b, at.p, q, at.h) + c, factor, rows[q]);
  };
  if (one_step && first < s.depth) load_rows(first);
#pragma unroll 2
  for (int64_t start = 0; start < s.candidates; start += lanes.rows) {
    const int64_t n = start + lanes.row;
    A sum[FAMILY] = {};
    if (n < s.candidates) {
      const T* token = tokens.at(at.b, parents.key(at, n), at.h);
      for (int64_t c = first; c < s.depth; c += step) {
        if (!one_step) load_rows(c);
        A own[N];
        load<N>(token + c, A(1), own);
#pragma unroll
        for (int q = 0; q < FAMILY; ++q)
#pragma unroll
          for (int i = 0; i < N; ++i) sum[q] += rows[q][i] * own[i];
      }
    }
    // Each exchange halves the sums that a lane has, until it has those of one query.
    const bool odd = lanes.part & 1, odd_pair = lanes.part & 2;
    A kept[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      kept[i] = odd ? sum[2 + i] : sum[i];
      kept[i] += __shfl_xor_sync(ALL_LANES, odd ? sum[i] : sum[2 + i], 1);
    }
    A own = odd_pair ? kept[1] : kept[0];
    own += __shfl_xor_sync(ALL_LANES, odd_pair ? kept[0] : kept[1], 2);
    for (int other = FAMILY; other < lanes.of_row; other *= 2)
      own += __shfl_xor_sync(ALL_LANES, own, other);
    if (n < s.candidates && lanes.part < FAMILY) numbers[n].query[2 * odd + odd_pair] = own;
  }
  __syncwarp();
}

template <class A>
__device__ void fill_padding(
    const Parents& parents,
    const QuadtreeShape& s,
    QuadtreeItem at,
    A value,
    Four<A>* numbers) {
  if (parents.padding.data == nullptr) return;
  for (int64_t n = threadIdx.x; n < s.candidates; n += WARP)
    if (parents.outside(at, n))
      for (int q = 0; q < FAMILY; ++q) numbers[n].query[q] = value;
  __syncwarp();
}

// Of the lanes that have the same query.
template <class A, class F>
__device__ A over_query(A value, const F& join) {
  for (int other = FAMILY; other < WARP; other *= 2)
    value = join(value, __shfl_xor_sync(ALL_LANES, value, other));
  return value;
}

template <class A>
__device__ constexpr A infinite() {
  return std::numeric_limits<A>::infinity();
}

// Type B: of each query over all candidates. -inf becomes 0, even where there is nothing else.
template <class A>
__device__ void softmax(const QuadtreeShape& s, Four<A>* numbers) {
  const int q = threadIdx.x % FAMILY, first = threadIdx.x / FAMILY;
  constexpr int step = WARP / FAMILY;
  A most = -infinite<A>(), sum = 0;
  for (int64_t n = first; n < s.candidates; n += step)
    most = numbers[n].query[q] > most ? numbers[n].query[q] : most;
  most = over_query(most, [](A a, A b) { return a > b ? a : b; });
  if (most == -infinite<A>()) most = 0;
  for (int64_t n = first; n < s.candidates; n += step) {
    const A e = std::exp(numbers[n].query[q] - most);
    numbers[n].query[q] = e;
    sum += e;
  }
  sum = over_query(sum, [](A a, A b) { return a + b; });
  const A inverse = sum == 0 ? A(0) : 1 / sum;
  for (int64_t n = first; n < s.candidates; n += step) numbers[n].query[q] *= inverse;
  __syncwarp();
}

// Type A: of one query over one family.
template <class A>
__device__ void softmax_of_family(const Four<A>* family, int q, A* p) {
  A most = -infinite<A>(), sum = 0;
  for (int c = 0; c < FAMILY; ++c) most = family[c].query[q] > most ? family[c].query[q] : most;
  if (most == -infinite<A>()) most = 0;
  for (int c = 0; c < FAMILY; ++c) sum += p[c] = std::exp(family[c].query[q] - most);
  for (int c = 0; c < FAMILY; ++c) p[c] *= sum == 0 ? A(0) : 1 / sum;
}

template <class A>
__device__ void softmax_of_families(
    const View<const A, 4>& scores,
    const QuadtreeShape& s,
    QuadtreeItem at,
    Four<A>* numbers) {
  for (int64_t n = threadIdx.x; n < s.candidates; n += WARP) {
    const int q = n % FAMILY;
    Four<A>* family = numbers + n - q;
    A p[FAMILY];
    softmax_of_family(family, q, p);
    const A score = *scores.at(at.b, at.p, n / FAMILY, at.h);
    for (int c = 0; c < FAMILY; ++c) family[c].query[q] = p[c] * score;
  }
  __syncwarp();
}

// Memory of each warp for `bytes` bytes: of its block, or of the device where that has not enough.
template <bool IN_SHARED>
__device__ unsigned char* own_memory(unsigned char* memory, int64_t bytes) {
  MMATTN_DYNAMIC_SHARED(unsigned char, shared);
  if constexpr (IN_SHARED) return shared + threadIdx.y * bytes;
  return memory + (blockIdx.x * int64_t(blockDim.y) + threadIdx.y) * bytes;
}

// Calls f(item) for each item of this warp.
template <class F>
__device__ void for_each_item(const QuadtreeShape& s, const F& f) {
  const int64_t step = int64_t(gridDim.x) * blockDim.y;
  for (int64_t i = blockIdx.x * int64_t(blockDim.y) + threadIdx.y; i < s.items; i += step)
    f(QuadtreeItem(s, i));
}

__device__ inline void
check_parents(const Parents& parents, const QuadtreeShape& s, QuadtreeItem at) {
  for (int64_t i = threadIdx.x; i < s.families; i += WARP) {
    const int64_t parent = parents.parent(at, i);
    assert(parent >= 0 && parent < s.key_families);
  }
}

// Whether rows can be read 16 bytes at a time.
bool has_aligned_rows(const Tensor& x) {
  const int64_t size = x.element_size(), last = x.dim() - 1;
  bool aligned =
      reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0 && x.size(last) * size % 16 == 0;
  for (int64_t i = 0; i < last; ++i)
    aligned = aligned && (x.size(i) <= 1 || x.stride(i) * size % 16 == 0);
  return aligned;
}

// Launches the first kernel with memory of blocks, or the second one with memory of the device.
template <class Kernel, class... Arguments>
void launch_warps(
    Kernel* in_shared,
    Kernel* in_device,
    const QuadtreeShape& s,
    int64_t bytes,
    const Tensor& on,
    Arguments&&... arguments) {
  const bool shared = bytes <= SHARED_BYTES;
  int64_t warps = MOST_WARPS;
  while (shared && warps > 1 && warps * bytes > SHARED_BYTES / 2) warps /= 2;
  const int64_t most = shared ? INT32_MAX : MOST_BLOCKS;
  const int64_t blocks = std::min(ceil_div(s.items, warps), most);
  const Tensor memory = empty({shared ? 0 : blocks * warps * bytes}, on, ScalarType::Byte);
  launch(
      shared ? in_shared : in_device,
      dim3(blocks),
      dim3(WARP, warps),
      shared ? warps * bytes : 0,
      on,
      arguments...,
      s,
      static_cast<unsigned char*>(memory.data_ptr()),
      bytes);
}

// Calls f(numbers that a lane reads at a time).
template <class T, class F>
void with_pack(bool aligned, const F& f) {
  if (aligned)
    f(std::integral_constant<int, 16 / sizeof(T)>{});
  else
    f(std::integral_constant<int, 1>{});
}

}  // namespace
}  // namespace mmattn
