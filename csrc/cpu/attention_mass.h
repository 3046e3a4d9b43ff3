// What attention_mass does alike for one query row and for all of them: reading queries and keys,
// what a row sees, and the softmax of a few hundred keys at a time.
#ifndef SRA_CPU_ATTENTION_MASS_H
#define SRA_CPU_ATTENTION_MASS_H

#include "math.h"
#include "sra_kernels.h"
#include "vector.h"

#include <algorithm>
#include <cstdint>
#include <limits>

namespace sra {

template <class A>
constexpr A kHidden = -std::numeric_limits<A>::infinity();

struct Range {
  int64_t first, last;
};

// The tensors of a call by their indices.
template <class T>
class Attention {
 public:
  using A = typename accumulator<T>::type;

  explicit Attention(const sra_attention_mass& params) : p(params) {}

  ALWAYS_INLINE int64_t group() const { return p.heads / p.kv_heads; }
  ALWAYS_INLINE int64_t position(int64_t row) const { return row + p.keys - p.queries; }
  ALWAYS_INLINE const T* query(int64_t b, int64_t head, int64_t row) const {
    return at(p.query, p.query_strides, b, head, row);
  }
  ALWAYS_INLINE const T* key(int64_t b, int64_t kv_head, int64_t j) const {
    return at(p.key, p.key_strides, b, kv_head, j);
  }
  ALWAYS_INLINE const uint8_t* mask(int64_t b) const {
    return p.key_mask ? p.key_mask + b * p.keys : nullptr;
  }
  ALWAYS_INLINE A lse(int64_t b, int64_t head, int64_t row) const {
    return static_cast<const A*>(p.lse)[(b * p.heads + head) * p.queries + row];
  }
  ALWAYS_INLINE A* mass(int64_t b) const { return static_cast<A*>(p.mass) + b * p.keys; }

  // The keys that any of the rows at positions low..high sees, without masked ones at either end.
  ALWAYS_INLINE Range seen(int64_t b, int64_t low, int64_t high) const {
    Range r = {p.window ? std::max<int64_t>(0, low - p.window + 1) : 0, high + 1};
    if (const uint8_t* real = mask(b)) {
      while (r.first < r.last && !real[r.first]) ++r.first;
      while (r.first < r.last && !real[r.last - 1]) --r.last;
    }
    return r;
  }

  const sra_attention_mass& p;

 private:
  ALWAYS_INLINE static const T* at(const void* tensor, const int64_t* strides, int64_t b,
                                   int64_t head, int64_t token) {
    return static_cast<const T*>(tensor) + b * strides[0] + head * strides[1] + token * strides[2];
  }
};

// A run of key rows in the accumulator type: the keys themselves where they are of it.
template <class A>
struct KeyRun {
  const A* rows;
  int64_t stride;
};

template <class T, class A>
ALWAYS_INLINE KeyRun<A> key_run(const T* key, int64_t stride, int64_t n, int64_t dim, A* buffer) {
  if constexpr (std::is_same<T, A>::value) {
    (void)n, (void)dim, (void)buffer;
    return {key, stride};
  } else {
    for (int64_t j = 0; j < n; ++j) copy_row(buffer + j * dim, key + j * stride, dim);
    return {buffer, dim};
  }
}

template <class A>
ALWAYS_INLINE void cap_scores(A* score, int64_t n, A cap) {
  for (int64_t i = 0; i < n; ++i) score[i] = cap * tanh_of(score[i] / cap);
}

// What is subtracted before exp: nothing when every score is hidden.
template <class A>
ALWAYS_INLINE A shift_of(A top) {
  return top == kHidden<A> ? A(0) : top;
}

// The softmax of a row is taken over runs of keys, each by its own largest score. This turns the
// runs' sums of exp into the factors of their entries in the whole: exp(top - largest) / total.
// False when the row gives nothing. Run r of a row lies at r * stride.
template <class A>
ALWAYS_INLINE bool factors_of_runs(const A* top, A* sum, int64_t runs, int64_t stride) {
  A largest = kHidden<A>, total = 0;
  for (int64_t r = 0; r < runs; ++r) largest = std::max(largest, top[r * stride]);
  for (int64_t r = 0; r < runs; ++r) {
    const A share = exp_of(top[r * stride] - shift_of(largest));
    total += sum[r * stride] * share;
    sum[r * stride] = share;
  }
  for (int64_t r = 0; r < runs; ++r) sum[r * stride] = total == 0 ? 0 : sum[r * stride] / total;
  return total != 0;
}

}  // namespace sra
#endif
