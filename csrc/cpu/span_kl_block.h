// span_kl on one block of entries: what a row is made of. Blocks have a fixed size and their sums are
// added up in order, so a row gives the same bits whether one thread walks it or several.
#ifndef SRA_CPU_SPAN_KL_BLOCK_H
#define SRA_CPU_SPAN_KL_BLOCK_H

#include "math.h"
#include "sra_kernels.h"
#include "vector.h"

namespace sra {

// The buffers of a block (logits and exponentials of both sides) fit the first-level cache.
constexpr int64_t kBlock = 1024;

// Largest logit, and the sum of exp((z - top) / temperature). Kept apart, and never as one
// log-sum-exp, whose rounding at the size of the logits would enter every probability.
template <class A>
struct Partial {
  A top;
  double sum;
};

// From a stored logit to a finished one.
template <class A>
struct Finish {
  A scale, cap;  // cap 0: none
  A per_temperature;
};

// Reads n entries of a row (those of `ids`, or first, first + 1, ...) into z, finished, and the
// derivative of the cap into d, if that is not NULL.
template <class A, class T>
ALWAYS_INLINE void load_block(const T* row, const int64_t* ids, int64_t first, int64_t n,
                              const Finish<A>& finish, A* __restrict z, A* __restrict d) {
  if (ids) {
    for (int64_t i = 0; i < n; ++i) z[i] = A(load(row[ids[first + i]]));
  } else {
    for (int64_t i = 0; i < n; ++i) z[i] = A(load(row[first + i]));
  }
  if (finish.scale != 1) {
    for (int64_t i = 0; i < n; ++i) z[i] *= finish.scale;
  }
  if (finish.cap != 0) {
    const A cap = finish.cap, per_cap = 1 / cap;
    for (int64_t i = 0; i < n; ++i) {
      const A y = tanh_of(z[i] * per_cap);
      z[i] = cap * y;
      if (d) d[i] = 1 - y * y;
    }
  }
}

// e = exp((z - base) / temperature). Meanwhile `next`, the entries' bytes of the block to come, is
// fetched from memory: one thread alone gains 15 %.
template <class A>
ALWAYS_INLINE void exponentials(const A* z, A base, A per_temperature, int64_t n, const void* next,
                                int64_t bytes, A* __restrict e) {
  constexpr int64_t kStep = 128;
  const char* fetch = static_cast<const char*>(next);
  for (int64_t i = 0; i < n; i += kStep) {
    const int64_t end = i + kStep < n ? i + kStep : n;
    for (int64_t k = i * bytes; fetch && k < end * bytes; k += 64) __builtin_prefetch(fetch + k);
    for (int64_t k = i; k < end; ++k) e[k] = exp_of((z[k] - base) * per_temperature);
  }
}

template <class A>
ALWAYS_INLINE Partial<A> exponentials_of_block(const A* z, A per_temperature, int64_t n,
                                               const void* next, int64_t bytes, A* e) {
  const A top = largest_of(z, n);
  const A base = top == -std::numeric_limits<A>::infinity() ? 0 : top;  // -inf - -inf is no number
  exponentials(z, base, per_temperature, n, next, bytes, e);
  return {top, double(sum_of(e, n))};
}

// Logits of -inf have probability 0, and this finite stand-in keeps 0 * r a zero.
template <class A>
ALWAYS_INLINE A finite(A x) {
  return x < A(-1e30) ? A(-1e30) : x;
}

// apart = the student's shifted logit less the teacher's. Whichever side the divergence takes its
// expectation over is kept finite.
template <class A>
ALWAYS_INLINE void difference(const A* zs, A student_top, const A* zt, A teacher_top,
                              A per_temperature, int32_t direction, int64_t n,
                              A* __restrict apart) {
  if (direction == SRA_FORWARD) {
    for (int64_t i = 0; i < n; ++i)
      apart[i] = (zs[i] - student_top) * per_temperature -
                 finite((zt[i] - teacher_top) * per_temperature);
  } else if (direction == SRA_REVERSE) {
    for (int64_t i = 0; i < n; ++i)
      apart[i] = finite((zs[i] - student_top) * per_temperature) -
                 (zt[i] - teacher_top) * per_temperature;
  } else {
    for (int64_t i = 0; i < n; ++i)
      apart[i] = finite((zs[i] - student_top) * per_temperature) -
                 finite((zt[i] - teacher_top) * per_temperature);
  }
}

// From a block's exponentials and differences, which are relative to the block's own tops, to
// probabilities and their log-ratio.
template <class A>
struct Scales {
  A student, teacher;  // on the exponentials
  A apart;             // added to the differences
};

// p (e^r - 1 - r), r = log q - log p: every term is >= 0, so the sum keeps its accuracy when the two
// agree (KL 4e-7, float32: 2e-5 off, where sum p log(p/q) is 30 % off). q where p is 0.
template <class A>
ALWAYS_INLINE A divergence_term(A p, A q, A r) {
  const A near = p * exp_excess(r), far = (q - p) - p * r;
  const A size = r < 0 ? -r : r;
  return p == 0 ? q : (size < A(0.5) ? near : far);
}

// The same for beta KL(t|m) + (1 - beta) KL(s|m), r = log s - log t; and log(m/s), for the slope.
template <class A>
struct Jsd {
  A term, over_s;
};
template <class A>
ALWAYS_INLINE Jsd<A> jsd_term(A s, A t, A r, A beta) {
  const Log1p<A> from_t = log1p_of((1 - beta) * expm1_of(r)), from_s = log1p_of(beta * expm1_of(-r));
  const A size = r < 0 ? -r : r;
  const bool near = size < A(0.5);
  const A over_t = near ? t * from_t.shortfall : (1 - beta) * (s - t) - t * from_t.value;
  const A over_s = near ? s * from_s.shortfall : beta * (t - s) - s * from_s.value;
  return {beta * over_t + (1 - beta) * over_s, from_s.value};
}

// Forward KL of a block: the terms' sum, if `value`; g = p_s - p_t, if not NULL.
template <class A>
ALWAYS_INLINE double forward_block(const Scales<A>& scales, const A* apart, const A* es,
                                   const A* et, int64_t n, bool value, A* __restrict g) {
  // Both rounded before the difference, or a fused multiply-add would leave a rest of equal sides.
  A ps[kBlock], pt[kBlock];
  for (int64_t i = 0; i < n; ++i) ps[i] = es[i] * scales.student;
  for (int64_t i = 0; i < n; ++i) pt[i] = et[i] * scales.teacher;
  if (g) {
    for (int64_t i = 0; i < n; ++i) g[i] = ps[i] - pt[i];
  }
  if (!value) return 0;
  A term[kBlock];
  for (int64_t i = 0; i < n; ++i)
    term[i] = divergence_term(pt[i], ps[i], apart[i] + scales.apart);
  return double(sum_of(term, n));
}

// Reverse KL and JSD of a block: the terms' sum. es becomes p_s, and `apart` the slope: the
// derivative is p_s (slope - sum p_s slope).
template <class A>
ALWAYS_INLINE double reverse_block(const Scales<A>& scales, A* __restrict apart, A* __restrict es,
                                   const A* et, int64_t n) {
  A term[kBlock];
  for (int64_t i = 0; i < n; ++i) {
    const A ps = es[i] * scales.student, r = apart[i] + scales.apart;
    term[i] = divergence_term(ps, et[i] * scales.teacher, -r);
    es[i] = ps;
    apart[i] = ps == 0 ? 0 : r;
  }
  return double(sum_of(term, n));
}
template <class A>
ALWAYS_INLINE double jsd_block(const Scales<A>& scales, A beta, A* __restrict apart,
                               A* __restrict es, const A* et, int64_t n) {
  A term[kBlock];
  for (int64_t i = 0; i < n; ++i) {
    const A ps = es[i] * scales.student;
    const Jsd<A> both = jsd_term(ps, et[i] * scales.teacher, apart[i] + scales.apart, beta);
    term[i] = both.term;
    es[i] = ps;
    apart[i] = ps == 0 ? 0 : (beta - 1) * both.over_s;
  }
  return double(sum_of(term, n));
}

// Sum of p (slope - centre). Centred on the likeliest entry: where that holds nearly all the mass,
// its own slope would cancel against the sum.
template <class A>
ALWAYS_INLINE double slope_block(const A* p, const A* slope, A centre, int64_t n) {
  A term[kBlock];
  for (int64_t i = 0; i < n; ++i) term[i] = p[i] * (slope[i] - centre);
  return double(sum_of(term, n));
}

template <class A>
ALWAYS_INLINE void slope_gradient(const A* p, const A* slope, A centre, A mean, int64_t n, A* g) {
  for (int64_t i = 0; i < n; ++i) g[i] = p[i] * ((slope[i] - centre) - mean);
}

// out[entry] = factor * g * d, rounded once.
template <class A, class O>
ALWAYS_INLINE void write_block(const A* g, A factor, const A* d, const int64_t* ids, int64_t first,
                               int64_t n, O* out) {
  if (ids) {
    for (int64_t i = 0; i < n; ++i) round_to(out[ids[first + i]], g[i] * factor * (d ? d[i] : 1));
  } else if (d) {
    for (int64_t i = 0; i < n; ++i) round_to(out[first + i], g[i] * factor * d[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) round_to(out[first + i], g[i] * factor);
  }
}

}  // namespace sra
#endif
