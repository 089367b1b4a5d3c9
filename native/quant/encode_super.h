/* Encoders of super-blocks of 256 elements: groups whose scales are integers times a scale of the super-block.
 * Included once for each instruction set.
 *
 * Each group's best scale is searched first, as if it could be kept; the largest decides the super-block's scale. Then
 * the integers around each group's scale are tried with what rounding has made of it, and the super-block's scale is
 * fitted once more to all that was chosen. */

#include <math.h>

#define SUPER_BLOCK 256
#define ROUNDS 2 /* a third one lowers the error by less than 0.2 % */

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

/* ---- x ≈ d · code · q ----------------------------------------------------------------------------------------- */

typedef struct super_scales {
    uint16_t d;
    int32_t codes[16];
    uint8_t qs[SUPER_BLOCK];
} super_scales;

/* The best code of each group for the super-block scale d, near those of the wanted scales. Returns what the whole
 * gains; `refit` receives the d that regression finds for these codes. */
LANES_INLINE float choose_codes(levels levels, const super_batch *batch, int n, float low, float high, float d,
                                const float *wanted, float *codes, float *refit) {
    float gains[16], xq[16], qq[16];
    int n_groups = SUPER_BLOCK / n;
    for (int g = 0; g < n_groups; g += N_LANES) {
        const floats *x = batch->x + n * g / N_LANES, *w = batch->w + n * g / N_LANES;
        floats start = rounded(load(wanted + g) * inverse(all(d)));
        floats code = {0}, gain = {0}, best_xq = {0}, best_qq = {0};
        floats trial[3], inverse_scale[3];
        scale_sums sums[3];
        for (int i = 0; i < 3; i++) {
            trial[i] = clamped(start + (float)(i - 1), low, high);
            inverse_scale[i] = inverse(d * trial[i]);
        }
        sum_trials(levels, x, w, n, 3, inverse_scale, sums);
        for (int i = 0; i < 3; i++) {
            floats trial_gain = scale_gain(d * trial[i], &sums[i]);
            ints better = trial_gain > gain;
            code = choose(better, trial[i], code);
            gain = choose(better, trial_gain, gain);
            best_xq = choose(better, sums[i].xq, best_xq);
            best_qq = choose(better, sums[i].qq, best_qq);
        }
        store(codes + g, code);
        store(gains + g, gain);
        store(xq + g, best_xq * code);
        store(qq + g, best_qq * code * code);
    }
    float gain = 0.0f, numerator = 0.0f, denominator = 0.0f;
    for (int g = 0; g < n_groups; g++) {
        gain += gains[g];
        numerator += xq[g];
        denominator += qq[g];
    }
    *refit = denominator > 0.0f ? numerator / denominator : d;
    return gain;
}

LANES_INLINE void search_super(levels levels, const float *src, const float *weights, int n, float low, float high,
                               const float *targets, super_scales *out) {
    super_batch batch;
    load_super(&batch, src, weights, n);
    int n_groups = SUPER_BLOCK / n;
    float wanted[16], most = 0.0f;
    for (int g = 0; g < n_groups; g += N_LANES)
        store(wanted + g, search_scale(levels, batch.x + n * g / N_LANES, batch.w + n * g / N_LANES, n, targets));
    for (int g = 0; g < n_groups; g++)
        if (fabsf(wanted[g]) > fabsf(most)) most = wanted[g];

    *out = (super_scales){0};
    float best_gain = 0.0f, d = most / low; /* the codes reach further below zero than above */
    for (int round = 0; round < ROUNDS; round++) {
        float codes[16], refit;
        uint16_t bits = (uint16_t)(round == 0 ? scale_bits_up(all(d)) : scale_bits(all(d)))[0];
        float gain = choose_codes(levels, &batch, n, low, high, f16_value((ints){0} + bits)[0], wanted, codes, &refit);
        if (gain > best_gain) {
            best_gain = gain;
            out->d = bits;
            for (int g = 0; g < n_groups; g++) out->codes[g] = (int32_t)codes[g];
        }
        d = refit;
    }
    float rounded_d = f16_value((ints){0} + out->d)[0];
    for (int g = 0; g < n_groups; g++)
        store_codes(levels, src + n * g, n, inverse(all(rounded_d * (float)out->codes[g]))[0], out->qs + n * g);
}

/* See targets_4_bit. */
static const float targets_3_bit[8] = {-5.0f, -4.6f, -4.4f, -4.2f, -4.0f, -3.8f, -3.2f, 2.8f};
static const float targets_6_bit[8] = {-32.5f, -32.0f, -31.75f, -31.25f, -31.0f, -30.75f, -30.0f, -29.0f};

static void encode_q6_k(const float *src, void *dst, int64_t n, const float *weights, float inverse_multiplier) {
    dg_block_q6_k *block = dst;
    for (int64_t i = 0; i < n; i += SUPER_BLOCK, block++) {
        super_scales scales;
        search_super(LEVELS_6_BIT, src + i, weights == NULL ? NULL : weights + i, 16, -128, 127, targets_6_bit,
                     &scales);
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
        search_super(LEVELS_3_BIT, src + i, weights == NULL ? NULL : weights + i, 16, -32, 31, targets_3_bit,
                     &scales);
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
        search_super(LEVELS_IQ4, src + i, weights == NULL ? NULL : weights + i, 32, -32, 31, targets_iq4, &scales);
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
    uint8_t scales[16], minima[16]; /* codes */
    uint8_t qs[SUPER_BLOCK];
} super_affine;

/* Sums over all groups, for the regression of x on d and dmin. */
typedef struct affine_refit {
    float dd, dm, mm, dx, mx;
} affine_refit;

LANES_INLINE float choose_affine_codes(float high, const super_batch *batch, int n, float max_code, float d,
                                       float dmin, const float *wanted_scale, const float *wanted_min, float *scales,
                                       float *minima, affine_refit *refit) {
    int n_groups = SUPER_BLOCK / n;
    float gains[16], dd[16], dm[16], mm[16], dx[16], mx[16];
    for (int g = 0; g < n_groups; g += N_LANES) {
        const floats *x = batch->x + n * g / N_LANES, *w = batch->w + n * g / N_LANES;
        moments moments = sum_moments(x, w, n);
        floats start = rounded(load(wanted_scale + g) * inverse(all(d)));
        floats start_min = rounded(load(wanted_min + g) * inverse(all(dmin)));
        floats scale = {0}, minimum = {0}, gain = {0};
        affine_sums best = {{0}, {0}, {0}};
        for (int step = -1; step <= 1; step++) {
            affine fit[3];
            floats trial = clamped(start + (float)step, 0, max_code), trial_min[3], inverse_scale[3], offset[3];
            affine_sums sums[3];
            for (int i = 0; i < 3; i++) {
                trial_min[i] = clamped(start_min + (float)(i - 1), 0, max_code);
                fit[i] = (affine){d * trial, -(dmin * trial_min[i])};
                inverse_scale[i] = inverse(fit[i].scale);
                offset[i] = fit[i].offset;
            }
            sum_affine_trials(high, x, w, n, 3, inverse_scale, offset, sums);
            for (int i = 0; i < 3; i++) {
                floats trial_gain = affine_gain(&fit[i], &sums[i], &moments);
                ints better = trial_gain > gain;
                scale = choose(better, trial, scale);
                minimum = choose(better, trial_min[i], minimum);
                gain = choose(better, trial_gain, gain);
                best.q = choose(better, sums[i].q, best.q);
                best.xq = choose(better, sums[i].xq, best.xq);
                best.qq = choose(better, sums[i].qq, best.qq);
            }
        }
        store(scales + g, scale);
        store(minima + g, minimum);
        store(gains + g, gain);
        store(dd + g, scale * scale * best.qq);
        store(dm + g, scale * minimum * best.q);
        store(mm + g, minimum * minimum * moments.w);
        store(dx + g, scale * best.xq);
        store(mx + g, minimum * moments.x);
    }
    float gain = 0.0f;
    *refit = (affine_refit){0};
    for (int g = 0; g < n_groups; g++) {
        gain += gains[g];
        refit->dd += dd[g];
        refit->dm += dm[g];
        refit->mm += mm[g];
        refit->dx += dx[g];
        refit->mx += mx[g];
    }
    return gain;
}

LANES_INLINE void search_super_affine(float high, const float *src, const float *weights, int n, float max_code,
                                      const float *spans, super_affine *out) {
    super_batch batch;
    load_super(&batch, src, weights, n);
    int n_groups = SUPER_BLOCK / n;
    float wanted_scale[16], wanted_min[16], d = 0.0f, dmin = 0.0f;
    for (int g = 0; g < n_groups; g += N_LANES) {
        affine fit = search_affine(high, true, batch.x + n * g / N_LANES, batch.w + n * g / N_LANES, n, spans);
        store(wanted_scale + g, fit.scale);
        store(wanted_min + g, -fit.offset);
    }
    for (int g = 0; g < n_groups; g++) {
        d = wanted_scale[g] > d ? wanted_scale[g] : d;
        dmin = wanted_min[g] > dmin ? wanted_min[g] : dmin;
    }
    d /= max_code;
    dmin /= max_code;

    *out = (super_affine){0};
    float best_gain = 0.0f;
    for (int round = 0; round < ROUNDS; round++) {
        float scales[16], minima[16];
        affine_refit refit;
        uint16_t d_bits = (uint16_t)(round == 0 ? scale_bits_up(all(d)) : scale_bits(all(d)))[0];
        uint16_t dmin_bits = (uint16_t)(round == 0 ? scale_bits_up(all(dmin)) : scale_bits(all(dmin)))[0];
        float gain = choose_affine_codes(high, &batch, n, max_code, f16_value((ints){0} + d_bits)[0],
                                         f16_value((ints){0} + dmin_bits)[0], wanted_scale, wanted_min, scales, minima,
                                         &refit);
        if (gain > best_gain) {
            best_gain = gain;
            out->d = d_bits;
            out->dmin = dmin_bits;
            for (int g = 0; g < n_groups; g++) {
                out->scales[g] = (uint8_t)scales[g];
                out->minima[g] = (uint8_t)minima[g];
            }
        }
        /* minimise Σ w (x − d·scale·q + dmin·minimum)² */
        float determinant = refit.dd * refit.mm - refit.dm * refit.dm;
        if (determinant <= 1e-5f * refit.dd * refit.mm) break;
        d = (refit.mm * refit.dx - refit.dm * refit.mx) / determinant;
        dmin = (refit.dm * refit.dx - refit.dd * refit.mx) / determinant;
    }
    float rounded_d = f16_value((ints){0} + out->d)[0], rounded_dmin = f16_value((ints){0} + out->dmin)[0];
    for (int g = 0; g < n_groups; g++) {
        float inverse_scale = inverse(all(rounded_d * (float)out->scales[g]))[0];
        store_affine_codes(high, src + n * g, n, inverse_scale, -(rounded_dmin * (float)out->minima[g]),
                           out->qs + n * g);
    }
}

static const float spans_2_bit[8] = {2.0f, 2.6f, 2.8f, 3.0f, 3.2f, 3.4f, 3.6f, 4.0f};

static void encode_q2_k(const float *src, void *dst, int64_t n, const float *weights, float inverse_multiplier) {
    dg_block_q2_k *block = dst;
    for (int64_t i = 0; i < n; i += SUPER_BLOCK, block++) {
        super_affine scales;
        search_super_affine(3, src + i, weights == NULL ? NULL : weights + i, 16, 15, spans_2_bit, &scales);
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
        search_super_affine(15, src + i, weights == NULL ? NULL : weights + i, 32, 63, spans_4_bit, &scales);
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
        search_super_affine(31, src + i, weights == NULL ? NULL : weights + i, 32, 63, spans_5_bit, &scales);
        block->d = scales.d;
        block->dmin = scales.dmin;
        pack_scales(&scales, block->scales);
        pack_distant_nibbles(scales.qs, block->qs);
        pack_bit(scales.qs, 4, block->qh);
    }
}
