// quadtree_level: sizes, and where its tensors have their numbers, on any device.
#pragma once

#include "common.h"

#include <algorithm>
#include <optional>

namespace mmattn {
namespace {

// Queries and keys come in families: the four children of a token of the next coarser level.
constexpr int FAMILY = 4;

struct QuadtreeShape {
  int64_t batch, heads, depth;
  int64_t parents;       // of the queries
  int64_t families;      // of keys that each parent has kept: K
  int64_t candidates;    // their children
  int64_t kept;          // candidates that each query keeps, 0 where nothing is chosen
  int64_t key_families;  // of all keys
  int64_t items;         // parents of all images and heads, which are worked on independently

  QuadtreeShape(const Tensor& queries, const Tensor& keys, const Tensor& indices, int64_t topk)
      : batch(queries.size(0)),
        heads(queries.size(3)),
        depth(queries.size(4)),
        parents(queries.size(1)),
        families(indices.size(2)),
        candidates(FAMILY * families),
        kept(std::min(topk, candidates)),
        key_families(keys.size(1) / FAMILY),
        items(batch * parents * heads) {
    STD_TORCH_CHECK(
        key_families > 0 || families == 0 || items == 0,
        "parents must be indices below the number of keys / 4, but there are no keys");
    STD_TORCH_CHECK(candidates <= INT32_MAX, "parents has too many keys for each query");
  }
};

// Which image, head and parent an item is; items of a head are neighbors, as their keys are.
struct QuadtreeItem {
  int64_t b, h, p;

  C10_HOST_DEVICE QuadtreeItem(const QuadtreeShape& s, int64_t item)
      : b(item / s.parents / s.heads), h(item / s.parents % s.heads), p(item % s.parents) {}
};

// (B, heads, P, 4, n) in memory, as (B, P, 4, heads, n).
inline Tensor heads_outermost(const Tensor& memory) {
  return torch::stable::transpose(torch::stable::transpose(memory, 1, 2), 2, 3);
}

struct QuadtreeOutputs {
  Tensor messages, scores, indices, kept;

  QuadtreeOutputs(const QuadtreeShape& s, const Tensor& values, bool type_a, bool with_scores) {
    const auto make = [&](ScalarType dtype, int64_t numbers) {
      return empty({s.batch, s.heads, s.parents, FAMILY, numbers}, values, dtype);
    };
    const auto nothing = [&](ScalarType dtype) { return empty({0}, values, dtype); };
    const auto by_rank = [&](ScalarType dtype) {
      return torch::stable::transpose(heads_outermost(make(dtype, s.kept)), 3, 4);
    };
    const bool chooses = s.kept > 0, scored = chooses && (type_a || with_scores);
    const ScalarType accumulate = accumulate_dtype(values.scalar_type());
    messages = heads_outermost(make(values.scalar_type(), s.depth));
    scores = scored ? by_rank(accumulate) : nothing(accumulate);
    indices = chooses ? by_rank(ScalarType::Long) : nothing(ScalarType::Long);
    kept = chooses && type_a ? make(ScalarType::Int, s.kept) : nothing(ScalarType::Int);
  }
};

struct QuadtreeGradients {
  Tensor queries, keys, values,
      parent_scores;  // of keys and values (B, heads, M, d), to be summed up

  QuadtreeGradients(const QuadtreeShape& s, const Tensor& like, bool type_a) {
    const ScalarType dtype = like.scalar_type(), accumulate = accumulate_dtype(dtype);
    const int64_t count = FAMILY * s.key_families;
    queries = heads_outermost(empty({s.batch, s.heads, s.parents, FAMILY, s.depth}, like, dtype));
    keys = zeros({s.batch, s.heads, count, s.depth}, like, accumulate);
    values = zeros({s.batch, s.heads, count, s.depth}, like, accumulate);
    parent_scores = empty({0}, like, accumulate);
    if (!type_a) return;
    parent_scores = empty({s.batch, s.heads, s.parents, s.families}, like, accumulate);
    parent_scores = torch::stable::transpose(torch::stable::transpose(parent_scores, 1, 2), 2, 3);
  }

  std::tuple<Tensor, Tensor, Tensor, Tensor> returned(ScalarType dtype) const {
    return {
        queries,
        torch::stable::transpose(torch::stable::to(keys, dtype), 1, 2),
        torch::stable::transpose(torch::stable::to(values, dtype), 1, 2),
        parent_scores};
  }
};

// A view of a tensor that may not be there, or that is empty in place of that: then its data is
// null.
template <class T, int D>
View<T, D> optional_view(const Tensor& x) {
  return x.dim() == D ? view<T, D>(x) : View<T, D>{};
}
template <class T, int D>
View<T, D> optional_view(const std::optional<Tensor>& x) {
  return x.has_value() ? view<T, D>(*x) : View<T, D>{};
}

}  // namespace
}  // namespace mmattn
