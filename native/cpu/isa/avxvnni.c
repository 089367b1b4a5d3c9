#if defined(__x86_64__)
#include "cpu/isa/simd_avx2.h"
#define DG_KERNELS dg_cpu_kernels_avxvnni
#define DG_KERNELS_NAME "avxvnni"
#include "cpu/kernels/body.h"
#endif
