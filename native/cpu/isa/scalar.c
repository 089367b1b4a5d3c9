#include "cpu/isa/simd_scalar.h"
#define DG_KERNELS dg_cpu_kernels_scalar
#define DG_KERNELS_NAME "scalar"
#include "cpu/kernels/body.h"
