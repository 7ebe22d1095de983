// Tokens' channels in registers: neighboring lanes share a token, each with CHANNELS of its
// channels.
#pragma once

#include "launch.h"

#include <initializer_list>

namespace mmattn {

constexpr int CHANNELS = 32;  // of a lane
constexpr int LARGEST_DEPTH = 128;

// What memory is read and written in: neighboring channels, 16 bytes of the accumulating type.
template <class A>
constexpr int PACK = 16 / sizeof(A);

template <class T, int N>
struct alignas(N * sizeof(T)) Pack {
  T value[N];
};

struct Depth {
  int64_t d;
  int parts = 1;       // lanes of a token
  int channels;        // d padded to parts * CHANNELS, as it is in shared memory
  bool packed = true;  // whether the tensors can be read in packs

  Depth(int64_t d, const char* name, std::initializer_list<const Tensor*> tensors) : d(d) {
    STD_TORCH_CHECK(
        d <= LARGEST_DEPTH,
        name,
        " on CUDA takes d up to ",
        LARGEST_DEPTH,
        ", got ",
        d,
        "; MMATTN_OPS=reference has no limit");
    while (parts * CHANNELS < d) parts *= 2;
    channels = parts * CHANNELS;
    for (const Tensor* tensor : tensors) packed = packed && can_be_packed(*tensor);
  }

  static bool can_be_packed(const Tensor& tensor) {
    constexpr int MOST = PACK<float>;
    const int64_t last = tensor.dim() - 1;
    bool packed = tensor.stride(last) == 1 && tensor.size(last) % MOST == 0 &&
        reinterpret_cast<uintptr_t>(tensor.data_ptr()) % (MOST * tensor.element_size()) == 0;
    for (int64_t n = 0; n < last; ++n) packed = packed && tensor.stride(n) % MOST == 0;
    return packed;
  }
};

// The first channel of a lane's n-th pack: the lanes of a token take packs in turn.
template <class A>
__device__ inline int channel_of(int n, int part, const Depth& depth) {
  return (n * depth.parts + part) * PACK<A>;
}

// `scale` times the pack that begins at channel c of a token; zero beyond d.
template <class A, class T>
__device__ inline Pack<A, PACK<A>>
read_pack(const T* token, int64_t stride, int c, A scale, const Depth& depth) {
  constexpr int N = PACK<A>;
  Pack<A, N> result = {};
  if (depth.packed && c < depth.d) {
    const auto read = *reinterpret_cast<const Pack<T, N>*>(token + c);
#pragma unroll
    for (int i = 0; i < N; ++i) result.value[i] = scale * static_cast<A>(read.value[i]);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (c + i < depth.d) result.value[i] = scale * static_cast<A>(token[(c + i) * stride]);
  }
  return result;
}

// `scale` times the lane's channels of a token; zero beyond d, and where there is no token.
template <class T, class A>
__device__ inline void read_token(
    const T* token,
    int64_t stride,
    int part,
    A scale,
    A* to,
    const Depth& depth,
    bool exists) {
#pragma unroll
  for (int n = 0; n < CHANNELS / PACK<A>; ++n) {
    Pack<A, PACK<A>> pack = {};
    if (exists) pack = read_pack<A>(token, stride, channel_of<A>(n, part, depth), scale, depth);
#pragma unroll
    for (int i = 0; i < PACK<A>; ++i) to[n * PACK<A> + i] = pack.value[i];
  }
}

// The product of a token in registers with one in shared memory, in all lanes of the token.
template <class A>
__device__ inline A product(const A* mine, const A* token, int part, const Depth& depth) {
  A sums[PACK<A>] = {};  // several, as one would wait for each of its additions
#pragma unroll
  for (int n = 0; n < CHANNELS / PACK<A>; ++n) {
    const auto other =
        *reinterpret_cast<const Pack<A, PACK<A>>*>(token + channel_of<A>(n, part, depth));
#pragma unroll
    for (int i = 0; i < PACK<A>; ++i) sums[i] += mine[n * PACK<A> + i] * other.value[i];
  }
  A sum = 0;
#pragma unroll
  for (int i = 0; i < PACK<A>; ++i) sum += sums[i];
  for (int lane = 1; lane < depth.parts; lane *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lane);
  return sum;
}

}  // namespace mmattn
