#if defined(__aarch64__)
#include "cpu/simd_neon.h"
#define DG_KERNELS dg_cpu_kernels_i8mm
#define DG_KERNELS_NAME "i8mm"
#include "cpu/body.h"
#endif
