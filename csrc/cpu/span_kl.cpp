// span_kl on the CPU: KL of two rows of logits, value and gradient.
//
// A row's two sides are read once: gathered, widened and exponentiated block by block into buffers
// that stay in the caches, from which value and gradient are made; so an exponential is taken once
// for each entry. Rows go over the threads; where there are few, their blocks do.

#include "span_kl_side.h"

namespace sra {
namespace {

// Below this many entries, counted on both sides, a second thread costs more than it brings.
constexpr int64_t kEntriesPerThread = 16384;
// Of each row, from forward to backward: the sums over its entries. A row of zeros says nothing.
// The first of a row's sums are this library's; those of the GPU kernels lie behind and stay zero, so
// that neither takes the other's for its own.
enum Stat { kStudentTop, kStudentSum, kTeacherTop, kTeacherSum, kMass };
constexpr int kStats = SRA_SPAN_KL_STATS;

// One pair of rows at a time, in buffers that are used again. `over(stage)` runs stage(i, n) for the
// n parts of a row.
template <class A>
class RowPair {
 public:
  explicit RowPair(const Call& call)
      : call_(call),
        p_(call.p),
        student_(call, true),
        teacher_(call, false),
        apart_(call.entries),
        cap_slope_(student_.finish.cap != 0 && p_.grad ? call.entries : 0),
        sums_(call.blocks) {}

  template <class Over>
  void run(int64_t r, const Over& over) {
    student_.turn_to(p_.student, r, p_.student_stride, p_.rows);
    teacher_.turn_to(p_.teacher, r, p_.teacher_stride, p_.rows);
    if (p_.grad) out_ = static_cast<char*>(p_.grad) + r * p_.grad_stride * kBytes[p_.grad_dtype];
    const A factor = p_.factors ? static_cast<const A*>(p_.factors)[r] : A(1);
    const A* known = p_.known ? static_cast<const A*>(p_.known) + r * kStats : nullptr;
    if (known && known[kTeacherSum] == 0) known = nullptr;
    const bool unused = factor == 0;
    A mass = 0;
    if (known) {
      student_.whole = {known[kStudentTop], double(known[kStudentSum])};
      teacher_.whole = {known[kTeacherTop], double(known[kTeacherSum])};
      mass = known[kMass];
    } else if (!unused || p_.mass) {
      read(over);
      mass = A(teacher_.mass());
    }
    if (p_.mass) static_cast<A*>(p_.mass)[r] = mass;
    if (p_.stats) remember(static_cast<A*>(p_.stats) + r * kStats, mass);
    if (unused || teacher_.whole.top == kNothing<A>) {
      if (p_.kl) static_cast<A*>(p_.kl)[r] = 0;
      if (out_) over([&](int64_t i, int64_t n) { clear(i, n); });
      return;
    }
    // Entries outside the ids get no gradient, but with a bucket each gets its own.
    if (out_ && p_.student_ids && p_.outside != SRA_BUCKET)
      over([&](int64_t i, int64_t n) { clear(i, n); });
    const A weight = p_.outside == SRA_WEIGHT ? factor * mass : factor;
    gradient_ = weight * student_.finish.per_temperature * student_.finish.scale;
    double kl = 0;
    if (known) gradient_alone(over);
    else kl = p_.direction == SRA_FORWARD ? forward(over) : through_slopes(over);
    if (p_.kl) static_cast<A*>(p_.kl)[r] = A(kl) * weight;
  }

 private:
  void clear(int64_t i, int64_t n) {
    const int64_t bytes = kBytes[p_.grad_dtype], first = part(p_.student_entries, i, n);
    std::memset(out_ + first * bytes, 0, (part(p_.student_entries, i + 1, n) - first) * bytes);
  }

  // block(first, n, b) for each block of part i of n.
  template <class Block>
  void each_block(int64_t i, int64_t n, const Block& block) const {
    for (int64_t b = part(call_.blocks, i, n); b < part(call_.blocks, i + 1, n); ++b)
      block(b * kBlock, std::min(kBlock, call_.entries - b * kBlock), b);
  }

  template <class Over>
  void read(const Over& over) {
    over([&](int64_t i, int64_t n) {
      A zs[kBlock], zt[kBlock];
      each_block(i, n, [&](int64_t first, int64_t length, int64_t b) {
        student_.read(first, length, zs, cap_slope(first));
        teacher_.read(first, length, zt, nullptr);
        Loops<A>::difference(zs, student_.base(b), zt, teacher_.base(b),
                             student_.finish.per_temperature, p_.direction, length,
                             &apart_[first]);
      });
      student_.read_rest(i, n);
      teacher_.read_rest(i, n);
    });
    const bool bucket = p_.outside == SRA_BUCKET && p_.student_ids;
    student_.combine(bucket);
    teacher_.combine(bucket);
    log_sums_ = std::log(student_.whole.sum) - std::log(teacher_.whole.sum);
  }

  // What the gradient alone can be made of, where nothing but sums over entries stands in it.
  void remember(A* stats, A mass) const {
    const bool enough = p_.direction == SRA_FORWARD && p_.outside != SRA_BUCKET;
    const Partial<A>&s = student_.whole, &t = teacher_.whole;
    const A known[kStats] = {s.top, A(s.sum), t.top, A(t.sum), mass};
    for (int k = 0; k < kStats; ++k) stats[k] = enough ? known[k] : A(0);
  }

  Scales<A> scales(int64_t b) const {
    const double apart = student_.shift(student_.base(b), student_.whole.top) -
                         teacher_.shift(teacher_.base(b), teacher_.whole.top) - log_sums_;
    return {student_.probability(b), teacher_.probability(b), A(apart)};
  }

  double total() const {
    double sum = 0;
    for (const double x : sums_) sum += x;
    return sum;
  }

  A* cap_slope(int64_t first) { return cap_slope_.empty() ? nullptr : &cap_slope_[first]; }

  void write(const A* g, const A* d, int64_t first, int64_t n) {
    Loops<A>::write[p_.grad_dtype](g, gradient_, d, call_.student_ids, first, n, out_);
  }

  bool has_bucket() const {
    return p_.outside == SRA_BUCKET && (student_.others.sum != 0 || teacher_.others.sum != 0);
  }

  template <class Over>
  void gradient_alone(const Over& over) {
    const Scales<A> scales{A(1 / student_.whole.sum), A(1 / teacher_.whole.sum), 0};
    over([&](int64_t i, int64_t n) {
      A z[kBlock], d[kBlock], es[kBlock], et[kBlock], g[kBlock];
      A* slope = student_.finish.cap != 0 ? d : nullptr;
      const auto exponentials = [&](Side<A>& side, int64_t first, int64_t length, A* d, A* e) {
        side.load(side.row, side.ids, first, length, side.finish, z, d);
        Loops<A>::exponentials(z, side.whole.top, side.finish.per_temperature, length,
                               side.next(first + length), side.next_bytes(length), e);
      };
      each_block(i, n, [&](int64_t first, int64_t length, int64_t) {
        exponentials(student_, first, length, slope, es);
        exponentials(teacher_, first, length, nullptr, et);
        Loops<A>::forward(scales, nullptr, es, et, length, false, g);
        write(g, slope, first, length);
      });
    });
  }

  template <class Over>
  double forward(const Over& over) {
    over([&](int64_t i, int64_t n) {
      A g[kBlock];
      each_block(i, n, [&](int64_t first, int64_t length, int64_t b) {
        sums_[b] = Loops<A>::forward(scales(b), &apart_[first], &student_.e[first],
                                     &teacher_.e[first], length, p_.kl != nullptr,
                                     out_ ? g : nullptr);
        if (out_) write(g, cap_slope(first), first, length);
      });
    });
    if (!has_bucket()) return total();
    const double s = student_.bucket_probability(), t = teacher_.bucket_probability();
    if (out_) bucket_gradient(over, s - t);
    return total() + divergence_term(t, s, student_.bucket_log() - teacher_.bucket_log());
  }

  template <class Over>
  double through_slopes(const Over& over) {
    const bool reverse = p_.direction == SRA_REVERSE;
    const int64_t peak = out_ ? likeliest() : 0;
    over([&](int64_t i, int64_t n) {
      each_block(i, n, [&](int64_t first, int64_t length, int64_t b) {
        A *apart = &apart_[first], *es = &student_.e[first], *et = &teacher_.e[first];
        sums_[b] = reverse ? Loops<A>::reverse(scales(b), apart, es, et, length)
                           : Loops<A>::jsd(scales(b), A(p_.beta), apart, es, et, length);
      });
    });
    double kl = total(), slope = 0;
    const double bucket = has_bucket() ? student_.bucket_probability() : 0;
    if (has_bucket()) {
      const double t = teacher_.bucket_probability();
      const double r = bucket == 0 ? -1e30 : student_.bucket_log() - teacher_.bucket_log();
      const Jsd<double> both = jsd_term(bucket, t, r, p_.beta);
      kl += reverse ? divergence_term(bucket, t, -r) : both.term;
      slope = bucket == 0 ? 0 : (reverse ? r : (p_.beta - 1) * both.over_s);
    }
    if (!out_) return kl;

    const A centre = bucket > double(student_.e[peak]) ? A(slope) : apart_[peak];
    over([&](int64_t i, int64_t n) {
      each_block(i, n, [&](int64_t first, int64_t length, int64_t b) {
        sums_[b] = Loops<A>::slope(&student_.e[first], &apart_[first], centre, length);
      });
    });
    const double mean = total() + bucket * (slope - double(centre));
    over([&](int64_t i, int64_t n) {
      A g[kBlock];
      each_block(i, n, [&](int64_t first, int64_t length, int64_t) {
        Loops<A>::gradient(&student_.e[first], &apart_[first], centre, A(mean), length, g);
        write(g, cap_slope(first), first, length);
      });
    });
    if (has_bucket()) bucket_gradient(over, bucket * ((slope - double(centre)) - mean));
    return kl;
  }

  // The student's likeliest shared entry: in a block with the row's top, the one of exponential 1.
  int64_t likeliest() const {
    for (int64_t b = 0; b < call_.blocks; ++b) {
      if (student_.inside[b].top != student_.shared.top) continue;
      const auto first = student_.e.begin() + b * kBlock;
      const auto last = student_.e.begin() + std::min((b + 1) * kBlock, call_.entries);
      return std::max_element(first, last) - student_.e.begin();
    }
    return 0;
  }

  // The bucket's gradient, shared out among its entries by their softmax among themselves.
  template <class Over>
  void bucket_gradient(const Over& over, double bucket) {
    const int64_t* rest = student_.rest.data();
    over([&](int64_t i, int64_t n) {
      A z[kBlock], e[kBlock], d[kBlock];
      A* slope = student_.finish.cap != 0 ? d : nullptr;
      const int64_t blocks = int64_t(student_.outside.size());
      for (int64_t b = part(blocks, i, n); b < part(blocks, i + 1, n); ++b) {
        const int64_t first = b * kBlock;
        const int64_t length = std::min(kBlock, int64_t(student_.rest.size()) - first);
        student_.load(student_.row, rest, first, length, student_.finish, z, slope);
        Loops<A>::exponentials(z, student_.others.top, student_.finish.per_temperature, length,
                               nullptr, 0, e);
        Loops<A>::write[p_.grad_dtype](e, A(bucket / student_.others.sum) * gradient_, slope,
                                       rest + first, 0, length, out_);
      }
    });
  }

  const Call& call_;
  const sra_span_kl& p_;
  Side<A> student_, teacher_;
  std::vector<A> apart_;  // the student's shifted logits less the teacher's; later the slopes
  std::vector<A> cap_slope_;
  std::vector<double> sums_;
  double log_sums_ = 0;  // log of the student's sum of exponentials, less the teacher's
  char* out_ = nullptr;
  A gradient_ = 0;  // what p_s - p_t is multiplied with
};

template <class A>
void run(const Call& call) {
  const sra_span_kl& p = call.p;
  const int64_t width = 2 * call.entries + int64_t(call.teacher_rest.size());
  const int threads = threads_for(p.rows * width, kEntriesPerThread, p.threads);
  // Few rows do not share out evenly: then the blocks of each row go over the threads.
  const int inner = threads_for(width, kEntriesPerThread, p.threads);
  if (inner > 1 && p.rows < 4 * threads) {
    RowPair<A> pair(call);
    for (int64_t r = 0; r < p.rows; ++r)
      pair.run(r, [&](const auto& stage) { parallel(inner, stage); });
    return;
  }
  parallel(threads, [&](int64_t i, int64_t n) {
    RowPair<A> pair(call);
    for (int64_t r = part(p.rows, i, n); r < part(p.rows, i + 1, n); ++r)
      pair.run(r, [](const auto& stage) { stage(0, 1); });
  });
}

bool bad_ids(const int64_t* ids, int64_t shared, int64_t entries) {
  if (!ids) return false;
  std::vector<bool> seen(entries, false);
  for (int64_t k = 0; k < shared; ++k) {
    if (ids[k] < 0 || ids[k] >= entries || seen[ids[k]]) return true;
    seen[ids[k]] = true;
  }
  return false;
}

bool bad_dtype(int32_t dtype) { return dtype < SRA_F32 || dtype > SRA_F64; }

}  // namespace
}  // namespace sra

int sra_span_kl_forward(const sra_span_kl* params) {
  using namespace sra;
  const sra_span_kl& p = *params;
  const bool wide = p.student_dtype == SRA_F64;
  if (bad_dtype(p.student_dtype) || bad_dtype(p.teacher_dtype)) return SRA_BAD_DTYPE;
  if (p.grad && (bad_dtype(p.grad_dtype) || wide != (p.grad_dtype == SRA_F64))) return SRA_BAD_DTYPE;
  if (bad_ids(p.student_ids, p.shared, p.student_entries)) return SRA_BAD_IDS;
  if (bad_ids(p.teacher_ids, p.shared, p.teacher_entries)) return SRA_BAD_IDS;
  const Call call(p);
  if (p.grad && p.grad != p.student)
    prefer_huge_pages(p.grad, p.rows * p.grad_stride * kBytes[p.grad_dtype]);
  if (wide) run<double>(call);
  else run<float>(call);
  return SRA_OK;
}
