/* The encoders of one instruction set, whatever this machine would choose, for tests. */
#include "quant/encode.h"
#include "quant/quant.h"

__attribute__((visibility("default"))) const dg_encode *test_encoders(int index);

/* Table `index`, which is indexed by dg_type; NULL behind the last one that this machine can run. */
const dg_encode *test_encoders(int index) {
    if (index == 0) return dg_encoders_baseline;
#if defined(__x86_64__) || defined(__i386__)
    const dg_encode best = dg_encoder_of(DG_TYPE_Q4_0);
    const bool avx512vl = best == dg_encoders_avx512vl[DG_TYPE_Q4_0];
    if (index == 1 && (avx512vl || best == dg_encoders_avx2[DG_TYPE_Q4_0])) return dg_encoders_avx2;
    if (index == 2 && avx512vl) return dg_encoders_avx512vl;
#endif
    return NULL;
}
