// span_kl: what one entry adds to a divergence, and the slope that a gradient is made of.
#ifndef SRA_CUDA_SPAN_KL_MATH_H
#define SRA_CUDA_SPAN_KL_MATH_H

#include "device.h"

#include <cmath>
#include <limits>

namespace sra {
namespace {

template <class A>
constexpr A kNothing = -std::numeric_limits<A>::infinity();
template <class A>
constexpr A kNaN = std::numeric_limits<A>::quiet_NaN();

// Products that no sum is fused with: the same operands give the same bits wherever they meet, so
// that equal sides stay equal and an entry's own slope goes out of it without a rest.
__device__ __forceinline__ float product(float x, float y) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(x, y);
#else
  return x * y;
#endif
}
__device__ __forceinline__ double product(double x, double y) {
#if defined(__CUDA_ARCH__)
  return __dmul_rn(x, y);
#else
  return x * y;
#endif
}

// e^x for x <= 0, in half the instructions of expf. Only what is far below the top loses bits.
__device__ __forceinline__ float exp_of(float x) { return exp2f(x * 1.44269504f); }
__device__ __forceinline__ double exp_of(double x) { return exp(x); }

// Logits of -inf have probability 0, and this finite stand-in keeps 0 * r a zero.
template <class A>
__device__ __forceinline__ A finite(A x) {
  return x < A(-1e30) ? A(-1e30) : x;
}

// e^r - 1 - r for |r| <= 1/2, without the cancellation, as in csrc/cpu/math.h.
__device__ __forceinline__ float exp_excess(float r) {
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
__device__ __forceinline__ double exp_excess(double r) {
  double p = 0;
#pragma unroll
  for (int k = 18; k >= 2; --k) p = (p * r + 1.0) * (1.0 / k);
  return p * r * r;
}

// u - log(1 + u) for |u| < 0.7, as good near 0: with s = u / (2 + u), log(1 + u) is
// 2 (s + s^3 / 3 + s^5 / 5 + ...), and u - 2 s = u s.
template <class A>
__device__ __forceinline__ A log1p_shortfall(A u) {
  const A s = u / (2 + u), s2 = s * s;
  A q = 0;
#pragma unroll
  for (int k = sizeof(A) == 4 ? 13 : 25; k >= 3; k -= 2) q = q * s2 + A(2.0 / k);
  return u * s - s * s2 * q;
}

// p (e^r - 1 - r), r = log q - log p: every term is >= 0, so the sum keeps its accuracy when the
// two agree. q where p is 0.
template <class A>
__device__ __forceinline__ A divergence_term(A p, A q, A r) {
  const A near = p * exp_excess(r), far = (q - p) - p * r;
  return p == 0 ? q : (fabs(r) < A(0.5) ? near : far);
}

// The same for beta KL(t|m) + (1 - beta) KL(s|m), r = log s - log t; and log(m/s), for the slope.
template <class A>
struct Jsd {
  A term, over_s;
};
template <class A>
__device__ __forceinline__ Jsd<A> jsd_term(A s, A t, A r, A beta) {
  constexpr A kMost = sizeof(A) == 4 ? A(88) : A(700);  // the largest that e^x can hold
  const A from_t = product(1 - beta, expm1(r > kMost ? kMost : r));
  const A from_s = product(beta, expm1(-r > kMost ? kMost : -r));
  const A log_s = log1p(from_s);
  if (fabs(r) < A(0.5)) {
    const A over_t = t * log1p_shortfall(from_t), over_s = s * log1p_shortfall(from_s);
    return {beta * over_t + (1 - beta) * over_s, log_s};
  }
  const A over_t = (1 - beta) * (s - t) - t * log1p(from_t);
  const A over_s = beta * (t - s) - s * log_s;
  return {beta * over_t + (1 - beta) * over_s, log_s};
}

// What one entry adds to the divergence, given the probabilities and r = log s - log t; and its
// slope: the gradient of reverse KL and JSD is s (slope - sum of s * slope).
template <class A>
struct Entry {
  A term, slope;
};
template <int kDirection, class A>
__device__ __forceinline__ Entry<A> entry_of(A s, A t, A r, A beta) {
  if constexpr (kDirection == SRA_FORWARD) {
    return {divergence_term(t, s, r), 0};
  } else if constexpr (kDirection == SRA_REVERSE) {
    return {divergence_term(s, t, -r), s == 0 ? 0 : r};
  } else {
    const Jsd<A> both = jsd_term(s, t, r, beta);
    return {both.term, s == 0 ? 0 : product(beta - 1, both.over_s)};
  }
}

// r of a shared entry, from its logits less the tops. Whichever side the expectation is over is
// kept finite.
template <int kDirection, class A>
__device__ __forceinline__ A log_ratio(A student, A teacher, A log_sums) {
  if constexpr (kDirection != SRA_FORWARD) student = finite(student);
  if constexpr (kDirection != SRA_REVERSE) teacher = finite(teacher);
  return (student - teacher) - log_sums;
}

}  // namespace
}  // namespace sra
#endif
