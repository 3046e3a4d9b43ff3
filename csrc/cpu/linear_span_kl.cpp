// What linear_span_kl needs beside span_kl's rows: the gradient of a head of which some rows were
// used, put together in one pass. torch needs three (zeros, the factor, a scatter), and each of them
// goes through memory: 47 ms of 900 for a head of 49,152 by 576, one thread.

#include "parallel.h"
#include "sra_kernels.h"
#include "vector.h"

#include <vector>

namespace sra {
namespace {

constexpr int64_t kElementsPerThread = 65536;

template <class T, class O>
ALWAYS_INLINE void scaled_row(const void* from, double factor, int64_t n, void* out) {
  using A = typename accumulator<T>::type;
  const T* x = static_cast<const T*>(from);
  const A f = A(factor);
  write_row(static_cast<O*>(out), n, [=](int64_t i) { return f * load(x[i]); });
}

#define SCALED(NAME, T, O)                                                           \
  CLONES void NAME(const void* from, double factor, int64_t n, void* out) {          \
    scaled_row<T, O>(from, factor, n, out);                                          \
  }
SCALED(f32_to_f32, float, float)
SCALED(f32_to_bf16, float, bf16)
SCALED(f32_to_f16, float, f16)
SCALED(bf16_to_bf16, bf16, bf16)
SCALED(f64_to_f64, double, double)
#undef SCALED

using Scaled = void (*)(const void*, double, int64_t, void*);

Scaled scaled_for(int32_t from, int32_t to) {
  if (from == SRA_F32 && to == SRA_F32) return f32_to_f32;
  if (from == SRA_F32 && to == SRA_BF16) return f32_to_bf16;
  if (from == SRA_F32 && to == SRA_F16) return f32_to_f16;
  if (from == SRA_BF16 && to == SRA_BF16) return bf16_to_bf16;
  if (from == SRA_F64 && to == SRA_F64) return f64_to_f64;
  return nullptr;
}

}  // namespace
}  // namespace sra

int sra_linear_span_kl_restore(const sra_head_rows* params) {
  using namespace sra;
  const sra_head_rows& p = *params;
  const Scaled scaled = scaled_for(p.rows_dtype, p.head_dtype);
  if (!scaled) return SRA_BAD_DTYPE;
  std::vector<int64_t> at(p.entries, -1);  // which of the rows belongs to an entry
  for (int64_t k = 0; k < p.count; ++k) {
    if (p.ids[k] < 0 || p.ids[k] >= p.entries) return SRA_BAD_IDS;
    at[p.ids[k]] = k;
  }
  const int64_t from_bytes = p.dim * kBytes[p.rows_dtype], to_bytes = p.dim * kBytes[p.head_dtype];
  prefer_huge_pages(p.head, p.entries * to_bytes);
  const int threads = threads_for(p.entries * p.dim, kElementsPerThread, p.threads);
  parallel(threads, [&](int64_t i, int64_t n) {
    for (int64_t v = part(p.entries, i, n); v < part(p.entries, i + 1, n); ++v) {
      char* out = static_cast<char*>(p.head) + v * to_bytes;
      if (at[v] < 0) std::memset(out, 0, size_t(to_bytes));
      else scaled(static_cast<const char*>(p.rows) + at[v] * from_bytes, p.factor, p.dim, out);
    }
  });
  return SRA_OK;
}

void sra_prefer_huge_pages(void* begin, int64_t bytes) { sra::prefer_huge_pages(begin, bytes); }
