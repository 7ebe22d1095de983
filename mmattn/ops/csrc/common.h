// Shared by the kernels of all operators on all devices: dtypes and strided tensors.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/macros/Macros.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

namespace mmattn {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Type in which values of type T are accumulated.
template <class T>
using Accumulate = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline ScalarType accumulate_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

template <class T>
struct Type {
  using type = T;
};

// Calls f(Type<T>{}) for the element type of a dtype.
template <class F>
auto dispatch(ScalarType dtype, F&& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(Type<float>{});
    case ScalarType::Double:
      return f(Type<double>{});
    case ScalarType::Half:
      return f(Type<Half>{});
    default:
      STD_TORCH_CHECK(
          dtype == ScalarType::BFloat16,
          "expected float32, float64, float16 or bfloat16, got ",
          torch::headeronly::toString(dtype));
      return f(Type<BFloat16>{});
  }
}

// Non-owning D-dimensional view: data pointer and strides, no sizes.
template <class T, int D>
struct View {
  T* data;
  int64_t stride[D];

  template <class... I>
  C10_HOST_DEVICE T* at(I... index) const {
    static_assert(sizeof...(I) <= D);
    const int64_t i[] = {static_cast<int64_t>(index)...};
    int64_t offset = 0;
    for (int n = 0; n < static_cast<int>(sizeof...(I)); ++n) offset += i[n] * stride[n];
    return data + offset;
  }
};

template <class T, int D>
View<T, D> view(const Tensor& x) {
  constexpr ScalarType dtype =
      torch::headeronly::CppTypeToScalarType<std::remove_const_t<T>>::value;
  STD_TORCH_CHECK(x.dim() == D, "expected ", D, " dimensions, got ", x.dim());
  STD_TORCH_CHECK(
      x.scalar_type() == dtype,
      "expected ",
      torch::headeronly::toString(dtype),
      ", got ",
      torch::headeronly::toString(x.scalar_type()));
  View<T, D> result;
  result.data = static_cast<T*>(x.data_ptr());
  for (int n = 0; n < D; ++n) result.stride[n] = x.stride(n);
  return result;
}

// x, or a copy of it, with a contiguous last dimension.
inline Tensor with_dense_rows(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  return x.size(last) <= 1 || x.stride(last) == 1 ? x : torch::stable::contiguous(x);
}

inline Tensor empty(const std::vector<int64_t>& size, const Tensor& like, ScalarType dtype) {
  return torch::stable::new_empty(like, size, dtype);
}

inline Tensor zeros(const std::vector<int64_t>& size, const Tensor& like, ScalarType dtype) {
  return torch::stable::new_zeros(like, size, dtype);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace mmattn
