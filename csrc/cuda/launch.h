// What differs between nvcc and the emulator of the tests: headers, launches, shared memory. The
// emulator's header comes in front by -include, and defines SHARED and DYNAMIC_SHARED itself.
#ifndef SRA_CUDA_LAUNCH_H
#define SRA_CUDA_LAUNCH_H

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// SHARED(float, sums, 32): an array of the block's shared memory.
#define SHARED(type, name, count) __shared__ type name[count]
// DYNAMIC_SHARED(float, row): the bytes that the launch asked for, as the type.
#define DYNAMIC_SHARED(type, name)                                 \
  extern __shared__ __align__(16) unsigned char sra_dynamic_shared[]; \
  type* const name = reinterpret_cast<type*>(sra_dynamic_shared)
#elif !defined(CUDA_EMULATION_H)
#error "Compile with nvcc, or with -include tests/emulation/cuda_emulation.h."
#endif

#include "sra_kernels.h"

#include <cstdint>

namespace sra {

// launch(kernel<T>, grid, block, shared_bytes, stream)(arguments...)
template <class... Params>
struct Launch {
  void (*kernel)(Params...);
  dim3 grid, block;
  size_t shared_bytes;
  cudaStream_t stream;

  void operator()(Params... params) const {
#if defined(__CUDACC__)
    kernel<<<grid, block, shared_bytes, stream>>>(params...);
#else
    emulation::launch(reinterpret_cast<const void*>(kernel), grid, block, shared_bytes,
                      [&] { kernel(params...); });
#endif
  }
};
template <class... Params>
Launch<Params...> launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
                         void* stream) {
  return {kernel, grid, block, shared_bytes, static_cast<cudaStream_t>(stream)};
}

// For sra_cuda_error().
inline cudaError_t& last_launch_error() {
  static thread_local cudaError_t error = cudaSuccess;
  return error;
}

// What an entry point returns after its launches.
inline int launch_status() {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return SRA_OK;
  last_launch_error() = error;
  return SRA_LAUNCH_FAILED;
}

// A workspace holds nothing yet. The emulator sees to it that nobody relies on what it held before.
inline void begin_workspace(void* workspace, int64_t bytes) {
#if defined(__CUDACC__)
  (void)workspace, (void)bytes;
#else
  emulation::poison(workspace, bytes);
#endif
}

}  // namespace sra
#endif
