/* One instruction set's encoders and their table. The including file defines ENCODERS, the table's name. */
#include "quant/encode.h"

#include "quant/encode_blocks.h"
#include "quant/encode_nvfp4.h"
#include "quant/encode_super.h"
/* It needs those above. */
#include "quant/encode_iq.h"

const dg_encode ENCODERS[DG_N_TYPES] = {
    [DG_TYPE_F32] = encode_f32,         [DG_TYPE_F16] = encode_f16,       [DG_TYPE_BF16] = encode_bf16,
    [DG_TYPE_Q4_0] = encode_q4_0,       [DG_TYPE_Q4_1] = encode_q4_1,     [DG_TYPE_Q5_0] = encode_q5_0,
    [DG_TYPE_Q5_1] = encode_q5_1,       [DG_TYPE_Q8_0] = encode_q8_0,     [DG_TYPE_IQ4_NL] = encode_iq4_nl,
    [DG_TYPE_NVFP4] = encode_nvfp4,     [DG_TYPE_Q2_K] = encode_q2_k,     [DG_TYPE_Q3_K] = encode_q3_k,
    [DG_TYPE_Q4_K] = encode_q4_k,       [DG_TYPE_Q5_K] = encode_q5_k,     [DG_TYPE_Q6_K] = encode_q6_k,
    [DG_TYPE_IQ4_XS] = encode_iq4_xs,   [DG_TYPE_IQ2_XS] = encode_iq2_xs, [DG_TYPE_IQ2_S] = encode_iq2_s,
    [DG_TYPE_IQ3_XXS] = encode_iq3_xxs, [DG_TYPE_IQ3_S] = encode_iq3_s,
};
