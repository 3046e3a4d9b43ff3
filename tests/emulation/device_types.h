// CUDA's small types and the functions on them that the kernels use.
#ifndef EMULATION_DEVICE_TYPES_H
#define EMULATION_DEVICE_TYPES_H

#include <cmath>
#include <cstdint>
#include <cstring>
#include <math.h>

// may_alias: kernels read arrays of other types through these.
#define EMULATION_VECTOR(NAME, T)                                                          \
  struct __attribute__((may_alias, aligned(2 * sizeof(T)))) NAME##2 { T x, y; };           \
  struct __attribute__((may_alias, aligned(sizeof(T) < 8 ? 4 * sizeof(T) : 16))) NAME##4 { \
    T x, y, z, w;                                                                          \
  };                                                                                       \
  inline NAME##2 make_##NAME##2(T x, T y) { return {x, y}; }                               \
  inline NAME##4 make_##NAME##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EMULATION_VECTOR(int, int)
EMULATION_VECTOR(uint, unsigned)
EMULATION_VECTOR(float, float)
EMULATION_VECTOR(double, double)
EMULATION_VECTOR(longlong, long long)
#undef EMULATION_VECTOR

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t u = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline __nv_bfloat16 __float2bfloat16_rn(float f) {
  if (f != f) return {0x7fff};
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return {uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}
inline __nv_bfloat16 __float2bfloat16(float f) { return __float2bfloat16_rn(f); }

inline float __half2float(__half x) {
  _Float16 h;
  std::memcpy(&h, &x.bits, 2);
  return float(h);
}
inline __half __float2half_rn(float f) {
  const _Float16 h = _Float16(f);
  __half out;
  std::memcpy(&out.bits, &h, 2);
  return out;
}
inline __half __float2half(float f) { return __float2half_rn(f); }

inline int __float_as_int(float x) {
  int i;
  std::memcpy(&i, &x, 4);
  return i;
}
inline float __int_as_float(int i) {
  float x;
  std::memcpy(&x, &i, 4);
  return x;
}
inline unsigned __float_as_uint(float x) { return unsigned(__float_as_int(x)); }
inline float __uint_as_float(unsigned i) { return __int_as_float(int(i)); }

// The fast ones are less exact on a GPU: their errors are not emulated.
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline double rsqrt(double x) { return 1 / std::sqrt(x); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }

// What a GPU reads or writes past its caches.
template <class T> T __ldg(const T* p) { return *p; }
template <class T> T __ldcs(const T* p) { return *p; }
template <class T> T __ldcg(const T* p) { return *p; }
template <class T> void __stcs(T* p, T x) { *p = x; }
template <class T> void __stcg(T* p, T x) { *p = x; }

// CUDA has these in the global namespace. Of a NaN and a number they give the number.
template <class T> constexpr T max(T a, T b) { return a < b || a != a ? b : a; }
template <class T> constexpr T min(T a, T b) { return b < a || a != a ? b : a; }

#endif
