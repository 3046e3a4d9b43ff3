// span_com on the CPU: a ragged weighted mean of rows, forward and backward.
//
// Both directions are bound by memory: forward reads tokens*dim and writes count*dim, backward
// writes tokens*dim (and reads it when the weights learn). Every output element is summed by one
// thread in one order, so the same input gives the same bits for any number of threads.

#include "parallel.h"
#include "sra_kernels.h"
#include "vector.h"

#include <cmath>
#include <vector>

namespace sra {
namespace {

// Columns summed at a time: 8 KiB of float accumulators stay in the first-level cache, and each row
// is read in runs long enough for the prefetcher.
constexpr int64_t kColumns = 2048;
// Below this many elements a second thread costs more than it brings.
constexpr int64_t kElementsPerThread = 16384;

template <class T>
using acc_t = typename accumulator<T>::type;

struct Span {
  int64_t begin, end;
};

ALWAYS_INLINE Span span_of(const sra_span_com& p, int64_t s) {
  return {p.spans[2 * s], p.spans[2 * s + 1]};
}

template <class A>
ALWAYS_INLINE double mass_of(const A* weights, Span s) {
  if (!weights) return double(s.end - s.begin);
  double mass = 0;
  for (int64_t t = s.begin; t < s.end; ++t) mass += weights[t];
  return mass;
}

// The share of each row in its span. A span of zero mass falls back to its plain mean, which reads a
// weight of 1 again and again: without a branch, the loops that use a share vectorise.
template <class A>
class Shares {
 public:
  ALWAYS_INLINE Shares(const A* weights, double mass, Span s) {
    const int64_t length = s.end - s.begin;
    const bool plain = !weights || mass == 0 || length == 1;
    weights_ = plain ? &kOne : weights;
    step_ = plain ? 0 : 1;
    mass_ = plain ? double(length) : mass;
  }
  ALWAYS_INLINE A operator()(int64_t t) const { return A(double(weights_[t * step_]) / mass_); }

 private:
  static constexpr A kOne = 1;
  const A* weights_;
  int64_t step_;
  double mass_;
};

// com[s, first:last] for one span, rounded to O.
template <class T, class O>
ALWAYS_INLINE void forward_span(const sra_span_com& p, int64_t s, int64_t first, int64_t last,
                                double mass) {
  using A = acc_t<T>;
  const Span span = span_of(p, s);
  const A* weights = static_cast<const A*>(p.weights);
  const T* hidden = static_cast<const T*>(p.hidden);
  O* com = static_cast<O*>(p.com) + s * p.dim;
  const auto row = [&](int64_t t) { return hidden + t * p.hidden_stride; };
  const Shares<A> w(weights, mass, span);
  const int64_t b = span.begin, length = span.end - span.begin;

  // 94 % of real spans are one token, nearly all the rest two or three: no accumulators for those.
  if (length == 0) {
    write_row(com + first, last - first, [](int64_t) { return A(0); });
  } else if (length == 1) {
    const T* r0 = row(b) + first;
    copy_row(com + first, r0, last - first);
  } else if (length == 2) {
    const T *r0 = row(b) + first, *r1 = row(b + 1) + first;
    const A w0 = w(b), w1 = w(b + 1);
    write_row(com + first, last - first,
              [=](int64_t i) { return w0 * load(r0[i]) + w1 * load(r1[i]); });
  } else if (length == 3) {
    const T *r0 = row(b) + first, *r1 = row(b + 1) + first, *r2 = row(b + 2) + first;
    const A w0 = w(b), w1 = w(b + 1), w2 = w(b + 2);
    write_row(com + first, last - first, [=](int64_t i) {
      return w0 * load(r0[i]) + w1 * load(r1[i]) + w2 * load(r2[i]);
    });
  } else {
    for (int64_t d = first; d < last; d += kColumns) {
      const int64_t n = std::min(kColumns, last - d);
      A sum[kColumns];
      std::fill_n(sum, n, A(0));
      int64_t t = b;
      for (; t + 4 <= span.end; t += 4) {
        const T *r0 = row(t) + d, *r1 = row(t + 1) + d, *r2 = row(t + 2) + d, *r3 = row(t + 3) + d;
        const A w0 = w(t), w1 = w(t + 1), w2 = w(t + 2), w3 = w(t + 3);
        for (int64_t i = 0; i < n; ++i)
          sum[i] += (w0 * load(r0[i]) + w1 * load(r1[i])) + (w2 * load(r2[i]) + w3 * load(r3[i]));
      }
      for (; t < span.end; ++t) {
        const T* r0 = row(t) + d;
        const A w0 = w(t);
        for (int64_t i = 0; i < n; ++i) sum[i] += w0 * load(r0[i]);
      }
      write_row(com + d, n, [&](int64_t i) { return sum[i]; });
    }
  }
}

// Spans first_span..last_span of at most long_rows rows, whole rows of com each.
template <class T>
ALWAYS_INLINE void forward_range(const sra_span_com& p, int64_t first_span, int64_t last_span,
                                 int64_t long_rows) {
  using A = acc_t<T>;
  for (int64_t s = first_span; s < last_span; ++s) {
    const Span span = span_of(p, s);
    if (span.end - span.begin > long_rows) continue;
    const double mass = mass_of(static_cast<const A*>(p.weights), span);
    static_cast<A*>(p.mass)[s] = A(mass);
    if (p.wide_com) forward_span<T, A>(p, s, 0, p.dim, mass);
    else forward_span<T, T>(p, s, 0, p.dim, mass);
  }
}

// One long span, its columns split over the threads: no partial sums to add up.
template <class T>
ALWAYS_INLINE void forward_columns(const sra_span_com& p, int64_t s, int64_t first, int64_t last) {
  using A = acc_t<T>;
  const double mass = mass_of(static_cast<const A*>(p.weights), span_of(p, s));
  if (first == 0) static_cast<A*>(p.mass)[s] = A(mass);
  if (p.wide_com) forward_span<T, A>(p, s, first, last, mass);
  else forward_span<T, T>(p, s, first, last, mass);
}

template <class T, class A>
ALWAYS_INLINE A centred_dot(const T* grad, const T* hidden, const A* com, int64_t n) {
  constexpr int kLanes = 32;
  A lane[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int k = 0; k < kLanes; ++k)
      lane[k] += load(grad[i + k]) * (load(hidden[i + k]) - com[i + k]);
  A sum = 0;
  for (; i < n; ++i) sum += load(grad[i]) * (load(hidden[i]) - com[i]);
  for (int k = 0; k < kLanes; ++k) sum += lane[k];
  return sum;
}

// Rows first..last of the gradients. The spans that cover a row are a contiguous range, because
// both columns of spans are non-decreasing: so this gathers, and needs no atomics.
template <class T>
ALWAYS_INLINE void backward_range(const sra_span_com& p, int64_t first, int64_t last) {
  using A = acc_t<T>;
  const A* weights = static_cast<const A*>(p.weights);
  const A* mass = static_cast<const A*>(p.mass);
  const A* grad_mass = static_cast<const A*>(p.grad_mass);
  const T* grad_com = static_cast<const T*>(p.grad_com);
  T* grad_hidden = static_cast<T*>(p.grad_hidden);
  A* grad_weights = static_cast<A*>(p.grad_weights);

  int64_t lo = 0, hi = 0;
  {  // first span that ends after `first`
    int64_t left = 0, right = p.count;
    while (left < right) {
      const int64_t middle = (left + right) / 2;
      if (p.spans[2 * middle + 1] > first) right = middle;
      else left = middle + 1;
    }
    lo = hi = left;
  }
  for (int64_t t = first; t < last; ++t) {
    while (lo < p.count && p.spans[2 * lo + 1] <= t) ++lo;
    hi = std::max(hi, lo);
    while (hi < p.count && p.spans[2 * hi] <= t) ++hi;

    if (grad_hidden) {
      T* out = grad_hidden + t * p.dim;
      if (hi == lo) {
        write_row(out, p.dim, [](int64_t) { return A(0); });
      } else if (hi == lo + 1) {
        const T* g = grad_com + lo * p.dim;
        const A w = Shares<A>(weights, mass[lo], span_of(p, lo))(t);
        if (w == 1) copy_row(out, g, p.dim);
        else write_row(out, p.dim, [=](int64_t i) { return w * load(g[i]); });
      } else {
        for (int64_t d = 0; d < p.dim; d += kColumns) {
          const int64_t n = std::min(kColumns, p.dim - d);
          A sum[kColumns];
          std::fill_n(sum, n, A(0));
          for (int64_t s = lo; s < hi; ++s) {
            const T* g = grad_com + s * p.dim + d;
            const A w = Shares<A>(weights, mass[s], span_of(p, s))(t);
            for (int64_t i = 0; i < n; ++i) sum[i] += w * load(g[i]);
          }
          write_row(out + d, n, [&](int64_t i) { return sum[i]; });
        }
      }
    }
    if (grad_weights) {
      A sum = 0;
      for (int64_t s = lo; s < hi; ++s) {
        sum += grad_mass[s];
        // The fallback to the plain mean does not depend on the weights, nor does a lone row.
        if (mass[s] == 0 || p.spans[2 * s + 1] - p.spans[2 * s] == 1) continue;
        const T* hidden = static_cast<const T*>(p.hidden) + t * p.hidden_stride;
        const A* com = static_cast<const A*>(p.com) + s * p.dim;
        sum += centred_dot<T, A>(grad_com + s * p.dim, hidden, com, p.dim) / mass[s];
      }
      grad_weights[t] = sum;
    }
  }
}

#define FOR_DTYPE(NAME, T)                                                                        \
  CLONES void forward_range_##NAME(const sra_span_com& p, int64_t a, int64_t b, int64_t l) {      \
    forward_range<T>(p, a, b, l);                                                                 \
  }                                                                                               \
  CLONES void forward_columns_##NAME(const sra_span_com& p, int64_t s, int64_t a, int64_t b) {    \
    forward_columns<T>(p, s, a, b);                                                               \
  }                                                                                               \
  CLONES void backward_range_##NAME(const sra_span_com& p, int64_t a, int64_t b) {                \
    backward_range<T>(p, a, b);                                                                   \
  }
FOR_DTYPE(f32, float)
FOR_DTYPE(bf16, bf16)
FOR_DTYPE(f16, f16)
FOR_DTYPE(f64, double)
#undef FOR_DTYPE

struct Kernels {
  void (*forward_range)(const sra_span_com&, int64_t, int64_t, int64_t);
  void (*forward_columns)(const sra_span_com&, int64_t, int64_t, int64_t);
  void (*backward_range)(const sra_span_com&, int64_t, int64_t);
  int64_t element_bytes;
};

const Kernels* kernels_for(int32_t dtype) {
  static const Kernels table[] = {
      {forward_range_f32, forward_columns_f32, backward_range_f32, 4},
      {forward_range_bf16, forward_columns_bf16, backward_range_bf16, 2},
      {forward_range_f16, forward_columns_f16, backward_range_f16, 2},
      {forward_range_f64, forward_columns_f64, backward_range_f64, 8},
  };
  return dtype >= SRA_F32 && dtype <= SRA_F64 ? &table[dtype] : nullptr;
}

template <class A>
bool weights_are_bad(const void* weights, int64_t n) {
  const A* w = static_cast<const A*>(weights);
  bool bad = false;
  for (int64_t t = 0; w && t < n; ++t) bad |= !(w[t] >= 0 && w[t] <= std::numeric_limits<A>::max());
  return bad;
}

int refuse(const sra_span_com& p) {
  if (!kernels_for(p.dtype)) return SRA_BAD_DTYPE;
  int64_t begin = 0, end = 0;
  for (int64_t s = 0; s < p.count; ++s) {
    const Span span = span_of(p, s);
    if (span.begin < begin || span.end < end || span.begin > span.end || span.end > p.tokens)
      return SRA_BAD_SPANS;
    begin = span.begin;
    end = span.end;
  }
  const bool bad = p.dtype == SRA_F64 ? weights_are_bad<double>(p.weights, p.tokens)
                                      : weights_are_bad<float>(p.weights, p.tokens);
  return bad ? SRA_BAD_WEIGHTS : SRA_OK;
}

}  // namespace
}  // namespace sra

int sra_span_com_forward(const sra_span_com* params) {
  using namespace sra;
  const sra_span_com& p = *params;
  if (const int status = refuse(p)) return status;
  const Kernels& kernels = *kernels_for(p.dtype);

  // work[s]: rows read by the spans before s, plus one for each row written.
  std::vector<int64_t> work(p.count + 1, 0);
  for (int64_t s = 0; s < p.count; ++s)
    work[s + 1] = work[s] + 1 + p.spans[2 * s + 1] - p.spans[2 * s];
  const int threads = threads_for(work[p.count] * p.dim, kElementsPerThread, p.threads);
  const int64_t com_bytes = p.wide_com && p.dtype != SRA_F64 ? 4 : kernels.element_bytes;
  prefer_huge_pages(p.com, p.count * p.dim * com_bytes);
  const int64_t long_rows = std::max<int64_t>(64, work[p.count] / (4 * threads));

  const auto run = [&](int64_t i, int64_t n) {
    const auto span_at = [&](int64_t w) {
      return std::lower_bound(work.begin(), work.end(), w) - work.begin();
    };
    const int64_t first = i == 0 ? 0 : span_at(part(work[p.count], i, n));
    const int64_t last = i + 1 == n ? p.count : span_at(part(work[p.count], i + 1, n));
    kernels.forward_range(p, first, last, long_rows);
    for (int64_t s = 0; s < p.count; ++s) {
      if (p.spans[2 * s + 1] - p.spans[2 * s] <= long_rows) continue;
      const int64_t blocks = (p.dim + 15) / 16;  // whole cache lines to each thread
      kernels.forward_columns(p, s, part(blocks, i, n) * 16,
                              std::min(p.dim, part(blocks, i + 1, n) * 16));
    }
  };
  parallel(threads, run);
  return SRA_OK;
}

int sra_span_com_backward(const sra_span_com* params) {
  using namespace sra;
  const sra_span_com& p = *params;
  if (const int status = refuse(p)) return status;
  const Kernels& kernels = *kernels_for(p.dtype);
  const int threads = threads_for(p.tokens * p.dim, kElementsPerThread, p.threads);
  if (p.grad_hidden) prefer_huge_pages(p.grad_hidden, p.tokens * p.dim * kernels.element_bytes);

  const auto run = [&](int64_t i, int64_t n) {
    kernels.backward_range(p, part(p.tokens, i, n), part(p.tokens, i + 1, n));
  };
  parallel(threads, run);
  return SRA_OK;
}
