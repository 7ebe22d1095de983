// quadtree_level: four sibling queries attend to the children of the keys that their parent kept.
#include "quadtree_warp.h"

namespace mmattn {
namespace {

// An integer with the order of the floating-point number; both zeros are equal.
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

// places: those of the greatest numbers of a query, in their order. Returns nothing else; `kept`
// are there.
template <class A>
__device__ void choose(const QuadtreeShape& s, const Four<A>* numbers, int q, int32_t* places) {
  using Order = decltype(order_of(A(0)));
  using Distance = std::make_unsigned_t<Order>;
  const int lane = threadIdx.x;
  const auto count_if = [&](const auto& holds) {
    int count = 0;
    for (int64_t n = lane; n < s.candidates; n += WARP)
      count += holds(order_of(numbers[n].query[q]));
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
  // By bisection: the kept-th greatest, or a lower number than that which exactly as many are not
  // below.
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
    const bool take =
        there && (own > least || (own == least && __popc(equal & lanes_before) < equals));
    const unsigned all = __ballot_sync(ALL_LANES, take);
    if (take) places[taken + __popc(all & lanes_before)] = static_cast<int32_t>(n);
    equals -= __popc(equal);
    taken += __popc(all);
  }
  __syncwarp();
}

// How many of a query's kept candidates come before the r-th of them.
template <class A>
__device__ int64_t
rank_of(const QuadtreeShape& s, const Four<A>* numbers, int q, const int32_t* places, int64_t r) {
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
    if (s.kept > 0)
      fill_padding(parents, s, at, -infinite<A>(), numbers);  // chosen after all others
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

}  // namespace
}  // namespace mmattn

MMATTN_CUDA_OPERATORS(m) { m.impl("quadtree_level", TORCH_BOX(&mmattn::quadtree_level)); }
