// span_kl: the call, the loops over a block for each element type, and one side of a pair of rows.
#ifndef SRA_CPU_SPAN_KL_SIDE_H
#define SRA_CPU_SPAN_KL_SIDE_H

#include "parallel.h"
#include "span_kl_block.h"

#include <vector>

namespace sra {
namespace {

// Loops of an accumulator type A; those that read or write logits, for each sra_dtype.
template <class A>
struct Loops;

#define LOAD(NAME, A, T)                                                                          \
  CLONES void NAME(const void* row, const int64_t* ids, int64_t first, int64_t n,                 \
                   const Finish<A>& finish, A* z, A* d) {                                         \
    load_block<A, T>(static_cast<const T*>(row), ids, first, n, finish, z, d);                    \
  }
LOAD(load_f32, float, float)
LOAD(load_bf16, float, bf16)
LOAD(load_f16, float, f16)
LOAD(load_f64, float, double)
LOAD(load_wide_f32, double, float)
LOAD(load_wide_bf16, double, bf16)
LOAD(load_wide_f16, double, f16)
LOAD(load_wide_f64, double, double)
#undef LOAD

#define WRITE(NAME, A, O)                                                                         \
  CLONES void NAME(const A* g, A factor, const A* d, const int64_t* ids, int64_t first,           \
                   int64_t n, void* out) {                                                        \
    write_block<A, O>(g, factor, d, ids, first, n, static_cast<O*>(out));                         \
  }
WRITE(write_f32, float, float)
WRITE(write_bf16, float, bf16)
WRITE(write_f16, float, f16)
WRITE(write_wide_f64, double, double)
#undef WRITE

#define SWEEPS(NAME, A)                                                                           \
  CLONES Partial<A> top_##NAME(const A* z, A per_temperature, int64_t n, const void* next,        \
                               int64_t bytes, A* e) {                                             \
    return exponentials_of_block<A>(z, per_temperature, n, next, bytes, e);                       \
  }                                                                                               \
  CLONES void exponentials_##NAME(const A* z, A base, A per_temperature, int64_t n,               \
                                  const void* next, int64_t bytes, A* e) {                        \
    exponentials<A>(z, base, per_temperature, n, next, bytes, e);                                 \
  }                                                                                               \
  CLONES void difference_##NAME(const A* zs, A student_top, const A* zt, A teacher_top,           \
                                A per_temperature, int32_t direction, int64_t n, A* apart) {      \
    difference<A>(zs, student_top, zt, teacher_top, per_temperature, direction, n, apart);        \
  }                                                                                               \
  CLONES double forward_##NAME(const Scales<A>& scales, const A* apart, const A* es, const A* et, \
                               int64_t n, bool value, A* g) {                                     \
    return forward_block<A>(scales, apart, es, et, n, value, g);                                  \
  }                                                                                               \
  CLONES double reverse_##NAME(const Scales<A>& scales, A* apart, A* es, const A* et,             \
                               int64_t n) {                                                       \
    return reverse_block<A>(scales, apart, es, et, n);                                            \
  }                                                                                               \
  CLONES double jsd_##NAME(const Scales<A>& scales, A beta, A* apart, A* es, const A* et,         \
                           int64_t n) {                                                           \
    return jsd_block<A>(scales, beta, apart, es, et, n);                                          \
  }                                                                                               \
  CLONES double slope_##NAME(const A* p, const A* slope, A centre, int64_t n) {                   \
    return slope_block<A>(p, slope, centre, n);                                                   \
  }                                                                                               \
  CLONES void gradient_##NAME(const A* p, const A* slope, A centre, A mean, int64_t n, A* g) {    \
    slope_gradient<A>(p, slope, centre, mean, n, g);                                              \
  }                                                                                               \
  template <>                                                                                     \
  struct Loops<A> {                                                                               \
    static constexpr auto exponentials_of_block = top_##NAME;                                     \
    static constexpr auto exponentials = exponentials_##NAME;                                     \
    static constexpr auto difference = difference_##NAME;                                         \
    static constexpr auto forward = forward_##NAME;                                               \
    static constexpr auto reverse = reverse_##NAME;                                               \
    static constexpr auto jsd = jsd_##NAME;                                                       \
    static constexpr auto slope = slope_##NAME;                                                   \
    static constexpr auto gradient = gradient_##NAME;                                             \
    using Load = void (*)(const void*, const int64_t*, int64_t, int64_t, const Finish<A>&, A*,    \
                          A*);                                                                    \
    using Write = void (*)(const A*, A, const A*, const int64_t*, int64_t, int64_t, void*);       \
    static const Load load[4];                                                                    \
    static const Write write[4];                                                                  \
  };
SWEEPS(float, float)
SWEEPS(double, double)
#undef SWEEPS
const Loops<float>::Load Loops<float>::load[] = {load_f32, load_bf16, load_f16, load_f64};
const Loops<float>::Write Loops<float>::write[] = {write_f32, write_bf16, write_f16, nullptr};
const Loops<double>::Load Loops<double>::load[] = {load_wide_f32, load_wide_bf16, load_wide_f16,
                                                   load_wide_f64};
const Loops<double>::Write Loops<double>::write[] = {nullptr, nullptr, nullptr, write_wide_f64};

inline int64_t blocks_of(int64_t n) { return (n + kBlock - 1) / kBlock; }

// The call, and what all of its rows share.
struct Call {
  const sra_span_kl& p;
  std::vector<int64_t> student_rest, teacher_rest;  // entries that are not shared, if they count
  std::vector<int64_t> student_sorted, teacher_sorted;
  const int64_t *student_ids, *teacher_ids;
  int64_t entries, blocks;

  explicit Call(const sra_span_kl& params)
      : p(params), student_ids(params.student_ids), teacher_ids(params.teacher_ids) {
    if (student_ids && teacher_ids) sort_by_teacher();
    entries = p.student_ids || p.teacher_ids ? p.shared : p.student_entries;
    blocks = blocks_of(entries);
    const bool bucket = p.outside == SRA_BUCKET;
    if (bucket) student_rest = rest(p.student_ids, p.student_entries);
    if (bucket || p.outside == SRA_WEIGHT || p.mass)
      teacher_rest = rest(p.teacher_ids, p.teacher_entries);
  }

  // The pairs in the order of the teacher's ids. Its rows are the longer ones, mostly too long for a
  // cache, so they are read from end to end; real vocabularies come in the student's order.
  void sort_by_teacher() {
    std::vector<int64_t> pair(p.teacher_entries, -1);
    for (int64_t k = 0; k < p.shared; ++k) pair[teacher_ids[k]] = student_ids[k];
    for (int64_t v = 0; v < p.teacher_entries; ++v) {
      if (pair[v] < 0) continue;
      student_sorted.push_back(pair[v]);
      teacher_sorted.push_back(v);
    }
    student_ids = student_sorted.data();
    teacher_ids = teacher_sorted.data();
  }

  std::vector<int64_t> rest(const int64_t* ids, int64_t n) const {
    std::vector<int64_t> others;
    if (!ids) return others;
    std::vector<bool> shared(n, false);
    for (int64_t k = 0; k < p.shared; ++k) shared[ids[k]] = true;
    for (int64_t v = 0; v < n; ++v)
      if (!shared[v]) others.push_back(v);
    return others;
  }
};

template <class A>
constexpr A kNothing = -std::numeric_limits<A>::infinity();

// One side of a row: what is known of its blocks, and of the whole.
template <class A>
struct Side {
  const int64_t* ids;
  const std::vector<int64_t>& rest;
  const Finish<A> finish;
  const int64_t bytes, row_bytes;
  const typename Loops<A>::Load load;
  const void *row = nullptr, *next_row = nullptr;
  std::vector<A> e;  // exponentials of the shared entries, relative to their block's top
  std::vector<Partial<A>> inside, outside;
  Partial<A> shared{}, others{}, whole{};

  Side(const Call& call, bool student)
      : ids(student ? call.student_ids : call.teacher_ids),
        rest(student ? call.student_rest : call.teacher_rest),
        finish{A(student ? call.p.student_scale : call.p.teacher_scale),
               A(student ? call.p.student_softcap : call.p.teacher_softcap),
               A(1 / call.p.temperature)},
        bytes(kBytes[student ? call.p.student_dtype : call.p.teacher_dtype]),
        row_bytes((student ? call.p.student_entries : call.p.teacher_entries) * bytes),
        load(Loops<A>::load[student ? call.p.student_dtype : call.p.teacher_dtype]),
        e(call.entries),
        inside(call.blocks),
        outside(blocks_of(int64_t(rest.size()))) {}

  void turn_to(const void* rows, int64_t r, int64_t stride, int64_t count) {
    row = static_cast<const char*>(rows) + r * stride * bytes;
    next_row = r + 1 < count ? static_cast<const char*>(row) + stride * bytes : nullptr;
  }

  // What to fetch while a block is worked on that ends at the shared entry `end`: the next block, or
  // where the entries are scattered over the row, as large a part of the next row.
  const void* next(int64_t end) const {
    const int64_t entries = int64_t(e.size());
    if (ids) {
      const int64_t blocks = blocks_of(entries), b = (end - 1) / kBlock;
      return next_row ? static_cast<const char*>(next_row) + part(row_bytes, b, blocks) : nullptr;
    }
    return end >= entries ? nullptr : static_cast<const char*>(row) + end * bytes;
  }
  // Bytes of that for each entry of the block.
  int64_t next_bytes(int64_t n) const {
    return ids ? row_bytes / (blocks_of(int64_t(e.size())) * n) : bytes;
  }

  // Block b of the shared entries: logits into z, exponentials into e.
  void read(int64_t first, int64_t n, A* z, A* d) {
    load(row, ids, first, n, finish, z, d);
    inside[first / kBlock] = Loops<A>::exponentials_of_block(
        z, finish.per_temperature, n, next(first + n), next_bytes(n), &e[first]);
  }

  // Part i of n of the others, of which only the sum counts.
  void read_rest(int64_t i, int64_t n) {
    A z[kBlock], exponential[kBlock];
    const int64_t blocks = int64_t(outside.size()), count = int64_t(rest.size());
    for (int64_t b = part(blocks, i, n); b < part(blocks, i + 1, n); ++b) {
      const int64_t length = std::min(kBlock, count - b * kBlock);
      load(row, rest.data(), b * kBlock, length, finish, z, nullptr);
      outside[b] = Loops<A>::exponentials_of_block(z, finish.per_temperature, length, nullptr,
                                                   bytes, exponential);
    }
  }

  A base(int64_t b) const { return inside[b].top == kNothing<A> ? 0 : inside[b].top; }

  double shift(A from, A to) const {
    return double(from - to) * double(finish.per_temperature);
  }

  // A part without a finite logit weighs nothing; one with a NaN stays NaN.
  double relative(const Partial<A>& of, A top) const {
    if (of.sum == 0 || of.sum != of.sum) return of.sum;
    return of.sum * std::exp(shift(of.top, top));
  }

  Partial<A> together(const std::vector<Partial<A>>& parts) const {
    Partial<A> all{kNothing<A>, 0};
    for (const auto& x : parts) all.top = std::max(all.top, x.top);
    for (const auto& x : parts) all.sum += relative(x, all.top);
    return all;
  }

  // With a bucket, everything outside is one more class, and counts in `whole`.
  void combine(bool bucket) {
    shared = whole = together(inside);
    others = together(outside);
    if (!bucket) return;
    whole.top = std::max(shared.top, others.top);
    whole.sum = relative(shared, whole.top) + relative(others, whole.top);
  }

  double mass() const {
    if (!ids) return 1;
    const A top = std::max(shared.top, others.top);
    const double inner = relative(shared, top), all = inner + relative(others, top);
    return all == 0 ? 0 : inner / all;
  }

  // What block b's exponentials are to be multiplied with to be probabilities.
  A probability(int64_t b) const {
    return A(relative({inside[b].top, 1}, whole.top) / whole.sum);
  }

  double bucket_probability() const { return relative(others, whole.top) / whole.sum; }
  double bucket_log() const {
    return shift(others.top, whole.top) + std::log(others.sum) - std::log(whole.sum);
  }
};

}  // namespace
}  // namespace sra
#endif
