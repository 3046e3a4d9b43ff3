// The loops of span_geometry: cosines of two sets of spans, their weighing, a part of the gradient.
#ifndef SRA_CUDA_GEOMETRY_BLOCKS_H
#define SRA_CUDA_GEOMETRY_BLOCKS_H

#include "geometry_rows.h"

namespace sra {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
// Both sides of the tile of products that a thread sums in registers.
template <class A>
constexpr int kSide = sizeof(A) == 8 ? 4 : 8;
// Columns in shared memory at a time.
constexpr int kDepth = 32;
// Columns of a cosine, and spans of a gradient, that are summed before they join the sums of those
// before them: in one long chain of additions, roundings pile up.
constexpr int kChain = 512, kTerms = 128;
static_assert(kDepth % kColumns == 0 && kChain % kDepth == 0, "whole steps");

// Spans whose numbers fit in shared memory with their cosines, and those of a band of more.
template <class A>
constexpr int kSpans = sizeof(A) == 8 ? 64 : 128;
template <class A>
constexpr int kBand = kSpans<A> / 2;
// Rows of shared memory: aligned to 16 bytes, and not all in the same banks.
template <class A>
constexpr int kRow = kSpans<A> + 4;

template <class A>
constexpr int kProducts = kSide<A> * kSide<A>;
template <class A>
constexpr int kMostSlices = kProducts<A> < kWarp ? kProducts<A> : kWarp;

// What is known of the spans of a sample: in shared memory, or in the workspace for a large one.
template <class A>
struct Spans {
  int64_t begin, n;
  A* weight;  // relative to the sample's largest
};

// The vectors of a sample in one model; see Length.
struct Side {
  Model model;
  double *scale, *inverse;
};

// A matrix of cosines: that of spans i and j, counted from the first of the band, at
// at[i * row + j * column].
template <class A>
struct Matrix {
  A* at;
  int row, column;
  __device__ A& operator()(int64_t i, int64_t j) const { return at[i * row + j * column]; }
};

// Spans first..first + count against spans other..other + others; or all pairs i < j of `count`.
struct Pairs {
  int64_t first, other;
  int count, others;
  bool half;
};

// The tile of a thread, and which columns of it: where tiles are few, `slices` threads, neighbours
// in a warp, share the columns of one.
struct Tile {
  int i, j, slice, slices;
  bool exists;
};
template <class A>
__device__ __forceinline__ Tile tile_of(const Pairs& p) {
  const int high = (p.count + kSide<A> - 1) / kSide<A>;
  const int wide = (p.others + kSide<A> - 1) / kSide<A>;
  const int tiles = p.half ? high * (high + 1) / 2 : high * wide;
  Tile t = {0, 0, 0, 1, true};
  while (t.slices < kMostSlices<A> && 2 * t.slices * tiles <= kThreads) t.slices *= 2;
  int tile = int(threadIdx.x) / t.slices;
  t.slice = int(threadIdx.x) % t.slices;
  t.exists = tile < tiles;
  if (!t.exists) return t;
  if (p.half) {
    for (; tile >= high - t.i; ++t.i) tile -= high - t.i;
    t.j = t.i + tile;
  } else {
    t.i = tile / wide;
    t.j = tile % wide;
  }
  return t;
}

// The sums over a tile's slices, in a fixed order. Each step halves the products that a thread
// holds: it gives one half to its neighbour and gets the other from it. Returns which of the
// tile's products are left in sum[0..kProducts / slices).
template <class A>
__device__ __forceinline__ int add_slices(const Tile& t, A (&sum)[kProducts<A>]) {
  int first = 0;
#pragma unroll
  for (int step = 1; step < kMostSlices<A>; step *= 2) {
    if (step >= t.slices) break;
    const int half = kProducts<A> / (2 * step);
    const bool upper = t.slice & step;
#pragma unroll
    for (int x = 0; x < half; ++x) {
      const A kept = upper ? sum[x + half] : sum[x], given = upper ? sum[x] : sum[x + half];
      sum[x] = kept + __shfl_xor_sync(kAllLanes, given, step);
    }
    if (upper) first += half;
  }
  return first;
}

// kSide numbers of shared memory, 16 bytes at a time.
template <class A>
__device__ __forceinline__ void read_side(const A* from, A (&out)[kSide<A>]) {
  constexpr int N = kVector<A>;
#pragma unroll
  for (int i = 0; i < kSide<A>; i += N) {
    A part[N];
    load<N>(part, from + i);
#pragma unroll
    for (int j = 0; j < N; ++j) out[i + j] = part[j];
  }
}

// Columns k..k + kDepth of the spans of both sides, on their way to shared memory: read while the
// columns before them are multiplied.
template <class A>
struct Staged {
  static constexpr int kItems = kSpans<A> * kDepth / kColumns / kThreads;
  A x[kItems][kColumns];

  // Neighbouring lanes have neighbouring spans: they write to different banks.
  __device__ __forceinline__ static int position(int item) {
    return (int(threadIdx.x) + item * kThreads) % kSpans<A>;
  }
  __device__ __forceinline__ static int column(int item) {
    return (int(threadIdx.x) + item * kThreads) / kSpans<A> * kColumns;
  }

  __device__ __forceinline__ void fetch(const Side& side, int64_t begin, const Pairs& p,
                                        int64_t k) {
#pragma unroll
    for (int item = 0; item < kItems; ++item) {
      const int at = position(item);
      const bool left = p.half || at < kBand<A>;
      const int64_t i = left ? p.first + at : p.other + at - kBand<A>;
      const bool exists = i < (left ? p.first + p.count : p.other + p.others);
      read_any(side.model, begin + i, k + column(item), exists ? side.scale[i] : 0, x[item]);
    }
  }
  __device__ __forceinline__ void put(A* stage) const {
#pragma unroll
    for (int item = 0; item < kItems; ++item)
#pragma unroll
      for (int i = 0; i < kColumns; ++i)
        stage[(column(item) + i) * kRow<A> + position(item)] = x[item][i];
  }
};

// Adds a tile's products to `out`, or begins with them.
template <class A>
__device__ __forceinline__ void add_tile(const Tile& t, const Pairs& p, bool begins,
                                         const Matrix<A>& out, A (&sum)[kProducts<A>]) {
  const int first = add_slices(t, sum), held = kProducts<A> / t.slices;
  // What is held are whole rows of the tile, or a part of one. They pass through the registers of
  // the first: the addresses of all of them at once would fill what registers there are.
  const int j = t.j * kSide<A> + first % kSide<A>;
  int i = t.i * kSide<A> + first / kSide<A>;
#pragma unroll 1
  for (int left = t.exists ? held : 0; left > 0; left -= kSide<A>, ++i) {
#pragma unroll
    for (int x = 0; x < kSide<A>; ++x) {
      const bool wanted = p.half ? i < j + x : i < p.count;
      if (x >= left || !wanted || j + x >= p.others) continue;
      A& to = out(i, p.other + j + x);
      to = begins ? sum[x] : to + sum[x];
    }
#pragma unroll
    for (int x = kSide<A>; x < kProducts<A>; ++x) sum[x - kSide<A>] = sum[x];
  }
#pragma unroll
  for (int x = 0; x < kProducts<A>; ++x) sum[x] = 0;
}

// The cosines of one model. `stage` holds kDepth rows of shared memory.
template <class A>
__device__ __forceinline__ void cosines(const Side& side, int64_t begin, const Pairs& p, A* stage,
                                        const Matrix<A>& out) {
  const Tile t = tile_of<A>(p);
  const A* const left = stage + t.i * kSide<A>;
  const A* const right = stage + t.j * kSide<A> + (p.half ? 0 : kBand<A>);
  const int64_t columns = max(side.model.dim, int64_t(1));  // vectors of no numbers are zeros
  A sum[kProducts<A>] = {};
  Staged<A> staged;
#pragma unroll 1
  for (int64_t k = -kDepth; k < columns; k += kDepth) {
    if (k >= 0) {
      __syncthreads();
      staged.put(stage);
      __syncthreads();
    }
    const int64_t next = k + kDepth;
    if (next < columns) staged.fetch(side, begin, p, next);
    if (k < 0) continue;
#pragma unroll 2
    for (int d = t.slice; d < kDepth; d += t.slices) {
      A a[kSide<A>], b[kSide<A>];
      read_side(left + d * kRow<A>, a);
      read_side(right + d * kRow<A>, b);
#pragma unroll
      for (int x = 0; x < kProducts<A>; ++x) sum[x] += a[x / kSide<A>] * b[x % kSide<A>];
    }
    if (next % kChain == 0 || next >= columns) add_tile(t, p, k < kChain, out, sum);
  }
  __syncthreads();
  for (int x = threadIdx.x; x < p.count * p.others; x += kThreads) {
    const int i = x / p.others, j = x % p.others;
    if (p.half && i >= j) continue;
    // In double: the rounding of one length would be that of all its cosines.
    A& cosine = out(i, p.other + j);
    cosine = A(double(cosine) * side.inverse[p.first + i] * side.inverse[p.other + j]);
  }
}

// Both models' cosines of a band of spans with all of the sample.
template <class A>
struct Cosines {
  Matrix<A> student, teacher;
  bool half;  // only those of i < j, and the band is the sample
  __device__ __forceinline__ static A at(const Matrix<A>& m, bool half, int64_t i, int64_t j) {
    return half && i > j ? m(j, i) : m(i, j);
  }
};

// Span i of the band, by a warp: the sum over j of weight_j * error_ij^2, on lane 0. The diagonal
// becomes the gradient's part along the span itself. Along the sphere the gradient is the sum over
// j of pull_ij (u_j - cos_ij u_i).
template <class A>
__device__ __forceinline__ double weigh(const Spans<A>& spans, const double* inverse,
                                        const Cosines<A>& c, int64_t first, int i,
                                        A& diagonal) {
  double square = 0, radial = 0;
  for (int64_t j = threadIdx.x % kWarp; j < spans.n; j += kWarp) {
    if (j == first + i) continue;
    const A ours = c.at(c.student, c.half, i, j), theirs = c.at(c.teacher, c.half, i, j);
    const A error = ours - theirs, pull = error * spans.weight[j];
    square += double(error) * double(pull);
    radial += double(pull) * double(ours);
  }
  square = warp_sum(square);
  radial = warp_sum(radial);
  diagonal = A(-radial * inverse[first + i]);
  return square;
}

// pull_ij / the length of j, at [j * row + i], for the spans i of the band, over their cosines.
template <class A>
__device__ __forceinline__ void pull(const Spans<A>& spans, const double* inverse,
                                     const Cosines<A>& c, int64_t first, int count, A* out,
                                     int row) {
  for (int64_t x = threadIdx.x; x < count * spans.n; x += kThreads) {
    const int64_t j = x / count;
    const int i = int(x % count);
    if (c.half ? i >= j : first + i == j) continue;
    const double error = double(c.student(i, j) - c.teacher(i, j));
    out[j * row + i] = A(error * double(spans.weight[j]) * inverse[j]);
    if (c.half) out[i * row + j] = A(error * double(spans.weight[i]) * inverse[i]);
  }
}

// The gradient of `count` spans from `first` on: for each, the sum over j of pull[j * row + i] by
// vector j. A warp sums kSide spans by kWarp * kColumns columns at a time.
template <class T, class O, class A>
__device__ __forceinline__ void gradient(const Spans<A>& spans, const Side& side, double share,
                                         int64_t first, int count, const A* pull, int row,
                                         O* grad, bool vectors) {
  const Model& m = side.model;
  constexpr int kWide = kWarp * kColumns;
  const int64_t strips = (m.dim + kWide - 1) / kWide;
  const int groups = (count + kSide<A> - 1) / kSide<A>;
  for (int64_t part = threadIdx.x / kWarp; part < strips * groups; part += kWarps) {
    const int64_t k = part / groups * kWide + threadIdx.x % kWarp * kColumns;
    const int group = int(part % groups) * kSide<A>;
    A sum[kSide<A>][kColumns] = {};
    for (int64_t begin = 0; begin < spans.n; begin += kTerms) {
      const int64_t end = min(spans.n, begin + kTerms);
      A part[kSide<A>][kColumns] = {};
#pragma unroll 2
      for (int64_t j = begin; j < end; ++j) {
        A x[kColumns], factor[kSide<A>];
        read_scaled<T>(m, spans.begin + j, k, side.scale[j], x);
        read_side(pull + j * row + group, factor);
#pragma unroll
        for (int i = 0; i < kSide<A>; ++i)
#pragma unroll
          for (int d = 0; d < kColumns; ++d) part[i][d] += factor[i] * x[d];
      }
#pragma unroll
      for (int i = 0; i < kSide<A>; ++i)
#pragma unroll
        for (int d = 0; d < kColumns; ++d) sum[i][d] += part[i][d];
    }
#pragma unroll
    for (int i = 0; i < kSide<A>; ++i) {
      const int64_t span = first + group + i;
      if (group + i >= count || k >= m.dim) continue;
      const A factor = A(4 * share * double(spans.weight[span]) * side.inverse[span] *
                         side.scale[span]);
      O* const to = grad + (spans.begin + span) * m.dim + k;
      constexpr int N = kVector<O> < kColumns ? kVector<O> : kColumns;
#pragma unroll
      for (int d = 0; d < kColumns; d += N) {
        A out[N];
#pragma unroll
        for (int e = 0; e < N; ++e) out[e] = factor * sum[i][d + e];
        if (vectors) {
          store<N>(to + d, out);
        } else {
#pragma unroll
          for (int e = 0; e < N; ++e)
            if (k + d + e < m.dim) to[d + e] = narrow<O>(out[e]);
        }
      }
    }
  }
}

}  // namespace sra
#endif
