// Dot products of rows with rows, a tile at a time: both sides are read where they lie.
//
// gemm.h would need one side transposed into panels, which for the 80 rows of a usual sample costs
// about a third of the products themselves.
#ifndef SRA_CPU_GRAM_H
#define SRA_CPU_GRAM_H

#include "vector.h"

#include <cstdint>
#include <cstring>

namespace sra {

// Rows of a tile on each side: 12 sums and 4 operands are AVX2's 16 registers.
constexpr int64_t kLeft = 3, kRight = 4;

// out[j] = the sum of v[j]'s lanes, in one fixed order.
ALWAYS_INLINE void lane_sums(const float* v, float* out) {
  typedef float half __attribute__((vector_size(16)));
  half h[4];
  for (int j = 0; j < 4; ++j) {
    half low, high;
    std::memcpy(&low, v + 8 * j, 16);
    std::memcpy(&high, v + 8 * j + 4, 16);
    h[j] = low + high;
  }
  const half t0 = __builtin_shufflevector(h[0], h[1], 0, 4, 1, 5) +
                  __builtin_shufflevector(h[0], h[1], 2, 6, 3, 7);
  const half t1 = __builtin_shufflevector(h[2], h[3], 0, 4, 1, 5) +
                  __builtin_shufflevector(h[2], h[3], 2, 6, 3, 7);
  const half sums = __builtin_shufflevector(t0, t1, 0, 1, 4, 5) +
                    __builtin_shufflevector(t0, t1, 2, 3, 6, 7);
  std::memcpy(out, &sums, 16);
}
ALWAYS_INLINE void lane_sums(const double* v, double* out) {
  for (int j = 0; j < 4; ++j)
    out[j] = (v[4 * j] + v[4 * j + 2]) + (v[4 * j + 1] + v[4 * j + 3]);
}

// c[i][j] = a[i] · b[j] over `depth` elements, a multiple of kPanel.
template <class A>
ALWAYS_INLINE void dot_tile(const A* const* a, const A* const* b, int64_t depth,
                            A (*c)[kRight]) {
  typedef A vector __attribute__((vector_size(32)));
  constexpr int64_t L = 32 / sizeof(A);
  const A *a0 = a[0], *a1 = a[1], *a2 = a[2];
  const A *b0 = b[0], *b1 = b[1], *b2 = b[2], *b3 = b[3];
  vector sum[kLeft][kRight] = {};
  for (int64_t k = 0; k < depth; k += L) {
    vector x0, x1, x2, y;
    std::memcpy(&x0, a0 + k, 32);
    std::memcpy(&x1, a1 + k, 32);
    std::memcpy(&x2, a2 + k, 32);
    const auto column = [&](const A* from, int64_t j) __attribute__((always_inline)) {
      std::memcpy(&y, from + k, 32);
      sum[0][j] += x0 * y;
      sum[1][j] += x1 * y;
      sum[2][j] += x2 * y;
    };
    column(b0, 0);
    column(b1, 1);
    column(b2, 2);
    column(b3, 3);
  }
  for (int64_t i = 0; i < kLeft; ++i) {
    A lanes[kRight * L];
    std::memcpy(lanes, sum[i], sizeof(lanes));
    lane_sums(lanes, c[i]);
  }
}

}  // namespace sra
#endif
