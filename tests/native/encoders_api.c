/* The encoders of one instruction set, whatever this machine would choose, for tests. */
#include "quant/encode.h"

__attribute__((visibility("default"))) const dg_encode *test_encoders(bool wide);

/* Indexed by dg_type. NULL for `wide` where this machine has no such encoders. */
const dg_encode *test_encoders(bool wide) {
    if (!wide) return dg_encoders_baseline;
#if defined(__x86_64__) || defined(__i386__)
    if (dg_encoder_of(DG_TYPE_Q4_0) == dg_encoders_avx2[DG_TYPE_Q4_0]) return dg_encoders_avx2;
#endif
    return NULL;
}
