// attention_mass of one query row a sample, in CUDA. Bound by reading the keys, which happens once.
//
// Two launches. The first cuts the keys into runs, one block for each run and key head: the heads
// that share the key head are scored together, and each keeps the largest score of the run and its
// sum of exp. The second adds the runs up in their order and sums over heads. What a row sees is
// known on the device alone, so the grid covers all keys, and blocks that see none of theirs end.

#include "device.h"

namespace sra {
namespace {

constexpr int kThreads = 128;
constexpr int kCombineThreads = 256;
constexpr int kWarps = kThreads / kWarp;
// Blocks of the first launch on a multiprocessor: what their registers leave room for.
constexpr int kBlocks = 3;
// Keys and heads that a lane multiplies at a time: their 16 sums stay in registers, and four keys
// are four loads under way.
constexpr int kKeys = 4, kHeads = 4;
// A run has this many keys at least, and a row this many runs at most, because every block of the
// second launch reads the statistics of all runs.
constexpr int64_t kRun = 128, kRuns = 128;
// What the scaled queries of a block may take of shared memory.
constexpr int64_t kQueryBytes = 48 << 10;

// How a call is cut: by the shapes alone.
struct Cut {
  int64_t run, runs;
  int64_t width;              // dim, filled up with zeros to whole steps of a team
  int64_t heads, head_parts;  // query heads of a block, and the blocks of a key head for each run
  int team;                   // lanes that share a key: 4, 8, 16 or 32
  bool vectors;               // every row of keys is aligned to 16 bytes
};

template <class A>
struct Scores {
  A* score;     // [batch, heads, keys], written where the row sees the key
  A *top, *sum; // [batch, heads, runs] the largest score and the sum of exp(score - top)
};

template <class A>
constexpr A kHidden = -A(INFINITY);

// What is subtracted before exp: nothing when every score is hidden.
template <class A>
__device__ __forceinline__ A shift_of(A top) {
  return top == kHidden<A> ? A(0) : top;
}

// The keys that a sample's row sees; none where its index is out of range.
struct Seen {
  int64_t first, last;
  bool valid;
};
__device__ __forceinline__ Seen seen(const sra_attention_mass& p, int64_t b) {
  const int64_t row = p.query_index[b];
  const int64_t position = row + p.keys - p.queries;
  if (row < 0 || row >= p.queries) return {0, 0, false};
  return {p.window ? max(int64_t(0), position - p.window + 1) : 0, position + 1, true};
}

// The sums over a team of four values that each of its lanes holds: the lanes of quarter i of the
// team get the sum of value i. Halves the values while it halves the lanes.
template <class A>
__device__ __forceinline__ A sums_of_team(const A (&x)[kKeys], int lane, int team) {
  const bool upper = lane & team / 2, odd = lane & team / 4;
  const A a = (upper ? x[2] : x[0]) + __shfl_xor_sync(kAllLanes, upper ? x[0] : x[2], team / 2);
  const A b = (upper ? x[3] : x[1]) + __shfl_xor_sync(kAllLanes, upper ? x[1] : x[3], team / 2);
  A sum = (odd ? b : a) + __shfl_xor_sync(kAllLanes, odd ? a : b, team / 4);
  for (int offset = team / 8; offset; offset /= 2)
    sum += __shfl_xor_sync(kAllLanes, sum, offset);
  return sum;
}

// The dot products of four keys with four heads' queries, this lane's share of them. Heads behind
// the last repeat it, for nothing.
template <class T>
__device__ __forceinline__ void multiply(const Cut& cut, const acc_t<T>* query, int64_t heads,
                                         const T* const (&key)[kKeys], int64_t dim, int lane,
                                         acc_t<T> (&sum)[kHeads][kKeys]) {
  constexpr int N = kVector<T>, kWide = kVector<acc_t<T>>;
#pragma unroll 1  // one step for heads of up to 512 bytes
  for (int64_t k = lane * N; k < cut.width; k += cut.team * N) {
    acc_t<T> x[kKeys][N];
    if (cut.vectors && k < dim) {
#pragma unroll
      for (int j = 0; j < kKeys; ++j) load<N>(x[j], key[j] + k);
    } else {
#pragma unroll
      for (int j = 0; j < kKeys; ++j)
#pragma unroll
        for (int i = 0; i < N; ++i) x[j][i] = k + i < dim ? widen(key[j][k + i]) : acc_t<T>(0);
    }
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      const acc_t<T>* from = query + min(int64_t(h), heads - 1) * cut.width + k;
      acc_t<T> q[N];
#pragma unroll
      for (int i = 0; i < N; i += kWide) {
        acc_t<T> part[kWide];
        load<kWide>(part, from + i);
#pragma unroll
        for (int j = 0; j < kWide; ++j) q[i + j] = part[j];
      }
#pragma unroll
      for (int j = 0; j < kKeys; ++j)
#pragma unroll
        for (int i = 0; i < N; ++i) sum[h][j] += q[i] * x[j][i];
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    score_run(const sra_attention_mass p, const Cut cut, const Scores<acc_t<T>> out) {
  using A = acc_t<T>;
  DYNAMIC_SHARED(A, query);  // [heads of the block, width]
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  const int64_t run = blockIdx.x % cut.runs, part = blockIdx.x / cut.runs % cut.head_parts;
  const int64_t kv_head = blockIdx.x / (cut.runs * cut.head_parts) % p.kv_heads;
  const int64_t b = blockIdx.x / (cut.runs * cut.head_parts * p.kv_heads);
  const int64_t group = p.heads / p.kv_heads, head = kv_head * group + part * cut.heads;
  const int64_t heads = min(cut.heads, group - part * cut.heads);

  const Seen row = seen(p, b);
  const int64_t first = max(row.first, run * cut.run), last = min(row.last, (run + 1) * cut.run);
  A* const score = out.score + (b * p.heads + head) * p.keys;
  A* const top = out.top + (b * p.heads + head) * cut.runs + run;
  A* const sum = out.sum + (b * p.heads + head) * cut.runs + run;
  if (first >= last) {
    for (int64_t h = threadIdx.x; h < heads; h += kThreads) {
      top[h * cut.runs] = kHidden<A>;
      sum[h * cut.runs] = 0;
    }
    return;
  }

  const T* const queries = static_cast<const T*>(p.query) + b * p.query_strides[0] +
                           head * p.query_strides[1] + p.query_index[b] * p.query_strides[2];
  for (int64_t i = threadIdx.x; i < heads * cut.width; i += kThreads) {
    const int64_t h = i / cut.width, k = i % cut.width;
    query[i] = k < p.dim ? widen(queries[h * p.query_strides[1] + k]) * A(p.scale) : A(0);
  }
  __syncthreads();

  const T* const keys = static_cast<const T*>(p.key) + b * p.key_strides[0] +
                        kv_head * p.key_strides[1];
  const uint8_t* const real = p.key_mask ? p.key_mask + b * p.keys : nullptr;
  const int member = int(threadIdx.x) % cut.team;
  const int64_t step = kThreads / cut.team * kKeys;  // keys of all teams, and all take each step
  for (int64_t begin = first; begin < last; begin += step) {
    const int64_t j = begin + threadIdx.x / cut.team * kKeys;
    const T* key[kKeys];
#pragma unroll
    for (int i = 0; i < kKeys; ++i) key[i] = keys + min(j + i, last - 1) * p.key_strides[2];
    for (int64_t h = 0; h < heads; h += kHeads) {
      A dot[kHeads][kKeys] = {};
      multiply<T>(cut, query + h * cut.width, heads - h, key, p.dim, member, dot);
#pragma unroll
      for (int i = 0; i < kHeads; ++i) {
        A x = sums_of_team(dot[i], member, cut.team);
        const int64_t own = j + member / (cut.team / 4);
        if (member % (cut.team / 4) || own >= last || h + i >= heads) continue;
        if (p.softcap > 0) x = A(p.softcap) * tanh(x / A(p.softcap));
        // After every transform: a masked key may hold anything, NaN included.
        score[(h + i) * p.keys + own] = real && !real[own] ? kHidden<A> : x;
      }
    }
  }
  __syncthreads();

  for (int64_t h = warp; h < heads; h += kWarps) {
    const A* const from = score + h * p.keys;
    A largest = kHidden<A>, total = 0;
    for (int64_t j = first + lane; j < last; j += kWarp) largest = larger(largest, from[j]);
    largest = warp_max(largest);
    for (int64_t j = first + lane; j < last; j += kWarp) total += exp(from[j] - shift_of(largest));
    total = warp_sum(total);
    if (lane == 0) top[h * cut.runs] = largest, sum[h * cut.runs] = total;
  }
}

// The shift and 1 / sum of each head's whole row, in shared memory; 0 where it gives nothing.
template <class A>
__device__ __forceinline__ void rows_of_runs(const Scores<A>& scores, int64_t b, int64_t heads,
                                             int64_t runs, A* shift, A* inverse) {
  const int lane = int(threadIdx.x) % kWarp;
  for (int64_t h = threadIdx.x / kWarp; h < heads; h += kCombineThreads / kWarp) {
    const A* const top = scores.top + (b * heads + h) * runs;
    const A* const sum = scores.sum + (b * heads + h) * runs;
    A largest = kHidden<A>, total = 0;
    for (int64_t r = lane; r < runs; r += kWarp) largest = larger(largest, top[r]);
    largest = shift_of(warp_max(largest));
    for (int64_t r = lane; r < runs; r += kWarp) total += sum[r] * exp(top[r] - largest);
    total = warp_sum(total);
    if (lane == 0) shift[h] = largest, inverse[h] = total == 0 ? A(0) : 1 / total;
  }
}

template <class A>
__global__ void __launch_bounds__(kCombineThreads)
    sum_heads(const sra_attention_mass p, int64_t runs, const Scores<A> scores) {
  DYNAMIC_SHARED(A, shift);  // [heads]
  A* const inverse = shift + p.heads;
  const int64_t blocks = (p.keys + kCombineThreads - 1) / kCombineThreads;
  const int64_t b = blockIdx.x / blocks;
  const int64_t j = blockIdx.x % blocks * kCombineThreads + threadIdx.x;
  const Seen row = seen(p, b);
  if (row.valid) rows_of_runs(scores, b, p.heads, runs, shift, inverse);
  __syncthreads();
  if (j >= p.keys) return;
  A mass = 0;
  if (!row.valid) {
    mass = A(NAN);
  } else if (j >= row.first && j < row.last) {
    const A* const score = scores.score + b * p.heads * p.keys + j;
    int64_t giving = 0;
    for (int64_t h = 0; h < p.heads; ++h) {
      mass += exp(score[h * p.keys] - shift[h]) * inverse[h];
      giving += inverse[h] != 0;
    }
    mass /= A(max(giving, int64_t(1)));
  }
  static_cast<A*>(p.mass)[b * p.keys + j] = mass;
}

int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

template <class T>
Cut cut_of(const sra_attention_mass& p) {
  constexpr int64_t N = kVector<T>;
  Cut cut;
  cut.run = kRun * ((p.keys + kRun * kRuns - 1) / (kRun * kRuns));
  cut.runs = (p.keys + cut.run - 1) / cut.run;
  cut.team = 4;
  while (cut.team < kWarp && cut.team * N < p.dim) cut.team *= 2;
  cut.width = up(p.dim, cut.team * N);
  const int64_t group = p.heads / p.kv_heads;
  const int64_t fit = kQueryBytes / int64_t(sizeof(acc_t<T>)) / max(cut.width, int64_t(1));
  cut.heads = max(int64_t(1), min(group, fit));
  cut.head_parts = (group + cut.heads - 1) / cut.heads;
  cut.vectors = rows_are_aligned<T>(p.key, p.dim, p.key_strides[2]) &&
                p.key_strides[0] % N == 0 && p.key_strides[1] % N == 0;
  return cut;
}

template <class A>
int64_t bytes_of(const sra_attention_mass& p, const Cut& cut) {
  return p.batch * p.heads * (p.keys + 2 * cut.runs) * int64_t(sizeof(A));
}

template <class T>
int forward(const sra_attention_mass& p, void* workspace, void* stream) {
  using A = acc_t<T>;
  if (p.batch == 0 || p.keys == 0) return SRA_OK;
  const Cut cut = cut_of<T>(p);
  begin_workspace(workspace, bytes_of<A>(p, cut));
  Scores<A> scores;
  scores.score = static_cast<A*>(workspace);
  scores.top = scores.score + p.batch * p.heads * p.keys;
  scores.sum = scores.top + p.batch * p.heads * cut.runs;
  const int64_t blocks = p.batch * p.kv_heads * cut.head_parts * cut.runs;
  if (p.heads > 0)
    launch(score_run<T>, dim3(unsigned(blocks)), dim3(kThreads),
           size_t(cut.heads * cut.width) * sizeof(A), stream)(p, cut, scores);
  const int64_t columns = (p.keys + kCombineThreads - 1) / kCombineThreads;
  launch(sum_heads<A>, dim3(unsigned(p.batch * columns)), dim3(kCombineThreads),
         size_t(2 * p.heads) * sizeof(A), stream)(p, cut.runs, scores);
  return launch_status();
}

}  // namespace
}  // namespace sra

int64_t sra_cuda_attention_mass_workspace(const sra_attention_mass* params) {
  using namespace sra;
  int64_t bytes = 0;
  for_dtype(params->dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    bytes = bytes_of<acc_t<T>>(*params, cut_of<T>(*params));
    return SRA_OK;
  });
  return bytes;
}

int sra_cuda_attention_mass_forward(const sra_attention_mass* params, void* workspace,
                                    void* stream) {
  return sra::for_dtype(params->dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return sra::forward<T>(*params, workspace, stream);
  });
}
