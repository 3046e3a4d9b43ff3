// attention_mass of one query row a sample. Bound by reading the keys, which happens once: the
// query heads of a group share each key while it is in the first-level cache.
#ifndef SRA_CPU_ATTENTION_ROW_H
#define SRA_CPU_ATTENTION_ROW_H

#include "attention_mass.h"

namespace sra {

// Keys of a run: with the scores of a group they stay in the first-level cache, and a long row is
// work for several threads.
constexpr int64_t kRowRun = 512;
// Keys widened at a time.
constexpr int64_t kWidened = 32;

template <class A>
using Lanes __attribute__((vector_size(32))) = A;

// The sum of each of four vectors, out[0..4): four at once take half the steps of four in turn.
ALWAYS_INLINE void sums_of_lanes(const Lanes<float>* v, float* out) {
  const Lanes<float> a = __builtin_shufflevector(v[0], v[1], 0, 8, 1, 9, 4, 12, 5, 13) +
                         __builtin_shufflevector(v[0], v[1], 2, 10, 3, 11, 6, 14, 7, 15);
  const Lanes<float> b = __builtin_shufflevector(v[2], v[3], 0, 8, 1, 9, 4, 12, 5, 13) +
                         __builtin_shufflevector(v[2], v[3], 2, 10, 3, 11, 6, 14, 7, 15);
  const Lanes<float> c = __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13) +
                         __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
  for (int i = 0; i < 4; ++i) out[i] = c[i] + c[i + 4];
}
ALWAYS_INLINE void sums_of_lanes(const Lanes<double>* v, double* out) {
  const Lanes<double> a = __builtin_shufflevector(v[0], v[1], 0, 4, 2, 6) +
                          __builtin_shufflevector(v[0], v[1], 1, 5, 3, 7);
  const Lanes<double> b = __builtin_shufflevector(v[2], v[3], 0, 4, 2, 6) +
                          __builtin_shufflevector(v[2], v[3], 1, 5, 3, 7);
  for (int i = 0; i < 2; ++i) out[i] = a[i] + a[i + 2], out[i + 2] = b[i] + b[i + 2];
}

// out[h][j] = q[h] · row[j] for H heads and four keys.
template <int64_t H, class A>
ALWAYS_INLINE void dots(const A* q, const A* const* row, int64_t dim, A (*out)[4]) {
  constexpr int64_t L = 32 / sizeof(A);
  Lanes<A> sum[H][4];
#pragma GCC unroll 3
  for (int64_t h = 0; h < H; ++h) sum[h][0] = sum[h][1] = sum[h][2] = sum[h][3] = Lanes<A>{};
  int64_t k = 0;
  for (; k + L <= dim; k += L) {
    Lanes<A> x, k0, k1, k2, k3;
    std::memcpy(&k0, row[0] + k, 32);
    std::memcpy(&k1, row[1] + k, 32);
    std::memcpy(&k2, row[2] + k, 32);
    std::memcpy(&k3, row[3] + k, 32);
#pragma GCC unroll 3
    for (int64_t h = 0; h < H; ++h) {
      std::memcpy(&x, q + h * dim + k, 32);
      sum[h][0] += x * k0;
      sum[h][1] += x * k1;
      sum[h][2] += x * k2;
      sum[h][3] += x * k3;
    }
  }
#pragma GCC unroll 3
  for (int64_t h = 0; h < H; ++h) sums_of_lanes(sum[h], out[h]);
  for (; k < dim; ++k)
    for (int64_t h = 0; h < H; ++h)
      for (int64_t j = 0; j < 4; ++j) out[h][j] += q[h * dim + k] * row[j][k];
}

template <int64_t H, class A>
ALWAYS_INLINE void dots_of_run(const A* q, KeyRun<A> keys, int64_t n, int64_t dim, A* out,
                               int64_t ldo) {
  for (int64_t j = 0; j < n; j += 4) {
    const A* row[4];
    for (int64_t i = 0; i < 4; ++i) row[i] = keys.rows + std::min(j + i, n - 1) * keys.stride;
    A dot[H][4];
    dots<H>(q, row, dim, dot);
    for (int64_t h = 0; h < H; ++h)
      std::memcpy(out + h * ldo + j, dot[h], size_t(std::min<int64_t>(4, n - j)) * sizeof(A));
  }
}

// The query row of a sample and the keys that it sees.
struct Row {
  int64_t sample, query;
  Range keys;
};

// One run of the row's keys, for the query heads that share kv_head: share[h * p.keys + j] becomes
// exp(score - top), with each head's largest score in top, and sum the sum of that. `scratch` holds
// group + kWidened rows.
template <class T>
ALWAYS_INLINE void row_run(const Attention<T>& a, const Row& row, int64_t kv_head, Range run,
                           typename accumulator<T>::type* share, typename accumulator<T>::type* top,
                           typename accumulator<T>::type* sum, int64_t stat_stride,
                           typename accumulator<T>::type* scratch) {
  using A = typename accumulator<T>::type;
  const int64_t group = a.group(), dim = a.p.dim, n = run.last - run.first, ld = a.p.keys;
  A* q = scratch;
  A* widened = scratch + group * dim;
  for (int64_t h = 0; h < group; ++h) {
    const T* from = a.query(row.sample, kv_head * group + h, row.query);
    for (int64_t k = 0; k < dim; ++k) q[h * dim + k] = load(from[k]) * A(a.p.scale);
  }
  for (int64_t j = 0; j < n; j += kWidened) {
    const int64_t m = std::min(kWidened, n - j);
    const KeyRun<A> keys = key_run(a.key(row.sample, kv_head, run.first + j), a.p.key_strides[2], m,
                                   dim, widened);
    int64_t h = 0;
    // Three heads by four keys: their 12 sums and what they need fill AVX2's 16 registers.
    for (; h + 3 <= group; h += 3)
      dots_of_run<3>(q + h * dim, keys, m, dim, share + h * ld + j, ld);
    if (h + 2 == group) dots_of_run<2>(q + h * dim, keys, m, dim, share + h * ld + j, ld);
    if (h + 1 == group) dots_of_run<1>(q + h * dim, keys, m, dim, share + h * ld + j, ld);
  }
  const uint8_t* real = a.mask(row.sample);
  for (int64_t h = 0; h < group; ++h) {
    A* s = share + h * ld;
    if (a.p.softcap > 0) cap_scores(s, n, A(a.p.softcap));
    // After every transform: a masked key may hold anything, NaN included.
    if (real)
      for (int64_t j = 0; j < n; ++j) s[j] = real[run.first + j] ? s[j] : kHidden<A>;
    top[h * stat_stride] = largest_of(s, n);
    const A shift = shift_of(top[h * stat_stride]);
    for (int64_t j = 0; j < n; ++j) s[j] = exp_of(s[j] - shift);
    sum[h * stat_stride] = sum_of(s, n);
  }
}

// mass[j] = sum over heads of factor[h] * share[h * ld + j].
template <class A>
ALWAYS_INLINE void sum_heads(const A* share, int64_t ld, const A* factor, int64_t factor_stride,
                             int64_t heads, int64_t n, A* __restrict mass) {
  for (int64_t h = 0; h < heads; ++h) {
    const A f = factor[h * factor_stride];
    const A* s = share + h * ld;
    for (int64_t j = 0; j < n; ++j) mass[j] += f * s[j];
  }
}

}  // namespace sra
#endif
