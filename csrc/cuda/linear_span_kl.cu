// What linear_span_kl needs beside span_kl's rows: the gradient of a head of which some rows were
// used. Each row of the head is written once, scaled or as zeros, by a table that is made first.

#include "device.h"

namespace sra {
namespace {

constexpr int kThreads = 256;

__global__ void no_rows(int32_t* at, int64_t entries) {
  const int64_t v = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (v < entries) at[v] = -1;
}

__global__ void place_rows(const int64_t* ids, int64_t count, int64_t entries, int32_t* at) {
  const int64_t k = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (k < count && ids[k] >= 0 && ids[k] < entries) at[ids[k]] = int32_t(k);
}

// A block writes a row.
template <class T, class O>
__global__ void __launch_bounds__(kThreads)
    scale_rows(const T* rows, const acc_t<T>* factor, const int32_t* at, int64_t dim, bool vectors,
               O* head) {
  constexpr int kSide = kVector<O> < kVector<T> ? kVector<O> : kVector<T>;
  const int64_t v = blockIdx.x;
  const int32_t k = at[v];
  const acc_t<T> f = factor ? *factor : acc_t<T>(1);
  const T* from = rows + k * dim;
  O* to = head + v * dim;
  const int64_t whole = vectors ? dim : 0;
  for (int64_t i = int64_t(threadIdx.x) * kSide; i < whole; i += int64_t(kThreads) * kSide) {
    acc_t<T> x[kSide] = {};
    if (k >= 0) load(x, from + i);
#pragma unroll
    for (int j = 0; j < kSide; ++j) x[j] *= f;
    store(to + i, x);
  }
  for (int64_t i = whole + threadIdx.x; i < dim; i += kThreads)
    to[i] = narrow<O>(k < 0 ? acc_t<T>(0) : f * widen(from[i]));
}

template <class T, class O>
int restore(const sra_head_rows& p, const void* factor, int32_t* at, void* stream) {
  const auto blocks = [](int64_t n) { return dim3(unsigned((n + kThreads - 1) / kThreads)); };
  if (p.entries == 0 || p.dim == 0) return SRA_OK;
  launch(no_rows, blocks(p.entries), kThreads, 0, stream)(at, p.entries);
  if (p.count)
    launch(place_rows, blocks(p.count), kThreads, 0, stream)(p.ids, p.count, p.entries, at);
  const bool vectors = rows_are_aligned<T>(p.rows, p.dim, p.dim) &&
                       rows_are_aligned<O>(p.head, p.dim, p.dim);
  launch(scale_rows<T, O>, dim3(unsigned(p.entries)), kThreads, 0, stream)(
      static_cast<const T*>(p.rows), static_cast<const acc_t<T>*>(factor), at, p.dim, vectors,
      static_cast<O*>(p.head));
  return launch_status();
}

}  // namespace
}  // namespace sra

// Any kernel tells: all are compiled for the same GPUs.
int sra_cuda_runs(void) {
#if defined(__CUDACC__)
  cudaFuncAttributes attributes;
  cudaFuncGetAttributes(&attributes, sra::no_rows);
#endif
  return sra::launch_status();
}

int64_t sra_cuda_linear_span_kl_workspace(const sra_head_rows* p) {
  return p->entries * int64_t(sizeof(int32_t));
}

int sra_cuda_linear_span_kl_restore(const sra_head_rows* params, const void* factor,
                                    void* workspace, void* stream) {
  using namespace sra;
  const sra_head_rows& p = *params;
  int32_t* at = static_cast<int32_t*>(workspace);
  begin_workspace(workspace, sra_cuda_linear_span_kl_workspace(params));
  const int32_t from = p.rows_dtype, to = p.head_dtype;
  if (from == SRA_F32 && to == SRA_F32) return restore<float, float>(p, factor, at, stream);
  if (from == SRA_F32 && to == SRA_BF16) return restore<float, bf16>(p, factor, at, stream);
  if (from == SRA_F32 && to == SRA_F16) return restore<float, f16>(p, factor, at, stream);
  if (from == SRA_BF16 && to == SRA_BF16) return restore<bf16, bf16>(p, factor, at, stream);
  if (from == SRA_F64 && to == SRA_F64) return restore<double, double>(p, factor, at, stream);
  return SRA_BAD_DTYPE;
}
