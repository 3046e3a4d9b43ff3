// Reading the spans of span_geometry, of any element type, and their lengths.
#ifndef SRA_CUDA_GEOMETRY_ROWS_H
#define SRA_CUDA_GEOMETRY_ROWS_H

#include "device.h"

namespace sra {

// Columns that a lane reads at a time: 16 bytes of the narrow types.
constexpr int kColumns = 8;

// The vectors of one model. The element type is known when the kernel runs, not when it is
// compiled: there are sixteen pairs of them.
struct Model {
  const void* x;
  int64_t dim, stride;
  int32_t dtype;
  bool vectors;  // each row is aligned to 16 bytes, and whole groups of kColumns
};

inline Model model_of(const void* x, int64_t dim, int64_t stride, int32_t dtype) {
  const int64_t size = dtype == SRA_F64 ? 8 : dtype == SRA_F32 ? 4 : 2;
  const bool aligned = reinterpret_cast<uintptr_t>(x) % 16 == 0 && stride * size % 16 == 0;
  return {x, dim, stride, dtype, aligned && dim % kColumns == 0};
}

// kColumns numbers from column k on, zeros behind the row's end.
template <class T>
__device__ __forceinline__ void read(const Model& m, int64_t row, int64_t k,
                                     acc_t<T> (&out)[kColumns]) {
  const T* const from = static_cast<const T*>(m.x) + row * m.stride + k;
  if (m.vectors && k < m.dim) {
    constexpr int N = kVector<T> < kColumns ? kVector<T> : kColumns;
#pragma unroll
    for (int i = 0; i < kColumns; i += N) {
      acc_t<T> part[N];
      load<N>(part, from + i);
#pragma unroll
      for (int j = 0; j < N; ++j) out[i + j] = part[j];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) out[i] = k + i < m.dim ? widen(from[i]) : acc_t<T>(0);
  }
}

// The same times a power of two, in the type A. A factor of 0 is of a span that must not be read.
template <class T, class A>
__device__ __forceinline__ void read_scaled(const Model& m, int64_t row, int64_t k, double scale,
                                            A (&out)[kColumns]) {
  acc_t<T> x[kColumns] = {};
  if (scale != 0) read<T>(m, row, k, x);
#pragma unroll
  for (int i = 0; i < kColumns; ++i) out[i] = A(x[i] * acc_t<T>(scale));
}
template <class A>
__device__ __forceinline__ void read_any(const Model& m, int64_t row, int64_t k, double scale,
                                         A (&out)[kColumns]) {
  switch (m.dtype) {
    case SRA_F32: return read_scaled<float>(m, row, k, scale, out);
    case SRA_BF16: return read_scaled<bf16>(m, row, k, scale, out);
    case SRA_F16: return read_scaled<f16>(m, row, k, scale, out);
    default: return read_scaled<double>(m, row, k, scale, out);
  }
}

struct Length {
  double scale;    // a power of two, which brings numbers near the ends of their range into it
  double inverse;  // 1 / the length of the scaled vector, 0 for a zero vector
};

// By a warp: sum of squares, or the largest number.
template <class T>
__device__ double sum_of_squares(const Model& m, int64_t row, double scale) {
  double sum = 0;
#pragma unroll 1
  for (int64_t k = threadIdx.x % kWarp * kColumns; k < m.dim; k += kWarp * kColumns) {
    acc_t<T> x[kColumns], part = 0;
    read_scaled<T>(m, row, k, scale, x);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) part += x[i] * x[i];
    sum += double(part);
  }
  return warp_sum(sum);
}
template <class T>
__device__ double largest_number(const Model& m, int64_t row) {
  acc_t<T> top = 0;
#pragma unroll 1
  for (int64_t k = threadIdx.x % kWarp * kColumns; k < m.dim; k += kWarp * kColumns) {
    acc_t<T> x[kColumns];
    read<T>(m, row, k, x);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) top = larger(top, x[i] < 0 ? -x[i] : x[i]);
  }
  return double(warp_max(top));
}

template <class T>
__device__ Length length_of(const Model& m, int64_t row) {
  double scale = 1, square = sum_of_squares<T>(m, row, scale);
  // Sums of products stay far from the ends of float's range if the squares do.
  if (!(square > 0x1p-40 && square < 0x1p60)) {
    const double largest = largest_number<T>(m, row);
    if (largest > 0 && isfinite(largest)) {
      int exponent = 0;
      frexp(largest, &exponent);
      // The scale itself is of type acc_t<T>.
      constexpr int kMost = sizeof(acc_t<T>) == 8 ? 1000 : 126;
      scale = ldexp(1.0, min(kMost, max(-kMost, -exponent)));
    }
    square = sum_of_squares<T>(m, row, scale);
  }
  return {scale, square == 0 ? 0 : 1 / sqrt(square)};
}
__device__ inline Length length_of_any(const Model& m, int64_t row) {
  switch (m.dtype) {
    case SRA_F32: return length_of<float>(m, row);
    case SRA_BF16: return length_of<bf16>(m, row);
    case SRA_F16: return length_of<f16>(m, row);
    default: return length_of<double>(m, row);
  }
}

}  // namespace sra
#endif
