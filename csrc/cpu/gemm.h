// A small matrix product for blocks that stay in the caches: C = A·Bᵀ or A·B, with B in panels.
//
// The products of the fused kernels are tiles whose result is used up at once; a library's product
// would write each of them to memory first, and costs microseconds a call.
#ifndef SRA_CPU_GEMM_H
#define SRA_CPU_GEMM_H

#include "vector.h"

#include <cstdint>
#include <cstring>

namespace sra {

// Columns of a panel: two registers of AVX2, one of AVX-512.
template <class A>
constexpr int64_t kPanel = 64 / sizeof(A);
// Rows of a tile: with two registers of columns each, 12 of AVX2's 16 registers hold sums.
constexpr int64_t kTile = 6;

template <class A>
constexpr int64_t panel_size(int64_t columns, int64_t depth) {
  return (columns + kPanel<A> - 1) / kPanel<A> * kPanel<A> * depth;
}

// Panels of B from the rows of its transpose: panel[k][j] = b(j)[k], where b(j) points to row j.
// Missing columns of the last panel are zeros.
template <class A, class RowOf>
ALWAYS_INLINE void pack_rows(int64_t columns, int64_t depth, RowOf b, A* __restrict panels) {
  constexpr int64_t W = kPanel<A>;
  for (int64_t j = 0; j < columns; j += W, panels += W * depth) {
    for (int64_t i = 0; i < W; ++i) {
      if (j + i < columns) {
        const auto* row = b(j + i);
        for (int64_t k = 0; k < depth; ++k) panels[k * W + i] = load(row[k]);
      } else {
        for (int64_t k = 0; k < depth; ++k) panels[k * W + i] = 0;
      }
    }
  }
}

// Panels of B from its own rows: panel[k][j] = b(k)[j].
template <class A, class RowOf>
ALWAYS_INLINE void pack_columns(int64_t columns, int64_t depth, RowOf b, A* __restrict panels) {
  constexpr int64_t W = kPanel<A>;
  for (int64_t j = 0; j < columns; j += W, panels += W * depth) {
    const int64_t n = columns - j < W ? columns - j : W;
    for (int64_t k = 0; k < depth; ++k) {
      const auto* row = b(k) + j;
      for (int64_t i = 0; i < n; ++i) panels[k * W + i] = load(row[i]);
      for (int64_t i = n; i < W; ++i) panels[k * W + i] = 0;
    }
  }
}

// c[i][0:kPanel] = sum over k of a[i * lda + k] * panel[k][0:kPanel], for R rows.
template <class A, int64_t R>
ALWAYS_INLINE void tile_product(const A* __restrict a, int64_t lda, const A* __restrict panel,
                                int64_t depth, A* __restrict c, int64_t ldc) {
  typedef A vector __attribute__((vector_size(32)));
  constexpr int64_t L = 32 / sizeof(A);
  vector sum[R][2];
  // Unrolled, or gcc 12 keeps the sums in memory to clear and to copy them: 6 % of attention_mass.
#pragma GCC unroll 8
  for (int64_t i = 0; i < R; ++i) sum[i][0] = sum[i][1] = vector{};
  for (int64_t k = 0; k < depth; ++k) {
    vector b0, b1;
    std::memcpy(&b0, panel + k * 2 * L, 32);
    std::memcpy(&b1, panel + k * 2 * L + L, 32);
    for (int64_t i = 0; i < R; ++i) {
      const A x = a[i * lda + k];
      sum[i][0] += x * b0;
      sum[i][1] += x * b1;
    }
  }
#pragma GCC unroll 8
  for (int64_t i = 0; i < R; ++i) {
    std::memcpy(c + i * ldc, &sum[i][0], 32);
    std::memcpy(c + i * ldc + L, &sum[i][1], 32);
  }
}

// c[rows, columns rounded up to whole panels] = a[rows, depth] · panels. Every element is summed over
// k in one order, whatever the tiling. `c` needs room for whole panels in each of its rows.
template <class A>
ALWAYS_INLINE void panel_product(const A* a, int64_t lda, int64_t rows, const A* panels,
                                 int64_t columns, int64_t depth, A* c, int64_t ldc) {
  constexpr int64_t W = kPanel<A>;
  for (int64_t j = 0; j < columns; j += W, panels += W * depth) {
    int64_t i = 0;
    for (; i + kTile <= rows; i += kTile)
      tile_product<A, kTile>(a + i * lda, lda, panels, depth, c + i * ldc + j, ldc);
    for (; i < rows; ++i)
      tile_product<A, 1>(a + i * lda, lda, panels, depth, c + i * ldc + j, ldc);
  }
}

}  // namespace sra
#endif
