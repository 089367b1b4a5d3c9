#if defined(__x86_64__)
#include "cpu/isa/simd_avx512.h"
#define DG_KERNELS dg_cpu_kernels_avx512
#define DG_KERNELS_NAME "avx512"
#include "cpu/kernels/body.h"
#endif
