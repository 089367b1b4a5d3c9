/* Weights to panels. Included by body.h, once for each instruction set.
 *
 * All LANES rows of a vector are decoded at once: sixteen bytes of each are read and transposed, so that word j of
 * every row stands in one vector, and everything after that is the same arithmetic in all lanes. */

/* Where sums have 16 bits, codes of five bits are taken about their middle, and the mins moved by as much. */
#define FIVE_BITS_OFFSET (HAS_SHORT_SUMS ? 16 : 0)

static dg_form form_of(int32_t type) {
    const dg_form q8 = {
        .integer = true, .is_signed = Q8_OFFSET == 0, .is_wide = HAS_WIDE_CODES, .group = 32, .offset = Q8_OFFSET};
    switch (type) {
    case DG_TYPE_Q4_0:
        return (dg_form){.integer = true, .group = 32, .offset = 8};
    case DG_TYPE_Q5_0:
        return (dg_form){.integer = true, .group = 32, .offset = 16};
    case DG_TYPE_Q4_1:
    case DG_TYPE_Q4_K:
        return (dg_form){.integer = true, .has_mins = true, .group = 32};
    case DG_TYPE_Q5_1:
    case DG_TYPE_Q5_K:
        return (dg_form){.integer = true, .has_mins = true, .group = 32, .offset = FIVE_BITS_OFFSET};
    case DG_TYPE_Q8_0:
    case DG_TYPE_IQ4_NL:
    case DG_TYPE_IQ4_XS:
        return q8;
    case DG_TYPE_NVFP4:
        return (dg_form){.integer = true, .group = 16, .offset = 12};
    case DG_TYPE_Q2_K:
        return (dg_form){.integer = true, .has_mins = true, .group = 16};
    case DG_TYPE_Q3_K:
        return (dg_form){.integer = true, .group = 16, .offset = 4};
    case DG_TYPE_Q6_K:
        return (dg_form){.integer = true, .group = 16, .offset = 32};
    default:
        return (dg_form){.integer = false};
    }
}

#include "cpu/kernels/decode/rows.h"

#include "cpu/kernels/decode/blocks.h"

#include "cpu/kernels/decode/super_blocks.h"

/* ---- Any type ------------------------------------------------------------------------------------------------ */

#define FOR_EACH_BLOCK(decode_block, block_size, block_bytes)                                                          \
    for (int64_t c = 0; c < n_cols; c += (block_size), s.p += (block_bytes)) decode_block(s, &t)

/* One vector of an integer panel. */
static void decode_integers(int32_t type, source s, target t, int64_t n_cols) {
    switch (type) {
    case DG_TYPE_Q4_0:
        FOR_EACH_BLOCK(decode_q4_0, 32, sizeof(dg_block_q4_0));
        break;
    case DG_TYPE_Q4_1:
        FOR_EACH_BLOCK(decode_q4_1, 32, sizeof(dg_block_q4_1));
        break;
    case DG_TYPE_Q5_0:
        FOR_EACH_BLOCK(decode_q5_0, 32, sizeof(dg_block_q5_0));
        break;
    case DG_TYPE_Q5_1:
        FOR_EACH_BLOCK(decode_q5_1, 32, sizeof(dg_block_q5_1));
        break;
    case DG_TYPE_Q8_0:
        FOR_EACH_BLOCK(decode_q8_0, 32, sizeof(dg_block_q8_0));
        break;
    case DG_TYPE_IQ4_NL:
        FOR_EACH_BLOCK(decode_iq4_nl, 32, sizeof(dg_block_iq4_nl));
        break;
    case DG_TYPE_IQ4_XS:
        FOR_EACH_BLOCK(decode_iq4_xs, 256, sizeof(dg_block_iq4_xs));
        break;
    case DG_TYPE_NVFP4:
        FOR_EACH_BLOCK(decode_nvfp4, 64, sizeof(dg_block_nvfp4));
        break;
    case DG_TYPE_Q2_K:
        FOR_EACH_BLOCK(decode_q2_k, 256, sizeof(dg_block_q2_k));
        break;
    case DG_TYPE_Q3_K:
        FOR_EACH_BLOCK(decode_q3_k, 256, sizeof(dg_block_q3_k));
        break;
    case DG_TYPE_Q4_K:
        FOR_EACH_BLOCK(decode_q4_k, 256, sizeof(dg_block_q4_k));
        break;
    case DG_TYPE_Q5_K:
        FOR_EACH_BLOCK(decode_q5_k, 256, sizeof(dg_block_q5_k));
        break;
    default:
        FOR_EACH_BLOCK(decode_q6_k, 256, sizeof(dg_block_q6_k));
        break; /* the last of form_of's integer types */
    }
}

/* One vector of a float panel, from rows of 2- or 4-byte floats. */
static void decode_plain_floats(int32_t type, source s, float multiplier, int64_t n_cols, float *values) {
    const vf multipliers = vf_set(multiplier);
    const int bytes = type == DG_TYPE_F32 ? 4 : 2;
    for (int64_t c = 0; c < n_cols; c += 16 / bytes) {
        vi m[4];
        vf columns[8];
        int64_t left = n_cols - c;
        load_rows_part(s, c * bytes, left * bytes, m);
        for (int j = 0; j < 4; j++) {
            if (type == DG_TYPE_F32) {
                columns[j] = vf_from_bits(m[j]);
            } else if (type == DG_TYPE_BF16) {
                columns[2 * j] = vf_from_bits(vi_shift_left(m[j], 16));
                columns[2 * j + 1] = vf_from_bits(vi_and(m[j], vi_set((int32_t)0xffff0000)));
            } else {
                columns[2 * j] = low_half(m[j]);
                columns[2 * j + 1] = high_half(m[j]);
            }
        }
        for (int j = 0; j < 16 / bytes && j < left; j++)
            vf_store(values + (c + j) * PANEL_LANES, vf_mul(columns[j], multipliers));
    }
}

/* One vector of a float panel, from rows of any type, by way of the type's own decoder. */
static void decode_any_floats(int32_t type, source s, float multiplier, int64_t n_cols, float *values) {
    enum { STRIP = 256 }; /* the largest block of any type */
    const dg_type_traits *traits = dg_type_traits_of(type);
    const vf multipliers = vf_set(multiplier);
    float strip[LANES][STRIP];
    memset(strip, 0, sizeof strip);
    for (int64_t c = 0; c < n_cols; c += STRIP) {
        int n = n_cols - c < STRIP ? (int)(n_cols - c) : STRIP;
        for (int i = 0; i < s.n; i++)
            traits->decode(s.p + c / traits->block_size * traits->block_bytes + i * s.stride, strip[i], n);
        for (int j = 0; j < n; j += 4) {
            vi m[4];
            vi_load_rows((const uint8_t *)&strip[0][j], STRIP * sizeof(float), m);
            for (int k = 0; k < 4 && j + k < n; k++)
                vf_store(values + (c + j + k) * PANEL_LANES, vf_mul(vf_from_bits(m[k]), multipliers));
        }
    }
}

static void decode(const dg_weight *weight, int64_t matrix, int64_t first_row, int32_t n_rows, dg_panel *panel) {
    const int64_t row_bytes = (int64_t)dg_row_bytes(weight->type, weight->n_cols);
    const uint8_t *src = (const uint8_t *)weight->data + (uint64_t)matrix * weight->matrix_bytes +
                         first_row * row_bytes + dg_row_bytes(weight->type, panel->first_col);
    const float multiplier = weight->scale != NULL ? weight->scale[matrix] : 1.0f;
    const bool plain = weight->type == DG_TYPE_F32 || weight->type == DG_TYPE_F16 || weight->type == DG_TYPE_BF16;
    for (int v = 0; v < VECTORS; v++) {
        const int first = v * LANES;
        if (first >= n_rows) break;
        const source s = {src + first * row_bytes, row_bytes, n_rows - first < LANES ? n_rows - first : LANES};
        if (panel->form.integer)
            decode_integers(
                weight->type, s,
                (target){panel->codes + first * 4, panel->scales + first, panel->mins + first, vf_set(multiplier)},
                panel->n_cols);
        else if (plain)
            decode_plain_floats(weight->type, s, multiplier, panel->n_cols, panel->values + first);
        else
            decode_any_floats(weight->type, s, multiplier, panel->n_cols, panel->values + first);
    }
#if HAS_ROW_PAIRS
    if (panel->form.integer) pair_codes(panel);
#endif
}
