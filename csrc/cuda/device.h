// What every CUDA kernel shares: element types, 16-byte accesses, sums of a warp and a block.
#ifndef SRA_CUDA_DEVICE_H
#define SRA_CUDA_DEVICE_H

#include "launch.h"

namespace sra {

using bf16 = __nv_bfloat16;
using f16 = __half;

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Sums, statistics and weights are float, or double where the activations are.
template <class T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <class T>
using acc_t = typename Accumulator<T>::type;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(f16 x) { return __half2float(x); }

// To nearest, ties to even.
template <class T>
__device__ __forceinline__ T narrow(acc_t<T> x) {
  return x;
}
template <>
__device__ __forceinline__ bf16 narrow<bf16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ f16 narrow<f16>(float x) {
  return __float2half_rn(x);
}

// N elements that lie side by side: one access of 16 bytes, if N is kVector<T> and `from` aligned.
template <class T>
constexpr int kVector = 16 / int(sizeof(T));

template <class T, int N>
struct alignas(N * sizeof(T)) Pack {
  T x[N];
};
template <int N, class T>
__device__ __forceinline__ void load(acc_t<T> (&out)[N], const T* from) {
  const Pack<T, N> pack = *reinterpret_cast<const Pack<T, N>*>(from);
#pragma unroll
  for (int i = 0; i < N; ++i) out[i] = widen(pack.x[i]);
}
template <int N, class T>
__device__ __forceinline__ void store(T* to, const acc_t<T> (&values)[N]) {
  Pack<T, N> pack;
#pragma unroll
  for (int i = 0; i < N; ++i) pack.x[i] = narrow<T>(values[i]);
  *reinterpret_cast<Pack<T, N>*>(to) = pack;
}

// Whether rows of `dim` elements, `stride` apart, can be read 16 bytes at a time.
template <class T>
bool rows_are_aligned(const void* begin, int64_t dim, int64_t stride) {
  return reinterpret_cast<uintptr_t>(begin) % 16 == 0 && dim % kVector<T> == 0 &&
         stride % kVector<T> == 0;
}

template <class A>
__device__ __forceinline__ A larger(A a, A b) {
  return a < b ? b : a;
}

// Of all lanes, the same on each: in a fixed order.
template <class A>
__device__ __forceinline__ A warp_sum(A x) {
#pragma unroll
  for (int offset = kWarp / 2; offset; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
  return x;
}
template <class A>
__device__ __forceinline__ A warp_max(A x) {
#pragma unroll
  for (int offset = kWarp / 2; offset; offset /= 2)
    x = larger(x, __shfl_xor_sync(kAllLanes, x, offset));
  return x;
}

// Of all threads of a block of whole warps, the same on each. Every thread must come.
template <class A>
__device__ __forceinline__ A block_sum(A x) {
  SHARED(A, of_warps, kWarp);
  x = warp_sum(x);
  const int warp = int(threadIdx.x) / kWarp, warps = int(blockDim.x) / kWarp;
  if (threadIdx.x % kWarp == 0) of_warps[warp] = x;
  __syncthreads();
  A sum = 0;
  for (int i = 0; i < warps; ++i) sum += of_warps[i];
  __syncthreads();  // before of_warps is written again
  return sum;
}
template <class A>
__device__ __forceinline__ A block_max(A x) {
  SHARED(A, of_warps, kWarp);
  x = warp_max(x);
  const int warp = int(threadIdx.x) / kWarp, warps = int(blockDim.x) / kWarp;
  if (threadIdx.x % kWarp == 0) of_warps[warp] = x;
  __syncthreads();
  A top = of_warps[0];
  for (int i = 1; i < warps; ++i) top = larger(top, of_warps[i]);
  __syncthreads();
  return top;
}

// run(Type<float>()) or its like, for the element type that dtype names.
template <class T>
struct Type {
  using type = T;
};
template <class Run>
int for_dtype(int32_t dtype, const Run& run) {
  switch (dtype) {
    case SRA_F32: return run(Type<float>());
    case SRA_BF16: return run(Type<bf16>());
    case SRA_F16: return run(Type<f16>());
    case SRA_F64: return run(Type<double>());
    default: return SRA_BAD_DTYPE;
  }
}

}  // namespace sra
#endif
