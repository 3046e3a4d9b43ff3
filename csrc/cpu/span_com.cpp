// span_com on the CPU: a ragged weighted mean of rows, forward and backward.
//
// Both directions are bound by memory: forward reads tokens*dim and writes count*dim, backward
// writes tokens*dim (and reads it when the weights learn). Every output element is summed by one
// thread in one order, so the same input gives the same bits for any number of threads.

#include "combine.h"
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

// The share of each row in its span. A span of zero mass falls back to its plain mean, which reads
// a weight of 1 again and again: without a branch, the loops that use a share vectorise.
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

// then(f, rows...) for rows t..t + count, one to four of them; f is their weighted sum.
template <class W, class Row, class Then>
ALWAYS_INLINE void weigh(int64_t count, int64_t t, const W& w, const Row& row, const Then& then) {
  const auto w0 = w(t);
  using A = decltype(w0 + w0);
  if (count == 1) return then([=](A x0) { return w0 * x0; }, row(t));
  const A w1 = w(t + 1);
  if (count == 2)
    return then([=](A x0, A x1) { return w0 * x0 + w1 * x1; }, row(t), row(t + 1));
  const A w2 = w(t + 2);
  if (count == 3)
    return then([=](A x0, A x1, A x2) { return w0 * x0 + w1 * x1 + w2 * x2; }, row(t), row(t + 1),
                row(t + 2));
  const A w3 = w(t + 3);
  then([=](A x0, A x1, A x2, A x3) { return (w0 * x0 + w1 * x1) + (w2 * x2 + w3 * x3); }, row(t),
       row(t + 1), row(t + 2), row(t + 3));
}

// com[s, first:last] for one span.
template <class T>
ALWAYS_INLINE void forward_span(const sra_span_com& p, int64_t s, int64_t first, int64_t last,
                                double mass) {
  using A = acc_t<T>;
  const Span span = span_of(p, s);
  const T* hidden = static_cast<const T*>(p.hidden);
  T* com = static_cast<T*>(p.com) + s * p.dim;
  const Shares<A> w(static_cast<const A*>(p.weights), mass, span);
  const int64_t length = span.end - span.begin;

  // 94 % of real spans are one token, nearly all the rest two or three: no accumulators for those.
  if (length == 0) {
    write_row(com + first, last - first, [](int64_t) { return A(0); });
  } else if (length == 1) {
    copy_row(com + first, hidden + span.begin * p.hidden_stride + first, last - first);
  } else if (length <= 4) {
    const auto row = [=](int64_t t) { return hidden + t * p.hidden_stride + first; };
    weigh(length, span.begin, w, row,
          [=](auto f, auto... rows) { combine(com + first, last - first, f, rows...); });
  } else {
    for (int64_t d = first; d < last; d += kColumns) {
      const auto row = [=](int64_t t) { return hidden + t * p.hidden_stride + d; };
      Sums<T, kColumns> sums(std::min(kColumns, last - d));
      // The rows that are left over from groups of four come first.
      int64_t t = span.begin + (length - 1) % 4 + 1;
      weigh(t - span.begin, span.begin, w, row,
            [&](auto f, auto... rows) { sums.set(f, rows...); });
      for (; t + 4 < span.end; t += 4)
        weigh(4, t, w, row, [&](auto f, auto... rows) { sums.add(f, rows...); });
      weigh(4, t, w, row, [&](auto f, auto... rows) { sums.finish(com + d, f, rows...); });
    }
  }
}

// Columns first..last of the spans begin..end.
template <class T>
ALWAYS_INLINE void forward_range(const sra_span_com& p, int64_t begin, int64_t end, int64_t first,
                                 int64_t last) {
  using A = acc_t<T>;
  for (int64_t s = begin; s < end; ++s) {
    const double mass = mass_of(static_cast<const A*>(p.weights), span_of(p, s));
    if (first == 0) static_cast<A*>(p.mass)[s] = A(mass);
    forward_span<T>(p, s, first, last, mass);
  }
}

// The gradient of a weight is g·(h - com) / mass, and com is a mean of rows: so g·(h - r) for every
// row h of the span, less the mean of that, needs no centre to be kept or read. r is the span's
// heaviest row, which the centre is largely made of: from there, little cancels.
template <class A>
ALWAYS_INLINE int64_t heaviest(const A* weights, Span s) {
  return weights ? std::max_element(weights + s.begin, weights + s.end) - weights : s.begin;
}

// pairs[s]: rows in the spans before s. slopes[pairs[s] + i]: for row i of span s.
template <class A>
struct Slopes {
  std::vector<int64_t> pairs;
  std::vector<A> values;
};

// g·(h - r) for the pairs first..last of a span and a row.
template <class T>
ALWAYS_INLINE void dots_range(const sra_span_com& p, Slopes<acc_t<T>>& slopes, int64_t first,
                              int64_t last) {
  using A = acc_t<T>;
  const T* hidden = static_cast<const T*>(p.hidden);
  const A* mass = static_cast<const A*>(p.mass);
  const std::vector<int64_t>& pairs = slopes.pairs;
  int64_t s = std::upper_bound(pairs.begin(), pairs.end(), first) - pairs.begin() - 1;
  for (; s < p.count && pairs[s] < last; ++s) {
    const Span span = span_of(p, s);
    // The fallback to the plain mean does not depend on the weights, nor does a lone row.
    if (mass[s] == 0 || span.end - span.begin == 1) continue;
    const T* grad = static_cast<const T*>(p.grad_com) + s * p.dim;
    const int64_t r = heaviest(static_cast<const A*>(p.weights), span);
    const T* from = hidden + r * p.hidden_stride;
    const int64_t begin = std::max(first, pairs[s]), end = std::min(last, pairs[s + 1]);
    for (int64_t pair = begin; pair < end; ++pair) {
      const int64_t t = span.begin + pair - pairs[s];
      if (t == r) continue;
      const T* row = hidden + t * p.hidden_stride;
      double sum = 0;  // of short runs, so that wide rows lose nothing
      for (int64_t d = 0; d < p.dim; d += kColumns)
        sum += dot_from(grad + d, row + d, from + d, std::min(kColumns, p.dim - d));
      slopes.values[pair] = A(sum);
    }
  }
}

// Rows first..last of the gradients. The spans that cover a row are a contiguous range, because
// both columns of spans are non-decreasing: so this gathers, and needs no atomics.
template <class T>
ALWAYS_INLINE void backward_range(const sra_span_com& p, const Slopes<acc_t<T>>& slopes,
                                  int64_t first, int64_t last) {
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
        else combine(out, p.dim, [=](A x) { return w * x; }, g);
      } else {
        for (int64_t d = 0; d < p.dim; d += kColumns) {
          const auto times_share = [=](int64_t s) {
            const A w = Shares<A>(weights, mass[s], span_of(p, s))(t);
            return [=](A x) { return w * x; };
          };
          const auto row = [=](int64_t s) { return grad_com + s * p.dim + d; };
          Sums<T, kColumns> sums(std::min(kColumns, p.dim - d));
          sums.set(times_share(lo), row(lo));
          for (int64_t s = lo + 1; s + 1 < hi; ++s) sums.add(times_share(s), row(s));
          sums.finish(out + d, times_share(hi - 1), row(hi - 1));
        }
      }
    }
    if (grad_weights) {
      A sum = 0;
      for (int64_t s = lo; s < hi; ++s) {
        sum += grad_mass[s] + slopes.values[slopes.pairs[s] + t - p.spans[2 * s]];
      }
      grad_weights[t] = sum;
    }
  }
}

// Each dtype's loops, compiled for every instruction set.
template <class T>
struct Kernels;
#define FOR_DTYPE(NAME, T)                                                                        \
  CLONES void forward_range_##NAME(const sra_span_com& p, int64_t begin, int64_t end,             \
                                   int64_t first, int64_t last) {                                 \
    forward_range<T>(p, begin, end, first, last);                                                 \
  }                                                                                               \
  CLONES void dots_range_##NAME(const sra_span_com& p, Slopes<acc_t<T>>& slopes, int64_t first,   \
                                int64_t last) {                                                   \
    dots_range<T>(p, slopes, first, last);                                                        \
  }                                                                                               \
  CLONES void backward_range_##NAME(const sra_span_com& p, const Slopes<acc_t<T>>& slopes,        \
                                    int64_t first, int64_t last) {                                \
    backward_range<T>(p, slopes, first, last);                                                    \
  }                                                                                               \
  template <>                                                                                     \
  struct Kernels<T> {                                                                             \
    static constexpr auto forward = forward_range_##NAME;                                         \
    static constexpr auto dots = dots_range_##NAME;                                               \
    static constexpr auto backward = backward_range_##NAME;                                       \
  };
FOR_DTYPE(f32, float)
FOR_DTYPE(bf16, bf16)
FOR_DTYPE(f16, f16)
FOR_DTYPE(f64, double)
#undef FOR_DTYPE

template <class A>
bool weights_are_bad(const void* weights, int64_t n) {
  const A* w = static_cast<const A*>(weights);
  bool bad = false;
  for (int64_t t = 0; w && t < n; ++t) bad |= !(w[t] >= 0 && w[t] <= std::numeric_limits<A>::max());
  return bad;
}

int refuse(const sra_span_com& p) {
  if (p.dtype < SRA_F32 || p.dtype > SRA_F64) return SRA_BAD_DTYPE;
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

template <class T>
void forward(const sra_span_com& p) {
  const auto work_of = [&](int64_t s) {  // rows read, and one written
    const Span span = span_of(p, s);
    return span.end - span.begin + 1;
  };
  int64_t total = 0;
  for (int64_t s = 0; s < p.count; ++s) total += work_of(s);
  const int threads = threads_for(total * p.dim, kElementsPerThread, p.threads);
  prefer_huge_pages(p.com, p.count * p.dim * int64_t(sizeof(T)));

  // work[s]: of the spans before s, but for the long ones, which all threads share.
  const int64_t long_work = std::max<int64_t>(64, total / (4 * threads));
  std::vector<int64_t> work(p.count + 1, 0), long_spans;
  for (int64_t s = 0; s < p.count; ++s) {
    const bool is_long = work_of(s) > long_work;
    if (is_long) long_spans.push_back(s);
    work[s + 1] = work[s] + (is_long ? 0 : work_of(s));
  }

  parallel(threads, [&](int64_t i, int64_t n) {
    const auto span_at = [&](int64_t w) {
      return std::lower_bound(work.begin(), work.end(), w) - work.begin();
    };
    const int64_t first = i == 0 ? 0 : span_at(part(work[p.count], i, n));
    const int64_t last = i + 1 == n ? p.count : span_at(part(work[p.count], i + 1, n));
    // A long span is shared column by column: no partial sums to add up.
    const int64_t blocks = (p.dim + 15) / 16;  // whole cache lines to each thread
    const int64_t first_column = part(blocks, i, n) * 16;
    const int64_t last_column = std::min(p.dim, part(blocks, i + 1, n) * 16);
    int64_t begin = first;
    for (const int64_t s : long_spans) {
      Kernels<T>::forward(p, s, s + 1, first_column, last_column);
      if (s < first || s >= last) continue;
      Kernels<T>::forward(p, begin, s, 0, p.dim);
      begin = s + 1;
    }
    Kernels<T>::forward(p, begin, last, 0, p.dim);
  });
}

template <class T>
Slopes<acc_t<T>> slopes_of(const sra_span_com& p) {
  using A = acc_t<T>;
  Slopes<A> slopes;
  if (!p.grad_weights) return slopes;
  slopes.pairs.assign(p.count + 1, 0);
  for (int64_t s = 0; s < p.count; ++s)
    slopes.pairs[s + 1] = slopes.pairs[s] + p.spans[2 * s + 1] - p.spans[2 * s];
  const int64_t n = slopes.pairs[p.count];
  slopes.values.assign(n, A(0));
  parallel(threads_for(n * p.dim, kElementsPerThread, p.threads), [&](int64_t i, int64_t count) {
    Kernels<T>::dots(p, slopes, part(n, i, count), part(n, i + 1, count));
  });
  const A* mass = static_cast<const A*>(p.mass);
  for (int64_t s = 0; s < p.count; ++s) {
    const Span span = span_of(p, s);
    if (mass[s] == 0 || span.end - span.begin == 1) continue;
    const Shares<A> share(static_cast<const A*>(p.weights), mass[s], span);
    A* slope = slopes.values.data() + slopes.pairs[s] - span.begin;
    double mean = 0;
    for (int64_t t = span.begin; t < span.end; ++t) mean += double(share(t)) * slope[t];
    for (int64_t t = span.begin; t < span.end; ++t) slope[t] = A((slope[t] - mean) / mass[s]);
  }
  return slopes;
}

template <class T>
void backward(const sra_span_com& p) {
  const Slopes<acc_t<T>> slopes = slopes_of<T>(p);
  const int threads = threads_for(p.tokens * p.dim, kElementsPerThread, p.threads);
  if (p.grad_hidden) prefer_huge_pages(p.grad_hidden, p.tokens * p.dim * int64_t(sizeof(T)));
  parallel(threads, [&](int64_t i, int64_t n) {
    Kernels<T>::backward(p, slopes, part(p.tokens, i, n), part(p.tokens, i + 1, n));
  });
}

}  // namespace
}  // namespace sra

int sra_span_com_forward(const sra_span_com* p) {
  using namespace sra;
  if (const int status = refuse(*p)) return status;
  switch (p->dtype) {
    case SRA_F32: forward<float>(*p); break;
    case SRA_BF16: forward<bf16>(*p); break;
    case SRA_F16: forward<f16>(*p); break;
    case SRA_F64: forward<double>(*p); break;
  }
  return SRA_OK;
}

int sra_span_com_backward(const sra_span_com* p) {
  using namespace sra;
  if (const int status = refuse(*p)) return status;
  switch (p->dtype) {
    case SRA_F32: backward<float>(*p); break;
    case SRA_BF16: backward<bf16>(*p); break;
    case SRA_F16: backward<f16>(*p); break;
    case SRA_F64: backward<double>(*p); break;
  }
  return SRA_OK;
}
