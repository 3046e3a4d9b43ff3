// span_kl: a block's work on a pair of rows, or on a part of one.
#ifndef SRA_CUDA_SPAN_KL_ROW_H
#define SRA_CUDA_SPAN_KL_ROW_H

#include "span_kl_sums.h"

namespace sra {
namespace {

// Of each row, from forward to backward. A row without a teacher's sum says nothing. The first ones
// are the CPU's, and stay zero: neither takes the other's for its own.
enum Stat {
  kStudentTop = 5, kStudentSum, kTeacherTop, kTeacherSum, kStudentRestTop, kStudentRestSum,
  kTeacherRestTop, kTeacherRestSum, kMass, kCentre, kMean,
  kStats
};
static_assert(kStats == SRA_SPAN_KL_STATS, "the slots of a row");

// Added up in the second sweep: the divergence, and the student's probability * (slope - centre).
template <class A>
struct Sums {
  A value = 0, slope = 0;
};

template <class A>
struct Call {
  sra_span_kl p;
  const int32_t* partner;         // the teacher's entry of each of the student's, -1: none; or NULL
  const uint8_t* shared_teacher;  // which of the teacher's entries are some partner; or NULL: all
  Finish<A> student, teacher;
  A per_logit;   // the derivative of a finished logit, but for the cap
  bool vectors;  // the student's rows, their gradient and the table lie so that 16 bytes are read
  bool teacher_vectors;
  int splits;    // blocks that share a row
  int staged;    // entries that a block keeps on chip from its first sweep, whole tiles
  Moments<A>* moments;  // [rows, splits]
  Sums<A>* sums;        // [rows, splits]
};

// What a launch does with its rows. Where blocks share a row, each step is a launch of its own.
enum Step { kRead = 1, kCompare = 2, kFinish = 4 };

template <class A, int kDirection>
class RowPair {
 public:
  __device__ RowPair(const Call<A>& call, int64_t row, int part)
      : call_(call), p_(call.p), row_(row), part_(part) {
    student_ = row_of(p_.student, p_.student_dtype, p_.student_stride);
    teacher_ = row_of(p_.teacher, p_.teacher_dtype, p_.teacher_stride);
    grad_ = p_.grad ? row_of(p_.grad, p_.grad_dtype, p_.grad_stride) : nullptr;
    DYNAMIC_SHARED(char, staged);
    staged_student_ = staged;
    staged_teacher_ = staged_student_ + call.staged * bytes_of(p_.student_dtype);
    staged_shared_ = staged_teacher_ + call.staged * bytes_of(p_.teacher_dtype);
    bucket_ = p_.outside == SRA_BUCKET && call.partner && call.shared_teacher;
    teacher_rest_ = call.shared_teacher && (p_.mass || p_.outside != SRA_RENORMALISE);
  }

  __device__ void run(int steps) {
    const A factor = p_.factors ? static_cast<const A*>(p_.factors)[row_] : A(1);
    const A* known = p_.known ? static_cast<const A*>(p_.known) + row_ * kStats : nullptr;
    if (known && known[kTeacherSum] == 0) known = nullptr;
    const bool used = factor != 0;

    const Moments<A> moments = known ? remembered(known) : gather_moments(steps, used);
    if (!(steps & kCompare) && (steps & kRead)) {
      if (threadIdx.x == 0) call_.moments[shared_at(part_)] = moments;
      return;
    }
    const A mass = known ? known[kMass] : (call_.shared_teacher ? moments.mass() : A(1));
    if (!used || nothing_to_teach(moments)) return idle(steps, mass);

    const Terms<A> terms(moments, bucket_);
    const A weight = p_.outside == SRA_WEIGHT ? product(factor, mass) : factor;
    gradient_ = product(weight, call_.per_logit);
    bucket_entry_ = entry_of<kDirection>(terms.bucket_student, terms.bucket_teacher,
                                         terms.bucket_ratio, A(p_.beta));
    centre_ = known ? known[kCentre] : centre(moments, terms);
    const bool slopes = kDirection != SRA_FORWARD && !known && (grad_ || p_.stats);
    const Sums<A> sums = gather_sums(steps, slopes, terms);
    if (!(steps & kFinish)) {
      if (threadIdx.x == 0) call_.sums[shared_at(part_)] = sums;
      return;
    }
    mean_ = known ? known[kMean]
                  : sums.slope + terms.bucket_student * (bucket_entry_.slope - centre_);
    if (part_ == 0 && threadIdx.x == 0) {
      if (p_.kl) out(p_.kl) = product(sums.value + bucket_entry_.term, weight);
      if (p_.mass) out(p_.mass) = mass;
      if (p_.stats) remember(moments, mass);
    }
    if (kDirection != SRA_FORWARD && grad_) slope_gradient(terms);
  }

 private:
  static constexpr int kHold = kHeld<A>;

  __device__ char* row_of(const void* rows, int32_t dtype, int64_t stride) const {
    return static_cast<char*>(const_cast<void*>(rows)) + row_ * stride * bytes_of(dtype);
  }
  __device__ A& out(void* rows) const { return static_cast<A*>(rows)[row_]; }
  __device__ int64_t shared_at(int part) const { return row_ * call_.splits + part; }

  __device__ bool nothing_to_teach(const Moments<A>& m) const {
    return m.teacher.sum == 0 && !(bucket_ && m.teacher_rest.sum != 0);
  }

  // each(places, tile) for this thread's entries of each tile of this block's part.
  template <class Each>
  __device__ void tiles(int64_t entries, bool vectors, const Each& each) const {
    const int size = (int(entries) + call_.splits - 1) / call_.splits;
    const int length = (size + kHold - 1) / kHold * kHold;  // parts begin where vectors do
    const int tile = int(blockDim.x) * kHold;
    const int64_t last = min(entries, int64_t(part_ + 1) * length);
    const int end = int(last);
    for (int64_t begin = int64_t(part_) * length; begin < last; begin += tile) {
      const int first = int(begin);
      each(vectors ? Places{first + int(threadIdx.x) * kHold, 1, end}
                   : Places{first + int(threadIdx.x), int(blockDim.x), end},
           first);
    }
  }

  // The finished logits of some entries, -inf where there is none; bit k: the k-th is shared. The
  // student's others count with a bucket alone. Row entries are read from the stage if it has them.
  template <bool kFirst>
  __device__ unsigned load(const Places& places, int tile, A (&student)[kHold],
                           A (&teacher)[kHold]) {
    const bool on_chip = tile < call_.staged;
    const bool keep = kFirst && on_chip, kept = !kFirst && on_chip;
    uint8_t* shared_here = reinterpret_cast<uint8_t*>(staged_shared_) + tile / kHold + threadIdx.x;
    unsigned shared = 0;
    if (call_.partner && !kept) {
      int partner[kHold];
      read_partners(call_.partner, places, partner);
#pragma unroll
      for (int k = 0; k < kHold; ++k) {
        if (partner[k] >= int(p_.teacher_entries)) {
          bad_table_ = true;
          partner[k] = -1;
        }
        if (partner[k] >= 0) shared |= 1u << k;
      }
      gather(p_.teacher_dtype, teacher_, keep ? staged_teacher_ : nullptr, places, partner,
             teacher);
      if (keep) *shared_here = uint8_t(shared);
    } else {
      read_row(p_.teacher_dtype, kept ? staged_teacher_ : teacher_,
               keep ? staged_teacher_ : nullptr, places, teacher);
      shared = call_.partner ? *shared_here : ~0u;
    }
    read_row(p_.student_dtype, kept ? staged_student_ : student_,
             keep ? staged_student_ : nullptr, places, student);
#pragma unroll
    for (int k = 0; k < kHold; ++k) {
      const bool exists = places.at(k) < places.end, both = exists && (shared >> k & 1);
      student[k] = both || (exists && bucket_) ? call_.student(student[k]) : kNothing<A>;
      teacher[k] = both ? call_.teacher(teacher[k]) : kNothing<A>;
    }
    return shared;
  }

  // Of this block's entries, or in a later step of the whole row.
  __device__ Moments<A> gather_moments(int steps, bool used) {
    Moments<A> mine;
    if (!used && !p_.mass) return mine;
    if (steps & kRead) mine = read();
    else if (int(threadIdx.x) < call_.splits) mine = call_.moments[shared_at(threadIdx.x)];
    return of_block(mine, bucket_, teacher_rest_, kDirection != SRA_FORWARD);
  }
  __device__ Sums<A> gather_sums(int steps, bool slopes, const Terms<A>& terms) {
    Sums<A> sums;
    if (!p_.kl && !slopes && !(kDirection == SRA_FORWARD && grad_)) return sums;
    if (steps & kCompare) sums = compare(terms);
    else if (int(threadIdx.x) < call_.splits) sums = call_.sums[shared_at(threadIdx.x)];
    if (p_.kl) sums.value = block_sum(sums.value);
    if (slopes) sums.slope = block_sum(sums.slope);
    return sums;
  }

  // The first sweep: this thread's share.
  __device__ Moments<A> read() {
    Moments<A> m;
    if (teacher_rest_) {
      tiles(p_.teacher_entries, call_.teacher_vectors, [&](const Places& places, int) {
        A z[kHold];
        read_row(p_.teacher_dtype, teacher_, nullptr, places, z);
        const unsigned shared = marks_at<kHold>(call_.shared_teacher, places);
#pragma unroll
        for (int k = 0; k < kHold; ++k) {
          const bool counts = places.at(k) < places.end && !(shared >> k & 1);
          z[k] = counts ? call_.teacher(z[k]) : kNothing<A>;
        }
        m.teacher_rest.add(z);
      });
    }
    tiles(p_.student_entries, call_.vectors, [&](const Places& places, int tile) {
      A student[kHold], teacher[kHold];
      const unsigned shared = load<true>(places, tile, student, teacher);
      if (bucket_) {
        A rest[kHold];
#pragma unroll
        for (int k = 0; k < kHold; ++k) {
          const bool inside = shared >> k & 1;
          rest[k] = inside ? kNothing<A> : student[k];
          if (!inside) student[k] = kNothing<A>;
        }
        m.student_rest.add(rest);
      }
      const bool moved = m.student.add(student);
      m.teacher.add(teacher);
      if (kDirection != SRA_FORWARD && moved) {
        m.peak = kNothing<A>;
#pragma unroll
        for (int k = 0; k < kHold; ++k)
          if (student[k] == m.student.top) m.peak = fmax(m.peak, teacher[k]);
      }
    });
    if (bad_table_) m.teacher.sum = kNaN<A>;
    return m;
  }

  // The slope of the likeliest class: where that holds nearly all the mass, its own slope would
  // cancel against the sum.
  __device__ A centre(const Moments<A>& m, const Terms<A>& terms) const {
    const A peak = product(exp_of(m.student.top - terms.student_top), terms.student_scale);
    if (terms.bucket_student > peak) return bucket_entry_.slope;
    const A teacher = m.peak - terms.teacher_top;
    const A r = log_ratio<kDirection>(m.student.top - terms.student_top, teacher, terms.log_sums);
    const A t = product(exp_of(teacher), terms.teacher_scale);
    return entry_of<kDirection>(peak, t, r, A(p_.beta)).slope;
  }

  // each(k, shared, s, t, r) for the entries in hand: probabilities and log-ratio.
  template <class Each>
  __device__ void entries(const Terms<A>& terms, unsigned shared, const A (&student)[kHold],
                          const A (&teacher)[kHold], const Each& each) const {
#pragma unroll
    for (int k = 0; k < kHold; ++k) {
      const bool inside = shared >> k & 1;
      const A s = student[k] - terms.student_top, t = teacher[k] - terms.teacher_top;
      each(k, inside ? product(exp_of(s), terms.student_scale) : A(0),
           product(exp_of(t), terms.teacher_scale), log_ratio<kDirection>(s, t, terms.log_sums));
    }
  }

  // The second sweep: this thread's share of the sums, and the gradient of forward KL.
  __device__ Sums<A> compare(const Terms<A>& terms) {
    Sums<A> sums;
    const A outside = terms.bucket_student - terms.bucket_teacher;
    tiles(p_.student_entries, call_.vectors, [&](const Places& places, int tile) {
      A student[kHold], teacher[kHold], g[kHold];
      const unsigned shared = load<false>(places, tile, student, teacher);
      entries(terms, shared, student, teacher, [&](int k, A s, A t, A r) {
        g[k] = s - t;
        if (kDirection == SRA_FORWARD && !p_.kl) return;
        const Entry<A> entry = entry_of<kDirection>(s, t, r, A(p_.beta));
        sums.value += entry.term;
        if (kDirection != SRA_FORWARD) sums.slope += s * (entry.slope - centre_);
      });
      if (kDirection == SRA_FORWARD && grad_)
        write_gradient(terms, places, tile, shared, student, outside, g);
    });
    return sums;
  }

  __device__ void slope_gradient(const Terms<A>& terms) {
    const A outside = terms.bucket_student * ((bucket_entry_.slope - centre_) - mean_);
    tiles(p_.student_entries, call_.vectors, [&](const Places& places, int tile) {
      A student[kHold], teacher[kHold], g[kHold];
      const unsigned shared = load<false>(places, tile, student, teacher);
      entries(terms, shared, student, teacher, [&](int k, A s, A t, A r) {
        const A slope = entry_of<kDirection>(s, t, r, A(p_.beta)).slope;
        g[k] = s == 0 ? A(0) : s * ((slope - centre_) - mean_);
      });
      write_gradient(terms, places, tile, shared, student, outside, g);
    });
  }

  // The bucket's gradient is shared out among its entries by their softmax among themselves.
  __device__ void write_gradient(const Terms<A>& terms, const Places& places, int tile,
                                 unsigned shared, const A (&student)[kHold], A outside,
                                 A (&g)[kHold]) const {
    const A each = outside * terms.per_rest;
#pragma unroll
    for (int k = 0; k < kHold; ++k) {
      if (bucket_ && !(shared >> k & 1)) g[k] = each * exp_of(student[k] - terms.rest_top);
      g[k] *= gradient_;
    }
    if (call_.student.capped) {
      A z[kHold];
      read_row(p_.student_dtype, tile < call_.staged ? staged_student_ : student_, nullptr,
               places, z);
#pragma unroll
      for (int k = 0; k < kHold; ++k) g[k] *= call_.student.cap_slope(z[k]);
    }
    write_row(p_.grad_dtype, grad_, places, g);
  }

  // A row that is left out, or that has nothing to teach.
  __device__ void idle(int steps, A mass) const {
    if ((steps & kFinish) && part_ == 0) {
      if (threadIdx.x == 0 && p_.kl) out(p_.kl) = 0;
      if (threadIdx.x == 0 && p_.mass) out(p_.mass) = mass;
      if (threadIdx.x < kStats && p_.stats) stats()[threadIdx.x] = 0;
    }
    if (!grad_ || !(steps & (kDirection == SRA_FORWARD ? kCompare : kFinish))) return;
    const A zeros[kHold] = {};
    tiles(p_.student_entries, call_.vectors, [&](const Places& places, int) {
      write_row(p_.grad_dtype, grad_, places, zeros);
    });
  }

  __device__ A* stats() const { return static_cast<A*>(p_.stats) + row_ * kStats; }

  __device__ void remember(const Moments<A>& m, A mass) const {
    A* to = stats();
    for (int k = 0; k < kStudentTop; ++k) to[k] = 0;
    to[kStudentTop] = m.student.top, to[kStudentSum] = m.student.sum;
    to[kTeacherTop] = m.teacher.top, to[kTeacherSum] = m.teacher.sum;
    to[kStudentRestTop] = m.student_rest.top, to[kStudentRestSum] = m.student_rest.sum;
    to[kTeacherRestTop] = m.teacher_rest.top, to[kTeacherRestSum] = m.teacher_rest.sum;
    to[kMass] = mass, to[kCentre] = centre_, to[kMean] = mean_;
  }
  __device__ static Moments<A> remembered(const A* from) {
    Moments<A> m;
    m.student = {from[kStudentTop], from[kStudentSum]};
    m.teacher = {from[kTeacherTop], from[kTeacherSum]};
    m.student_rest = {from[kStudentRestTop], from[kStudentRestSum]};
    m.teacher_rest = {from[kTeacherRestTop], from[kTeacherRestSum]};
    return m;
  }

  const Call<A>& call_;
  const sra_span_kl& p_;
  const int64_t row_;
  const int part_;
  const char *student_, *teacher_;
  char *grad_, *staged_student_, *staged_teacher_, *staged_shared_;
  bool bucket_, teacher_rest_;  // the entries outside that count
  bool bad_table_ = false;
  A gradient_ = 0;  // what the gradient of a logit is multiplied with
  A centre_ = 0, mean_ = 0;
  Entry<A> bucket_entry_{};
};

}  // namespace
}  // namespace sra
#endif
