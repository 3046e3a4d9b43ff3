// Elementary functions that vectorise: float by polynomials without a branch, double by the library.
//
// The polynomials are least-squares fits of our own, reweighted towards the smallest relative error;
// tests/test_math.py measures each against float64.
#ifndef SRA_CPU_MATH_H
#define SRA_CPU_MATH_H

#include "vector.h"

#include <cmath>
#include <cstdint>
#include <cstring>

namespace sra {

ALWAYS_INLINE int32_t bits_of(float x) {
  int32_t i;
  std::memcpy(&i, &x, 4);
  return i;
}
ALWAYS_INLINE float from_bits(int32_t i) {
  float x;
  std::memcpy(&x, &i, 4);
  return x;
}

// Adding 1.5 * 2^23 rounds to an integer, which then stands in the low bits; 127 more, and they are
// the exponent of that power of two.
constexpr float kRound = 12582912.0f + 127.0f;

// x = n ln 2 + r, with |r| <= ln 2 / 2.
struct Reduced {
  float r, scale;  // scale = 2^n
};
ALWAYS_INLINE Reduced reduced(float x) {
  const float shifted = x * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  return {r, from_bits(int32_t(uint32_t(bits_of(shifted)) << 23))};
}

// e^r - 1 for |r| <= ln 2 / 2.
ALWAYS_INLINE float expm1_reduced(float r) {
  float p = 1.3814598198e-3f;
  p = p * r + 8.3687170863e-3f;
  p = p * r + 4.1668388067e-2f;
  p = p * r + 1.6666520630e-1f;
  p = p * r + 4.9999993448e-1f;
  return p * (r * r) + r;
}

// e^x for x <= 88, good to 1 ulp; 0 below -87.3, where the result would not be normal.
ALWAYS_INLINE float exp_of(float x) {
  const Reduced part = reduced(x);
  const float y = expm1_reduced(part.r) * part.scale + part.scale;
  return x < -87.3f ? 0.0f : y;
}
ALWAYS_INLINE double exp_of(double x) { return std::exp(x); }

// e^x - 1, as good near 0; at most e^88.
ALWAYS_INLINE float expm1_of(float x) {
  const Reduced part = reduced(x > 88.0f ? 88.0f : (x < -87.0f ? -87.0f : x));
  return expm1_reduced(part.r) * part.scale + (part.scale - 1.0f);
}
ALWAYS_INLINE double expm1_of(double x) { return std::expm1(x > 700 ? 700 : x); }

// e^r - 1 - r for |r| <= 1/2, without the cancellation.
ALWAYS_INLINE float exp_excess(float r) {
  float p = 2.4841679591e-5f;
  p = p * r + 1.9961957803e-4f;
  p = p * r + 1.3889040150e-3f;
  p = p * r + 8.3331827542e-3f;
  p = p * r + 4.1666664310e-2f;
  p = p * r + 1.6666667135e-1f;
  p = p * r + 5.0000000004e-1f;
  return p * (r * r);
}
// Taylor: the term of degree 18 is below 2^-53 of the sum.
ALWAYS_INLINE double exp_excess(double r) {
  double p = 0;
  for (int k = 18; k >= 2; --k) p = (p * r + 1.0) / k;
  return p * r * r;
}

// log(1 + u) for u > -1, and u - log(1 + u), which keeps its accuracy near 0.
template <class A>
struct Log1p {
  A value, shortfall;
};
ALWAYS_INLINE Log1p<float> log1p_of(float u) {
  const float y = 1.0f + u;
  // y = m * 2^e with m in [0.707, 1.414); f = m - 1 exactly.
  const int32_t e = (bits_of(y) - bits_of(0.70710678f)) >> 23;
  const float m = from_bits(int32_t(uint32_t(bits_of(y)) - (uint32_t(e) << 23)));
  const float f = e == 0 || u != u ? u : m - 1.0f;  // a NaN stays one
  const float s = f / (2.0f + f), s2 = s * s;
  float q = 2.3582725256e-1f;
  q = q * s2 + 2.8537279469e-1f;
  q = q * s2 + 4.0000335634e-1f;
  q = q * s2 + 6.6666665644e-1f;
  const float rest = s * s2 * q;  // log m = 2s + rest, and f - 2s = f * s
  const float value = float(e) * 0.693147181f + (2.0f * s + rest);
  return {value, e == 0 ? f * s - rest : u - value};
}
ALWAYS_INLINE Log1p<double> log1p_of(double u) {
  const double value = std::log1p(u);
  if (std::fabs(u) > 0.3) return {value, u - value};
  const double s = u / (2.0 + u), s2 = s * s;
  double q = 0;
  for (int k = 25; k >= 3; k -= 2) q = q * s2 + 2.0 / k;
  return {value, u * s - s * s2 * q};
}

// tanh x, good to 2 ulp.
ALWAYS_INLINE float tanh_of(float x) {
  const float a = x < 0 ? -x : x, x2 = x * x;
  float p = -5.7049004389e-3f;
  p = p * x2 + 2.0639013322e-2f;
  p = p * x2 - 5.3739693588e-2f;
  p = p * x2 + 1.3331441956e-1f;
  p = p * x2 - 3.3333281934e-1f;
  const float near = x + x * x2 * p;
  const float far = 1.0f - 2.0f / (exp_of(a > 20.0f ? 40.0f : 2.0f * a) + 1.0f);
  return a < 0.625f ? near : (x < 0 ? -far : far);
}
ALWAYS_INLINE double tanh_of(double x) { return std::tanh(x); }

// Sum and largest of n values, in one fixed order whatever the instruction set.
template <class A>
ALWAYS_INLINE A sum_of(const A* x, int64_t n) {
  constexpr int kLanes = 32;
  A lane[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int k = 0; k < kLanes; ++k) lane[k] += x[i + k];
  for (int k = 0; i + k < n; ++k) lane[k] += x[i + k];
  for (int half = kLanes / 2; half; half /= 2)
    for (int k = 0; k < half; ++k) lane[k] += lane[k + half];
  return lane[0];
}
template <class A>
ALWAYS_INLINE A largest_of(const A* x, int64_t n) {
  constexpr int kLanes = 32;
  A lane[kLanes];
  std::fill_n(lane, kLanes, -std::numeric_limits<A>::infinity());
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int k = 0; k < kLanes; ++k) lane[k] = x[i + k] > lane[k] ? x[i + k] : lane[k];
  for (int k = 0; i + k < n; ++k) lane[k] = x[i + k] > lane[k] ? x[i + k] : lane[k];
  for (int half = kLanes / 2; half; half /= 2)
    for (int k = 0; k < half; ++k) lane[k] = lane[k + half] > lane[k] ? lane[k + half] : lane[k];
  return lane[0];
}

}  // namespace sra
#endif
