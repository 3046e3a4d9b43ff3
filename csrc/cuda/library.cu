#include "launch.h"

int sra_cuda_abi(void) { return SRA_KERNELS_ABI; }

int sra_cuda_emulated(void) {
#if defined(__CUDACC__)
  return 0;
#else
  return 1;
#endif
}

const char* sra_cuda_error(void) { return cudaGetErrorString(sra::last_launch_error()); }
