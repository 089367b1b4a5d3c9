/* Encoders for x86 with AVX-512: registers of 256 bits as for AVX2, but twice as many of them, and masks. A fifth to
 * three fifths faster (docs/types.md); registers of 512 bits would need groups of 16 where super-blocks have 8. */
#if defined(__x86_64__) || defined(__i386__)
#define ENCODERS dg_encoders_avx512vl
#include "quant/encode_table.h"
#endif
