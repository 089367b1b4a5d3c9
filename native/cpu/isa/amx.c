#if defined(DG_HAS_AMX)
#include "cpu/isa/simd_avx512.h"
#define HAS_TILES 1
#define DG_KERNELS dg_cpu_kernels_amx
#define DG_KERNELS_NAME "amx"
#include "cpu/kernels/body.h"
#endif
