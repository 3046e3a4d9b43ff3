// What every CPU kernel shares: element types, rounding, writing rows, huge pages.
#ifndef SRA_CPU_VECTOR_H
#define SRA_CPU_VECTOR_H

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#define ALWAYS_INLINE inline __attribute__((always_inline))

// One binary, the instruction set chosen when the library is loaded. What a cloned function calls
// must be ALWAYS_INLINE, or it is built for the baseline (measured: KL rows 280 ms against 70 ms).
// -DCLONES= builds for the set that -march names, and no other.
#if !defined(CLONES)
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__GLIBC__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif
#endif

namespace sra {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

constexpr int64_t kBytes[] = {4, 2, 2, 8};  // of each sra_dtype

template <class T>
struct accumulator {
  using type = float;
};
template <>
struct accumulator<double> {
  using type = double;
};

ALWAYS_INLINE float load(float x) { return x; }
ALWAYS_INLINE double load(double x) { return x; }
ALWAYS_INLINE float load(bf16 x) {
  const uint32_t u = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

template <class T>
ALWAYS_INLINE void round_to(T& out, T x) {
  out = x;
}
// To nearest, ties to even. A NaN that arithmetic made, or that came from a bf16, has a low half of
// zeros and stays NaN.
ALWAYS_INLINE void round_to(bf16& out, float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  out.bits = uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

#if defined(__FLT16_MAX__)
// In integers, because gcc 12 converts one _Float16 at a time: twice as fast. The exponent is put right
// by a product, which makes normal numbers of subnormal ones too.
ALWAYS_INLINE float load(f16 x) {
  const uint32_t magnitude = uint32_t(x.bits & 0x7fffu) << 13;
  float f;
  std::memcpy(&f, &magnitude, 4);
  f *= 5.192296858534828e33f;  // 2^112
  uint32_t u;
  std::memcpy(&u, &f, 4);
  u = magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : u;  // infinity and NaN
  u |= uint32_t(x.bits & 0x8000u) << 16;
  std::memcpy(&f, &u, 4);
  return f;
}
ALWAYS_INLINE void round_to(f16& out, float x) {
  const _Float16 h = _Float16(x);
  std::memcpy(&out.bits, &h, 2);
}
#else
#error "This compiler has no _Float16: use gcc >= 12 or clang >= 15, or SRA_KERNELS_BUILD=none."
#endif

// Writes f(0..n) to out. Ordinary stores: on huge pages they are as fast as ones that bypass the
// caches, or faster (measured, 64 MiB backward, float32: 6.3 ms against 7.3).
template <class T, class F>
ALWAYS_INLINE void write_row(T* __restrict out, int64_t n, F f) {
  for (int64_t i = 0; i < n; ++i) round_to(out[i], f(i));
}

// Writes `from` to out, bit by bit where the types agree.
template <class O, class T>
ALWAYS_INLINE void copy_row(O* out, const T* from, int64_t n) {
  if constexpr (std::is_same<O, T>::value) std::memcpy(out, from, size_t(n) * sizeof(T));
  else write_row(out, n, [=](int64_t i) { return load(from[i]); });
}

// Outputs of this size ask for huge pages: one of 2 MiB fits whole, wherever they begin.
constexpr int64_t kHugeBytes = int64_t(4) << 20;

// Asks for huge pages before a large output is first touched. Memory fresh from the system costs
// more than the arithmetic: 8,192 page faults for 32 MiB, or 16 (numpy does the same). It is advice:
// where the system does not take it, nothing is lost.
inline void prefer_huge_pages(void* begin, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 65536;  // the largest that a system of today uses as its small one
  const uintptr_t address = reinterpret_cast<uintptr_t>(begin);
  const uintptr_t first = (address + kPage - 1) / kPage * kPage;
  const uintptr_t last = (address + uintptr_t(bytes)) / kPage * kPage;
  if (bytes >= kHugeBytes) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)begin, (void)bytes;
#endif
}

}  // namespace sra
#endif
