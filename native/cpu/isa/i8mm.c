#if defined(__aarch64__)
#include "cpu/isa/simd_neon.h"
#define DG_KERNELS dg_cpu_kernels_i8mm
#define DG_KERNELS_NAME "i8mm"
#include "cpu/kernels/body.h"
#endif
