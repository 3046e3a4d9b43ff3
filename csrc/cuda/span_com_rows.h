// What both directions of span_com share: inputs, a span and its mass, the columns of a row.
#ifndef SRA_CUDA_SPAN_COM_ROWS_H
#define SRA_CUDA_SPAN_COM_ROWS_H

#include "device.h"

#include <algorithm>
#include <cmath>

namespace sra {

// V columns that lie side by side are one access; a lane has this many of them in flight.
template <int V>
constexpr int kAccesses = std::min(4, 16 / V);

template <class T>
struct Inputs {
  const T* hidden;
  const int64_t* spans;
  const acc_t<T>* weights;  // or null
  int64_t tokens, count, stride;
  int dim;
};

struct Span {
  int64_t begin, end;
  __device__ int64_t length() const { return end - begin; }
  __device__ bool bad() const { return end < begin; }
};
__device__ __forceinline__ Span bad_span() { return {0, -1}; }

// A bad one where it is out of range, reversed, or decreases: nothing is read then.
template <class T>
__device__ __forceinline__ Span span_at(const Inputs<T>& in, int64_t s) {
  const Span span = {in.spans[2 * s], in.spans[2 * s + 1]};
  const Span before = s ? Span{in.spans[2 * s - 2], in.spans[2 * s - 1]} : Span{0, 0};
  const bool good = before.begin <= span.begin && before.end <= span.end && 0 <= span.begin &&
                    span.begin <= span.end && span.end <= in.tokens;
  return good ? span : bad_span();
}

// NaN where a weight is NaN, infinite or negative.
template <class T>
__device__ __forceinline__ acc_t<T> mass_of(const Inputs<T>& in, Span span) {
  using A = acc_t<T>;
  if (span.bad()) return A(NAN);
  if (!in.weights) return A(span.length());
  A mass = 0;
  for (int64_t t = span.begin; t < span.end; ++t) {
    const A w = in.weights[t];
    mass += w >= 0 && w < A(INFINITY) ? w : A(NAN);
  }
  return mass;
}

// The share of each row in a span. One of zero mass falls back to its plain mean.
template <class A>
struct Shares {
  const A* weights;
  A mass;
  template <class T>
  __device__ __forceinline__ Shares(const Inputs<T>& in, Span span, A mass)
      : weights(mass == 0 ? nullptr : in.weights), mass(mass == 0 ? A(span.length()) : mass) {}
  __device__ __forceinline__ A operator()(int64_t t) const {
    return (weights ? weights[t] : A(1)) / mass;
  }
};

// This lane's columns of a row, tile by tile: visit(columns, valid) for every tile of this block.
template <int V, class Visit>
__device__ __forceinline__ void for_columns(int dim, int lane, int lanes, const Visit& visit) {
  const int tile = kAccesses<V> * V * lanes;
  for (int first = int(blockIdx.y) * tile; first < dim; first += int(gridDim.y) * tile)
    visit([=](int u) { return first + (u * lanes + lane) * V; });
}

// sum += share * row, for one row of a tile.
template <int V, class T, class Column>
__device__ __forceinline__ void add_row(acc_t<T> (&sum)[kAccesses<V>][V], acc_t<T> share,
                                        const T* row, int dim, const Column& column) {
#pragma unroll
  for (int u = 0; u < kAccesses<V>; ++u) {
    if (column(u) >= dim) continue;
    acc_t<T> x[V];
    load(x, row + column(u));
#pragma unroll
    for (int i = 0; i < V; ++i) sum[u][i] += share * x[i];
  }
}
template <int V, class O, class Column>
__device__ __forceinline__ void store_row(O* row, const acc_t<O> (&sum)[kAccesses<V>][V],
                                          int dim, const Column& column) {
#pragma unroll
  for (int u = 0; u < kAccesses<V>; ++u)
    if (column(u) < dim) store(row + column(u), sum[u]);
}

}  // namespace sra
#endif
