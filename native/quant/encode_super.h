/* Encoders of super-blocks of 256 elements: groups whose scales are integers times a scale of the super-block.
 * Included once for each instruction set, after encode_blocks.h.
 *
 * Each group's best scale is searched first, as if it could be kept; the largest decides the super-block's scale. Then
 * the integers next to each group's wanted scale are tried with what rounding has made of it. */

#define SUPER_BLOCK 256

/* A super-block's elements and weights: vector v of groups of n stands at x + n · v. */
typedef struct super_batch {
    floats x[SUPER_BLOCK / N_LANES], w[SUPER_BLOCK / N_LANES];
} super_batch;

LANES_INLINE void load_super(super_batch *batch, const float *src, const float *weights, int n) {
    for (int first = 0; first < SUPER_BLOCK; first += n * N_LANES) {
        load_groups(src + first, n, batch->x + first / N_LANES);
        if (weights != NULL) load_groups(weights + first, n, batch->w + first / N_LANES);
    }
    if (weights == NULL)
        for (int i = 0; i < SUPER_BLOCK / N_LANES; i++) batch->w[i] = all(1.0f);
}

/* The binary16 of a super-block's scale. It must not be rounded down, or the code of the largest group would not reach:
 * among the subnormals that would be felt. */
LANES_INLINE uint16_t super_bits(float scale) {
    uint16_t bits = (uint16_t)scale_bits(all(scale))[0];
    return (uint16_t)(bits + (fabsf(dg_f16_to_f32(bits)) < fabsf(scale)));
}

/* ---- x ≈ d · code · q ----------------------------------------------------------------------------------------- */

typedef struct super_scales {
    uint16_t d;
    int32_t codes[16];
    uint8_t qs[SUPER_BLOCK];
} super_scales;

LANES_INLINE void search_super(levels kind, const float *src, const float *weights, int n, float low, float high,
                               const float *targets, super_scales *out) {
    super_batch batch;
    load_super(&batch, src, weights, n);
    int n_groups = SUPER_BLOCK / n;
    float wanted[16], most = 0.0f;
    for (int g = 0; g < n_groups; g += N_LANES)
        store(wanted + g, search_scale(kind, batch.x + n * g / N_LANES, batch.w + n * g / N_LANES, n, targets));
    for (int g = 0; g < n_groups; g++)
        if (fabsf(wanted[g]) > fabsf(most)) most = wanted[g];
    out->d = super_bits(most / low); /* the codes reach further below zero than above */
    float d = dg_f16_to_f32(out->d);

    for (int g = 0; g < n_groups; g += N_LANES) {
        floats start = rounded(load(wanted + g) * inverse(all(d)));
        floats code[3], inverse_scale[3];
        scale_sums sums[3];
        for (int i = 0; i < 3; i++) {
            code[i] = clamped(start + (float)(i - 1), low, high);
            inverse_scale[i] = inverse(d * code[i]);
        }
        sum_trials(kind, batch.x + n * g / N_LANES, batch.w + n * g / N_LANES, n, 3, inverse_scale, sums);
        floats best = {0}, gain = {0};
        for (int i = 0; i < 3; i++) {
            floats trial_gain = scale_gain(d * code[i], &sums[i]);
            ints better = trial_gain > gain;
            best = choose(better, code[i], best);
            gain = choose(better, trial_gain, gain);
        }
        ints codes = to_ints(best);
        memcpy(out->codes + g, &codes, sizeof codes);
    }
    for (int g = 0; g < n_groups; g++)
        store_codes(kind, src + n * g, n, inverse(all(d * (float)out->codes[g]))[0], out->qs + n * g);
}

/* See targets_4_bit. */
static const float targets_3_bit[8] = {-5.0f, -4.6f, -4.4f, -4.2f, -4.0f, -3.8f, -3.2f, 2.8f};
static const float targets_6_bit[8] = {-32.5f, -32.0f, -31.75f, -31.25f, -31.0f, -30.75f, -30.0f, -29.0f};

static void encode_q6_k(const float *src, void *dst, int64_t n, const float *weights, float inverse_multiplier) {
    dg_block_q6_k *block = dst;
    for (int64_t i = 0; i < n; i += SUPER_BLOCK, block++) {
        super_scales scales;
        search_super(LEVELS_6_BIT, src + i, at(weights, i), 16, -128, 127, targets_6_bit, &scales);
        block->d = scales.d;
        for (int g = 0; g < 16; g++) block->scales[g] = (int8_t)scales.codes[g];
        for (int half = 0; half < 2; half++) {
            const uint8_t *a = scales.qs + 128 * half, *b = a + 32, *c = a + 64, *d = a + 96;
            uint8_t *ql = block->ql + 64 * half, *qh = block->qh + 32 * half;
            for (int j = 0; j < 32; j++) {
                ql[j] = (uint8_t)((a[j] & 15) | c[j] << 4);
                ql[j + 32] = (uint8_t)((b[j] & 15) | d[j] << 4);
                qh[j] = (uint8_t)(a[j] >> 4 | b[j] >> 4 << 2 | c[j] >> 4 << 4 | d[j] >> 4 << 6);
            }
        }
    }
}

/* Four 2-bit codes a byte: 32 apart. */
LANES_INLINE void pack_crumbs(const uint8_t *codes, uint8_t *qs) {
    for (int half = 0; half < 2; half++, codes += 128, qs += 32)
        for (int j = 0; j < 32; j++)
            qs[j] = (uint8_t)((codes[j] & 3) | (codes[j + 32] & 3) << 2 | (codes[j + 64] & 3) << 4 |
                              (codes[j + 96] & 3) << 6);
}

/* Bit `bit` of each code: 32 apart in the bits of a byte. */
LANES_INLINE void pack_bit(const uint8_t *codes, int bit, uint8_t *plane) {
    for (int j = 0; j < 32; j++) {
        int bits = 0;
        for (int k = 0; k < 8; k++) bits |= (codes[32 * k + j] >> bit & 1) << k;
        plane[j] = (uint8_t)bits;
    }
}

static void encode_q3_k(const float *src, void *dst, int64_t n, const float *weights, float inverse_multiplier) {
    dg_block_q3_k *block = dst;
    for (int64_t i = 0; i < n; i += SUPER_BLOCK, block++) {
        super_scales scales;
        search_super(LEVELS_3_BIT, src + i, at(weights, i), 16, -32, 31, targets_3_bit, &scales);
        block->d = scales.d;
        memset(block->scales, 0, sizeof block->scales);
        for (int g = 0; g < 16; g++) {
            int code = scales.codes[g] + 32;
            block->scales[g % 8] |= (uint8_t)((code & 15) << 4 * (g / 8));
            block->scales[8 + g % 4] |= (uint8_t)(code >> 4 << 2 * (g / 4));
        }
        pack_crumbs(scales.qs, block->qs);
        pack_bit(scales.qs, 2, block->hmask);
    }
}

static void encode_iq4_xs(const float *src, void *dst, int64_t n, const float *weights, float inverse_multiplier) {
    dg_block_iq4_xs *block = dst;
    for (int64_t i = 0; i < n; i += SUPER_BLOCK, block++) {
        super_scales scales;
        search_super(LEVELS_IQ4, src + i, at(weights, i), 32, -32, 31, targets_iq4, &scales);
        block->d = scales.d;
        block->scales_h = 0;
        memset(block->scales_l, 0, sizeof block->scales_l);
        for (int g = 0; g < 8; g++) {
            int code = scales.codes[g] + 32;
            block->scales_l[g / 2] |= (uint8_t)((code & 15) << 4 * (g % 2));
            block->scales_h |= (uint16_t)(code >> 4 << 2 * g);
            pack_nibbles(scales.qs + 32 * g, block->qs + 16 * g);
        }
    }
}

/* ---- x ≈ d · code · q − dmin · code_min ------------------------------------------------------------------------- */

typedef struct super_affine {
    uint16_t d, dmin;
    int32_t scales[16], minima[16]; /* codes */
    uint8_t qs[SUPER_BLOCK];
} super_affine;

/* The best codes of N_LANES groups, 0 … max_code: all nine combinations of those next to the wanted ones are tried. */
LANES_INLINE void choose_affine_codes(float high, const floats *x, const floats *w, int n, float max_code, float d,
                                      float dmin, floats wanted_scale, floats wanted_minimum, int32_t *scales,
                                      int32_t *minima) {
    moment_sums moments = sum_moments(x, w, n);
    floats start = rounded(wanted_scale * inverse(all(d)));
    floats start_minimum = rounded(wanted_minimum * inverse(all(dmin)));
    floats best_scale = {0}, best_minimum = {0}, gain = {0};
    for (int step = -1; step <= 1; step++) {
        floats scale = clamped(start + (float)step, 0, max_code), minimum[3], inverse_scale[3], offset[3];
        affine_sums sums[3];
        for (int i = 0; i < 3; i++) {
            minimum[i] = clamped(start_minimum + (float)(i - 1), 0, max_code);
            inverse_scale[i] = inverse(d * scale);
            offset[i] = -(dmin * minimum[i]);
        }
        sum_affine_trials(high, x, w, n, 3, inverse_scale, offset, sums);
        for (int i = 0; i < 3; i++) {
            affine trial = {d * scale, offset[i]};
            floats trial_gain = affine_gain(&trial, &sums[i], &moments);
            ints better = trial_gain > gain;
            best_scale = choose(better, scale, best_scale);
            best_minimum = choose(better, minimum[i], best_minimum);
            gain = choose(better, trial_gain, gain);
        }
    }
    ints scale_codes = to_ints(best_scale), minimum_codes = to_ints(best_minimum);
    memcpy(scales, &scale_codes, sizeof scale_codes);
    memcpy(minima, &minimum_codes, sizeof minimum_codes);
}

LANES_INLINE void search_super_affine(float high, const float *src, const float *weights, int n, float max_code,
                                      const float *spans, super_affine *out) {
    super_batch batch;
    load_super(&batch, src, weights, n);
    int n_groups = SUPER_BLOCK / n;
    float wanted_scale[16], wanted_minimum[16], most = 0.0f, most_minimum = 0.0f;
    for (int g = 0; g < n_groups; g += N_LANES) {
        affine fit =
            search_affine(high, true, batch.x + n * g / N_LANES, batch.w + n * g / N_LANES, n, spans, weights != NULL);
        store(wanted_scale + g, fit.scale);
        store(wanted_minimum + g, -fit.offset);
    }
    for (int g = 0; g < n_groups; g++) {
        if (wanted_scale[g] > most) most = wanted_scale[g];
        if (wanted_minimum[g] > most_minimum) most_minimum = wanted_minimum[g];
    }
    out->d = super_bits(most / max_code);
    out->dmin = super_bits(most_minimum / max_code);
    float d = dg_f16_to_f32(out->d), dmin = dg_f16_to_f32(out->dmin);

    for (int g = 0; g < n_groups; g += N_LANES)
        choose_affine_codes(high, batch.x + n * g / N_LANES, batch.w + n * g / N_LANES, n, max_code, d, dmin,
                            load(wanted_scale + g), load(wanted_minimum + g), out->scales + g, out->minima + g);
    for (int g = 0; g < n_groups; g++)
        store_affine_codes(high, src + n * g, n, inverse(all(d * (float)out->scales[g]))[0],
                           -(dmin * (float)out->minima[g]), out->qs + n * g);
}

static const float spans_2_bit[8] = {2.0f, 2.6f, 2.8f, 3.0f, 3.2f, 3.4f, 3.6f, 4.0f};

static void encode_q2_k(const float *src, void *dst, int64_t n, const float *weights, float inverse_multiplier) {
    dg_block_q2_k *block = dst;
    for (int64_t i = 0; i < n; i += SUPER_BLOCK, block++) {
        super_affine scales;
        search_super_affine(3, src + i, at(weights, i), 16, 15, spans_2_bit, &scales);
        block->d = scales.d;
        block->dmin = scales.dmin;
        for (int g = 0; g < 16; g++) block->scales[g] = (uint8_t)(scales.scales[g] | scales.minima[g] << 4);
        pack_crumbs(scales.qs, block->qs);
    }
}

/* Scales and minima of 6 bits: see dg_block_q4_k. */
LANES_INLINE void pack_scales(const super_affine *from, uint8_t *scales) {
    for (int j = 0; j < 4; j++) {
        int scale = from->scales[j + 4], minimum = from->minima[j + 4];
        scales[j] = (uint8_t)(from->scales[j] | scale >> 4 << 6);
        scales[4 + j] = (uint8_t)(from->minima[j] | minimum >> 4 << 6);
        scales[8 + j] = (uint8_t)((scale & 15) | (minimum & 15) << 4);
    }
}

/* Lower four bits of two codes a byte: 32 apart. */
LANES_INLINE void pack_distant_nibbles(const uint8_t *codes, uint8_t *qs) {
    for (int k = 0; k < 4; k++, codes += 64, qs += 32)
        for (int j = 0; j < 32; j++) qs[j] = (uint8_t)((codes[j] & 15) | codes[j + 32] << 4);
}

static void encode_q4_k(const float *src, void *dst, int64_t n, const float *weights, float inverse_multiplier) {
    dg_block_q4_k *block = dst;
    for (int64_t i = 0; i < n; i += SUPER_BLOCK, block++) {
        super_affine scales;
        search_super_affine(15, src + i, at(weights, i), 32, 63, spans_4_bit, &scales);
        block->d = scales.d;
        block->dmin = scales.dmin;
        pack_scales(&scales, block->scales);
        pack_distant_nibbles(scales.qs, block->qs);
    }
}

static void encode_q5_k(const float *src, void *dst, int64_t n, const float *weights, float inverse_multiplier) {
    dg_block_q5_k *block = dst;
    for (int64_t i = 0; i < n; i += SUPER_BLOCK, block++) {
        super_affine scales;
        search_super_affine(31, src + i, at(weights, i), 32, 63, spans_5_bit, &scales);
        block->d = scales.d;
        block->dmin = scales.dmin;
        pack_scales(&scales, block->scales);
        pack_distant_nibbles(scales.qs, block->qs);
        pack_bit(scales.qs, 4, block->qh);
    }
}
