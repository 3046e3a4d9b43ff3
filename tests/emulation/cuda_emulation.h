// CUDA C++ on a CPU: the .cu files of csrc/cuda compiled by g++ with this header in front, to be
// tested where there is no GPU. One fiber for each CUDA thread; barriers, warp operations and
// shared memory that report misuse. Correctness alone: no speed, no tensor cores, no ordering of
// memory between threads that do not synchronise, and blocks run one after another.
//
//   g++ -x c++ -std=c++17 -O2 -Wno-unknown-pragmas -shared -fPIC -Icsrc/include
//       -include tests/emulation/cuda_emulation.h csrc/cuda/*.cu -o emulated.so
//
// What it finds: a missing barrier (for some SRA_EMULATION_SEED), barriers and warp operations that
// some thread does not reach, lanes that disagree, reads of shared memory and of workspaces before
// they are written (NaN), writes behind shared memory; with -fsanitize=address every access out of
// bounds. A fault is the launch's error, as on a GPU.
#ifndef CUDA_EMULATION_H
#define CUDA_EMULATION_H

#include "block.h"
#include "device_types.h"

#include <functional>
#include <map>
#include <string>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __restrict__ __restrict

#define threadIdx (emulation::block().current().index)
#define blockIdx (emulation::block().index)
#define blockDim (emulation::block().size)
#define gridDim (emulation::block().grid)
constexpr int warpSize = emulation::kWarp;

// --- shared memory ---

// The address of a static local tells declarations apart, also those in instances of a template.
#define SHARED(type, name, count)                 \
  static const char emulation_key_##name = 0;     \
  type* const name = static_cast<type*>(          \
      emulation::block().shared().at(&emulation_key_##name, (count) * sizeof(type)))
#define DYNAMIC_SHARED(type, name) \
  type* const name = static_cast<type*>(emulation::block().shared().dynamic())

// --- barriers and warps ---

namespace emulation {

template <class T>
uint64_t bits(T x) {
  static_assert(sizeof(T) <= 8, "a lane gives at most 8 bytes");
  uint64_t word = 0;
  std::memcpy(&word, &x, sizeof x);
  return word;
}
template <class T>
T value(uint64_t word) {
  T x;
  std::memcpy(&x, &word, sizeof x);
  return x;
}

inline int lane() { return block().current().number % kWarp; }

template <class Make>
void each(uint32_t mask, const Make& make) {
  for (int lane = 0; lane < kWarp; ++lane)
    if (mask >> lane & 1) make(lane);
}

// A lane that the mask leaves out has nothing to give: on a GPU anything may come from it.
inline void exchange(Warp& warp, uint32_t mask) {
  each(mask, [&](int lane) {
    const int source = warp.lanes[lane].source;
    warp.lanes[lane].got = mask >> source & 1 ? warp.lanes[source].given : ~uint64_t(0);
  });
}
inline void ballot(Warp& warp, uint32_t mask) {
  uint64_t votes = 0;
  each(mask, [&](int lane) { votes |= warp.lanes[lane].given << lane; });
  each(mask, [&](int lane) { warp.lanes[lane].got = votes; });
}
inline void nothing(Warp&, uint32_t) {}

template <class T, class Op>
void reduce(Warp& warp, uint32_t mask) {
  T sum{};
  bool first = true;
  each(mask, [&](int lane) {
    const T given = value<T>(warp.lanes[lane].given);
    sum = first ? given : Op()(sum, given);
    first = false;
  });
  each(mask, [&](int lane) { warp.lanes[lane].got = bits(sum); });
}
struct Larger {
  template <class T>
  T operator()(T a, T b) const { return a < b ? b : a; }
};
struct Smaller {
  template <class T>
  T operator()(T a, T b) const { return b < a ? b : a; }
};

template <class T>
T from_lane(uint32_t mask, T x, int source, Place place) {
  return value<T>(block().together(mask, exchange, bits(x), source, place));
}

}  // namespace emulation

inline void __syncthreads(emulation::Place place = emulation::Place::here()) {
  emulation::block().barrier(place);
}
inline void __syncwarp(unsigned mask = ~0u, emulation::Place place = emulation::Place::here()) {
  emulation::block().together(mask, emulation::nothing, 0, 0, place);
}
inline void __threadfence() {}
inline void __threadfence_block() {}

// `width` lanes exchange among themselves; where the source lies outside, a lane gets its own.
template <class T>
T __shfl_sync(unsigned mask, T x, int source, int width = 32,
              emulation::Place place = emulation::Place::here()) {
  const int first = emulation::lane() & ~(width - 1);
  return emulation::from_lane(mask, x, first | (source & (width - 1)), place);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T x, int offset, int width = 32,
                  emulation::Place place = emulation::Place::here()) {
  const int lane = emulation::lane(), last = lane | (width - 1), source = lane ^ offset;
  return emulation::from_lane(mask, x, source > last ? lane : source, place);
}
template <class T>
T __shfl_down_sync(unsigned mask, T x, unsigned offset, int width = 32,
                   emulation::Place place = emulation::Place::here()) {
  const int lane = emulation::lane(), last = lane | (width - 1), source = lane + int(offset);
  return emulation::from_lane(mask, x, source > last ? lane : source, place);
}
template <class T>
T __shfl_up_sync(unsigned mask, T x, unsigned offset, int width = 32,
                 emulation::Place place = emulation::Place::here()) {
  const int lane = emulation::lane(), first = lane & ~(width - 1), source = lane - int(offset);
  return emulation::from_lane(mask, x, source < first ? lane : source, place);
}
inline unsigned __ballot_sync(unsigned mask, int vote,
                              emulation::Place place = emulation::Place::here()) {
  return unsigned(emulation::block().together(mask, emulation::ballot, vote != 0, 0, place));
}
inline int __any_sync(unsigned mask, int vote, emulation::Place place = emulation::Place::here()) {
  return __ballot_sync(mask, vote, place) != 0;
}
inline int __all_sync(unsigned mask, int vote, emulation::Place place = emulation::Place::here()) {
  return __ballot_sync(mask, vote, place) == mask;
}
#define EMULATION_REDUCE(NAME, T, OP)                                                    \
  inline T NAME(unsigned mask, T x, emulation::Place place = emulation::Place::here()) { \
    return emulation::value<T>(emulation::block().together(                              \
        mask, emulation::reduce<T, OP>, emulation::bits(x), 0, place));                  \
  }
EMULATION_REDUCE(__reduce_add_sync, unsigned, std::plus<>)
EMULATION_REDUCE(__reduce_add_sync, int, std::plus<>)
EMULATION_REDUCE(__reduce_max_sync, unsigned, emulation::Larger)
EMULATION_REDUCE(__reduce_max_sync, int, emulation::Larger)
EMULATION_REDUCE(__reduce_min_sync, unsigned, emulation::Smaller)
EMULATION_REDUCE(__reduce_min_sync, int, emulation::Smaller)
#undef EMULATION_REDUCE

inline int __syncthreads_or(int vote, emulation::Place place = emulation::Place::here()) {
  return emulation::block().barrier(place, vote != 0) != 0;
}
inline int __syncthreads_count(int vote, emulation::Place place = emulation::Place::here()) {
  return emulation::block().barrier(place, vote != 0);
}
inline int __syncthreads_and(int vote, emulation::Place place = emulation::Place::here()) {
  return emulation::block().barrier(place, vote == 0) == 0;
}

// Of integers alone: floats that are added in any order do not give the same bits twice.
template <class T>
T atomicAdd(T* p, T x) {
  static_assert(std::is_integral<T>::value, "no atomics on floats");
  const T before = *p;
  *p = before + x;
  return before;
}
template <class T>
T atomicMax(T* p, T x) {
  static_assert(std::is_integral<T>::value, "no atomics on floats");
  const T before = *p;
  *p = max(before, x);
  return before;
}
template <class T>
T atomicCAS(T* p, T expected, T x) {
  static_assert(std::is_integral<T>::value, "no atomics on floats");
  const T before = *p;
  if (before == expected) *p = x;
  return before;
}

// --- the host's side ---

using cudaStream_t = void*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719,
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

namespace emulation {

struct Runtime {
  cudaError_t error = cudaSuccess;
  std::string why;
  std::map<const void*, size_t> allowed;  // kernels that asked for more shared memory

  cudaError_t refuse(cudaError_t code, const std::string& text) {
    why = text;
    return error = code;
  }
};
inline Runtime& runtime() {
  static thread_local Runtime runtime;
  return runtime;
}

inline void launch(const void* kernel, dim3 grid, dim3 size, size_t shared_bytes,
                   std::function<void()> run) {
  Runtime& at = runtime();
  const size_t threads = size_t(size.x) * size.y * size.z;
  const bool fits = threads >= 1 && threads <= 1024 && grid.x >= 1 && grid.x <= 0x7fffffffu &&
                    grid.y >= 1 && grid.y <= 0xffff && grid.z >= 1 && grid.z <= 0xffff;
  if (!fits) {
    at.refuse(cudaErrorInvalidConfiguration, "the grid or the block is empty or too large");
    return;
  }
  const auto allowed = at.allowed.find(kernel);
  if (shared_bytes > (allowed == at.allowed.end() ? kStaticShared : allowed->second)) {
    at.refuse(cudaErrorInvalidValue, "more shared memory than this kernel has asked for");
    return;
  }
  const std::string fault = block().run(grid, size, shared_bytes, std::move(run));
  if (!fault.empty()) at.refuse(cudaErrorLaunchFailure, fault);
}

}  // namespace emulation

inline cudaError_t cudaGetLastError() {
  const cudaError_t error = emulation::runtime().error;
  emulation::runtime().error = cudaSuccess;
  return error;
}
inline const char* cudaGetErrorString(cudaError_t) { return emulation::runtime().why.c_str(); }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  // Few multiprocessors, so that grids that fill the device stay small.
  *value = attribute == cudaDevAttrMultiProcessorCount ? 4 : int(emulation::kLargestShared);
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  emulation::Runtime& at = emulation::runtime();
  if (size_t(bytes) > emulation::kLargestShared)
    return at.refuse(cudaErrorInvalidValue, "more shared memory than a block can have");
  at.allowed[reinterpret_cast<const void*>(kernel)] = size_t(bytes);
  return cudaSuccess;
}
namespace emulation {
inline void poison(void* begin, int64_t bytes) {
  if (bytes > 0) std::memset(begin, kPoison, size_t(bytes));
}
}  // namespace emulation
inline cudaError_t cudaMemsetAsync(void* begin, int byte, size_t bytes, cudaStream_t) {
  std::memset(begin, byte, bytes);
  return cudaSuccess;
}

#endif
