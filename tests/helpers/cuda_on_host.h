// A stand-in for CUDA that runs kernels on the CPU: a block's threads are fibers, one after another.
//
// A fiber runs until it ends or waits for others at a barrier or in a warp exchange; then the next one
// runs. That checks the kernels' arithmetic, indices and barriers, not their races or their speed.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_host {

constexpr int WARP_LANES = 32;
constexpr size_t STACK_BYTES = 128 * 1024;

struct Fiber {
  ucontext_t first;  // where it begins
  jmp_buf context;  // where it goes on; changing to it takes no system call
  bool begun = false;
  std::vector<char> stack = std::vector<char>(STACK_BYTES);
  dim3 thread;
  bool ended = false;
  int64_t block_barriers = 0, warp_barriers = 0;  // how many it has reached
};

struct Block {
  std::vector<Fiber> fibers;
  jmp_buf scheduler;
  size_t current = 0;
  std::function<void()> body;
  std::vector<uint64_t> exchanged;  // a slot for each thread
  std::vector<unsigned char> shared;
};

inline Block block;

inline void yield() {
  if (_setjmp(block.fibers[block.current].context) == 0) _longjmp(block.scheduler, 1);
}

inline void resume(Fiber& fiber) {
  if (_setjmp(block.scheduler) != 0) return;
  if (fiber.begun) _longjmp(fiber.context, 1);
  fiber.begun = true;
  setcontext(&fiber.first);
}

// Waits until all threads of [first, last) that have not ended have reached the barrier.
inline void wait(size_t first, size_t last, int64_t Fiber::* reached) {
  const int64_t mine = ++(block.fibers[block.current].*reached);
  const auto all_there = [&] {
    for (size_t i = first; i < last; ++i)
      if (!block.fibers[i].ended && block.fibers[i].*reached < mine) return false;
    return true;
  };
  while (!all_there()) yield();
}

inline void warp_wait() {
  const size_t first = block.current / WARP_LANES * WARP_LANES;
  wait(first, std::min(first + WARP_LANES, block.fibers.size()), &Fiber::warp_barriers);
}

// The value that another lane of the warp gave to the same call.
template <class V>
V exchange(V value, int lane) {
  static_assert(sizeof(V) <= sizeof(uint64_t));
  const size_t first = block.current / WARP_LANES * WARP_LANES;
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(V));
  block.exchanged[block.current] = bits;
  warp_wait();
  const size_t from = std::min(first + lane, block.fibers.size() - 1);
  bits = block.exchanged[from];
  std::memcpy(&value, &bits, sizeof(V));
  warp_wait();
  return value;
}

// f(values that the lanes of the warp gave to the same call, number of lanes).
template <class F>
auto over_warp(uint64_t value, const F& f) {
  const size_t first = block.current / WARP_LANES * WARP_LANES;
  block.exchanged[block.current] = value;
  warp_wait();
  const int lanes = static_cast<int>(std::min<size_t>(WARP_LANES, block.fibers.size() - first));
  const auto result = f(&block.exchanged[first], lanes);
  warp_wait();
  return result;
}

inline int lane() { return static_cast<int>(block.current % WARP_LANES); }

inline void enter() {
  block.body();
  block.fibers[block.current].ended = true;
  block.exchanged[block.current] = 0;  // its vote, should the others go on voting
  yield();
}

inline void run_block() {
  for (Fiber& fiber : block.fibers) {
    fiber.ended = fiber.begun = false;
    fiber.block_barriers = fiber.warp_barriers = 0;
    getcontext(&fiber.first);
    fiber.first.uc_stack.ss_sp = fiber.stack.data();
    fiber.first.uc_stack.ss_size = fiber.stack.size();
    fiber.first.uc_link = nullptr;  // enter() does not return
    makecontext(&fiber.first, enter, 0);
  }
  for (bool waiting = true; waiting;) {
    waiting = false;
    for (block.current = 0; block.current < block.fibers.size(); ++block.current) {
      Fiber& fiber = block.fibers[block.current];
      if (fiber.ended) continue;
      threadIdx = fiber.thread;
      resume(fiber);
      waiting = waiting || !fiber.ended;
    }
  }
}

}  // namespace cuda_on_host

inline void __syncthreads() {
  using namespace cuda_on_host;
  wait(0, block.fibers.size(), &Fiber::block_barriers);
}
inline void __syncwarp(unsigned = 0xffffffffu) { cuda_on_host::warp_wait(); }

template <class V>
V __shfl_sync(unsigned, V value, int lane) {
  return cuda_on_host::exchange(value, lane % cuda_on_host::WARP_LANES);
}
template <class V>
V __shfl_xor_sync(unsigned, V value, int mask) {
  return cuda_on_host::exchange(value, cuda_on_host::lane() ^ mask);
}
template <class V>
V __shfl_up_sync(unsigned, V value, int delta) {
  const int lane = cuda_on_host::lane();
  return cuda_on_host::exchange(value, lane >= delta ? lane - delta : lane);
}
template <class V>
V __shfl_down_sync(unsigned, V value, int delta) {
  const int lane = cuda_on_host::lane() + delta;
  return cuda_on_host::exchange(value, lane < cuda_on_host::WARP_LANES ? lane : lane - delta);
}
inline unsigned __ballot_sync(unsigned, int predicate) {
  return cuda_on_host::over_warp(predicate != 0 ? 1 : 0, [](const uint64_t* of_lane, int lanes) {
    unsigned votes = 0;
    for (int i = 0; i < lanes; ++i) votes |= static_cast<unsigned>(of_lane[i]) << i;
    return votes;
  });
}
inline int __reduce_add_sync(unsigned, int value) {
  return cuda_on_host::over_warp(value, [](const uint64_t* of_lane, int lanes) {
    int sum = 0;
    for (int i = 0; i < lanes; ++i) sum += static_cast<int>(of_lane[i]);
    return sum;
  });
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }

template <class V>
V atomicAdd(V* at, V value) {
  const V before = *at;
  *at = before + value;
  return before;
}

template <class V>
V __ldg(const V* at) {
  return *at;
}

#define MMATTN_DYNAMIC_SHARED(T, name) \
  T* name = reinterpret_cast<T*>(cuda_on_host::block.shared.data())

namespace mmattn {

template <class... Parameters, class... Arguments>
void launch(
    void (*kernel)(Parameters...),
    dim3 grid,
    dim3 block,
    size_t shared_bytes,
    const torch::stable::Tensor&,
    Arguments&&... arguments) {
  namespace host = cuda_on_host;
  const size_t threads = size_t(block.x) * block.y * block.z;
  if (threads > 1024 || shared_bytes > 227 * 1024 || grid.y > 65535 || grid.z > 65535) {
    std::fprintf(stderr, "cuda_on_host: a launch that no GPU takes\n");
    std::abort();
  }
  host::block.fibers.resize(threads);
  host::block.exchanged.resize(threads);
  host::block.shared.resize(shared_bytes);
  for (size_t i = 0; i < threads; ++i) {
    const unsigned n = static_cast<unsigned>(i);
    host::block.fibers[i].thread = dim3(n % block.x, n / block.x % block.y, n / block.x / block.y);
  }
  blockDim = block;
  gridDim = grid;
  host::block.body = [&] { kernel(static_cast<Parameters>(arguments)...); };
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y, z);
        // What a block finds in shared memory is undefined.
        std::fill(host::block.shared.begin(), host::block.shared.end(), 0xff);
        host::run_block();
      }
}

}  // namespace mmattn
