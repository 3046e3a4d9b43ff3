// Rows combined column by column. Two bfloat16 lie in one 32-bit word: each half is widened where
// it lies, and rounded back there, so nothing moves between lanes. For three rows that is 30
// instructions of AVX2 for 16 columns, and 48 when they are unpacked first (measured in the cache:
// 34 GB/s against 21).
#ifndef SRA_CPU_COMBINE_H
#define SRA_CPU_COMBINE_H

#include "math.h"
#include "vector.h"

namespace sra {

template <class... T>
constexpr bool all_bf16 = (std::is_same<T, bf16>::value && ...);

ALWAYS_INLINE uint32_t word(const bf16* row, int64_t i) {
  uint32_t w;
  std::memcpy(&w, row + 2 * i, 4);
  return w;
}
ALWAYS_INLINE float low_half(uint32_t w) { return from_bits(int32_t(w << 16)); }
ALWAYS_INLINE float high_half(uint32_t w) { return from_bits(int32_t(w & 0xffff0000u)); }

// As round_to, with the result left in the upper half.
ALWAYS_INLINE uint32_t rounded(float x) {
  const uint32_t u = uint32_t(bits_of(x));
  return u + 0x7fffu + ((u >> 16) & 1u);
}
ALWAYS_INLINE void write_word(bf16* row, int64_t i, float low, float high) {
  const uint32_t w = (rounded(low) >> 16) | (rounded(high) & 0xffff0000u);
  std::memcpy(row + 2 * i, &w, 4);
}

// out[i] = f(rows[i]...), rounded.
template <class O, class F, class... T>
ALWAYS_INLINE void combine(O* __restrict out, int64_t n, F f, const T*... rows) {
  int64_t done = 0;
  if constexpr (all_bf16<O, T...>) {
    for (int64_t i = 0; i < n / 2; ++i)
      write_word(out, i, f(low_half(word(rows, i))...), f(high_half(word(rows, i))...));
    done = n / 2 * 2;
  }
  for (int64_t i = done; i < n; ++i) round_to(out[i], f(load(rows[i])...));
}

// The sum of a[i] * (x[i] - y[i]), in an order that does not depend on the instruction set.
template <class T>
ALWAYS_INLINE typename accumulator<T>::type dot_from(const T* a, const T* x, const T* y,
                                                     int64_t n) {
  using A = typename accumulator<T>::type;
  constexpr int kLanes = 32;
  A lane[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    if constexpr (all_bf16<T>) {
      for (int k = 0; k < kLanes / 2; ++k) {
        const uint32_t wa = word(a + i, k), wx = word(x + i, k), wy = word(y + i, k);
        lane[k] += low_half(wa) * (low_half(wx) - low_half(wy));
        lane[kLanes / 2 + k] += high_half(wa) * (high_half(wx) - high_half(wy));
      }
    } else {
      for (int k = 0; k < kLanes; ++k)
        lane[k] += load(a[i + k]) * (load(x[i + k]) - load(y[i + k]));
    }
  }
  A sum = 0;
  for (; i < n; ++i) sum += load(a[i]) * (load(x[i]) - load(y[i]));
  for (int k = 0; k < kLanes; ++k) sum += lane[k];
  return sum;
}

// Sums of up to kCapacity columns. Those of bfloat16 stand by halves: all low ones, then all high.
template <class T, int64_t kCapacity>
class Sums {
  using A = typename accumulator<T>::type;

 public:
  ALWAYS_INLINE explicit Sums(int64_t n) : n_(n) {}

  // sum[i] = f(rows[i]...)
  template <class F, class... Rows>
  ALWAYS_INLINE void set(F f, const Rows*... rows) {
    each([&](A& sum, A value) { sum = value; }, f, rows...);
  }
  // sum[i] += f(rows[i]...)
  template <class F, class... Rows>
  ALWAYS_INLINE void add(F f, const Rows*... rows) {
    each([&](A& sum, A value) { sum += value; }, f, rows...);
  }
  // out[i] = sum[i] + f(rows[i]...), rounded
  template <class F, class... Rows>
  ALWAYS_INLINE void finish(T* __restrict out, F f, const Rows*... rows) const {
    int64_t done = 0;
    if constexpr (all_bf16<Rows...>) {
      const A *low = sum_, *high = sum_ + n_ / 2;
      for (int64_t i = 0; i < n_ / 2; ++i) {
        const A first = low[i] + f(low_half(word(rows, i))...);
        const A second = high[i] + f(high_half(word(rows, i))...);
        write_word(out, i, first, second);
      }
      done = n_ / 2 * 2;
    }
    for (int64_t i = done; i < n_; ++i) round_to(out[i], sum_[i] + f(load(rows[i])...));
  }

 private:
  template <class Into, class F, class... Rows>
  ALWAYS_INLINE void each(Into into, F f, const Rows*... rows) {
    int64_t done = 0;
    if constexpr (all_bf16<Rows...>) {
      A *low = sum_, *high = sum_ + n_ / 2;
      for (int64_t i = 0; i < n_ / 2; ++i) {
        into(low[i], f(low_half(word(rows, i))...));
        into(high[i], f(high_half(word(rows, i))...));
      }
      done = n_ / 2 * 2;
    }
    for (int64_t i = done; i < n_; ++i) into(sum_[i], f(load(rows[i])...));
  }

  int64_t n_;
  A sum_[kCapacity];
};

}  // namespace sra
#endif
