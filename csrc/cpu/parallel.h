// Work over threads: how many, which part is whose, and the loop that runs them.
#ifndef SRA_CPU_PARALLEL_H
#define SRA_CPU_PARALLEL_H

#include <algorithm>
#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace sra {

// As many threads as the work feeds, at most `wanted`: waking one costs about 10 us.
inline int threads_for(int64_t work, int64_t work_per_thread, int32_t wanted) {
#if defined(_OPENMP)
  return int(std::max<int64_t>(1, std::min<int64_t>(wanted, work / work_per_thread)));
#else
  (void)work, (void)work_per_thread, (void)wanted;
  return 1;
#endif
}

// Where part i of n things begins, when they are cut into `count` even parts.
inline int64_t part(int64_t n, int64_t i, int64_t count) {
  return n / count * i + std::min(i, n % count);
}

// run(i, n) on each of n threads. Which thread does what must not show in the result.
template <class Run>
void parallel(int threads, const Run& run) {
#if defined(_OPENMP)
#pragma omp parallel num_threads(threads)
  run(omp_get_thread_num(), omp_get_num_threads());
#else
  (void)threads;
  run(0, 1);
#endif
}

// run(i) for i in 0..n, one at a time to whichever thread is free: for parts of uneven size.
template <class Run>
void parallel_each(int threads, int64_t n, const Run& run) {
#if defined(_OPENMP)
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
#else
  (void)threads;
#endif
  for (int64_t i = 0; i < n; ++i) run(i);
}

}  // namespace sra
#endif
