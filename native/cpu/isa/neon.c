#if defined(__aarch64__)
#include "cpu/isa/simd_neon.h"
#define DG_KERNELS dg_cpu_kernels_neon
#define DG_KERNELS_NAME "neon"
#include "cpu/kernels/body.h"
#endif
