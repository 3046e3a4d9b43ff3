// What every CPU kernel shares: element types, rounding, streaming stores, work splitting.
#ifndef SRA_CPU_VECTOR_H
#define SRA_CPU_VECTOR_H

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

#define ALWAYS_INLINE inline __attribute__((always_inline))

// One binary, the instruction set chosen when the library is loaded. What a cloned function calls
// must be ALWAYS_INLINE, or it is built for the baseline (measured: KL rows 280 ms against 70 ms).
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__GLIBC__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif

namespace sra {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

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

ALWAYS_INLINE void round_to(float& out, float x) { out = x; }
ALWAYS_INLINE void round_to(double& out, double x) { out = x; }
ALWAYS_INLINE void round_to(bf16& out, float x) {  // to nearest, ties to even; NaN stays NaN
  uint32_t u;
  std::memcpy(&u, &x, 4);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  out.bits = (u & 0x7fffffffu) > 0x7f800000u ? uint16_t((u >> 16) | 0x40u) : uint16_t(rounded);
}

#if defined(__FLT16_MAX__)
ALWAYS_INLINE float load(f16 x) {
  _Float16 h;
  std::memcpy(&h, &x.bits, 2);
  return float(h);
}
ALWAYS_INLINE void round_to(f16& out, float x) {
  const _Float16 h = _Float16(x);
  std::memcpy(&out.bits, &h, 2);
}
#else
#error "This compiler has no _Float16: use gcc >= 12 or clang >= 15, or SRA_KERNELS_BUILD=none."
#endif

// Outputs larger than this are streamed past the caches: they would not stay in them, and an
// ordinary store reads every line first (measured, 64 MiB backward: 1.4x faster streamed).
constexpr int64_t kStreamBytes = int64_t(8) << 20;

// Writes f(0..n) to out. With `stream`, whole cache lines bypass the caches.
template <class T, class F>
ALWAYS_INLINE void write_row(T* out, int64_t n, bool stream, F f) {
  int64_t i = 0;
#if defined(__x86_64__)
  if (stream) {
    constexpr int64_t kLine = 64 / sizeof(T);
    const int64_t head = int64_t((64 - (reinterpret_cast<uintptr_t>(out) & 63)) & 63) / sizeof(T);
    for (; i < std::min(head, n); ++i) round_to(out[i], f(i));
    for (; i + kLine <= n; i += kLine) {
      alignas(64) T line[kLine];
      for (int64_t k = 0; k < kLine; ++k) round_to(line[k], f(i + k));
      const __m128i* from = reinterpret_cast<const __m128i*>(line);
      __m128i* to = reinterpret_cast<__m128i*>(out + i);
      for (int k = 0; k < 4; ++k) _mm_stream_si128(to + k, _mm_load_si128(from + k));
    }
  }
#endif
  for (; i < n; ++i) round_to(out[i], f(i));
}

// Streamed stores become visible to other threads in order only after this.
inline void finish_streaming() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace sra
#endif
