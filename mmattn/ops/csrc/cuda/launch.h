// What the CUDA kernels share: the way to launch one, and to register an operator.
//
// With MMATTN_ON_HOST the same sources are compiled by a C++ compiler against a stand-in for CUDA
// that runs a block's threads one after another on the CPU (tests/helpers/cuda_on_host.h), so that
// the kernels are tested where there is no GPU.
#pragma once

#include "../common.h"

#ifdef MMATTN_ON_HOST

#include "cuda_on_host.h"

#define MMATTN_CUDA_OPERATORS(m) STABLE_TORCH_LIBRARY_IMPL(mmattn_on_host, CPU, m)

#else

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#define MMATTN_CUDA_OPERATORS(m) STABLE_TORCH_LIBRARY_IMPL(mmattn, CUDA, m)

namespace mmattn {

// Runs a kernel on the current stream of a tensor's device.
template <class... Parameters, class... Arguments>
void launch(
    void (*kernel)(Parameters...),
    dim3 grid,
    dim3 block,
    size_t shared_bytes,
    const Tensor& on,
    Arguments&&... arguments) {
  const int32_t device = on.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  if (shared_bytes > 48 * 1024) {  // more than that is given only when asked for
    cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  }
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(
      static_cast<Parameters>(arguments)...);
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "CUDA kernel launch failed: ", cudaGetErrorString(error));
}

}  // namespace mmattn

// Memory of a block whose size the launch gives, as T*.
#define MMATTN_DYNAMIC_SHARED(T, name)                                 \
  extern __shared__ __align__(16) unsigned char mmattn_shared_bytes[]; \
  T* name = reinterpret_cast<T*>(mmattn_shared_bytes)

#endif

namespace mmattn {

constexpr int WARP = 32;

// The sum of a value over the lanes of a warp, in every lane.
template <class A>
__device__ inline A warp_sum(A value) {
  for (int lane = WARP / 2; lane > 0; lane /= 2) value += __shfl_xor_sync(0xffffffffu, value, lane);
  return value;
}

// The greatest of a value over the lanes of a warp, in every lane.
template <class A>
__device__ inline A warp_max(A value) {
  for (int lane = WARP / 2; lane > 0; lane /= 2) {
    const A other = __shfl_xor_sync(0xffffffffu, value, lane);
    value = other > value ? other : value;
  }
  return value;
}

}  // namespace mmattn
