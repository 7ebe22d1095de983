// The operators' kernels for one instruction set; every source is compiled once for each, as MMATTN_ISA.
//
// Included once more for each instruction set by library.cpp, so there is no include guard.
#include "../common.h"

namespace mmattn::MMATTN_ISA {

Tensor deform_sample(const Tensor& x, const Tensor& positions);

std::tuple<Tensor, Tensor> deform_sample_backward(
    const Tensor& grad,
    const Tensor& x,
    const Tensor& positions,
    const Tensor& sampled);

std::tuple<Tensor, Tensor> deform_attention(
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& table,
    const Tensor& query_grid,
    const Tensor& key_positions,
    double scale);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> deform_attention_backward(
    const Tensor& grad,
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& table,
    const Tensor& query_grid,
    const Tensor& key_positions,
    double scale,
    const Tensor& out,
    const Tensor& lse);

std::tuple<Tensor, Tensor> neighborhood_attention(
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& rpb,
    int64_t kernel_size,
    double scale);

std::tuple<Tensor, Tensor, Tensor, Tensor> neighborhood_attention_backward(
    const Tensor& grad,
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& rpb,
    int64_t kernel_size,
    double scale,
    const Tensor& out,
    const Tensor& lse);

std::tuple<Tensor, Tensor, Tensor, Tensor> quadtree_level(
    const Tensor& queries,
    const Tensor& keys,
    const Tensor& values,
    const Tensor& parents,
    std::optional<Tensor> parent_scores,
    std::optional<Tensor> padding,
    int64_t topk,
    bool with_scores);

std::tuple<Tensor, Tensor, Tensor, Tensor> quadtree_level_backward(
    const Tensor& grad_messages,
    const Tensor& grad_scores,
    const Tensor& queries,
    const Tensor& keys,
    const Tensor& values,
    const Tensor& parents,
    std::optional<Tensor> parent_scores,
    std::optional<Tensor> padding,
    int64_t topk,
    bool with_scores,
    const Tensor& kept);

std::tuple<Tensor, Tensor> window_attention(
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& bias,
    const Tensor& pad_k,
    const Tensor& pad_v,
    int64_t window_size,
    int64_t shift);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> window_attention_backward(
    const Tensor& grad,
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& bias,
    const Tensor& pad_k,
    const Tensor& pad_v,
    int64_t window_size,
    int64_t shift,
    const Tensor& out,
    const Tensor& lse);

}  // namespace mmattn::MMATTN_ISA
