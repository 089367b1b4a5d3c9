/* Weights to panels. Included by body.h, once for each instruction set.
 *
 * A strip of STRIP columns of up to LANES rows is decoded row by row, in the order of its columns; then the rows are
 * brought side by side, four bytes (four codes, or one float) at a time. */

#define STRIP 256 /* the largest block of any type */

static dg_form form_of(int32_t type) {
    const dg_form q8 = {.integer = true, .is_signed = Q8_OFFSET == 0, .group = 32, .offset = Q8_OFFSET};
    switch (type) {
    case DG_TYPE_Q4_0: return (dg_form){.integer = true, .group = 32, .offset = 8};
    case DG_TYPE_Q5_0: return (dg_form){.integer = true, .group = 32, .offset = 16};
    case DG_TYPE_Q4_1:
    case DG_TYPE_Q5_1:
    case DG_TYPE_Q4_K:
    case DG_TYPE_Q5_K: return (dg_form){.integer = true, .has_mins = true, .group = 32};
    case DG_TYPE_Q8_0:
    case DG_TYPE_IQ4_NL:
    case DG_TYPE_IQ4_XS: return q8;
    case DG_TYPE_NVFP4: return (dg_form){.integer = true, .group = 16, .offset = 12};
    case DG_TYPE_Q2_K: return (dg_form){.integer = true, .has_mins = true, .group = 16};
    case DG_TYPE_Q3_K: return (dg_form){.integer = true, .group = 16, .offset = 4};
    case DG_TYPE_Q6_K: return (dg_form){.integer = true, .group = 16, .offset = 32};
    default: return (dg_form){.integer = false};
    }
}

/* Where a strip of one row goes: codes (n), and scales and mins, one per group, LANES apart. */
typedef struct strip {
    uint8_t *codes;
    float *scales;
    float *mins;
    float multiplier;
} strip;

static inline uint32_t read_u32(const uint8_t *bytes) {
    uint32_t value;
    memcpy(&value, bytes, sizeof value);
    return value;
}

static inline void split_nibbles(const uint8_t *qs, int n, uint8_t *low, uint8_t *high) {
    for (int j = 0; j < n; j++) {
        low[j] = qs[j] & 15;
        high[j] = qs[j] >> 4;
    }
}

static inline uint8_t signed_code(int8_t q) { return (uint8_t)(q + Q8_OFFSET); }

static void strip_q4_0(const dg_block_q4_0 *block, int n, strip s) {
    for (int b = 0; b < n / 32; b++, block++) {
        s.scales[b * LANES] = dg_f16_to_f32(block->d) * s.multiplier;
        split_nibbles(block->qs, 16, s.codes + 32 * b, s.codes + 32 * b + 16);
    }
}

static void strip_q4_1(const dg_block_q4_1 *block, int n, strip s) {
    for (int b = 0; b < n / 32; b++, block++) {
        s.scales[b * LANES] = dg_f16_to_f32(block->d) * s.multiplier;
        s.mins[b * LANES] = -dg_f16_to_f32(block->m) * s.multiplier;
        split_nibbles(block->qs, 16, s.codes + 32 * b, s.codes + 32 * b + 16);
    }
}

static inline void add_fifth_bits(const uint8_t *qh, uint8_t *codes) {
    uint32_t high = read_u32(qh);
    for (int j = 0; j < 32; j++) codes[j] |= (uint8_t)((high >> j & 1) << 4);
}

static void strip_q5_0(const dg_block_q5_0 *block, int n, strip s) {
    for (int b = 0; b < n / 32; b++, block++) {
        s.scales[b * LANES] = dg_f16_to_f32(block->d) * s.multiplier;
        split_nibbles(block->qs, 16, s.codes + 32 * b, s.codes + 32 * b + 16);
        add_fifth_bits(block->qh, s.codes + 32 * b);
    }
}

static void strip_q5_1(const dg_block_q5_1 *block, int n, strip s) {
    for (int b = 0; b < n / 32; b++, block++) {
        s.scales[b * LANES] = dg_f16_to_f32(block->d) * s.multiplier;
        s.mins[b * LANES] = -dg_f16_to_f32(block->m) * s.multiplier;
        split_nibbles(block->qs, 16, s.codes + 32 * b, s.codes + 32 * b + 16);
        add_fifth_bits(block->qh, s.codes + 32 * b);
    }
}

static void strip_q8_0(const dg_block_q8_0 *block, int n, strip s) {
    for (int b = 0; b < n / 32; b++, block++) {
        s.scales[b * LANES] = dg_f16_to_f32(block->d) * s.multiplier;
        for (int j = 0; j < 32; j++) s.codes[32 * b + j] = signed_code(block->qs[j]);
    }
}

static inline void look_up_iq4(const uint8_t *qs, uint8_t *codes) {
    for (int j = 0; j < 16; j++) {
        codes[j] = signed_code(dg_iq4_values[qs[j] & 15]);
        codes[j + 16] = signed_code(dg_iq4_values[qs[j] >> 4]);
    }
}

static void strip_iq4_nl(const dg_block_iq4_nl *block, int n, strip s) {
    for (int b = 0; b < n / 32; b++, block++) {
        s.scales[b * LANES] = dg_f16_to_f32(block->d) * s.multiplier;
        look_up_iq4(block->qs, s.codes + 32 * b);
    }
}

static void strip_iq4_xs(const dg_block_iq4_xs *block, int n, strip s) {
    for (; n > 0; n -= 256, block++) {
        float d = dg_f16_to_f32(block->d) * s.multiplier;
        for (int i = 0; i < 8; i++) {
            int scale = (block->scales_l[i / 2] >> 4 * (i % 2) & 15) | (block->scales_h >> 2 * i & 3) << 4;
            s.scales[i * LANES] = d * (float)(scale - 32);
            look_up_iq4(block->qs + 16 * i, s.codes + 32 * i);
        }
        s.codes += 256;
        s.scales += 8 * LANES;
    }
}

static void strip_nvfp4(const dg_block_nvfp4 *block, int n, strip s) {
    static const uint8_t raised[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0}; /* E2M1 · 2 + 12 */
    for (int g = 0; g < n / 16; g++) {
        const uint8_t *qs = block[g / 4].qs + 8 * (g % 4);
        s.scales[g * LANES] = 0.5f * dg_e4m3_to_f32(block[g / 4].scales[g % 4]) * s.multiplier;
        for (int j = 0; j < 8; j++) {
            s.codes[16 * g + j] = raised[qs[j] & 15];
            s.codes[16 * g + j + 8] = raised[qs[j] >> 4];
        }
    }
}

/* The planes of Q2_K and Q3_K, four 2-bit codes a byte. */
static inline void split_pairs(const uint8_t *qs, uint8_t *codes) {
    for (int h = 0; h < 2; h++)
        for (int k = 0; k < 4; k++)
            for (int j = 0; j < 32; j++) codes[128 * h + 32 * k + j] = qs[32 * h + j] >> 2 * k & 3;
}

static void strip_q2_k(const dg_block_q2_k *block, int n, strip s) {
    for (; n > 0; n -= 256, block++) {
        float d = dg_f16_to_f32(block->d) * s.multiplier, dmin = dg_f16_to_f32(block->dmin) * s.multiplier;
        for (int i = 0; i < 16; i++) {
            s.scales[i * LANES] = d * (float)(block->scales[i] & 15);
            s.mins[i * LANES] = dmin * (float)(block->scales[i] >> 4);
        }
        split_pairs(block->qs, s.codes);
        s.codes += 256;
        s.scales += 16 * LANES;
        s.mins += 16 * LANES;
    }
}

static void strip_q3_k(const dg_block_q3_k *block, int n, strip s) {
    for (; n > 0; n -= 256, block++) {
        float d = dg_f16_to_f32(block->d) * s.multiplier;
        for (int i = 0; i < 16; i++) {
            int low = block->scales[i % 8] >> 4 * (i / 8) & 15;
            int high = block->scales[8 + i % 4] >> 2 * (i / 4) & 3;
            s.scales[i * LANES] = d * (float)((low | high << 4) - 32);
        }
        split_pairs(block->qs, s.codes);
        for (int k = 0; k < 8; k++)
            for (int j = 0; j < 32; j++) s.codes[32 * k + j] |= (uint8_t)((block->hmask[j] >> k & 1) << 2);
        s.codes += 256;
        s.scales += 16 * LANES;
    }
}

/* The eight 6-bit scales and minima of Q4_K and Q5_K. */
static inline void scales_and_mins(const uint8_t *packed, float d, float dmin, strip s) {
    for (int i = 0; i < 8; i++) {
        int scale = i < 4 ? packed[i] & 63 : (packed[i + 4] & 15) | packed[i - 4] >> 6 << 4;
        int min = i < 4 ? packed[i + 4] & 63 : packed[i + 4] >> 4 | packed[i] >> 6 << 4;
        s.scales[i * LANES] = d * (float)scale;
        s.mins[i * LANES] = dmin * (float)min;
    }
}

static void strip_q4_k(const dg_block_q4_k *block, int n, strip s) {
    for (; n > 0; n -= 256, block++) {
        scales_and_mins(block->scales, dg_f16_to_f32(block->d) * s.multiplier,
                        dg_f16_to_f32(block->dmin) * s.multiplier, s);
        for (int k = 0; k < 4; k++)
            split_nibbles(block->qs + 32 * k, 32, s.codes + 64 * k, s.codes + 64 * k + 32);
        s.codes += 256;
        s.scales += 8 * LANES;
        s.mins += 8 * LANES;
    }
}

static void strip_q5_k(const dg_block_q5_k *block, int n, strip s) {
    for (; n > 0; n -= 256, block++) {
        scales_and_mins(block->scales, dg_f16_to_f32(block->d) * s.multiplier,
                        dg_f16_to_f32(block->dmin) * s.multiplier, s);
        for (int k = 0; k < 4; k++)
            split_nibbles(block->qs + 32 * k, 32, s.codes + 64 * k, s.codes + 64 * k + 32);
        for (int k = 0; k < 8; k++)
            for (int j = 0; j < 32; j++) s.codes[32 * k + j] |= (uint8_t)((block->qh[j] >> k & 1) << 4);
        s.codes += 256;
        s.scales += 8 * LANES;
        s.mins += 8 * LANES;
    }
}

static void strip_q6_k(const dg_block_q6_k *block, int n, strip s) {
    for (; n > 0; n -= 256, block++) {
        float d = dg_f16_to_f32(block->d) * s.multiplier;
        for (int i = 0; i < 16; i++) s.scales[i * LANES] = d * (float)block->scales[i];
        for (int h = 0; h < 2; h++) {
            const uint8_t *ql = block->ql + 64 * h, *qh = block->qh + 32 * h;
            uint8_t *codes = s.codes + 128 * h;
            for (int j = 0; j < 32; j++) {
                codes[j] = (ql[j] & 15) | (qh[j] & 3) << 4;
                codes[32 + j] = (ql[32 + j] & 15) | (qh[j] >> 2 & 3) << 4;
                codes[64 + j] = ql[j] >> 4 | (qh[j] >> 4 & 3) << 4;
                codes[96 + j] = ql[32 + j] >> 4 | qh[j] >> 6 << 4;
            }
        }
        s.codes += 256;
        s.scales += 16 * LANES;
    }
}

static void decode_strip(int32_t type, const void *src, int n, strip s) {
    switch (type) {
    case DG_TYPE_Q4_0: strip_q4_0(src, n, s); break;
    case DG_TYPE_Q4_1: strip_q4_1(src, n, s); break;
    case DG_TYPE_Q5_0: strip_q5_0(src, n, s); break;
    case DG_TYPE_Q5_1: strip_q5_1(src, n, s); break;
    case DG_TYPE_Q8_0: strip_q8_0(src, n, s); break;
    case DG_TYPE_IQ4_NL: strip_iq4_nl(src, n, s); break;
    case DG_TYPE_IQ4_XS: strip_iq4_xs(src, n, s); break;
    case DG_TYPE_NVFP4: strip_nvfp4(src, n, s); break;
    case DG_TYPE_Q2_K: strip_q2_k(src, n, s); break;
    case DG_TYPE_Q3_K: strip_q3_k(src, n, s); break;
    case DG_TYPE_Q4_K: strip_q4_k(src, n, s); break;
    case DG_TYPE_Q5_K: strip_q5_k(src, n, s); break;
    default: strip_q6_k(src, n, s); break; /* the last of form_of's integer types */
    }
}

/* dst (n_words, LANES) = transpose of src (LANES, STRIP words or fewer) */
static void side_by_side(const uint32_t *src, int64_t src_stride, int n_words, uint32_t *dst) {
    for (int w = 0; w < n_words; w += LANES) {
        vi m[LANES];
        for (int i = 0; i < LANES; i++) m[i] = vi_load(src + i * src_stride + w);
        vi_transpose(m);
        int n = n_words - w < LANES ? n_words - w : LANES;
        for (int i = 0; i < n; i++) vi_store(dst + (w + i) * LANES, m[i]);
    }
}

static void decode_integers(const dg_weight *weight, const uint8_t *src, uint64_t row_bytes, float multiplier,
                            int32_t n_rows, dg_panel *panel) {
    const dg_type_traits *traits = dg_type_traits_of(weight->type);
    int group = panel->form.group;
    uint8_t codes[LANES][STRIP];
    memset(codes, 0, sizeof codes);
    if (n_rows < LANES) {
        size_t n_scales = (size_t)(panel->n_cols / group) * LANES * sizeof(float);
        memset(panel->scales, 0, n_scales);
        if (panel->form.has_mins) memset(panel->mins, 0, n_scales);
    }
    for (int64_t col = 0; col < panel->n_cols; col += STRIP) {
        int n = panel->n_cols - col < STRIP ? (int)(panel->n_cols - col) : STRIP;
        int64_t first_scale = col / group * LANES;
        uint64_t offset = (uint64_t)(col / traits->block_size) * (uint64_t)traits->block_bytes;
        for (int i = 0; i < n_rows; i++)
            decode_strip(weight->type, src + (uint64_t)i * row_bytes + offset, n,
                         (strip){codes[i], panel->scales + first_scale + i,
                                 panel->form.has_mins ? panel->mins + first_scale + i : NULL, multiplier});
        side_by_side((const uint32_t *)codes, STRIP / 4, n / 4, (uint32_t *)panel->codes + col / 4 * LANES);
    }
}

static void decode_floats(const dg_weight *weight, const uint8_t *src, uint64_t row_bytes, float multiplier,
                          int32_t n_rows, dg_panel *panel) {
    const dg_type_traits *traits = dg_type_traits_of(weight->type);
    float values[LANES][STRIP];
    memset(values, 0, sizeof values);
    for (int64_t col = 0; col < panel->n_cols; col += STRIP) {
        int n = panel->n_cols - col < STRIP ? (int)(panel->n_cols - col) : STRIP;
        uint64_t offset = (uint64_t)(col / traits->block_size) * (uint64_t)traits->block_bytes;
        for (int i = 0; i < n_rows; i++) {
            traits->decode(src + (uint64_t)i * row_bytes + offset, values[i], n);
            if (multiplier != 1.0f)
                for (int j = 0; j < n; j++) values[i][j] *= multiplier;
        }
        side_by_side((const uint32_t *)values, STRIP, n, (uint32_t *)panel->values + col * LANES);
    }
}

static void decode(const dg_weight *weight, int64_t matrix, int64_t first_row, int32_t n_rows, dg_panel *panel) {
    uint64_t row_bytes = dg_row_bytes(weight->type, weight->n_cols);
    const uint8_t *src = (const uint8_t *)weight->data + (uint64_t)matrix * weight->matrix_bytes +
                         (uint64_t)first_row * row_bytes;
    float multiplier = weight->scale != NULL ? weight->scale[matrix] : 1.0f;
    panel->n_cols = weight->n_cols;
    if (panel->form.integer)
        decode_integers(weight, src, row_bytes, multiplier, n_rows, panel);
    else
        decode_floats(weight, src, row_bytes, multiplier, n_rows, panel);
}
