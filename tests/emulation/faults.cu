// Faults for the emulator to find: `faults NAME` runs a kernel that has one, `faults NAME mended`
// the same kernel without. Prints the launch's error, or whether the result is right.

#include "../../csrc/cuda/device.h"

#include <cstdio>
#include <cstring>
#include <vector>

namespace sra {
namespace {

constexpr int kThreads = 64;
constexpr int kHalf = kThreads / 2;

struct Arguments {
  const float* in;   // [kThreads]
  float* out;        // [kThreads], which should be `in` in reverse
  float* workspace;  // [kThreads]
};

__device__ int me() { return int(threadIdx.x); }
__device__ int partner() { return kThreads - 1 - me(); }

template <bool kMended>
__global__ void missing_barrier(Arguments a) {
  SHARED(float, row, kThreads);
  row[me()] = a.in[me()];
  if (kMended) __syncthreads();
  a.out[me()] = row[partner()];
}

template <bool kMended>
__global__ void read_out_of_bounds(Arguments a) {
  const int shift = kMended ? 0 : 1;
  a.out[me()] = a.in[partner() + shift];
}

template <bool kMended>
__global__ void write_out_of_bounds(Arguments a) {
  const int shift = kMended ? 0 : 1;
  a.out[partner() + shift] = a.in[me()];
}

template <bool kMended>
__global__ void shared_out_of_bounds(Arguments a) {
  SHARED(float, row, kThreads);
  row[me()] = a.in[me()];
  if (!kMended && me() == 0) row[kThreads] = 0;
  __syncthreads();
  a.out[me()] = row[partner()];
}

template <bool kMended>
__global__ void dynamic_shared_out_of_bounds(Arguments a) {
  DYNAMIC_SHARED(float, row);  // kThreads of them
  row[me()] = a.in[me()];
  if (!kMended && me() == 0) row[kThreads] = 0;
  __syncthreads();
  a.out[me()] = row[partner()];
}

template <bool kMended>
__global__ void shared_not_written(Arguments a) {
  SHARED(float, row, kThreads);
  if (kMended) row[me()] = 0;
  __syncthreads();
  a.out[me()] = a.in[partner()] + row[partner()];
}

template <bool kMended>
__global__ void workspace_not_written(Arguments a) {
  if (kMended) a.workspace[me()] = 0;
  a.out[me()] = a.in[partner()] + a.workspace[me()];
}

template <bool kMended>
__global__ void output_not_written(Arguments a) {
  if (kMended || me() != 7) a.out[me()] = a.in[partner()];
}

template <bool kMended>
__global__ void barrier_for_some(Arguments a) {
  SHARED(float, row, kThreads);
  row[me()] = a.in[me()];
  if (!kMended && me() >= kHalf) return;
  __syncthreads();
  a.out[me()] = row[partner()];
}

template <bool kMended>
__global__ void two_barriers(Arguments a) {
  SHARED(float, row, kThreads);
  row[me()] = a.in[me()];
  if (!kMended && me() >= kHalf)
    __syncthreads();
  else
    __syncthreads();
  if (kMended) __syncthreads();
  a.out[me()] = row[partner()];
}

template <bool kMended>
__global__ void lane_missing(Arguments a) {
  float x = a.in[partner()];
  if (kMended || me() != 5) x = __shfl_sync(kAllLanes, x, me());
  a.out[me()] = x;
}

template <bool kMended>
__global__ void lane_outside_the_mask(Arguments a) {
  float x = a.in[partner()];
  const int lane = me() % kWarp, source = kMended || lane != 3 ? lane : 5;
  if (lane < 4) x = __shfl_sync(0xfu, x, source);
  a.out[me()] = x;
}

template <bool kMended>
__global__ void lanes_disagree(Arguments a) {
  float x = a.in[partner()];
  if (!kMended && me() % 2) x += __any_sync(kAllLanes, 0);
  else x = __shfl_sync(kAllLanes, x, me());
  a.out[me()] = x;
}

struct Fault {
  const char* name;
  void (*planted)(Arguments);
  void (*mended)(Arguments);
};
#define FAULT(name) {#name, name<false>, name<true>}
const Fault kFaults[] = {
    FAULT(missing_barrier),       FAULT(read_out_of_bounds),
    FAULT(write_out_of_bounds),   FAULT(shared_out_of_bounds),
    FAULT(dynamic_shared_out_of_bounds), FAULT(shared_not_written),
    FAULT(workspace_not_written), FAULT(output_not_written),
    FAULT(barrier_for_some),      FAULT(two_barriers),
    FAULT(lane_missing),          FAULT(lane_outside_the_mask),
    FAULT(lanes_disagree),
};
#undef FAULT

int run(void (*kernel)(Arguments), dim3 grid, size_t shared_bytes) {
  std::vector<float> in(kThreads), out(kThreads), workspace(kThreads);
  for (int i = 0; i < kThreads; ++i) in[i] = float(i);
  begin_workspace(out.data(), int64_t(out.size() * sizeof(float)));
  begin_workspace(workspace.data(), int64_t(workspace.size() * sizeof(float)));
  launch(kernel, grid, kThreads, shared_bytes, nullptr)({in.data(), out.data(), workspace.data()});
  if (const cudaError_t error = cudaGetLastError()) {
    std::printf("error: %s\n", cudaGetErrorString(error));
    return 0;
  }
  bool right = true;
  for (int i = 0; i < kThreads; ++i) right &= out[i] == in[kThreads - 1 - i];
  std::puts(right ? "right" : "wrong");
  return 0;
}

}  // namespace
}  // namespace sra

int main(int, char** arguments) {
  using namespace sra;
  const bool mended = arguments[2] && !std::strcmp(arguments[2], "mended");
  constexpr size_t kRow = kThreads * sizeof(float), kMuch = size_t(64) << 10;
  for (const Fault& fault : kFaults)
    if (!std::strcmp(fault.name, arguments[1]))
      return run(mended ? fault.mended : fault.planted, 3, kRow);
  if (!std::strcmp(arguments[1], "empty_grid"))
    return run(missing_barrier<true>, mended ? 1 : 0, 0);
  if (!std::strcmp(arguments[1], "shared_memory_not_asked_for")) {
    const auto kernel = dynamic_shared_out_of_bounds<true>;
    if (mended)
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(kMuch));
    return run(kernel, 1, kMuch);
  }
  return 2;
}
