// Gradients of quadtree_level.
#include "quadtree_warp.h"

namespace mmattn {
namespace {

// Channels of a lane in the second part of the backward pass.
constexpr int SLICES = 2;

template <class A>
int64_t backward_bytes(const QuadtreeShape& s) {
  return 2 * s.candidates * sizeof(Four<A>);
}

// p: the probabilities with which the message was formed. ds: gradients of p -> gradients of the
// scores.
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

// Lanes are channels, so that the additions of a warp to a key's gradient are to one piece of
// memory.
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
  m.impl("quadtree_level_backward", TORCH_BOX(&mmattn::quadtree_level_backward));
}
