/* Encoders for every machine that the compiler's own flags allow. */
#define ENCODERS dg_encoders_baseline
#include "quant/encode_table.h"
