#include "sra_kernels.h"

int sra_kernels_abi(void) { return SRA_KERNELS_ABI; }
