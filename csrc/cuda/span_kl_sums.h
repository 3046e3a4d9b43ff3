// span_kl: the sums over a pair of rows, and what follows from them for each entry.
#ifndef SRA_CUDA_SPAN_KL_SUMS_H
#define SRA_CUDA_SPAN_KL_SUMS_H

#include "span_kl_entries.h"

namespace sra {
namespace {

// Largest logit, and the sum of exp(z - top). Kept apart, and never as one log-sum-exp, whose
// rounding at the size of the logits would enter every probability.
template <class A>
struct Partial {
  A top = kNothing<A>, sum = 0;

  // True if the top moved.
  __device__ bool add(const A (&z)[kHeld<A>]) {
    A highest = z[0];
#pragma unroll
    for (int k = 1; k < kHeld<A>; ++k) highest = fmax(highest, z[k]);
    const bool moved = highest > top;
    if (moved) {
      sum = product(sum, exp_of(top - highest));
      top = highest;
    }
    const A base = top == kNothing<A> ? 0 : top;  // -inf - -inf is no number
#pragma unroll
    for (int k = 0; k < kHeld<A>; ++k) sum += exp_of(z[k] - base);
    return moved;
  }

  // The sum as one of exp(z - to). Without a finite logit it is nothing; with a NaN it stays NaN.
  __device__ A relative(A to) const {
    return sum == 0 ? 0 : product(sum, exp_of(top - to));
  }
};

template <class A>
__device__ __forceinline__ Partial<A> together(const Partial<A>& x, const Partial<A>& y) {
  const A top = fmax(x.top, y.top);
  return {top, x.relative(top) + y.relative(top)};
}

// Of a pair of rows, or of a part of it.
template <class A>
struct Moments {
  Partial<A> student, teacher;            // the shared entries
  Partial<A> student_rest, teacher_rest;  // the others: the student's with a bucket alone
  A peak = kNothing<A>;                   // the teacher's logit at the student's likeliest one

  // The teacher's softmax inside the shared entries.
  __device__ A mass() const {
    const A inside = teacher.relative(fmax(teacher.top, teacher_rest.top));
    const A all = inside + teacher_rest.relative(fmax(teacher.top, teacher_rest.top));
    return all == 0 ? 0 : inside / all;
  }
};

// What a block's threads hold, put together in a fixed order; the same on each.
template <class A>
__device__ __forceinline__ Partial<A> of_block(const Partial<A>& mine) {
  const A top = block_max(mine.top);
  return {top, block_sum(mine.relative(top))};
}
template <class A>
__device__ __forceinline__ Moments<A> of_block(const Moments<A>& mine, bool bucket,
                                               bool teacher_rest, bool peak) {
  Moments<A> all;
  all.student = of_block(mine.student);
  all.teacher = of_block(mine.teacher);
  if (bucket) all.student_rest = of_block(mine.student_rest);
  if (teacher_rest) all.teacher_rest = of_block(mine.teacher_rest);
  if (peak) all.peak = block_max(mine.student.top == all.student.top ? mine.peak : kNothing<A>);
  return all;
}

// From logits to probabilities and their ratio; and the bucket, where there is one.
template <class A>
struct Terms {
  A student_top, teacher_top;
  A student_scale, teacher_scale;  // 1 over the sums
  A log_sums;                      // log of the student's sum, less the teacher's
  A bucket_student = 0, bucket_teacher = 0, bucket_ratio = 0;
  A rest_top = 0, per_rest = 0;  // of the student's entries in the bucket

  __device__ Terms(const Moments<A>& m, bool bucket) {
    const Partial<A> s = bucket ? together(m.student, m.student_rest) : m.student;
    const Partial<A> t = bucket ? together(m.teacher, m.teacher_rest) : m.teacher;
    student_top = s.top;
    teacher_top = t.top;
    student_scale = 1 / s.sum;
    teacher_scale = 1 / t.sum;
    log_sums = log(s.sum) - log(t.sum);
    if (!bucket) return;
    const Partial<A>&s_rest = m.student_rest, &t_rest = m.teacher_rest;
    bucket_student = product(s_rest.relative(s.top), student_scale);
    bucket_teacher = product(t_rest.relative(t.top), teacher_scale);
    const A log_student = (s_rest.top - s.top) + log(s_rest.sum);
    const A log_teacher = (t_rest.top - t.top) + log(t_rest.sum);
    // Two empty buckets have no ratio: then any will do.
    bucket_ratio = s_rest.sum == 0 ? kNothing<A> : (log_student - log_teacher) - log_sums;
    if (s_rest.sum != 0) {
      rest_top = s_rest.top;
      per_rest = 1 / s_rest.sum;
    }
  }
};

}  // namespace
}  // namespace sra
#endif
