/* The encoders, compiled once for each instruction set. All give the same bytes. */
#ifndef DG_QUANT_ENCODE_H
#define DG_QUANT_ENCODE_H

#include "dgemma.h"
#include "quant/blocks.h"

#define DG_N_TYPES (DG_TYPE_NVFP4 + 1)

/* Indexed by dg_type; NULL for types that are only read. */
extern const dg_encode dg_encoders_baseline[DG_N_TYPES];
#if defined(__x86_64__) || defined(__i386__)
extern const dg_encode dg_encoders_avx2[DG_N_TYPES];
extern const dg_encode dg_encoders_avx512vl[DG_N_TYPES];
#endif

#endif
