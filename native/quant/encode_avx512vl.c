/* Encoders for x86 with AVX-512: registers of 256 bits as for AVX2, but twice as many of them, and masks. A tenth
 * (IQ4_XS) to two thirds (Q8_0) less time; with 512 bits, groups of 16 would be needed where super-blocks have 8. */
#if defined(__x86_64__) || defined(__i386__)
#define ENCODERS dg_encoders_avx512vl
#include "quant/encode_table.h"
#endif
