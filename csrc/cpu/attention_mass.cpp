// attention_mass on the CPU: how much attention each key receives, never a T×T tensor.
//
// Work is cut by the shapes alone, and each part has sums of its own that are added in order: the
// same input gives the same bits for any number of threads.

#include "attention_mass.h"
#include "attention_row.h"
#include "attention_tile.h"
#include "parallel.h"

#include <memory>
#include <vector>

namespace sra {
namespace {

// Below this many multiplications a second thread costs more than it brings.
constexpr int64_t kWorkPerThread = 1 << 18;
// Partial masses of all samples together: parts for the threads, keys * kBlocks numbers in memory.
constexpr int64_t kBlocks = 128;

#define FOR_DTYPE(T, A)                                                                           \
  CLONES void row_run_of(const Attention<T>& a, const Row& row, int64_t kv_head, Range run,       \
                         A* share, A* top, A* sum, int64_t stat_stride, A* scratch) {             \
    row_run<T>(a, row, kv_head, run, share, top, sum, stat_stride, scratch);                      \
  }                                                                                               \
  CLONES void tile_mass_of(const Attention<T>& a, const Tile& tile, int64_t columns,              \
                           TileSpace<A>& space, A* mass) {                                        \
    tile_mass<T>(a, tile, columns, space, mass);                                                  \
  }
FOR_DTYPE(float, float)
FOR_DTYPE(bf16, float)
FOR_DTYPE(f16, float)
FOR_DTYPE(double, double)
#undef FOR_DTYPE

#define FOR_DTYPE(A)                                                                              \
  CLONES void sum_heads_of(const A* share, int64_t ld, const A* factor, int64_t factor_stride,    \
                           int64_t heads, int64_t n, A* mass) {                                   \
    sum_heads(share, ld, factor, factor_stride, heads, n, mass);                                  \
  }
FOR_DTYPE(float)
FOR_DTYPE(double)
#undef FOR_DTYPE

template <class T>
void one_row(const Attention<T>& a) {
  using A = typename accumulator<T>::type;
  const sra_attention_mass& p = a.p;
  const int64_t runs = (p.keys + kRowRun - 1) / kRowRun, group = a.group();
  const std::unique_ptr<A[]> share(new A[p.batch * p.heads * p.keys]);
  const std::unique_ptr<A[]> top(new A[p.batch * p.heads * runs]);
  const std::unique_ptr<A[]> sum(new A[p.batch * p.heads * runs]);
  const int threads =
      threads_for(p.batch * p.heads * p.keys * p.dim, kWorkPerThread, p.threads);

  std::vector<Row> rows(p.batch);
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t position = a.position(p.query_index[b]);
    rows[b] = {b, p.query_index[b], a.seen(b, position, position)};
  }
  const auto run_of = [&](const Row& row, int64_t r) {
    const int64_t first = std::min(row.keys.last, row.keys.first + r * kRowRun);
    return Range{first, std::min(row.keys.last, first + kRowRun)};
  };
  parallel_each(threads, p.batch * p.kv_heads * runs, [&](int64_t i) {
    const Row& row = rows[i / (p.kv_heads * runs)];
    const int64_t kv_head = i / runs % p.kv_heads, r = i % runs;
    const int64_t head = row.sample * p.heads + kv_head * group;
    const Range run = run_of(row, r);
    const std::unique_ptr<A[]> scratch(new A[(group + kWidened) * p.dim]);
    row_run_of(a, row, kv_head, run, share.get() + head * p.keys + run.first,
               top.get() + head * runs + r, sum.get() + head * runs + r, runs, scratch.get());
  });
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t begin = b * p.heads * runs, end = begin + p.heads * runs;
    int64_t giving = 0;
    for (int64_t i = begin; i < end; i += runs)
      giving += factors_of_runs(top.get() + i, sum.get() + i, runs, 1);
    for (int64_t i = begin; i < end; ++i) sum[i] /= A(std::max<int64_t>(1, giving));
  }
  std::fill_n(a.mass(0), p.batch * p.keys, A(0));
  parallel_each(threads, p.batch * runs, [&](int64_t i) {
    const int64_t b = i / runs, r = i % runs;
    const Range run = run_of(rows[b], r);
    sum_heads_of(share.get() + b * p.heads * p.keys + run.first, p.keys,
                 sum.get() + b * p.heads * runs + r, runs, p.heads, run.last - run.first,
                 a.mass(b) + run.first);
  });
}

// The rows of a sample whose own key is real.
template <class T>
std::vector<int64_t> counting_rows(const Attention<T>& a, int64_t b) {
  std::vector<int64_t> rows;
  for (int64_t row = 0; row < a.p.queries; ++row)
    if (!a.mask(b) || a.mask(b)[a.position(row)]) rows.push_back(row);
  return rows;
}

// The columns of each tile. Under a window, rows far apart do not share one: a tile's scores have
// room for a window and kColumns keys.
template <class T>
std::vector<Range> tiles_of(const Attention<T>& a, const std::vector<int64_t>& rows,
                            int64_t columns) {
  const int64_t group = a.group(), count = int64_t(rows.size()) * group;
  std::vector<Range> tiles;
  for (int64_t first = 0, last; first < count; first = last) {
    last = std::min(count, first + columns);
    while (a.p.window && rows[(last - 1) / group] - rows[first / group] >= kColumns)
      last = (last - 1) / group * group;
    tiles.push_back({first, last});
  }
  return tiles;
}

template <class T>
void all_rows(const Attention<T>& a) {
  using A = typename accumulator<T>::type;
  const sra_attention_mass& p = a.p;
  // The keys that a tile sees at most, its scores' rows.
  const int64_t keys =
      p.window && p.window < p.keys ? std::min(p.keys, p.window + kColumns) : p.keys;
  const int64_t fit = kScoreBytes / int64_t(sizeof(A)) / std::max<int64_t>(1, keys);
  const int64_t columns =
      std::max(kPanel<A>, std::min(kColumns, fit / kPanel<A> * kPanel<A>));
  const int64_t tiles_at_most = p.kv_heads * ((p.queries * a.group() + columns - 1) / columns);
  const int64_t blocks = std::max<int64_t>(
      1, std::min(tiles_at_most, kBlocks / std::max<int64_t>(1, p.batch)));
  const std::unique_ptr<A[]> partial(new A[p.batch * blocks * p.keys]);
  const int threads =
      threads_for(p.batch * p.heads * p.queries * p.keys * p.dim / 2, kWorkPerThread, p.threads);

  std::vector<std::vector<int64_t>> rows(p.batch);
  std::vector<std::vector<Range>> tiles(p.batch);
  for (int64_t b = 0; b < p.batch; ++b) {
    rows[b] = counting_rows(a, b);
    tiles[b] = tiles_of(a, rows[b], columns);
  }
  parallel_each(threads, p.batch * blocks, [&](int64_t i) {
    const int64_t b = i / blocks, units = int64_t(tiles[b].size()) * p.kv_heads;
    A* mass = partial.get() + i * p.keys;
    std::fill_n(mass, p.keys, A(0));
    TileSpace<A> space(columns, p.lse ? kTileRun : keys, p.dim);
    for (int64_t unit = i % blocks; unit < units; unit += blocks) {
      const Range t = tiles[b][unit / p.kv_heads];
      const Tile tile = {b, unit % p.kv_heads, rows[b].data(), t.first, t.last};
      tile_mass_of(a, tile, columns, space, mass);
    }
  });
  parallel_each(threads, p.batch, [&](int64_t b) {
    std::vector<double> sum(p.keys, 0);  // float would lose a digit over so many parts
    for (int64_t k = 0; k < blocks; ++k) {
      const A* part = partial.get() + (b * blocks + k) * p.keys;
      for (int64_t j = 0; j < p.keys; ++j) sum[j] += part[j];
    }
    double total = 0;
    for (const double x : sum) total += x;
    for (int64_t j = 0; j < p.keys; ++j) a.mass(b)[j] = A(sum[j] / (total == 0 ? 1 : total));
  });
}

template <class T>
void forward(const sra_attention_mass& p) {
  const Attention<T> a(p);
  if (p.query_index) one_row(a);
  else all_rows(a);
}

}  // namespace
}  // namespace sra

int sra_attention_mass_forward(const sra_attention_mass* params) {
  using namespace sra;
  const sra_attention_mass& p = *params;
  if (p.dtype < SRA_F32 || p.dtype > SRA_F64) return SRA_BAD_DTYPE;
  for (int64_t b = 0; p.query_index && b < p.batch; ++b)
    if (p.query_index[b] < 0 || p.query_index[b] >= p.queries) return SRA_BAD_INDEX;
  switch (p.dtype) {
    case SRA_F32: forward<float>(p); break;
    case SRA_BF16: forward<bf16>(p); break;
    case SRA_F16: forward<f16>(p); break;
    default: forward<double>(p);
  }
  return SRA_OK;
}
