// attention_mass of many query rows: a tile of them against all the keys that it sees.
//
// Scores lie key by key, one column a query: keys are read where they are, never repacked, and the
// softmax, which runs over keys, is taken for a register of columns at once.
#ifndef SRA_CPU_ATTENTION_TILE_H
#define SRA_CPU_ATTENTION_TILE_H

#include "attention_mass.h"
#include "gemm.h"

#include <memory>

namespace sra {

// Columns of a tile at most, and the bytes that its scores may take before it narrows: more than a
// second-level cache, because narrow tiles cost more (measured, 8,192 keys: 16 columns 1.42 s, 64
// columns 0.80 s).
constexpr int64_t kColumns = 64;
constexpr int64_t kScoreBytes = 2 << 20;
// Keys of a run, a multiple of kTile. The scores of 64 columns take 24 KiB.
constexpr int64_t kTileRun = 96;

// What a thread needs for its tiles.
template <class A>
struct TileSpace {
  TileSpace(int64_t columns, int64_t keys, int64_t dim)
      : runs((keys + kTileRun - 1) / kTileRun),
        space(new A[panel_size<A>(columns, dim) + kTileRun * dim +
                    runs * (kTileRun + 2) * columns]) {
    panels = space.get();
    widened = panels + panel_size<A>(columns, dim);
    top = widened + kTileRun * dim;
    sum = top + runs * columns;
    scores = sum + runs * columns;
  }
  int64_t runs;
  std::unique_ptr<A[]> space;
  A *panels, *widened, *top, *sum, *scores;
};

// Which queries a tile holds. Column c is query head c % group of row rows[c / group].
struct Tile {
  int64_t sample, kv_head;
  const int64_t* rows;  // those that count, in order
  int64_t first, last;  // columns
};

// exp(score - largest) for a run of n keys, in place, with each column's largest and sum.
template <class A>
ALWAYS_INLINE void softmax_run(A* scores, int64_t n, int64_t columns, A* top, A* sum) {
  constexpr int64_t W = kPanel<A>;
  for (int64_t c = 0; c < columns; c += W) {
    A largest[W], total[W] = {}, shift[W];
    std::fill_n(largest, W, kHidden<A>);
    for (int64_t j = 0; j < n; ++j) {
      const A* s = scores + j * columns + c;
      for (int64_t i = 0; i < W; ++i) largest[i] = s[i] > largest[i] ? s[i] : largest[i];
    }
    for (int64_t i = 0; i < W; ++i) shift[i] = shift_of(largest[i]);
    for (int64_t j = 0; j < n; ++j) {
      A* s = scores + j * columns + c;
      for (int64_t i = 0; i < W; ++i) {
        s[i] = exp_of(s[i] - shift[i]);
        total[i] += s[i];
      }
    }
    std::copy_n(largest, W, top + c);
    std::copy_n(total, W, sum + c);
  }
}

// mass[j] += sum over columns of factor[c] * share[j * columns + c].
template <class A>
ALWAYS_INLINE void sum_columns(const A* share, int64_t n, int64_t columns, const A* factor,
                               A* __restrict mass) {
  constexpr int64_t W = kPanel<A>;
  for (int64_t j = 0; j < n; ++j) {
    A lane[W] = {};
    for (int64_t c = 0; c < columns; c += W)
      for (int64_t i = 0; i < W; ++i) lane[i] += factor[c + i] * share[j * columns + c + i];
    for (int64_t half = W / 2; half; half /= 2)
      for (int64_t i = 0; i < half; ++i) lane[i] += lane[i + half];
    mass[j] += lane[0];
  }
}

// Adds to mass[j] what the tile's rows pay to key j.
template <class T>
ALWAYS_INLINE void tile_mass(const Attention<T>& a, const Tile& t, int64_t columns,
                             TileSpace<typename accumulator<T>::type>& space,
                             typename accumulator<T>::type* mass) {
  using A = typename accumulator<T>::type;
  const int64_t group = a.group(), dim = a.p.dim, used = t.last - t.first;
  const auto row_of = [&](int64_t c) { return t.rows[(t.first + c) / group]; };
  const auto head_of = [&](int64_t c) { return t.kv_head * group + (t.first + c) % group; };
  // Columns past the last repeat it and count for nothing; zeros would meet infinite keys.
  const auto query_of = [&](int64_t c) {
    c = std::min(c, used - 1);
    return a.query(t.sample, head_of(c), row_of(c));
  };
  pack_rows<A>(columns, dim, query_of, space.panels);
  for (int64_t i = 0; i < columns * dim; ++i) space.panels[i] *= A(a.p.scale);

  const int64_t low = a.position(row_of(0)), high = a.position(row_of(used - 1));
  const Range keys = a.seen(t.sample, low, high);
  const uint8_t* real = a.mask(t.sample);
  // The keys that a column sees, counted from keys.first.
  int32_t oldest[kColumns], own[kColumns];
  // A column that gives nothing has an infinite log-sum-exp.
  A lse[kColumns];
  for (int64_t c = 0; c < columns; ++c) {
    const int64_t row = row_of(std::min(c, used - 1));
    own[c] = int32_t(a.position(row) - keys.first);
    oldest[c] = a.p.window ? int32_t(std::max<int64_t>(0, own[c] - a.p.window + 1)) : 0;
    lse[c] = -kHidden<A>;
    if (a.p.lse && c < used) {
      const A given = a.lse(t.sample, head_of(c), row);
      if (given != kHidden<A>) lse[c] = given;
    }
  }

  int64_t run = 0;
  for (int64_t j = keys.first; j < keys.last; j += kTileRun, ++run) {
    const int64_t n = std::min(kTileRun, keys.last - j);
    // With the log-sum-exp known, a run is summed up at once and the next takes its place.
    const int64_t slot = a.p.lse ? 0 : run;
    A* top = space.top + slot * columns;
    A* sum = space.sum + slot * columns;
    A* scores = space.scores + slot * kTileRun * columns;
    const KeyRun<A> rows =
        key_run(a.key(t.sample, t.kv_head, j), a.p.key_strides[2], n, dim, space.widened);
    panel_product(rows.rows, rows.stride, n, space.panels, columns, dim, scores, columns);
    if (a.p.softcap > 0) cap_scores(scores, n * columns, A(a.p.softcap));
    for (int64_t i = 0; i < n; ++i) {
      A* s = scores + i * columns;
      const int32_t k = int32_t(j + i - keys.first);
      if (real && !real[j + i]) std::fill_n(s, columns, kHidden<A>);
      else if (j + i > low || (a.p.window && j + i <= high - a.p.window))
        for (int64_t c = 0; c < columns; ++c)
          s[c] = (k <= own[c]) & (k >= oldest[c]) ? s[c] : kHidden<A>;
    }
    softmax_run(scores, n, columns, top, sum);
    if (a.p.lse) {
      for (int64_t c = 0; c < columns; ++c) sum[c] = exp_of(top[c] - lse[c]);
      sum_columns(scores, n, columns, sum, mass + j);
    }
  }
  if (a.p.lse) return;
  for (int64_t c = 0; c < columns; ++c) {
    factors_of_runs(space.top + c, space.sum + c, run, columns);
    for (int64_t r = 0; c >= used && r < run; ++r) space.sum[r * columns + c] = 0;
  }
  for (int64_t r = 0; r < run; ++r) {
    const int64_t j = keys.first + r * kTileRun;
    sum_columns(space.scores + r * kTileRun * columns, std::min(kTileRun, keys.last - j), columns,
                space.sum + r * columns, mass + j);
  }
}

}  // namespace sra
#endif
