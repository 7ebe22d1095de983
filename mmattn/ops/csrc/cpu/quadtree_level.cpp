// quadtree_level: four sibling queries attend to the children of the keys that their parent has
// kept.
#include "../checks.h"
#include "choose.h"
#include "families.h"

#include <atomic>

namespace mmattn {
namespace {

// Parents that a thread takes at least.
constexpr int64_t GRAIN = 16;
// Numbers that the backward pass keeps at a time between its two phases: few enough for the
// last cache, and enough that the threads seldom wait for each other.
constexpr int64_t NUMBERS_AT_A_TIME = 1 << 21;

// What the kept keys of an item are, and which of their children are padding.
template <class T>
class Candidates {
 public:
  Candidates(
      const QuadtreeShape& s,
      const Tensor& parents,
      const std::optional<Tensor>& padding,
      std::atomic<bool>& wrong)
      : s_(s),
        indices_(mmattn::view<const int64_t, 4>(parents)),
        padding_(optional_view<const bool, 1>(padding)),
        wrong_(wrong),
        parents_(s.families) {}

  const int64_t* read(QuadtreeItem at) {
    const int64_t* from = indices_.at(at.b, at.p, 0, at.h);
    for (int64_t i = 0; i < s_.families; ++i) {
      const int64_t parent = from[i * indices_.stride[2]];
      const bool inside = parent >= 0 && parent < s_.key_families;
      if (!inside) wrong_.store(true, std::memory_order_relaxed);
      parents_[i] = inside ? parent : 0;
    }
    return parents_;
  }

  bool padded() const { return padding_.data != nullptr; }
  bool outside(int64_t candidate) const {
    return *padding_.at(FAMILY * parents_[candidate / FAMILY] + candidate % FAMILY);
  }

  // Numbers (families, 16) of all queries and the padding.
  void fill_padding(Accumulate<T>* numbers, Accumulate<T> value) const {
    if (!padded()) return;
    for (int64_t n = 0; n < s_.candidates; ++n) {
      if (!outside(n)) continue;
      for (int q = 0; q < FAMILY; ++q) numbers[place(q, n)] = value;
    }
  }

  // Where the number of a query and a candidate is.
  static int64_t place(int query, int64_t candidate) {
    return candidate / FAMILY * PAIRS + query * FAMILY + candidate % FAMILY;
  }

 private:
  const QuadtreeShape& s_;
  View<const int64_t, 4> indices_;
  View<const bool, 1> padding_;
  std::atomic<bool>& wrong_;
  Buffer<int64_t> parents_;
};

void check_parents(const std::atomic<bool>& wrong, const QuadtreeShape& s) {
  STD_TORCH_CHECK(!wrong, "parents must be indices from 0 to ", s.key_families - 1, ", one is not");
}

// Type A: the numbers of each family times its parent's score.
template <class A>
void scale_families(
    A* numbers,
    const View<const A, 4>& scores,
    const QuadtreeShape& s,
    QuadtreeItem at) {
  for (int64_t i = 0; i < s.families; ++i) {
    const A score = *scores.at(at.b, at.p, i, at.h);
    for (int n = 0; n < PAIRS; ++n) numbers[i * PAIRS + n] *= score;
  }
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
  check_quadtree_level(queries_in, keys_in, values_in, parents, parent_scores, padding, topk);
  const QuadtreeShape s(queries_in, keys_in, parents, topk);
  const Tensor queries = with_dense_rows(queries_in), keys = with_dense_rows(keys_in),
               values = with_dense_rows(values_in);
  const bool type_a = parent_scores.has_value();
  const QuadtreeOutputs out(s, values, type_a, with_scores);
  std::atomic<bool> wrong = false;
  dispatch(values.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Accumulate<T>;
    const auto q = view<const T, 5>(queries);
    const auto own_scores = optional_view<const A, 4>(parent_scores);
    const auto message = view<T, 5>(out.messages);
    const auto score = optional_view<A, 5>(out.scores);
    const auto index = optional_view<int64_t, 5>(out.indices);
    const auto kept = optional_view<int32_t, 5>(out.kept);
    const int64_t width = pad_to_lanes<A>(s.depth);
    const A scale = 1 / std::sqrt(static_cast<A>(s.depth));

    torch::stable::parallel_for(0, s.items, GRAIN, [&](int64_t begin, int64_t end) {
      Candidates<T> candidates(s, parents, padding, wrong);
      Gathered<T> k(s, view<const T, 4>(keys)), v(s, view<const T, 4>(values));
      const Buffer<A> rows(FAMILY * width), p(PAIRS * s.families);
      const Choice<A> choice(s.candidates, s.kept);
      for (int64_t item = begin; item < end; ++item) {
        const QuadtreeItem at(s, item);
        const int64_t* own = candidates.read(at);
        k.gather(at.b, at.h, own);
        v.gather(at.b, at.h, own);
        read_rows(q, s, at, scale, rows);
        multiply(rows, k, s, p);
        candidates.fill_padding(p, -std::numeric_limits<A>::infinity());
        softmax<A>(p, s.families, type_a);
        if (type_a) scale_families<A>(p, own_scores, s, at);

        for (int query = 0; query < (s.kept > 0 ? FAMILY : 0); ++query) {
          OrderOf<A>* order = choice.order();
          for (int64_t i = 0; i < s.families; ++i)
            for (int c = 0; c < FAMILY; ++c)
              order[i * FAMILY + c] = order_of(p[i * PAIRS + query * FAMILY + c]);
          if (candidates.padded())
            for (int64_t n = 0; n < s.candidates; ++n)
              if (candidates.outside(n)) order[n] = choice.LAST;
          const int32_t* places = choice.choose();
          int64_t* to_index = index.at(at.b, at.p, query, 0, at.h);
          for (int64_t r = 0; r < s.kept; ++r)
            to_index[r * index.stride[3]] = FAMILY * own[places[r] / FAMILY] + places[r] % FAMILY;
          if (score.data == nullptr) continue;
          A* to_score = score.at(at.b, at.p, query, 0, at.h);
          for (int64_t r = 0; r < s.kept; ++r)
            to_score[r * score.stride[3]] = p[candidates.place(query, places[r])];
          if (!type_a) continue;
          std::copy_n(places, s.kept, kept.at(at.b, at.h, at.p, query));
          for (int64_t r = 0; r < s.kept; ++r)
            p[candidates.place(query, places[r])] = 0;  // the message leaves it to the next level
        }

        weigh(p, v, s, rows);
        for (int query = 0; query < FAMILY; ++query) {
          T* to = message.at(at.b, at.p, query, at.h);
          for (int64_t n = 0; n < s.depth; ++n) to[n] = static_cast<T>(rows[query * width + n]);
        }
      }
    });
  });
  check_parents(wrong, s);
  return {out.messages, out.scores, out.indices, out.kept};
}

// Two phases for some items at a time. First, for each item: probabilities and their gradients,
// from the scores again, and the gradient of its queries. Then for each key, in the order of the
// items: the gradients that they give to it. A thread has its share of the keys, so that none is
// written by two, and the sums do not depend on how many threads there are.
std::tuple<Tensor, Tensor, Tensor, Tensor> quadtree_level_backward(
    const Tensor& grad_messages_in,
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
  check_quadtree_level(queries_in, keys_in, values_in, parents, parent_scores, padding, topk);
  const QuadtreeShape s(queries_in, keys_in, parents, topk);
  const Tensor queries = with_dense_rows(queries_in), keys = with_dense_rows(keys_in),
               values = with_dense_rows(values_in), upstream = with_dense_rows(grad_messages_in);
  const bool type_a = parent_scores.has_value();
  check_quadtree_level_gradients(
      grad_messages_in, grad_scores, queries_in, type_a, with_scores, s.kept, kept);
  const QuadtreeGradients out(s, values, type_a);
  std::atomic<bool> wrong = false, wrong_kept = false;
  dispatch(values.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Accumulate<T>;
    const auto q = view<const T, 5>(queries), grad = view<const T, 5>(upstream);
    const auto own_scores = optional_view<const A, 4>(parent_scores);
    const auto score_grad = optional_view<const A, 5>(grad_scores);
    const auto chosen = optional_view<const int32_t, 5>(kept);
    const auto query_grad = view<T, 5>(out.queries);
    const auto key_grad = view<A, 4>(out.keys), value_grad = view<A, 4>(out.values);
    const auto own_score_grad = optional_view<A, 4>(out.parent_scores);
    const int64_t width = pad_to_lanes<A>(s.depth), numbers = PAIRS * s.families;
    const A scale = 1 / std::sqrt(static_cast<A>(s.depth));

    const int64_t per_item = 2 * numbers + 2 * FAMILY * width;
    const int64_t at_a_time = std::min(s.items, std::max(GRAIN, NUMBERS_AT_A_TIME / per_item));
    // For each item of the phase: queries and upstream gradients (4, width), p and its scores'
    // gradients.
    const Buffer<A> q_rows(at_a_time * FAMILY * width), grad_rows(at_a_time * FAMILY * width);
    const Buffer<A> p_all(at_a_time * numbers), ds_all(at_a_time * numbers);
    const Buffer<int64_t> parents_all(at_a_time * s.families);

    const auto differentiate = [&](int64_t first, int64_t begin, int64_t end) {
      Candidates<T> candidates(s, parents, padding, wrong);
      Gathered<T> k(s, view<const T, 4>(keys)), v(s, view<const T, 4>(values));
      const Buffer<A> rows(FAMILY * width);
      for (int64_t i = begin; i < end; ++i) {
        const QuadtreeItem at(s, first + i);
        A* p = p_all + i * numbers;
        A* ds = ds_all + i * numbers;
        const int64_t* own = candidates.read(at);
        std::copy_n(own, s.families, parents_all + i * s.families);
        k.gather(at.b, at.h, own);
        v.gather(at.b, at.h, own);
        read_rows(q, s, at, scale, q_rows + i * FAMILY * width);
        read_rows(grad, s, at, A(1), grad_rows + i * FAMILY * width);
        multiply(q_rows + i * FAMILY * width, k, s, p);
        candidates.fill_padding(p, -std::numeric_limits<A>::infinity());
        softmax<A>(p, s.families, type_a);
        multiply(grad_rows + i * FAMILY * width, v, s, ds);

        if (type_a) {
          const auto for_each_kept = [&](const auto& f) {
            for (int query = 0; query < FAMILY; ++query)
              for (int64_t r = 0; r < s.kept; ++r) {
                const int64_t candidate = *chosen.at(at.b, at.h, at.p, query, r);
                if (candidate >= 0 && candidate < s.candidates)
                  f(query, r, candidates.place(query, candidate));
                else
                  wrong_kept.store(true, std::memory_order_relaxed);
              }
          };
          for_each_kept([&](int query, int64_t r, int64_t place) {
            ds[place] = *score_grad.at(at.b, at.p, query, r, at.h);
          });
          for (int64_t n = 0; n < s.families; ++n) {
            const A score = *own_scores.at(at.b, at.p, n, at.h);
            A sum = 0;
            for (int query = 0; query < FAMILY; ++query) {
              A* p4 = p + n * PAIRS + query * FAMILY;
              A* ds4 = ds + n * PAIRS + query * FAMILY;
              A dot = 0;
              for (int c = 0; c < FAMILY; ++c) dot += p4[c] * ds4[c];
              sum += dot;
              for (int c = 0; c < FAMILY; ++c) {
                p4[c] *= score;
                ds4[c] = p4[c] * (ds4[c] - dot);
              }
            }
            *own_score_grad.at(at.b, at.p, n, at.h) = sum;
          }
          for_each_kept([&](int, int64_t, int64_t place) { p[place] = 0; });
        } else {
          A dots[PAIRS] = {};
          for (int64_t n = 0; n < s.families; ++n)
            for (int l = 0; l < PAIRS; ++l) dots[l] += p[n * PAIRS + l] * ds[n * PAIRS + l];
          for (int l = 0; l < PAIRS; l += FAMILY) {
            const A dot = (dots[l] + dots[l + 1]) + (dots[l + 2] + dots[l + 3]);
            for (int c = 0; c < FAMILY; ++c) dots[l + c] = dot;
          }
          for (int64_t n = 0; n < s.families; ++n)
            for (int l = 0; l < PAIRS; ++l)
              ds[n * PAIRS + l] = p[n * PAIRS + l] * (ds[n * PAIRS + l] - dots[l]);
        }

        weigh(ds, k, s, rows);
        for (int query = 0; query < FAMILY; ++query) {
          T* to = query_grad.at(at.b, at.p, query, at.h);
          for (int64_t n = 0; n < s.depth; ++n)
            to[n] = static_cast<T>(rows[query * width + n] * scale);
        }
      }
    };

    // Key families are hashed to threads, so that neighbors land on different ones.
    const uint64_t owners = torch::stable::get_num_threads();
    const auto owner_of = [=](int64_t family) {
      return static_cast<uint32_t>(family) * 2654435769u * owners >> 32;
    };
    const auto add_to_keys = [&](int64_t first, int64_t items, uint64_t owner) {
      for (int64_t i = 0; i < items; ++i) {
        const QuadtreeItem at(s, first + i);
        const A* q4 = q_rows + i * FAMILY * width;
        const A* grad4 = grad_rows + i * FAMILY * width;
        for (int64_t n = 0; n < s.families; ++n) {
          const int64_t family = parents_all[i * s.families + n];
          if (owner_of(family) != owner) continue;
          const A* ds = ds_all + i * numbers + n * PAIRS;
          const A* p = p_all + i * numbers + n * PAIRS;
          add_rows(ds, q4, width, s.depth, key_grad.at(at.b, at.h, FAMILY * family));
          add_rows(p, grad4, width, s.depth, value_grad.at(at.b, at.h, FAMILY * family));
        }
      }
    };

    for (int64_t first = 0; first < s.items; first += at_a_time) {
      const int64_t items = std::min(at_a_time, s.items - first);
      torch::stable::parallel_for(
          0, items, GRAIN, [&](int64_t begin, int64_t end) { differentiate(first, begin, end); });
      torch::stable::parallel_for(0, owners, 1, [&](int64_t begin, int64_t end) {
        for (int64_t owner = begin; owner < end; ++owner) add_to_keys(first, items, owner);
      });
    }
  });
  check_parents(wrong, s);
  STD_TORCH_CHECK(
      !wrong_kept, "kept must be candidates from 0 to ", s.candidates - 1, ", one is not");
  return out.returned(values.scalar_type());
}

}  // namespace
}  // namespace mmattn

STABLE_TORCH_LIBRARY_IMPL(mmattn, CPU, m) {
  m.impl("quadtree_level", TORCH_BOX(&mmattn::quadtree_level));
  m.impl("quadtree_level_backward", TORCH_BOX(&mmattn::quadtree_level_backward));
}
