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

}  // namespace mmattn::MMATTN_ISA
