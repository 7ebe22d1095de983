// Checks of the operators' arguments before a number is read or written: a kernel that trusts a
// wrong size, dtype or integer reads and writes outside its tensors.
#pragma once

#include "common.h"

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <string>

namespace mmattn {

constexpr int64_t ANY = -1;  // a size that may be any
// Numbers that a tensor or a buffer may have: no memory has more, and in bytes they fit an int64_t.
// Expanded tensors may have more.
constexpr int64_t MOST_NUMBERS = int64_t(1) << 48;

template <class Sizes>
std::string text_of(const Sizes& sizes) {
  std::string text;
  for (const int64_t n : sizes)
    text += (text.empty() ? "" : ", ") + (n == ANY ? std::string("any") : std::to_string(n));
  return "(" + text + ")";
}

inline void check_dtype(const char* name, const Tensor& x, ScalarType dtype) {
  STD_TORCH_CHECK(
      x.scalar_type() == dtype,
      name,
      " must be ",
      torch::headeronly::toString(dtype),
      ", got ",
      torch::headeronly::toString(x.scalar_type()));
}

inline void check_range(const char* name, int64_t value, int64_t low, int64_t high) {
  STD_TORCH_CHECK(
      low <= value && value <= high, name, " must be from ", low, " to ", high, ", got ", value);
}

// Sizes that are 0 count as 1, so that no part of the product overflows either.
template <class Sizes>
void check_count(const char* name, const Sizes& sizes) {
  int64_t count = 1;
  for (const int64_t n : sizes) {
    STD_TORCH_CHECK(
        n <= MOST_NUMBERS / count,
        name,
        " must have at most ",
        MOST_NUMBERS,
        " numbers, got ",
        text_of(sizes));
    count *= std::max<int64_t>(n, 1);
  }
}

inline void check_sizes(const char* name, const Tensor& x, std::initializer_list<int64_t> sizes) {
  const auto own = x.sizes();
  const bool fits = std::equal(
      own.begin(), own.end(), sizes.begin(), sizes.end(), [](int64_t size, int64_t expected) {
        return expected == ANY || size == expected;
      });
  STD_TORCH_CHECK(fits, name, " must have the shape ", text_of(sizes), ", got ", text_of(own));
  check_count(name, own);
}

inline void check_tensor(
    const char* name,
    const Tensor& x,
    std::initializer_list<int64_t> sizes,
    ScalarType dtype) {
  check_sizes(name, x, sizes);
  check_dtype(name, x, dtype);
}

// The dtype of a tensor of values, one that the kernels are compiled for.
inline ScalarType
check_values(const char* name, const Tensor& x, std::initializer_list<int64_t> sizes) {
  check_sizes(name, x, sizes);
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::Half ||
          dtype == ScalarType::BFloat16,
      name,
      " must be float32, float64, float16 or bfloat16, got ",
      torch::headeronly::toString(dtype));
  return dtype;
}

inline void check_window_attention(
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& bias,
    const Tensor& pad_k,
    const Tensor& pad_v,
    int64_t window_size,
    int64_t shift) {
  const ScalarType dtype = check_values("k", k, {ANY, ANY, ANY, ANY, ANY});
  const int64_t batch = k.size(0), height = k.size(1), width = k.size(2), heads = k.size(3),
                d = k.size(4);
  check_tensor("v", v, {batch, height, width, heads, d}, dtype);
  STD_TORCH_CHECK(d > 0, "k must have at least one channel a head, got ", text_of(k.sizes()));
  check_range("window_size", window_size, 1, 1 << 15);  // its fourth power fits an int64_t
  check_range("shift", shift, 0, window_size - 1);
  check_tensor("q", q, {batch, ANY, ANY, heads, d}, dtype);
  const bool shared = q.size(1) != height || q.size(2) != width;
  STD_TORCH_CHECK(
      !shared || (q.size(1) == window_size && q.size(2) == window_size && shift == 0),
      "q must have the shape ",
      text_of(k.sizes()),
      ", or as a shared query, without a shift, ",
      text_of(std::initializer_list<int64_t>{batch, window_size, window_size, heads, d}),
      ", got ",
      text_of(q.sizes()),
      " with shift ",
      shift);
  const int64_t tokens = window_size * window_size;
  check_tensor("bias", bias, {heads, tokens, tokens}, accumulate_dtype(dtype));
  check_tensor("pad_k", pad_k, {heads, d}, dtype);
  check_tensor("pad_v", pad_v, {heads, d}, dtype);
  // Of the parts that are summed up, and of a window's keys, padded.
  using Sizes = std::initializer_list<int64_t>;
  check_count("the gradients of bias", Sizes{heads + 32, tokens, tokens});
  check_count("the gradients of q", Sizes{batch + 32, heads, tokens, d});
  check_count("a window", Sizes{tokens + 256, d + 256});
}

inline void check_neighborhood_attention(
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& rpb,
    int64_t kernel_size) {
  const ScalarType dtype = check_values("q", q, {ANY, ANY, ANY, ANY, ANY});
  const int64_t batch = q.size(0), height = q.size(1), width = q.size(2), heads = q.size(3),
                d = q.size(4);
  STD_TORCH_CHECK(d > 0, "q must have at least one channel a head, got ", text_of(q.sizes()));
  check_tensor("k", k, {batch, height, width, heads, d}, dtype);
  check_tensor("v", v, {batch, height, width, heads, d}, dtype);
  STD_TORCH_CHECK(
      kernel_size > 0 && kernel_size % 2 == 1 && kernel_size <= std::min(height, width),
      "kernel_size must be odd, positive and at most the map's height and width, got ",
      kernel_size,
      " with q ",
      text_of(q.sizes()));
  const int64_t offsets = 2 * kernel_size - 1;
  check_tensor("rpb", rpb, {heads, offsets, offsets}, accumulate_dtype(dtype));
  // Of a row of queries, and of the rows of keys that it attends to, padded.
  using Sizes = std::initializer_list<int64_t>;
  check_count("the scores of a row", Sizes{width, kernel_size + 1, kernel_size + 16});
  check_count("the keys of a row", Sizes{kernel_size, width + 32, d + 32});
}

inline void check_deform_sample(const Tensor& x, const Tensor& positions) {
  const ScalarType dtype = check_values("x", x, {ANY, ANY, ANY, ANY});
  STD_TORCH_CHECK(
      x.size(1) > 0 && x.size(2) > 0 && x.size(3) > 0,
      "x must have at least one channel and one cell, got ",
      text_of(x.sizes()));
  check_tensor("positions", positions, {x.size(0), ANY, ANY, 2}, accumulate_dtype(dtype));
  const int64_t groups = positions.size(1);
  STD_TORCH_CHECK(
      groups > 0 && x.size(1) % groups == 0,
      "the channels of x must be a multiple of the groups of positions, got ",
      x.size(1),
      " and ",
      groups);
}

inline void check_deform_attention(
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& table,
    const Tensor& query_grid,
    const Tensor& key_positions) {
  const ScalarType dtype = check_values("q", q, {ANY, ANY, ANY, ANY});
  const ScalarType accumulate = accumulate_dtype(dtype);
  const int64_t batch = q.size(0), heads = q.size(1), queries = q.size(2), d = q.size(3);
  check_tensor("k", k, {batch, heads, ANY, d}, dtype);
  const int64_t keys = k.size(2);
  STD_TORCH_CHECK(heads > 0 && keys > 0 && d > 0, "k must not be empty, got ", text_of(k.sizes()));
  check_tensor("v", v, {batch, heads, keys, d}, dtype);
  check_tensor("table", table, {heads, ANY, ANY}, accumulate);
  // Sides that float32 has exactly; and cells, with the border, that an int32_t can count.
  const int64_t side = 1 << 24;
  check_range("the height of table", table.size(1), 1, side);
  check_range("the width of table", table.size(2), 1, side);
  STD_TORCH_CHECK(
      (table.size(1) + 3) * (table.size(2) + 3) <= std::numeric_limits<int32_t>::max(),
      "table must have fewer than 2**31 cells a head, with a border of 3, got ",
      text_of(table.sizes()));
  check_tensor("query_grid", query_grid, {queries, 2}, accumulate);
  check_tensor("key_positions", key_positions, {batch, ANY, keys, 2}, accumulate);
  const int64_t groups = key_positions.size(1);
  STD_TORCH_CHECK(
      groups > 0 && heads % groups == 0,
      "the heads of q must be a multiple of the groups of key_positions, got ",
      heads,
      " and ",
      groups);
  // Of a head, padded.
  using Sizes = std::initializer_list<int64_t>;
  check_count("the queries of a head", Sizes{queries, d + 256});
  check_count("the keys of a head", Sizes{keys + 256, d + 256});
}

inline void check_quadtree_level(
    const Tensor& queries,
    const Tensor& keys,
    const Tensor& values,
    const Tensor& parents,
    const std::optional<Tensor>& parent_scores,
    const std::optional<Tensor>& padding,
    int64_t topk) {
  const ScalarType dtype = check_values("queries", queries, {ANY, ANY, 4, ANY, ANY});
  const int64_t batch = queries.size(0), count = queries.size(1), heads = queries.size(3),
                d = queries.size(4);
  check_tensor("keys", keys, {batch, ANY, heads, d}, dtype);
  STD_TORCH_CHECK(
      d > 0 && keys.size(1) % 4 == 0,
      "keys must be 4 children of each parent, with at least one channel, got ",
      text_of(keys.sizes()));
  check_tensor("values", values, {batch, keys.size(1), heads, d}, dtype);
  check_tensor("parents", parents, {batch, count, ANY, heads}, ScalarType::Long);
  const int64_t families = parents.size(2);
  if (parent_scores.has_value())
    check_tensor(
        "parent_scores", *parent_scores, {batch, count, families, heads}, accumulate_dtype(dtype));
  if (padding.has_value()) check_tensor("padding", *padding, {keys.size(1)}, ScalarType::Bool);
  STD_TORCH_CHECK(topk >= 0, "topk must be at least 0, which chooses nothing, got ", topk);
  // Of a query, padded.
  check_count("the candidates", std::initializer_list<int64_t>{4 * families, d + 256});
}

// What quadtree_level's gradient takes beyond its arguments; `kept`: candidates that are kept.
inline void check_quadtree_level_gradients(
    const Tensor& grad_messages,
    const Tensor& grad_scores,
    const Tensor& queries,
    bool type_a,
    bool with_scores,
    int64_t kept,
    const Tensor& kept_candidates) {
  const ScalarType dtype = queries.scalar_type();
  const int64_t batch = queries.size(0), count = queries.size(1), heads = queries.size(3);
  check_tensor("grad_messages", grad_messages, {batch, count, 4, heads, queries.size(4)}, dtype);
  check_dtype("grad_scores", grad_scores, accumulate_dtype(dtype));
  check_dtype("kept", kept_candidates, ScalarType::Int);
  // Outputs that are not there are empty.
  if (kept > 0 && (type_a || with_scores))
    check_sizes("grad_scores", grad_scores, {batch, count, 4, kept, heads});
  else
    STD_TORCH_CHECK(
        grad_scores.numel() == 0, "grad_scores must be empty, got ", text_of(grad_scores.sizes()));
  if (kept > 0 && type_a)
    check_sizes("kept", kept_candidates, {batch, heads, count, 4, kept});
  else
    STD_TORCH_CHECK(
        kept_candidates.numel() == 0, "kept must be empty, got ", text_of(kept_candidates.sizes()));
}

}  // namespace mmattn
