// span_kl on a GPU: KL of two rows of logits, value and gradient in one launch.
//
// A block takes a pair of rows: a first sweep for the sums, a second for the divergence and for
// forward KL its gradient, a third for the gradient of the others. What the first sweep reads stays
// on chip as far as there is room; the rest of the row comes again from the L2 cache. Where there
// are fewer rows than multiprocessors, blocks share a row, and each sweep is a launch.

#include "span_kl_row.h"

#include <algorithm>

namespace sra {
namespace {

// The registers of a multiprocessor hold what this many threads need: three blocks, or one of a row
// that takes most of the memory on chip.
template <class A>
constexpr int kMostThreads = sizeof(A) == 4 ? 768 : 384;
constexpr int kBlocks = 3;
constexpr int kTilesPerThread = 4;         // of a small row, rather than more threads
constexpr int64_t kEntriesPerPart = 4096;  // fewer do not pay for the launches
constexpr int kMostParts = 64;             // one thread takes one, when they are put together
constexpr int64_t kReservedShared = 2048;  // of a block: sums of its warps, and the system's part

template <class A, int kDirection>
__global__ void __launch_bounds__(kMostThreads<A>, 1) span_kl_rows(const Call<A> call, int steps) {
  const int64_t row = blockIdx.x / call.splits;
  RowPair<A, kDirection>(call, row, int(blockIdx.x) - int(row) * call.splits).run(steps);
}

int attribute(cudaDeviceAttr name) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) == cudaSuccess) cudaDeviceGetAttribute(&value, name, device);
  return value;
}

// Blocks that share a row, where there are not rows enough.
int splits(const sra_span_kl& p) {
  const int64_t multiprocessors = attribute(cudaDevAttrMultiProcessorCount);
  if (p.rows == 0 || p.rows > multiprocessors) return 1;
  const int64_t entries = std::max(p.student_entries, p.teacher_entries);
  const int64_t parts = std::min(kBlocks * multiprocessors / p.rows, entries / kEntriesPerPart);
  return int(std::clamp<int64_t>(parts, 1, kMostParts));
}

template <class A>
int64_t workspace_bytes(const sra_span_kl& p) {
  const int64_t parts = splits(p);
  return parts == 1 ? 0 : p.rows * parts * int64_t(sizeof(Moments<A>) + sizeof(Sums<A>));
}

bool aligned(const void* rows, int32_t dtype, int64_t stride) {
  return reinterpret_cast<uintptr_t>(rows) % 16 == 0 && stride * bytes_of(dtype) % 16 == 0;
}

template <class A>
Finish<A> finish_of(double scale, double cap, double temperature) {
  if (cap == 0) return {A(scale / temperature), 0, false};
  return {A(scale / cap), A(cap / temperature), true};
}

template <class A>
Call<A> call_of(const sra_span_kl& p, const int32_t* partner, const uint8_t* shared_teacher,
                void* workspace) {
  Call<A> call{};
  call.p = p;
  call.partner = partner;
  call.shared_teacher = shared_teacher;
  call.student = finish_of<A>(p.student_scale, p.student_softcap, p.temperature);
  call.teacher = finish_of<A>(p.teacher_scale, p.teacher_softcap, p.temperature);
  call.per_logit = A(p.student_scale / p.temperature);
  call.teacher_vectors = aligned(p.teacher, p.teacher_dtype, p.teacher_stride);
  call.vectors = aligned(p.student, p.student_dtype, p.student_stride) &&
                 (partner ? aligned(partner, SRA_F32, 0) : call.teacher_vectors) &&
                 (!p.grad || aligned(p.grad, p.grad_dtype, p.grad_stride));
  call.splits = splits(p);
  call.moments = static_cast<Moments<A>*>(workspace);
  call.sums = reinterpret_cast<Sums<A>*>(call.moments + p.rows * call.splits);
  return call;
}

template <class A, int kDirection>
int run(Call<A> call, void* stream) {
  const sra_span_kl& p = call.p;
  const auto kernel = span_kl_rows<A, kDirection>;
  int threads = kMostParts;
  while (2 * threads <= kMostThreads<A> / kBlocks &&
         threads * kHeld<A> * kTilesPerThread < p.student_entries / call.splits)
    threads *= 2;

  const dim3 grid(unsigned(p.rows * call.splits));
  if (call.splits > 1) {
    const auto step = [&](Step which, dim3 blocks) {
      launch(kernel, blocks, threads, 0, stream)(call, which);
    };
    step(kRead, grid);
    const bool slopes = kDirection != SRA_FORWARD && (p.grad || p.stats);
    if (p.kl || slopes || p.grad) step(kCompare, grid);
    if (p.kl || p.mass || p.stats || slopes) step(kFinish, grid);
    return launch_status();
  }

  int64_t bytes = 0;
  if (!p.known) {
    // What a second sweep would read again: both rows, and a bit for each entry of the table.
    constexpr int kHold = kHeld<A>;
    const int64_t held = kHold * (bytes_of(p.student_dtype) + bytes_of(p.teacher_dtype)) + 1;
    const int64_t room = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - kReservedShared;
    if (p.student_entries / kHold * held > room / kBlocks) threads = kMostThreads<A>;
    const int64_t tiles = (p.student_entries + threads * kHold - 1) / (threads * kHold);
    call.staged = int(std::min(tiles, room / (threads * held)) * threads * kHold);
    bytes = call.staged / kHold * held;
    // All that there is, not `bytes`: another thread may be about to launch a longer row.
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(room));
  }
  launch(kernel, grid, threads, size_t(bytes), stream)(call, kRead | kCompare | kFinish);
  return launch_status();
}

template <class A>
int run(const Call<A>& call, void* stream) {
  switch (call.p.direction) {
    case SRA_FORWARD: return run<A, SRA_FORWARD>(call, stream);
    case SRA_REVERSE: return run<A, SRA_REVERSE>(call, stream);
    default: return run<A, SRA_JSD>(call, stream);
  }
}

bool bad_dtype(int32_t dtype) { return dtype < SRA_F32 || dtype > SRA_F64; }

}  // namespace
}  // namespace sra

int64_t sra_cuda_span_kl_workspace(const sra_span_kl* p) {
  return p->student_dtype == SRA_F64 ? sra::workspace_bytes<double>(*p)
                                     : sra::workspace_bytes<float>(*p);
}

int sra_cuda_span_kl_forward(const sra_span_kl* params, const int32_t* partner,
                             const uint8_t* shared_teacher, void* workspace, void* stream) {
  using namespace sra;
  const sra_span_kl& p = *params;
  const bool wide = p.student_dtype == SRA_F64;
  if (bad_dtype(p.student_dtype) || bad_dtype(p.teacher_dtype)) return SRA_BAD_DTYPE;
  if (p.grad && (bad_dtype(p.grad_dtype) || wide != (p.grad_dtype == SRA_F64)))
    return SRA_BAD_DTYPE;
  if (p.rows == 0) return SRA_OK;
  begin_workspace(workspace, sra_cuda_span_kl_workspace(params));
  return wide ? run(call_of<double>(p, partner, shared_teacher, workspace), stream)
              : run(call_of<float>(p, partner, shared_teacher, workspace), stream);
}
