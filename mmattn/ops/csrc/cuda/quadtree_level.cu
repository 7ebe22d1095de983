// quadtree_level: four sibling queries attend to the children of the keys that their parent has kept.
//
// A warp works on one parent of one head at a time. The scores of its candidates are in shared memory, four
// numbers a candidate, one for each query; rows of keys and values are read where they are, 16 bytes a lane.
#include "../quadtree.h"
#include "launch.h"

#include <cassert>
#include <limits>

namespace mmattn {
namespace {

constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr int MOST_WARPS = 4;
// What any GPU gives to a block. Where the candidates of one parent need more, memory of the device serves.
constexpr int64_t SHARED_BYTES = 96 * 1024;
// Blocks that share the device's memory then.
constexpr int64_t MOST_BLOCKS = 1024;
// Channels of a lane in the second part of the backward pass.
constexpr int SLICES = 2;

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
  int row, part;  // which of them this lane reads, and which part of it

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

// numbers: for each candidate the products of its row of `tokens` with the four rows of x, times a factor.
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

// An integer that orders numbers as they are ordered; both zeros are one.
__device__ inline int32_t order_of(float x) {
  x += 0.0f;
  int32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits ^ ((bits >> 31) & INT32_MAX);
}
__device__ inline int64_t order_of(double x) {
  x += 0.0;
  int64_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits ^ ((bits >> 63) & INT64_MAX);
}

// places: those of the greatest numbers of a query, in their order. Returns nothing else; `kept` are there.
template <class A>
__device__ void choose(const QuadtreeShape& s, const Four<A>* numbers, int q, int32_t* places) {
  using Order = decltype(order_of(A(0)));
  using Distance = std::make_unsigned_t<Order>;
  const int lane = threadIdx.x;
  const auto count_if = [&](const auto& holds) {
    int count = 0;
    for (int64_t n = lane; n < s.candidates; n += WARP) count += holds(order_of(numbers[n].query[q]));
    return static_cast<int64_t>(__reduce_add_sync(ALL_LANES, count));
  };
  Order low = order_of(numbers[0].query[q]), high = low;
  for (int64_t n = lane; n < s.candidates; n += WARP) {
    const Order own = order_of(numbers[n].query[q]);
    low = own < low ? own : low;
    high = own > high ? own : high;
  }
  high = warp_max(high);
  low = ~warp_max(~low);
  // By bisection: the kept-th greatest, or a lower number than that which exactly as many are not below.
  int64_t not_below = s.candidates;
  while (low < high && not_below != s.kept) {
    const Distance half = (static_cast<Distance>(high) - static_cast<Distance>(low) - 1) / 2 + 1;
    const Order middle = static_cast<Order>(static_cast<Distance>(low) + half);
    const int64_t count = count_if([=](Order x) { return x >= middle; });
    if (count >= s.kept) {
      low = middle;
      not_below = count;
    } else {
      high = middle - 1;
    }
  }
  const Order least = low;
  int64_t equals = s.kept - count_if([=](Order x) { return x > least; });
  const unsigned lanes_before = (1u << lane) - 1;
  int64_t taken = 0;
  for (int64_t start = 0; start < s.candidates; start += WARP) {
    const int64_t n = start + lane;
    const bool there = n < s.candidates;
    const Order own = there ? order_of(numbers[n].query[q]) : least;
    const unsigned equal = __ballot_sync(ALL_LANES, there && own == least);
    const bool take = there &&
        (own > least || (own == least && __popc(equal & lanes_before) < equals));
    const unsigned all = __ballot_sync(ALL_LANES, take);
    if (take) places[taken + __popc(all & lanes_before)] = static_cast<int32_t>(n);
    equals -= __popc(equal);
    taken += __popc(all);
  }
  __syncwarp();
}

// How many of a query's kept candidates come before the r-th of them.
template <class A>
__device__ int64_t rank_of(
    const QuadtreeShape& s,
    const Four<A>* numbers,
    int q,
    const int32_t* places,
    int64_t r) {
  const auto own = order_of(numbers[places[r]].query[q]);
  int64_t before = 0;
  for (int64_t other = 0; other < s.kept; ++other) {
    const auto order = order_of(numbers[places[other]].query[q]);
    before += order > own || (order == own && other < r);
  }
  return before;
}

// Messages: for each query the sum of the candidates' rows, each with its number.
template <int N, class T>
__device__ void weigh(
    const Four<Accumulate<T>>* numbers,
    const View<const T, 4>& tokens,
    const Parents& parents,
    const QuadtreeShape& s,
    QuadtreeItem at,
    const View<T, 5>& out) {
  using A = Accumulate<T>;
  const Lanes lanes(s.depth, N);
  for (int64_t start = 0; start < s.depth; start += lanes.of_row * N) {
    const int64_t c = start + lanes.part * N;
    A sum[FAMILY][N] = {};
    if (c < s.depth) {
#pragma unroll 4
      for (int64_t n = lanes.row; n < s.candidates; n += lanes.rows) {
        A own[N];
        load<N>(tokens.at(at.b, parents.key(at, n), at.h) + c, A(1), own);
        const Four<A> weight = numbers[n];
#pragma unroll
        for (int q = 0; q < FAMILY; ++q)
#pragma unroll
          for (int i = 0; i < N; ++i) sum[q][i] += weight.query[q] * own[i];
      }
    }
    for (int other = lanes.of_row; other < WARP; other *= 2)
#pragma unroll
      for (int q = 0; q < FAMILY; ++q)
#pragma unroll
        for (int i = 0; i < N; ++i) sum[q][i] += __shfl_xor_sync(ALL_LANES, sum[q][i], other);
    if (lanes.row != 0 || c >= s.depth) continue;
#pragma unroll
    for (int q = 0; q < FAMILY; ++q) {
      Pack<T, N> pack;
      for (int i = 0; i < N; ++i) pack.x[i] = static_cast<T>(sum[q][i]);
      *reinterpret_cast<Pack<T, N>*>(out.at(at.b, at.p, q, at.h) + c) = pack;
    }
  }
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

__device__ inline void check_parents(const Parents& parents, const QuadtreeShape& s, QuadtreeItem at) {
  for (int64_t i = threadIdx.x; i < s.families; i += WARP) {
    const int64_t parent = parents.parent(at, i);
    assert(parent >= 0 && parent < s.key_families);
  }
}

template <class A>
int64_t forward_bytes(const QuadtreeShape& s) {
  return s.candidates * sizeof(Four<A>) + ceil_div(s.kept * sizeof(int32_t), 16) * 16;
}

template <class T, int N, bool IN_SHARED>
__global__ void forward(
    View<const T, 5> queries,
    View<const T, 4> keys,
    View<const T, 4> values,
    Parents parents,
    View<const Accumulate<T>, 4> parent_scores,
    View<T, 5> messages,
    View<Accumulate<T>, 5> scores,
    View<int64_t, 5> indices,
    View<int32_t, 5> kept,
    QuadtreeShape s,
    unsigned char* memory,
    int64_t bytes) {
  using A = Accumulate<T>;
  auto* numbers = reinterpret_cast<Four<A>*>(own_memory<IN_SHARED>(memory, bytes));
  auto* places = reinterpret_cast<int32_t*>(numbers + s.candidates);
  const bool type_a = parent_scores.data != nullptr;
  const A scale = 1 / std::sqrt(static_cast<A>(s.depth));
  for_each_item(s, [&](QuadtreeItem at) {
    check_parents(parents, s, at);
    multiply<N>(queries, scale, keys, parents, s, at, numbers);
    fill_padding(parents, s, at, -infinite<A>(), numbers);
    if (type_a)
      softmax_of_families(parent_scores, s, at, numbers);
    else
      softmax(s, numbers);
    if (s.kept > 0) fill_padding(parents, s, at, -infinite<A>(), numbers);  // chosen after all others
    for (int q = 0; q < (s.kept > 0 ? FAMILY : 0); ++q) {
      choose(s, numbers, q, places);
      for (int64_t r = threadIdx.x; r < s.kept; r += WARP) {
        const int32_t n = places[r];
        const int64_t rank = rank_of(s, numbers, q, places, r);
        const A p = numbers[n].query[q];
        *indices.at(at.b, at.p, q, rank, at.h) = parents.key(at, n);
        if (scores.data != nullptr)
          *scores.at(at.b, at.p, q, rank, at.h) = p == -infinite<A>() ? A(0) : p;
        if (type_a) *kept.at(at.b, at.h, at.p, q, rank) = n;
      }
      __syncwarp();
      if (type_a)  // the message leaves them to the next level
        for (int64_t r = threadIdx.x; r < s.kept; r += WARP) numbers[places[r]].query[q] = 0;
      __syncwarp();
    }
    if (s.kept > 0) fill_padding(parents, s, at, A(0), numbers);
    weigh<N>(numbers, values, parents, s, at, messages);
    __syncwarp();
  });
}

template <class A>
int64_t backward_bytes(const QuadtreeShape& s) {
  return 2 * s.candidates * sizeof(Four<A>);
}

// p: the probabilities with which the message was formed. ds: gradients of p -> gradients of the scores.
template <class A>
__device__ void differentiate_softmax(const QuadtreeShape& s, Four<A>* p, Four<A>* ds) {
  softmax(s, p);
  const int q = threadIdx.x % FAMILY, first = threadIdx.x / FAMILY;
  constexpr int step = WARP / FAMILY;
  A dot = 0;
  for (int64_t n = first; n < s.candidates; n += step) dot += p[n].query[q] * ds[n].query[q];
  dot = over_query(dot, [](A a, A b) { return a + b; });
  for (int64_t n = first; n < s.candidates; n += step)
    ds[n].query[q] = p[n].query[q] * (ds[n].query[q] - dot);
  __syncwarp();
}

template <class A>
__device__ void differentiate_families(
    const View<const A, 4>& scores,
    const View<const A, 5>& score_grad,
    const View<const int32_t, 5>& kept,
    const View<A, 4>& parent_score_grad,
    const QuadtreeShape& s,
    QuadtreeItem at,
    Four<A>* p,
    Four<A>* ds) {
  for (int64_t i = threadIdx.x; i < FAMILY * s.kept; i += WARP) {
    const int q = i % FAMILY;
    const int64_t r = i / FAMILY;
    ds[*kept.at(at.b, at.h, at.p, q, r)].query[q] = *score_grad.at(at.b, at.p, q, r, at.h);
  }
  __syncwarp();
  for (int64_t start = 0; start < s.candidates; start += WARP) {
    const int64_t n = start + threadIdx.x, i = n / FAMILY;
    const int q = n % FAMILY;
    A dot = 0;
    if (n < s.candidates) {
      A own[FAMILY];
      softmax_of_family(p + i * FAMILY, q, own);
      Four<A>* gradients = ds + i * FAMILY;
      for (int c = 0; c < FAMILY; ++c) dot += own[c] * gradients[c].query[q];
      const A score = *scores.at(at.b, at.p, i, at.h);
      for (int c = 0; c < FAMILY; ++c) {
        own[c] *= score;
        gradients[c].query[q] = own[c] * (gradients[c].query[q] - dot);
        p[i * FAMILY + c].query[q] = own[c];
      }
    }
    for (int other = 1; other < FAMILY; other *= 2) dot += __shfl_xor_sync(ALL_LANES, dot, other);
    if (n < s.candidates && q == 0) *parent_score_grad.at(at.b, at.p, i, at.h) = dot;
  }
  __syncwarp();
  for (int64_t i = threadIdx.x; i < FAMILY * s.kept; i += WARP)
    p[*kept.at(at.b, at.h, at.p, i % FAMILY, i / FAMILY)].query[i % FAMILY] = 0;
  __syncwarp();
}

// Lanes are channels, so that the additions of a warp to a key's gradient are to one piece of memory.
template <class T>
__device__ void add_gradients(
    const View<const T, 5>& queries,
    const View<const T, 4>& keys,
    const View<const T, 5>& grad,
    const Parents& parents,
    const QuadtreeShape& s,
    QuadtreeItem at,
    const Four<Accumulate<T>>* p,
    const Four<Accumulate<T>>* ds,
    const View<T, 5>& query_grad,
    const View<Accumulate<T>, 4>& key_grad,
    const View<Accumulate<T>, 4>& value_grad) {
  using A = Accumulate<T>;
  const A scale = 1 / std::sqrt(static_cast<A>(s.depth));
  for (int64_t first = threadIdx.x; first < s.depth; first += SLICES * WARP) {
    A q_rows[SLICES][FAMILY] = {}, grad_rows[SLICES][FAMILY] = {}, sum[SLICES][FAMILY] = {};
#pragma unroll
    for (int i = 0; i < SLICES; ++i) {
      const int64_t c = first + i * WARP;
      if (c >= s.depth) continue;
      for (int q = 0; q < FAMILY; ++q) {
        q_rows[i][q] = static_cast<A>(queries.at(at.b, at.p, q, at.h)[c]) * scale;
        grad_rows[i][q] = static_cast<A>(grad.at(at.b, at.p, q, at.h)[c]);
      }
    }
#pragma unroll 4
    for (int64_t n = 0; n < s.candidates; ++n) {
      const int64_t key = parents.key(at, n);
      const Four<A> own_p = p[n], own_ds = ds[n];
#pragma unroll
      for (int i = 0; i < SLICES; ++i) {
        const int64_t c = first + i * WARP;
        if (c >= s.depth) continue;
        const A number = static_cast<A>(keys.at(at.b, key, at.h)[c]);
        A for_key = 0, for_value = 0;
#pragma unroll
        for (int q = 0; q < FAMILY; ++q) {
          sum[i][q] += own_ds.query[q] * number;
          for_key += own_ds.query[q] * q_rows[i][q];
          for_value += own_p.query[q] * grad_rows[i][q];
        }
        atomicAdd(key_grad.at(at.b, at.h, key) + c, for_key);
        atomicAdd(value_grad.at(at.b, at.h, key) + c, for_value);
      }
    }
#pragma unroll
    for (int i = 0; i < SLICES; ++i) {
      const int64_t c = first + i * WARP;
      if (c >= s.depth) continue;
      for (int q = 0; q < FAMILY; ++q)
        query_grad.at(at.b, at.p, q, at.h)[c] = static_cast<T>(sum[i][q] * scale);
    }
  }
}

template <class T, int N, bool IN_SHARED>
__global__ void backward(
    View<const T, 5> grad,
    View<const Accumulate<T>, 5> score_grad,
    View<const T, 5> queries,
    View<const T, 4> keys,
    View<const T, 4> values,
    Parents parents,
    View<const Accumulate<T>, 4> parent_scores,
    View<const int32_t, 5> kept,
    View<T, 5> query_grad,
    View<Accumulate<T>, 4> key_grad,
    View<Accumulate<T>, 4> value_grad,
    View<Accumulate<T>, 4> parent_score_grad,
    QuadtreeShape s,
    unsigned char* memory,
    int64_t bytes) {
  using A = Accumulate<T>;
  auto* p = reinterpret_cast<Four<A>*>(own_memory<IN_SHARED>(memory, bytes));
  auto* ds = p + s.candidates;
  const A scale = 1 / std::sqrt(static_cast<A>(s.depth));
  for_each_item(s, [&](QuadtreeItem at) {
    check_parents(parents, s, at);
    multiply<N>(queries, scale, keys, parents, s, at, p);
    multiply<N>(grad, A(1), values, parents, s, at, ds);
    fill_padding(parents, s, at, -infinite<A>(), p);
    if (parent_scores.data != nullptr)
      differentiate_families(parent_scores, score_grad, kept, parent_score_grad, s, at, p, ds);
    else
      differentiate_softmax(s, p, ds);
    add_gradients(queries, keys, grad, parents, s, at, p, ds, query_grad, key_grad, value_grad);
    __syncwarp();
  });
}

// Whether rows can be read 16 bytes at a time.
bool has_aligned_rows(const Tensor& x) {
  const int64_t size = x.element_size(), last = x.dim() - 1;
  bool aligned = reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0 && x.size(last) * size % 16 == 0;
  for (int64_t i = 0; i < last; ++i) aligned = aligned && (x.size(i) <= 1 || x.stride(i) * size % 16 == 0);
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

std::tuple<Tensor, Tensor, Tensor, Tensor> quadtree_level(
    const Tensor& queries_in,
    const Tensor& keys_in,
    const Tensor& values_in,
    const Tensor& parents,
    std::optional<Tensor> parent_scores,
    std::optional<Tensor> padding,
    int64_t topk,
    bool with_scores) {
  const QuadtreeShape s(queries_in, keys_in, parents, topk);
  const Tensor queries = with_dense_rows(queries_in), keys = with_dense_rows(keys_in),
               values = with_dense_rows(values_in);
  const QuadtreeOutputs out(s, values, parent_scores.has_value(), with_scores);
  const bool aligned =
      has_aligned_rows(queries) && has_aligned_rows(keys) && has_aligned_rows(values);
  if (s.items > 0) {
    dispatch(values.scalar_type(), [&](auto type) {
      using T = typename decltype(type)::type;
      using A = Accumulate<T>;
      with_pack<T>(aligned, [&](auto pack) {
        constexpr int N = decltype(pack)::value;
        launch_warps(
            forward<T, N, true>,
            forward<T, N, false>,
            s,
            forward_bytes<A>(s),
            values,
            view<const T, 5>(queries),
            view<const T, 4>(keys),
            view<const T, 4>(values),
            Parents{view<const int64_t, 4>(parents), optional_view<const bool, 1>(padding)},
            optional_view<const A, 4>(parent_scores),
            view<T, 5>(out.messages),
            optional_view<A, 5>(out.scores),
            optional_view<int64_t, 5>(out.indices),
            optional_view<int32_t, 5>(out.kept));
      });
    });
  }
  return {out.messages, out.scores, out.indices, out.kept};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> quadtree_level_backward(
    const Tensor& grad_messages,
    const Tensor& grad_scores,
    const Tensor& queries_in,
    const Tensor& keys_in,
    const Tensor& values_in,
    const Tensor& parents,
    std::optional<Tensor> parent_scores,
    std::optional<Tensor> padding,
    int64_t topk,
    bool with_scores,
    const Tensor& kept) {
  const QuadtreeShape s(queries_in, keys_in, parents, topk);
  const Tensor queries = with_dense_rows(queries_in), keys = with_dense_rows(keys_in),
               values = with_dense_rows(values_in), grad = with_dense_rows(grad_messages);
  const QuadtreeGradients out(s, values, parent_scores.has_value());
  const bool aligned = has_aligned_rows(queries) && has_aligned_rows(keys) &&
      has_aligned_rows(values) && has_aligned_rows(grad);
  if (s.items > 0) {
    dispatch(values.scalar_type(), [&](auto type) {
      using T = typename decltype(type)::type;
      using A = Accumulate<T>;
      with_pack<T>(aligned, [&](auto pack) {
        constexpr int N = decltype(pack)::value;
        launch_warps(
            backward<T, N, true>,
            backward<T, N, false>,
            s,
            backward_bytes<A>(s),
            values,
            view<const T, 5>(grad),
            optional_view<const A, 5>(grad_scores),
            view<const T, 5>(queries),
            view<const T, 4>(keys),
            view<const T, 4>(values),
            Parents{view<const int64_t, 4>(parents), optional_view<const bool, 1>(padding)},
            optional_view<const A, 4>(parent_scores),
            optional_view<const int32_t, 5>(kept),
            view<T, 5>(out.queries),
            view<A, 4>(out.keys),
            view<A, 4>(out.values),
            optional_view<A, 4>(out.parent_scores));
      });
    });
  }
  return out.returned(values.scalar_type());
}

}  // namespace
}  // namespace mmattn

MMATTN_CUDA_OPERATORS(m) {
  m.impl("quadtree_level", TORCH_BOX(&mmattn::quadtree_level));
  m.impl("quadtree_level_backward", TORCH_BOX(&mmattn::quadtree_level_backward));
}
