// span_geometry in CUDA, for samples of few spans: one block a sample, one launch for loss and
// gradient.
//
// The cosines of up to kSpans spans stay in shared memory: the student's above the diagonal, the
// teacher's below it. Then they are weighed in place, and one more product gives the gradient. How
// many spans a sample has, the device alone knows. So the block of a larger one goes through it in
// bands, whose cosines lie in the workspace: right, but no faster than one block is.

#include "geometry_blocks.h"

#include <limits>

namespace sra {
namespace {

template <class A>
constexpr A kSmallest = std::numeric_limits<A>::min();
template <class A>
constexpr A kLargest = std::numeric_limits<A>::max();

// The gradient is saved in the student's type, but in float for float16, whose range is too small
// for that of long vectors. run(T, O): the student's type and that of its gradient.
template <class A, class Run>
__device__ __forceinline__ void for_student(int32_t dtype, const Run& run) {
  if constexpr (sizeof(A) == 8) run(double(), double());
  else if (dtype == SRA_BF16) run(bf16(), bf16());
  else if (dtype == SRA_F16) run(f16(), float());
  else run(float(), float());
}

// Of all spans; a sample has its part of each.
template <class A>
struct Workspace {
  double* numbers;  // [4, spans] scales and inverse lengths
  A* matrices;      // [spans, 2, kBand] a band's cosines
  A* weights;       // [spans]
};

// What a sample without a loss to learn from gets: `value` for its loss and all of its gradient.
template <class A>
__device__ __forceinline__ void give(const sra_span_geometry& p, int64_t b, int64_t first,
                                     int64_t last, A value) {
  if (threadIdx.x == 0) static_cast<A*>(p.loss)[b] = value;
  if (!p.grad) return;
  for_student<A>(p.student_dtype, [&](auto, auto output) {
    using O = decltype(output);
    O* const grad = static_cast<O*>(p.grad);
    for (int64_t i = first * p.student_dim + threadIdx.x; i < last * p.student_dim; i += kThreads)
      grad[i] = narrow<O>(value);
  });
}

// The weights of a sample, relative to its largest so that products cannot underflow, and their sum
// over all pairs: NaN where a weight is none.
template <class A>
__device__ __forceinline__ double weights_of(const A* given, const Spans<A>& spans) {
  A largest = 0;
  for (int64_t i = threadIdx.x; i < spans.n; i += kThreads) {
    const A w = given[i];
    largest = larger(largest, w >= 0 && w <= kLargest<A> ? w : A(INFINITY));
  }
  largest = block_max(largest);
  if (largest > kLargest<A>) return NAN;
  // A difference of squares, to which the largest weights would lend their rounding: they are
  // exactly 1, and counted by themselves.
  int ones = 0;
  double sum = 0, squares = 0;
  for (int64_t i = threadIdx.x; i < spans.n; i += kThreads) {
    const A w = largest == 0 ? A(0) : given[i] / largest;
    spans.weight[i] = w;
    ones += w == 1;
    if (w == 1) continue;
    sum += double(w);
    squares += double(w) * double(w);
  }
  const double one = block_sum(ones);
  sum = block_sum(sum);
  squares = block_sum(squares);
  return one * (one - 1) + 2 * one * sum + (sum * sum - squares);
}

// Spans of weight 0 are not read: their scale says so.
template <class A>
__device__ __forceinline__ void lengths_of(const Spans<A>& spans, const Side& side) {
  for (int64_t i = threadIdx.x / kWarp; i < spans.n; i += kWarps) {
    Length length = {0, 0};
    if (spans.weight[i] > 0) length = length_of_any(side.model, spans.begin + i);
    if (threadIdx.x % kWarp) continue;
    side.scale[i] = length.scale;
    side.inverse[i] = length.inverse;
  }
}

// Member by member: a choice between structs goes through memory.
__device__ __forceinline__ Side either(bool first, const Side& a, const Side& b) {
  return {{first ? a.model.x : b.model.x, first ? a.model.dim : b.model.dim,
           first ? a.model.stride : b.model.stride, first ? a.model.dtype : b.model.dtype,
           first ? a.model.vectors : b.model.vectors},
          first ? a.scale : b.scale,
          first ? a.inverse : b.inverse};
}
template <class A>
__device__ __forceinline__ Matrix<A> either(bool first, const Matrix<A>& a, const Matrix<A>& b) {
  return {first ? a.at : b.at, first ? a.row : b.row, first ? a.column : b.column};
}

template <class A>
__global__ void __launch_bounds__(kThreads)
    geometry(const sra_span_geometry p, const Model student, const Model teacher,
             const bool vectors, const Workspace<A> w) {
  DYNAMIC_SHARED(A, stage);  // [kDepth, kRow], and the cosines of a small sample: [kSpans, kRow]
  A* const small = stage + kDepth * kRow<A>;
  SHARED(double, numbers, 4 * kSpans<A>);
  SHARED(A, weights, kSpans<A>);

  const int64_t b = blockIdx.x;
  const int64_t begin = p.offsets[b], end = p.offsets[b + 1];
  const bool is_first = b == 0, is_last = b == p.samples - 1;
  if (begin < 0 || end < begin || end > p.spans || (is_first && begin != 0) ||
      (is_last && end != p.spans)) {
    // No partition: what would stay unwritten is marked too.
    const int64_t first = is_first ? 0 : max(int64_t(0), begin);
    const int64_t last = is_last ? p.spans : min(p.spans, end);
    return give(p, b, first, last, A(NAN));
  }

  Spans<A> spans;
  spans.begin = begin, spans.n = end - begin;
  const bool fits = spans.n <= kSpans<A>;
  const int64_t band = fits ? kSpans<A> : kBand<A>;
  double* const known = fits ? numbers : w.numbers + begin;
  const int64_t apart = fits ? kSpans<A> : p.spans;
  spans.weight = fits ? weights : w.weights + begin;
  const Side ours = {student, known, known + apart};
  const Side theirs = {teacher, known + 2 * apart, known + 3 * apart};

  const double total = weights_of(static_cast<const A*>(p.weights) + begin, spans);
  if (!(total >= double(kSmallest<A>))) return give(p, b, begin, end, A(total == total ? 0 : NAN));
  __syncthreads();
#pragma unroll 1
  for (int turn = 0; turn < 2; ++turn) lengths_of(spans, either(turn == 0, ours, theirs));
  __syncthreads();

  Cosines<A> cosine;
  A* const matrix = fits ? small : w.matrices + begin * 2 * kBand<A>;
  const int row = fits ? kRow<A> : kBand<A>;  // from one span j to the next
  cosine.half = fits;
  cosine.student = fits ? Matrix<A>{matrix, row, 1} : Matrix<A>{matrix, 1, row};
  cosine.teacher = {fits ? matrix : matrix + spans.n * row, 1, row};
  double squares = 0;
  for (int64_t first = 0; first < spans.n; first += band) {
    const int count = int(min(band, spans.n - first));
    for (int64_t other = 0; other < spans.n; other += band) {
      const Pairs pairs = {first, other, count, int(min(band, spans.n - other)), fits};
#pragma unroll 1
      for (int turn = 0; turn < 2; ++turn)
        cosines(either(turn == 0, ours, theirs), begin, pairs, stage,
                either(turn == 0, cosine.student, cosine.teacher));
    }
    __syncthreads();
    for (int i = int(threadIdx.x) / kWarp; i < count; i += kWarps) {
      A diagonal;
      const double square = weigh(spans, ours.inverse, cosine, first, i, diagonal);
      if (threadIdx.x % kWarp) continue;
      squares += double(spans.weight[first + i]) * square;
      matrix[(first + i) * row + i] = diagonal;
    }
    if (!p.grad) continue;
    __syncthreads();
    pull(spans, ours.inverse, cosine, first, count, matrix, row);
    __syncthreads();
    for_student<A>(p.student_dtype, [&](auto input, auto output) {
      using T = decltype(input);
      using O = decltype(output);
      gradient<T>(spans, ours, 1 / total, first, count, matrix, row, static_cast<O*>(p.grad),
                  vectors);
    });
  }
  squares = block_sum(squares);
  if (threadIdx.x == 0) static_cast<A*>(p.loss)[b] = A(squares / total);
}

template <class A>
int64_t bytes_of(const sra_span_geometry& p) {
  if (p.spans <= kSpans<A>) return 0;
  return p.spans * int64_t(4 * sizeof(double) + (2 * kBand<A> + 1) * sizeof(A));
}

template <class A>
int forward(const sra_span_geometry& p, void* workspace, void* stream) {
  if (p.samples == 0) return SRA_OK;
  begin_workspace(workspace, bytes_of<A>(p));
  Workspace<A> w;
  w.numbers = static_cast<double*>(workspace);
  w.matrices = reinterpret_cast<A*>(w.numbers + 4 * p.spans);
  w.weights = w.matrices + 2 * kBand<A> * p.spans;
  const Model student = model_of(p.student, p.student_dim, p.student_stride, p.student_dtype);
  const Model teacher = model_of(p.teacher, p.teacher_dim, p.teacher_stride, p.teacher_dtype);
  const bool vectors =
      p.student_dim % kColumns == 0 && reinterpret_cast<uintptr_t>(p.grad) % 16 == 0;
  constexpr int kBytes = (kDepth + kSpans<A>) * kRow<A> * int(sizeof(A));
  cudaFuncSetAttribute(geometry<A>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  launch(geometry<A>, dim3(unsigned(p.samples)), dim3(kThreads), kBytes, stream)(
      p, student, teacher, vectors, w);
  return launch_status();
}

}  // namespace
}  // namespace sra

int64_t sra_cuda_span_geometry_workspace(const sra_span_geometry* params) {
  return params->student_dtype == SRA_F64 ? sra::bytes_of<double>(*params)
                                          : sra::bytes_of<float>(*params);
}

int sra_cuda_span_geometry_forward(const sra_span_geometry* params, void* workspace,
                                   void* stream) {
  using namespace sra;
  for (const int32_t dtype : {params->student_dtype, params->teacher_dtype})
    if (dtype < SRA_F32 || dtype > SRA_F64) return SRA_BAD_DTYPE;
  return params->student_dtype == SRA_F64 ? forward<double>(*params, workspace, stream)
                                          : forward<float>(*params, workspace, stream);
}
