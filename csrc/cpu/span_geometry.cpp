// span_geometry on the CPU: the cosines of a sample's spans in both models, loss and gradient.
//
// Bound by arithmetic. Spans of positive weight are brought to unit length in rows of the
// accumulator type; their cosines are formed for half of the pairs and mirrored, then weighed in
// place, and one more product gives the gradient. All of it stays in the caches for up to a few
// hundred spans; of more, a band of rows is held at a time. Samples go over threads, or the blocks
// of a sample that is large beside the rest: no sum is shared by two of them, so any number of
// threads gives the same bits.
//
// N x N for any N. From sums over d x d matrices the loss cancels: in float32 its error is 2e-8,
// whatever the loss (eager: 4e-15 for one of 8e-11). In float64, unit vectors included, they would
// be right, and as fast from N = 2 (Ds + Dt) on: 2,944 spans for the narrowest real pair.

#include "geometry_blocks.h"
#include "parallel.h"
#include "sra_kernels.h"
#include "vector.h"

#include <atomic>
#include <cmath>
#include <memory>
#include <vector>

namespace sra {
namespace {

// Cosines of both models that a band may fill: 1,448 spans in float32 are one band.
constexpr int64_t kBandBytes = int64_t(16) << 20;
// Rows whose cosines are one piece of work, a multiple of both sides of a tile.
constexpr int64_t kBlock = 48;
// Below this many multiplications a second thread costs more than it brings.
constexpr int64_t kWorkPerThread = int64_t(1) << 20;

// Memory that is written before it is read, kept from sample to sample.
template <class X>
class Scratch {
 public:
  X* at_least(int64_t n) {
    if (n > size_) {
      memory_.reset();
      memory_.reset(new X[n]);
      size_ = n;
      prefer_huge_pages(memory_.get(), n * int64_t(sizeof(X)));
    }
    return memory_.get();
  }

 private:
  std::unique_ptr<X[]> memory_;
  int64_t size_ = 0;
};

#define FOR_INPUT(NAME, T, A)                                                                     \
  CLONES double unit_row_##NAME(const void* x, int64_t row, int64_t row_stride, int64_t n,        \
                                A* unit, int64_t stride) {                                        \
    return unit_row<T, A>(static_cast<const T*>(x) + row * row_stride, n, unit, stride);          \
  }
FOR_INPUT(f32_f32, float, float)
FOR_INPUT(bf16_f32, bf16, float)
FOR_INPUT(f16_f32, f16, float)
FOR_INPUT(f64_f32, double, float)
FOR_INPUT(f32_f64, float, double)
FOR_INPUT(bf16_f64, bf16, double)
FOR_INPUT(f16_f64, f16, double)
FOR_INPUT(f64_f64, double, double)
#undef FOR_INPUT

#define FOR_ACCUMULATOR(A)                                                                        \
  CLONES void cosines_of(const Rows<A>& rows, int64_t n, const Band<A>& band, int64_t first,      \
                         int64_t last, A* out) {                                                  \
    cosines(rows, n, band, first, last, out);                                                     \
  }                                                                                               \
  CLONES void weigh_rows(const Sample<A>& s, const Band<A>& band, int64_t first, int64_t last) {  \
    for (int64_t i = first; i < last; ++i) weigh(s, band, i);                                     \
  }
FOR_ACCUMULATOR(float)
FOR_ACCUMULATOR(double)
#undef FOR_ACCUMULATOR

#define FOR_OUTPUT(A, O)                                                                          \
  CLONES void gradient_of(const Sample<A>& s, const Band<A>& band, int64_t first, int64_t last,   \
                          A* panels, O* grad, int64_t dim) {                                      \
    gradient_strip(s, band, first, last, panels, grad, dim);                                      \
  }
FOR_OUTPUT(float, float)
FOR_OUTPUT(float, bf16)
FOR_OUTPUT(double, double)
#undef FOR_OUTPUT

template <class A>
using UnitRow = double (*)(const void*, int64_t, int64_t, int64_t, A*, int64_t);
UnitRow<float> unit_row_of(int32_t dtype, float) {
  static const UnitRow<float> table[] = {unit_row_f32_f32, unit_row_bf16_f32, unit_row_f16_f32,
                                         unit_row_f64_f32};
  return table[dtype];
}
UnitRow<double> unit_row_of(int32_t dtype, double) {
  static const UnitRow<double> table[] = {unit_row_f32_f64, unit_row_bf16_f64, unit_row_f16_f64,
                                          unit_row_f64_f64};
  return table[dtype];
}

// Multiplications in a sample of n spans.
int64_t work_of(const sra_span_geometry& p, int64_t n) {
  return n * (n + 2) * (p.student_dim + p.teacher_dim + (p.grad ? 2 * p.student_dim : 0)) / 2;
}

// One thread, or several at one sample, with memory of its own.
template <class A, class O>
class Worker {
 public:
  Worker(const sra_span_geometry& p, int threads) : p_(p), threads_(threads) {}

  void run(int64_t b) {
    const int64_t begin = p_.offsets[b], end = p_.offsets[b + 1];
    static_cast<A*>(p_.loss)[b] = 0;
    O* grad = static_cast<O*>(p_.grad);
    Sample<A> s;
    if (!choose(begin, end, s)) return forget(begin, end);
    normalise(s);

    Band<A> band;
    band.ld = padded<A>(s.n);
    const int64_t held = kBandBytes / int64_t(2 * sizeof(A)) / band.ld / kBlock * kBlock;
    const int64_t rows = std::min(s.n, std::max(kBlock, held));
    band.student = student_cosines_.at_least(whole_tiles(rows) * band.ld);
    std::fill_n(band.student + rows * band.ld, (whole_tiles(rows) - rows) * band.ld, A(0));
    band.teacher = teacher_cosines_.at_least(rows * band.ld);
    for (band.first = 0; band.first < s.n; band.first = band.last) {
      band.last = std::min(s.n, band.first + rows);
      const int64_t blocks = (band.last - band.first + kBlock - 1) / kBlock;
      // The last block has the most to do: it begins first.
      parallel_each(threads_, 2 * blocks, [&](int64_t i) {
        const int64_t first = band.first + (blocks - 1 - i / 2) * kBlock;
        const int64_t last = std::min(band.last, first + kBlock);
        if (i % 2) cosines_of(s.student, s.n, band, first, last, band.student);
        else cosines_of(s.teacher, s.n, band, first, last, band.teacher);
      });
      parallel_each(threads_, blocks, [&](int64_t i) {
        const int64_t first = band.first + i * kBlock;
        weigh_rows(s, band, first, std::min(band.last, first + kBlock));
      });
      if (!grad) continue;
      const int64_t strips = (p_.student_dim + kStrip - 1) / kStrip;
      parallel_each(threads_, strips, [&](int64_t i) {
        const std::unique_ptr<A[]> panels(new A[s.n * kStrip]);
        gradient_of(s, band, i * kStrip, std::min(p_.student_dim, (i + 1) * kStrip), panels.get(),
                    grad, p_.student_dim);
      });
    }
    double loss = 0;
    for (int64_t i = 0; i < s.n; ++i) loss += double(s.weight[i]) * s.squares[i];
    static_cast<A*>(p_.loss)[b] = A(loss * s.share);
  }

 private:
  // Spans first..last teach nothing.
  void forget(int64_t first, int64_t last) {
    const int64_t dim = p_.student_dim;
    if (p_.grad) std::fill_n(static_cast<O*>(p_.grad) + first * dim, (last - first) * dim, O{});
  }

  // The spans that have weight; false where no pair of them has.
  bool choose(int64_t begin, int64_t end, Sample<A>& s) {
    const A* weights = static_cast<const A*>(p_.weights);
    A largest = 0;
    for (int64_t i = begin; i < end; ++i) largest = std::max(largest, weights[i]);
    row_.clear(), weight_.clear();
    double before = 0, total = 0;
    for (int64_t i = begin; i < end; ++i) {
      // Pair weights are ratios: with the largest at 1, their products cannot underflow.
      const A weight = largest == 0 ? 0 : weights[i] / largest;
      if (weight == 0) {
        forget(i, i + 1);
        continue;
      }
      row_.push_back(i), weight_.push_back(weight);
      total += 2 * double(weight) * before;
      before += double(weight);
    }
    s.n = int64_t(row_.size());
    s.row = row_.data();
    s.weight = weight_.data();
    s.share = 1 / total;
    return total >= double(std::numeric_limits<A>::min());
  }

  void normalise(Sample<A>& s) {
    s.student.stride = padded<A>(p_.student_dim);
    s.teacher.stride = padded<A>(p_.teacher_dim);
    s.student.unit = student_.at_least(s.n * s.student.stride);
    s.teacher.unit = teacher_.at_least(s.n * s.teacher.stride);
    inverse_.resize(s.n), squares_.resize(s.n);
    s.inverse = inverse_.data();
    s.squares = squares_.data();
    const auto student = unit_row_of(p_.student_dtype, A());
    const auto teacher = unit_row_of(p_.teacher_dtype, A());
    parallel_each(threads_, (s.n + kBlock - 1) / kBlock, [&](int64_t block) {
      for (int64_t i = block * kBlock; i < std::min(s.n, (block + 1) * kBlock); ++i) {
        s.inverse[i] = student(p_.student, s.row[i], p_.student_stride, p_.student_dim,
                               s.student.unit + i * s.student.stride, s.student.stride);
        teacher(p_.teacher, s.row[i], p_.teacher_stride, p_.teacher_dim,
                s.teacher.unit + i * s.teacher.stride, s.teacher.stride);
      }
    });
  }

  const sra_span_geometry& p_;
  const int threads_;
  std::vector<int64_t> row_;
  std::vector<A> weight_;
  std::vector<double> inverse_, squares_;
  Scratch<A> student_, teacher_, student_cosines_, teacher_cosines_;
};

template <class A, class O>
void run(const sra_span_geometry& p) {
  int64_t total = 0;
  for (int64_t b = 0; b < p.samples; ++b) total += work_of(p, p.offsets[b + 1] - p.offsets[b]);
  const int threads = threads_for(total, kWorkPerThread, p.threads);
  if (p.grad) prefer_huge_pages(p.grad, p.spans * p.student_dim * int64_t(sizeof(O)));

  // A sample that is more than half of a thread's share would keep the others waiting.
  std::vector<int64_t> small;
  Worker<A, O> together(p, threads);
  for (int64_t b = 0; b < p.samples; ++b) {
    if (threads > 1 && work_of(p, p.offsets[b + 1] - p.offsets[b]) > total / (2 * threads))
      together.run(b);
    else small.push_back(b);
  }
  std::atomic<int64_t> next{0};
  parallel(small.empty() ? 1 : threads, [&](int64_t, int64_t) {
    Worker<A, O> alone(p, 1);
    for (int64_t i; (i = next++) < int64_t(small.size());) alone.run(small[i]);
  });
}

template <class A>
bool weights_are_bad(const void* weights, int64_t n) {
  const A* w = static_cast<const A*>(weights);
  bool bad = false;
  for (int64_t i = 0; i < n; ++i) bad |= !(w[i] >= 0 && w[i] <= std::numeric_limits<A>::max());
  return bad;
}

int refuse(const sra_span_geometry& p) {
  for (const int32_t dtype : {p.student_dtype, p.teacher_dtype})
    if (dtype < SRA_F32 || dtype > SRA_F64) return SRA_BAD_DTYPE;
  if (p.offsets[0] != 0 || p.offsets[p.samples] != p.spans) return SRA_BAD_SPANS;
  for (int64_t b = 0; b < p.samples; ++b)
    if (p.offsets[b] > p.offsets[b + 1]) return SRA_BAD_SPANS;
  const bool bad = p.student_dtype == SRA_F64 ? weights_are_bad<double>(p.weights, p.spans)
                                              : weights_are_bad<float>(p.weights, p.spans);
  return bad ? SRA_BAD_WEIGHTS : SRA_OK;
}

}  // namespace
}  // namespace sra

int sra_span_geometry_forward(const sra_span_geometry* params) {
  using namespace sra;
  const sra_span_geometry& p = *params;
  if (const int status = refuse(p)) return status;
  if (p.student_dtype == SRA_F64) run<double, double>(p);
  else if (p.student_dtype == SRA_BF16) run<float, bf16>(p);
  else run<float, float>(p);  // the gradient of float16 waits in float32
  return SRA_OK;
}
