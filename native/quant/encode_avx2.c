/* Encoders for x86 with AVX2. */
#if defined(__x86_64__) || defined(__i386__)
#define ENCODERS dg_encoders_avx2
#include "quant/encode_table.h"
#endif
