// span_kl: how a thread reads the entries of a pair of rows, and writes their gradient.
//
// The student's row is walked in order, and the teacher's entry of the same meaning fetched through
// a table; so reads of the one and writes of the gradient are of 16 bytes. Element types are looked
// up for each read: one switch for several entries, where an instance of the kernel for each pair
// of types would take minutes to compile.
#ifndef SRA_CUDA_SPAN_KL_ENTRIES_H
#define SRA_CUDA_SPAN_KL_ENTRIES_H

#include "span_kl_math.h"

#include <cstring>
#include <type_traits>

namespace sra {
namespace {

// Entries that a thread holds at a time: 16 bytes of bfloat16, or of double.
template <class A>
constexpr int kHeld = sizeof(A) == 4 ? 8 : 2;

__host__ __device__ constexpr int bytes_of(int32_t dtype) {
  return dtype == SRA_F64 ? 8 : (dtype == SRA_F32 ? 4 : 2);
}

// Entries first, first + step, ... of a row that ends at `end`.
struct Places {
  int first, step, end;
  __device__ int at(int k) const { return first + k * step; }
  __device__ bool vector(int n) const { return step == 1 && first + n <= end; }
};

// From a stored logit to a finished one: over the temperature, scaled, capped.
template <class A>
struct Finish {
  A in, out;  // z * in, or where it is capped tanh(z * in) * out
  bool capped;

  __device__ A operator()(A z) const {
    const A y = product(z, in);
    return capped ? product(tanh(y), out) : y;
  }
  // The derivative of the cap.
  __device__ A cap_slope(A z) const {
    const A y = tanh(product(z, in));
    return 1 - y * y;
  }
};

// run(Type<float>()) or its like, on the device.
template <class Run>
__device__ __forceinline__ void with_type(int32_t dtype, const Run& run) {
  switch (dtype) {
    case SRA_F32: return run(Type<float>());
    case SRA_BF16: return run(Type<bf16>());
    case SRA_F16: return run(Type<f16>());
    default: return run(Type<double>());
  }
}

// What lies side by side, as the machine moves it: a copy of the elements would be one by one.
template <int bytes>
struct Word;
template <>
struct Word<16> {
  using type = uint4;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<4> {
  using type = unsigned;
};

// Reads entries into z, and keeps them as they are in `keep`, if that is not NULL.
template <class A, int N>
__device__ __forceinline__ void read_row(int32_t dtype, const void* row, void* keep,
                                         const Places& places, A (&z)[N]) {
  with_type(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int kSide = kVector<T> < N ? kVector<T> : N;  // side by side in one access
    using W = typename Word<kSide * int(sizeof(T))>::type;
    const T* from = static_cast<const T*>(row);
    T* to = static_cast<T*>(keep);
    if (places.vector(N)) {
#pragma unroll
      for (int k = 0; k < N; k += kSide) {
        const auto word = *reinterpret_cast<const W*>(from + places.first + k);
        if (to) *reinterpret_cast<W*>(to + places.first + k) = word;
        Pack<T, kSide> pack;
        memcpy(&pack, &word, sizeof word);
#pragma unroll
        for (int i = 0; i < kSide; ++i) z[k + i] = A(widen(pack.x[i]));
      }
      return;
    }
#pragma unroll
    for (int k = 0; k < N; ++k) {
      z[k] = 0;
      if (places.at(k) >= places.end) continue;
      const T x = from[places.at(k)];
      if (to) to[places.at(k)] = x;
      z[k] = A(widen(x));
    }
  });
}

// The same for the entries of `row` that `partner` names. Those of -1 are none.
template <class A, int N>
__device__ __forceinline__ void gather(int32_t dtype, const void* row, void* keep,
                                       const Places& places, const int (&partner)[N],
                                       A (&z)[N]) {
  with_type(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const T* from = static_cast<const T*>(row);
    T* to = static_cast<T*>(keep);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      z[k] = 0;
      if (partner[k] < 0) continue;
      const T x = from[partner[k]];
      if (to) to[places.at(k)] = x;
      z[k] = A(widen(x));
    }
  });
}

// The table's entries at these places, -1 behind the end.
template <int N>
__device__ __forceinline__ void read_partners(const int32_t* table, const Places& places,
                                              int (&partner)[N]) {
  constexpr int kSide = N < 4 ? N : 4;
  if (places.vector(N)) {
#pragma unroll
    for (int k = 0; k < N; k += kSide) {
      const auto pack = *reinterpret_cast<const Pack<int32_t, kSide>*>(table + places.first + k);
#pragma unroll
      for (int i = 0; i < kSide; ++i) partner[k + i] = pack.x[i];
    }
    return;
  }
#pragma unroll
  for (int k = 0; k < N; ++k)
    partner[k] = places.at(k) < places.end ? table[places.at(k)] : -1;
}

// Bit k: the entry at place k has a mark. Behind the end there is none.
template <int N>
__device__ __forceinline__ unsigned marks_at(const uint8_t* marks, const Places& places) {
  unsigned bits = 0;
#pragma unroll
  for (int k = 0; k < N; ++k)
    if (places.at(k) < places.end && marks[places.at(k)]) bits |= 1u << k;
  return bits;
}

// Rounded once, to the gradient's element type: the student's, unless the accumulator is wider.
template <class A, int N>
__device__ __forceinline__ void write_row(int32_t dtype, void* row, const Places& places,
                                          const A (&g)[N]) {
  with_type(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (std::is_same<A, acc_t<T>>::value) {
      constexpr int kSide = kVector<T> < N ? kVector<T> : N;
      T* to = static_cast<T*>(row);
      if (places.vector(N)) {
#pragma unroll
        for (int k = 0; k < N; k += kSide) {
          Pack<T, kSide> pack;
#pragma unroll
          for (int i = 0; i < kSide; ++i) pack.x[i] = narrow<T>(g[k + i]);
          *reinterpret_cast<Pack<T, kSide>*>(to + places.first + k) = pack;
        }
        return;
      }
#pragma unroll
      for (int k = 0; k < N; ++k)
        if (places.at(k) < places.end) to[places.at(k)] = narrow<T>(g[k]);
    }
  });
}

}  // namespace
}  // namespace sra
#endif
