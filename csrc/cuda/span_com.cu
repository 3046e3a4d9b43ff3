// span_com on a GPU: a ragged weighted mean of rows, forward and backward, in a fixed order.
//
// A group of lanes owns a span and walks along its columns, 16 bytes a lane. A span of more than
// kPiece rows is cut at the multiples of kPiece, the pieces are summed as if they were spans, and
// a second kernel puts their centres together. Backward gathers: the spans over a row are
// neighbours in the table, because neither column of it decreases.

#include "span_com_rows.h"

#include <algorithm>
#include <type_traits>

namespace sra {
namespace {

constexpr int kThreads = 128;
constexpr int64_t kPiece = 64;
constexpr int64_t kWarpsToFill = 4096;  // fewer, and the columns of a row are shared out too

// --- forward ---

// Pieces of long spans. A chunk is kPiece rows; slot 2c holds the part of chunk c of a long span
// that began before it, slot 2c + 1 that of one that begins in it. Of spans that do not overlap
// there is at most one of each, because none fits into a chunk: so the slots need no plan. A long
// span that overlaps the one before it has none, and is summed like a short one.
template <class A>
struct Pieces {
  A* com;          // [2 * chunks, dim]
  A* mass;         // [2 * chunks]
  int64_t* heads;  // [chunks] the long span that begins in a chunk, or -1
  int64_t chunks;  // 0: no span can be long
};

template <class T, class A>
__device__ __forceinline__ bool in_pieces(const Inputs<T>& in, const Pieces<A>& pieces, int64_t s,
                                          Span span) {
  return pieces.chunks && span.length() > kPiece &&
         (s == 0 || in.spans[2 * s - 1] <= span.begin);
}

// The first span that ends after row t.
template <class T>
__device__ __forceinline__ int64_t first_over(const Inputs<T>& in, int64_t t) {
  int64_t low = 0, high = in.count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (in.spans[2 * middle + 1] > t) high = middle;
    else low = middle + 1;
  }
  return low;
}

// com and mass of each span of at least `least` rows: short ones to com, pieces of long ones to
// their slots. The slots come first: they are the most work.
template <class T, class O, int V>
__global__ void __launch_bounds__(kThreads)
    sum_spans(Inputs<T> in, Pieces<acc_t<T>> pieces, O* com, acc_t<T>* mass, int64_t least,
              int lanes) {
  using A = acc_t<T>;
  const int lane = int(threadIdx.x) % lanes;
  const int64_t item = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / lanes;
  const int64_t s = item - 2 * pieces.chunks;
  const bool piece = s < 0;
  if (s >= in.count) return;
  Span span = bad_span();
  if (piece) {
    const int64_t chunk = item / 2, begin = chunk * kPiece;
    const bool head = item % 2;
    // A long span that begins in the chunk is the first to end after its last row, because it is
    // disjoint from the one before it.
    const int64_t owner = first_over(in, head ? begin + kPiece - 1 : begin);
    if (owner < in.count) span = span_at(in, owner);
    const bool here = head == (span.begin >= begin) && span.begin < begin + kPiece &&
                      in_pieces(in, pieces, owner, span);
    if (lane == 0 && blockIdx.y == 0) {
      if (head) pieces.heads[chunk] = here ? owner : -1;
      // Of an unsorted table, combine_pieces may read a slot that nobody fills.
      if (!here) pieces.mass[item] = A(NAN);
    }
    if (!here) return;
    span = {max(span.begin, begin), min(span.end, begin + kPiece)};
  } else {
    span = span_at(in, s);
    if (!span.bad() && span.length() < least) return;
    // NaN until combine_pieces writes it, which it does not where the table is not sorted.
    if (in_pieces(in, pieces, s, span)) span = bad_span();
  }

  const A total = mass_of(in, span);
  A* const total_to = piece ? pieces.mass + item : mass ? mass + s : nullptr;
  if (total_to && lane == 0 && blockIdx.y == 0) *total_to = total;
  const Shares<A> share(in, span, total);
  for_columns<V>(in.dim, lane, lanes, [&](const auto& column) {
    A sum[kAccesses<V>][V];
#pragma unroll
    for (int u = 0; u < kAccesses<V>; ++u)
#pragma unroll
      for (int i = 0; i < V; ++i) sum[u][i] = span.bad() ? total : A(0);
#pragma unroll 2
    for (int64_t t = span.begin; t < span.end; ++t)
      add_row<V>(sum, share(t), in.hidden + t * in.stride, in.dim, column);
    if (piece) store_row<V>(pieces.com + item * in.dim, sum, in.dim, column);
    else store_row<V>(com + s * in.dim, sum, in.dim, column);
  });
}

// One block, or gridDim.y of them, for the long span that begins in each chunk.
template <class T, class O, int V>
__global__ void __launch_bounds__(kThreads)
    combine_pieces(Inputs<T> in, Pieces<acc_t<T>> pieces, O* com, acc_t<T>* mass) {
  using A = acc_t<T>;
  const int64_t chunk = blockIdx.x, s = pieces.heads[chunk];
  if (s < 0) return;
  const Span span = span_at(in, s);
  const int64_t last = (span.end - 1) / kPiece;
  const auto slot = [=](int64_t c) { return c == chunk ? 2 * c + 1 : 2 * c; };
  const auto rows = [=](int64_t c) {
    return min(span.end, (c + 1) * kPiece) - max(span.begin, c * kPiece);
  };
  A total = 0;
  for (int64_t c = chunk; c <= last; ++c) total += pieces.mass[slot(c)];
  if (mass && threadIdx.x == 0 && blockIdx.y == 0) mass[s] = total;
  for_columns<V>(in.dim, int(threadIdx.x), kThreads, [&](const auto& column) {
    A sum[kAccesses<V>][V] = {};
    for (int64_t c = chunk; c <= last; ++c) {
      // A piece of zero mass holds its plain mean, which counts if all the others do.
      const A share = total == 0 ? A(rows(c)) / A(span.length()) : pieces.mass[slot(c)] / total;
      add_row<V>(sum, share, pieces.com + slot(c) * in.dim, in.dim, column);
    }
    store_row<V>(com + s * in.dim, sum, in.dim, column);
  });
}

// --- backward ---

// The first span that ends after row t, found by a whole warp: each round looks at 32 of them.
template <class T>
__device__ __forceinline__ int64_t first_over_by_warp(const Inputs<T>& in, int64_t t, int lane) {
  int64_t low = 0, high = in.count;
  while (low < high) {
    const int64_t step = (high - low + kWarp - 1) / kWarp;
    const int64_t probe = low + (lane + 1) * step - 1;
    const bool before = probe < high && in.spans[2 * probe + 1] <= t;
    low += __popc(__ballot_sync(kAllLanes, before)) * step;
    high = min(high, low + step - 1);
  }
  return low;
}

struct Range {
  int64_t first, last;
};
template <class T>
__device__ __forceinline__ Range spans_over(const Inputs<T>& in, int64_t t, int lane) {
  const int64_t first = first_over_by_warp(in, t, lane);
  int64_t last = first;
  while (last < in.count && in.spans[2 * last] <= t) ++last;
  return {first, last};
}

// A warp for each row: grad_hidden[t] = sum of share * grad_com over the spans that cover t.
template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    gather_rows(Inputs<T> in, const acc_t<T>* mass, const T* grad_com, T* grad_hidden) {
  using A = acc_t<T>;
  const int lane = int(threadIdx.x) % kWarp;
  const int64_t t = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / kWarp;
  if (t >= in.tokens) return;
  const Range over = spans_over(in, t, lane);
  const auto share = [&](int64_t s) { return Shares<A>(in, span_at(in, s), mass[s])(t); };
  const bool single = over.last - over.first == 1;
  const A only = single ? share(over.first) : A(0);
  for_columns<V>(in.dim, lane, kWarp, [&](const auto& column) {
    A sum[kAccesses<V>][V] = {};
    for (int64_t s = over.first; s < over.last; ++s)
      add_row<V>(sum, single ? only : share(s), grad_com + s * in.dim, in.dim, column);
    store_row<V>(grad_hidden + t * in.dim, sum, in.dim, column);
  });
}

// A warp for each row: grad_weights[t] = sum of grad_com . (hidden[t] - com) / mass + grad_mass
// over the spans that cover t. In this form, of a difference, little cancels.
template <class T, int V>
__global__ void __launch_bounds__(kThreads, 5)
    weigh_rows(Inputs<T> in, const acc_t<T>* mass, const T* grad_com, const acc_t<T>* grad_mass,
               const acc_t<T>* com, acc_t<T>* grad_weights) {
  using A = acc_t<T>;
  const int lane = int(threadIdx.x) % kWarp;
  const int64_t t = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / kWarp;
  if (t >= in.tokens) return;
  const Range over = spans_over(in, t, lane);
  A sum = 0;
  for (int64_t s = over.first; s < over.last; ++s) {
    sum += grad_mass[s];
    const Span span = span_at(in, s);
    // The plain mean does not depend on the weights, nor does a lone row.
    if (mass[s] == 0 || span.length() == 1) continue;
    A dot = span.bad() ? A(NAN) : A(0);
    for (int d = lane * V; d < in.dim && !span.bad(); d += kWarp * V) {
      A g[V], h[V], c[V];
      load(g, grad_com + s * in.dim + d);
      load(h, in.hidden + t * in.stride + d);
      load(c, com + s * in.dim + d);
#pragma unroll
      for (int i = 0; i < V; ++i) dot += g[i] * (h[i] - c[i]);
    }
    sum += warp_sum(dot) / mass[s];
  }
  if (lane == 0) grad_weights[t] = sum;
}

// --- the host's side ---

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Into how many parts the columns of a row go, so that `warps` of them fill the device.
int64_t splits(int64_t warps, int64_t dim, int64_t tile) {
  return std::clamp(kWarpsToFill / std::max<int64_t>(1, warps), int64_t(1),
                    std::max<int64_t>(1, ceil_div(dim, tile)));
}

int64_t chunks_of(const sra_span_com& p) {
  return p.tokens > kPiece ? ceil_div(p.tokens, kPiece) : 0;
}

template <class T>
Inputs<T> inputs_of(const sra_span_com& p) {
  return {static_cast<const T*>(p.hidden), p.spans, static_cast<const acc_t<T>*>(p.weights),
          p.tokens, p.count, p.hidden_stride, int(p.dim)};
}

// The workspace: centres of all spans (backward, for the weights' gradient), then the pieces.
template <class A>
struct Workspace {
  A* centres;
  Pieces<A> pieces;
  int64_t bytes;

  Workspace(const sra_span_com& p, void* begin) {
    const int64_t chunks = p.com || p.grad_weights ? chunks_of(p) : 0;
    // An even number, and two masses to a chunk: so the heads are aligned to 8.
    const int64_t centres_size = p.grad_weights ? (p.count * p.dim + 1) / 2 * 2 : 0;
    centres = static_cast<A*>(begin);
    pieces.com = centres + centres_size;
    pieces.mass = pieces.com + 2 * chunks * p.dim;
    pieces.heads = reinterpret_cast<int64_t*>(pieces.mass + 2 * chunks);
    pieces.chunks = chunks;
    bytes = reinterpret_cast<char*>(pieces.heads + chunks) - static_cast<char*>(begin);
  }
};

template <class T, class O, int V>
void centres(const sra_span_com& p, const Pieces<acc_t<T>>& pieces, O* com, acc_t<T>* mass,
             int64_t least, void* stream) {
  if (!p.count) return;
  const Inputs<T> in = inputs_of<T>(p);
  constexpr int kLaneColumns = V * kAccesses<V>;
  int lanes = 1;
  while (lanes < kWarp && lanes * kLaneColumns < p.dim) lanes *= 2;
  const int64_t threads = (p.count + 2 * pieces.chunks) * lanes;
  const dim3 grid(unsigned(ceil_div(threads, kThreads)),
                  unsigned(splits(threads / kWarp, p.dim, lanes * kLaneColumns)));
  launch(sum_spans<T, O, V>, grid, kThreads, 0, stream)(in, pieces, com, mass, least, lanes);
  if (!pieces.chunks) return;
  const dim3 combine(unsigned(pieces.chunks),
                     unsigned(splits(0, p.dim, kThreads * kLaneColumns)));
  launch(combine_pieces<T, O, V>, combine, kThreads, 0, stream)(in, pieces, com, mass);
}

template <class T, int V>
void backward(const sra_span_com& p, const Workspace<acc_t<T>>& workspace, void* stream) {
  using A = acc_t<T>;
  if (!p.tokens) return;
  const Inputs<T> in = inputs_of<T>(p);
  const A* mass = static_cast<const A*>(p.mass);
  const T* grad_com = static_cast<const T*>(p.grad_com);
  const unsigned blocks = unsigned(ceil_div(p.tokens * kWarp, kThreads));
  if (p.grad_hidden) {
    const dim3 grid(blocks, unsigned(splits(p.tokens, p.dim, kWarp * V * kAccesses<V>)));
    launch(gather_rows<T, V>, grid, kThreads, 0, stream)(in, mass, grad_com,
                                                         static_cast<T*>(p.grad_hidden));
  }
  if (p.grad_weights) {
    centres<T, A, V>(p, workspace.pieces, workspace.centres, nullptr, 2, stream);
    launch(weigh_rows<T, V>, blocks, kThreads, 0, stream)(
        in, mass, grad_com, static_cast<const A*>(p.grad_mass), workspace.centres,
        static_cast<A*>(p.grad_weights));
  }
}

// run(number of columns in an access), as a constant.
template <class T, class Run>
void for_width(bool aligned, const Run& run) {
  if (aligned) run(std::integral_constant<int, kVector<T>>());
  else run(std::integral_constant<int, 1>());
}

}  // namespace
}  // namespace sra

int64_t sra_cuda_span_com_workspace(const sra_span_com* p) {
  using namespace sra;
  return p->dtype == SRA_F64 ? Workspace<double>(*p, nullptr).bytes
                             : Workspace<float>(*p, nullptr).bytes;
}

int sra_cuda_span_com_forward(const sra_span_com* p, void* workspace, void* stream) {
  using namespace sra;
  begin_workspace(workspace, sra_cuda_span_com_workspace(p));
  return for_dtype(p->dtype, [=](auto type) {
    using T = typename decltype(type)::type;
    const bool aligned = rows_are_aligned<T>(p->hidden, p->dim, p->hidden_stride) &&
                         rows_are_aligned<T>(p->com, p->dim, p->dim);
    for_width<T>(aligned, [=](auto width) {
      const Workspace<acc_t<T>> space(*p, workspace);
      centres<T, T, width()>(*p, space.pieces, static_cast<T*>(p->com),
                             static_cast<acc_t<T>*>(p->mass), 0, stream);
    });
    return launch_status();
  });
}

int sra_cuda_span_com_backward(const sra_span_com* p, void* workspace, void* stream) {
  using namespace sra;
  begin_workspace(workspace, sra_cuda_span_com_workspace(p));
  return for_dtype(p->dtype, [=](auto type) {
    using T = typename decltype(type)::type;
    const bool aligned = rows_are_aligned<T>(p->grad_com, p->dim, p->dim) &&
                         rows_are_aligned<T>(p->grad_hidden, p->dim, p->dim) &&
                         rows_are_aligned<T>(p->hidden, p->dim, p->hidden_stride);
    for_width<T>(aligned, [=](auto width) {
      backward<T, width()>(*p, Workspace<acc_t<T>>(*p, workspace), stream);
    });
    return launch_status();
  });
}
