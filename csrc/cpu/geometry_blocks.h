// The loops of span_geometry: unit vectors, their cosines, the weighing, a strip of the gradient.
#ifndef SRA_CPU_GEOMETRY_BLOCKS_H
#define SRA_CPU_GEOMETRY_BLOCKS_H

#include "gemm.h"
#include "gram.h"
#include "vector.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

namespace sra {

// Elements of a dot product before it is added up: four rows of them stay in the first-level cache.
constexpr int64_t kDepth = 1024;
// Columns of the gradient that are one piece of work, the rows they are summed over at a time, and
// the rows summed for: a panel and a strip of sums fit in the first-level cache.
constexpr int64_t kStrip = 64, kStripDepth = 256, kStripRows = 48;

// Whole panels, and never a multiple of 4 KiB apart: such rows would evict each other.
template <class A>
ALWAYS_INLINE int64_t padded(int64_t n) {
  const int64_t stride = (n + kPanel<A> - 1) / kPanel<A> * kPanel<A>;
  return stride * sizeof(A) % 4096 == 0 ? stride + kPanel<A> : stride;
}

ALWAYS_INLINE int64_t whole_tiles(int64_t rows) { return (rows + kTile - 1) / kTile * kTile; }

// Unit vectors of one model.
template <class A>
struct Rows {
  A* unit;
  int64_t stride;
};

// The n spans of a sample that have weight.
template <class A>
struct Sample {
  int64_t n;
  const int64_t* row;  // of the inputs
  const A* weight;     // relative to the sample's largest
  Rows<A> student, teacher;
  double* inverse;  // 1 / length of the student's vectors, 0 for a zero vector
  double* squares;  // sum over j of weight_j * error_ij^2
  double share;     // 1 / sum of all pair weights
};

// Rows first..last of a sample and their cosines with all spans, in rows ld apart. Both bounds are
// multiples of kRight, or the sample's end: no tile is half inside.
template <class A>
struct Band {
  int64_t first, last;
  A *student, *teacher;
  int64_t ld;
};

// The length of a row, and the unit vector padded with zeros. Squares of any float fit in a double.
template <class T, class A>
ALWAYS_INLINE double unit_row(const T* __restrict x, int64_t n, A* __restrict unit,
                              int64_t stride) {
  double scale = 1;
  if constexpr (std::is_same<T, double>::value) {
    double largest = 0;
    for (int64_t i = 0; i < n; ++i)
      largest = std::fabs(x[i]) > largest ? std::fabs(x[i]) : largest;
    int exponent = 0;
    if (largest > 0 && std::isfinite(largest)) std::frexp(largest, &exponent);
    scale = std::ldexp(1.0, -std::max(exponent, -1000));
  }
  constexpr int64_t kLanes = 16;
  double lane[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int64_t k = 0; k < kLanes; ++k) {
      const double v = scale * double(load(x[i + k]));
      lane[k] += v * v;
    }
  for (int64_t k = 0; i + k < n; ++k) {
    const double v = scale * double(load(x[i + k]));
    lane[k] += v * v;
  }
  double square = 0;
  for (int64_t k = 0; k < kLanes; ++k) square += lane[k];
  const double scaled = square == 0 ? 0 : 1 / std::sqrt(square);
  // In two parts: the rounding of one factor would be the same relative error in all its cosines.
  const A high = A(scaled), low = A(scaled - double(high));
  // A factor outside float's normal range belongs to a tiny or a huge vector.
  if (!std::is_same<T, double>::value && std::isnormal(high))
    for (int64_t k = 0; k < n; ++k) unit[k] = high * A(load(x[k])) + low * A(load(x[k]));
  else
    for (int64_t k = 0; k < n; ++k) unit[k] = A(scale * double(load(x[k])) * scaled);
  for (int64_t k = n; k < stride; ++k) unit[k] = 0;
  return scaled * scale;
}

// Cosines of rows first..last of the band with all spans. Inside the band a row has only its half
// of them, up to itself, and writes the other half for the rows above it.
template <class A>
ALWAYS_INLINE void cosines(const Rows<A>& rows, int64_t n, const Band<A>& band, int64_t first,
                           int64_t last, A* out) {
  const auto in_band = [&](int64_t j) { return j >= band.first && j < band.last; };
  const auto at = [&](int64_t i, int64_t j) -> A& { return out[(i - band.first) * band.ld + j]; };
  for (int64_t k = 0; k < rows.stride; k += kDepth) {
    const int64_t depth = std::min(kDepth, rows.stride - k);
    const bool begun = k > 0, done = k + depth == rows.stride;
    const auto put = [&](A x, int64_t i, int64_t j) { at(i, j) = begun ? at(i, j) + x : x; };
    for (int64_t j = 0; j < n; j += kRight) {
      const A* b[kRight];
      for (int64_t y = 0; y < kRight; ++y)
        b[y] = rows.unit + std::min(j + y, n - 1) * rows.stride + k;
      const int64_t width = std::min(kRight, n - j);
      const bool inside = in_band(j);
      for (int64_t i = first; i < last; i += kLeft) {
        if (inside && j >= i + kLeft) continue;
        const A* a[kLeft];
        for (int64_t x = 0; x < kLeft; ++x)
          a[x] = rows.unit + std::min(i + x, last - 1) * rows.stride + k;
        A tile[kLeft][kRight];
        dot_tile(a, b, depth, tile);
        const int64_t height = std::min(kLeft, last - i);
        // Whole tiles away from the diagonal, which most are, have loops of known length.
        if (height == kLeft && width == kRight && (!inside || j + kRight <= i)) {
          for (int64_t x = 0; x < kLeft; ++x)
            for (int64_t y = 0; y < kRight; ++y) put(tile[x][y], i + x, j + y);
          if (inside && done)
            for (int64_t y = 0; y < kRight; ++y)
              for (int64_t x = 0; x < kLeft; ++x) at(j + y, i + x) = at(i + x, j + y);
          continue;
        }
        for (int64_t x = 0; x < height; ++x)
          for (int64_t y = 0; y < width; ++y) {
            if (inside && j + y > i + x) continue;  // another row's half
            put(tile[x][y], i + x, j + y);
            if (inside && done) at(j + y, i + x) = at(i + x, j + y);
          }
      }
    }
  }
}

// Row i of the band: the student's cosines become the row of the matrix that gives the gradient,
// and squares[i] is filled. Along the sphere, sum over j of pull_ij (u_j - cos_ij u_i): the second
// part is the matrix's diagonal.
template <class A>
ALWAYS_INLINE void weigh(const Sample<A>& s, const Band<A>& band, int64_t i) {
  A* __restrict ours = band.student + (i - band.first) * band.ld;
  A* __restrict theirs = band.teacher + (i - band.first) * band.ld;
  ours[i] = theirs[i] = 0;
  constexpr int64_t kLanes = 16;
  double square[kLanes] = {}, radial[kLanes] = {};
  const auto one = [&](int64_t j, int64_t k) __attribute__((always_inline)) {
    const A error = ours[j] - theirs[j], pull = error * s.weight[j];
    square[k] += double(error) * double(pull);
    radial[k] += double(pull) * double(ours[j]);
    ours[j] = pull;
  };
  int64_t j = 0;
  for (; j + kLanes <= s.n; j += kLanes)
    for (int64_t k = 0; k < kLanes; ++k) one(j + k, k);
  for (int64_t k = 0; j + k < s.n; ++k) one(j + k, k);
  for (int64_t k = 1; k < kLanes; ++k) square[0] += square[k], radial[0] += radial[k];
  s.squares[i] = square[0];
  ours[i] = A(-radial[0]);
}

// Columns first..last of the gradient of the band's rows: their matrix times the unit vectors.
template <class A, class O>
ALWAYS_INLINE void gradient_strip(const Sample<A>& s, const Band<A>& band, int64_t first,
                                  int64_t last, A* panels, O* grad, int64_t dim) {
  const int64_t columns = last - first;
  const int64_t panel_columns = panel_size<A>(columns, 1);
  for (int64_t k = 0; k < s.n; k += kStripDepth) {
    const auto row = [&](int64_t i) { return s.student.unit + (k + i) * s.student.stride + first; };
    pack_columns(columns, std::min(kStripDepth, s.n - k), row, panels + k * panel_columns);
  }
  for (int64_t i = band.first; i < band.last; i += kStripRows) {
    const int64_t rows = std::min(kStripRows, band.last - i);
    A sum[kStripRows * kStrip], part[kStripRows * kStrip];
    for (int64_t k = 0; k < s.n; k += kStripDepth) {
      // Whole tiles: a row alone costs as much as four in one.
      panel_product(band.student + (i - band.first) * band.ld + k, band.ld, whole_tiles(rows),
                    panels + k * panel_columns, columns, std::min(kStripDepth, s.n - k),
                    k == 0 ? sum : part, kStrip);
      if (k > 0)
        for (int64_t x = 0; x < rows * kStrip; ++x) sum[x] += part[x];
    }
    for (int64_t x = 0; x < rows; ++x) {
      const A factor = A(4 * s.share * double(s.weight[i + x]) * s.inverse[i + x]);
      const A* from = sum + x * kStrip;
      write_row(grad + s.row[i + x] * dim + first, columns,
                [=](int64_t d) { return factor * from[d]; });
    }
  }
}

}  // namespace sra
#endif
