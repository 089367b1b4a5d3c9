/* Encoders of the plain formats and of blocks of 32. Included once for each instruction set. */
#include <math.h>

#include "quant/blocks.h"
#include "quant/float.h"
#include "quant/search.h"

/* Elements and weights of N_LANES groups; where there are fewer, the rest are zero. */
typedef struct group_batch {
    floats x[32], w[32]; /* (n) */
} group_batch;

LANES_INLINE void load_batch(group_batch *batch, const float *src, const float *weights, int n_groups, int n) {
    float padded[N_LANES * 32];
    if (n_groups < N_LANES) {
        memset(padded, 0, sizeof padded);
        memcpy(padded, src, (size_t)(n_groups * n) * sizeof *src);
        src = padded;
    }
    load_groups(src, n, batch->x);
    if (weights == NULL) {
        for (int j = 0; j < n; j++) batch->w[j] = all(1.0f);
        return;
    }
    if (n_groups < N_LANES) {
        memcpy(padded, weights, (size_t)(n_groups * n) * sizeof *weights);
        weights = padded;
    }
    load_groups(weights, n, batch->w);
}

static inline int batch_size(int64_t n_left) { return n_left < N_LANES ? (int)n_left : N_LANES; }

static inline const float *at(const float *weights, int64_t i) { return weights == NULL ? NULL : weights + i; }

/* The binary16 nearest to each scale, but not zero for a scale that is not: codes of ±1 are better than none. */
LANES_INLINE ints scale_bits(floats scale) {
    ints half = f16_bits(scale);
    return half | ((scale != 0.0f) & ((half & 0x7fff) == 0) & 1);
}

/* ---- Plain formats ------------------------------------------------------------------------------------------- */

static void encode_f32(const float *src, void *dst, int64_t n, const float *weights, float inverse_multiplier) {
    memcpy(dst, src, (size_t)n * sizeof *src);
}

static void encode_f16(const float *src, void *dst, int64_t n, const float *weights, float inverse_multiplier) {
    uint8_t *out = dst;
    int64_t i = 0;
    for (; i + N_LANES <= n; i += N_LANES) {
        halves half = __builtin_convertvector(f16_bits(load(src + i)), halves);
        memcpy(out + 2 * i, &half, sizeof half);
    }
    for (; i < n; i++) {
        uint16_t half = dg_f32_to_f16(src[i]);
        memcpy(out + 2 * i, &half, sizeof half);
    }
}

static void encode_bf16(const float *src, void *dst, int64_t n, const float *weights, float inverse_multiplier) {
    uint8_t *out = dst;
    for (int64_t i = 0; i < n; i++) {
        uint16_t half = dg_f32_to_bf16(src[i]);
        memcpy(out + 2 * i, &half, sizeof half);
    }
}

/* ---- Blocks of 32 -------------------------------------------------------------------------------------------- */

/* On which values the element with the largest magnitude is tried. Chosen greedily on normal and heavy-tailed numbers:
 * the error is within 0.2 % of that of thirty values. */
static const float targets_4_bit[8] = {-8.75f, -8.5f, -8.25f, -8.0f, -7.75f, -7.25f, -7.0f, -6.25f};
static const float targets_5_bit[8] = {-16.5f, -16.25f, -16.0f, -15.75f, -15.25f, -15.0f, -14.75f, -14.0f};
static const float targets_iq4[8] = {-137.0f, -130.0f, -123.0f, -110.0f, -103.0f, 110.0f, 117.0f, 124.0f};

/* Bits of the scales, and their inverses, of up to N_LANES blocks. */
typedef struct block_scales {
    int32_t bits[N_LANES];
    float inverse[N_LANES];
} block_scales;

LANES_INLINE block_scales keep_scales(floats scale) {
    block_scales scales;
    ints bits = scale_bits(scale);
    memcpy(scales.bits, &bits, sizeof bits);
    store(scales.inverse, inverse(f16_value(bits)));
    return scales;
}

LANES_INLINE block_scales search_blocks(levels kind, const float *src, const float *weights, int n_blocks,
                                        const float *targets) {
    group_batch batch;
    load_batch(&batch, src, weights, n_blocks, 32);
    return keep_scales(search_scale(kind, batch.x, batch.w, 32, targets));
}

/* Two elements a byte: 16 apart. */
LANES_INLINE void pack_nibbles(const uint8_t *codes, uint8_t *qs) {
    for (int j = 0; j < 16; j++) qs[j] = (uint8_t)((codes[j] & 15) | codes[j + 16] << 4);
}

/* Bit 4 of each of 32 codes. */
LANES_INLINE void pack_fifth_bits(const uint8_t *codes, uint8_t *qh) {
    uint32_t bits = 0;
    for (int j = 0; j < 32; j++) bits |= (uint32_t)(codes[j] >> 4 & 1) << j;
    memcpy(qh, &bits, sizeof bits);
}

static void encode_q4_0(const float *src, void *dst, int64_t n, const float *weights, float inverse_multiplier) {
    dg_block_q4_0 *block = dst;
    for (int64_t b = 0; b < n / 32; b += N_LANES) {
        int n_blocks = batch_size(n / 32 - b);
        block_scales scales = search_blocks(LEVELS_4_BIT, src + 32 * b, at(weights, 32 * b), n_blocks, targets_4_bit);
        for (int i = 0; i < n_blocks; i++, block++) {
            uint8_t codes[32];
            store_codes(LEVELS_4_BIT, src + 32 * (b + i), 32, scales.inverse[i], codes);
            block->d = (uint16_t)scales.bits[i];
            pack_nibbles(codes, block->qs);
        }
    }
}

static void encode_q5_0(const float *src, void *dst, int64_t n, const float *weights, float inverse_multiplier) {
    dg_block_q5_0 *block = dst;
    for (int64_t b = 0; b < n / 32; b += N_LANES) {
        int n_blocks = batch_size(n / 32 - b);
        block_scales scales = search_blocks(LEVELS_5_BIT, src + 32 * b, at(weights, 32 * b), n_blocks, targets_5_bit);
        for (int i = 0; i < n_blocks; i++, block++) {
            uint8_t codes[32];
            store_codes(LEVELS_5_BIT, src + 32 * (b + i), 32, scales.inverse[i], codes);
            block->d = (uint16_t)scales.bits[i];
            pack_nibbles(codes, block->qs);
            pack_fifth_bits(codes, block->qh);
        }
    }
}

static void encode_iq4_nl(const float *src, void *dst, int64_t n, const float *weights, float inverse_multiplier) {
    dg_block_iq4_nl *block = dst;
    for (int64_t b = 0; b < n / 32; b += N_LANES) {
        int n_blocks = batch_size(n / 32 - b);
        block_scales scales = search_blocks(LEVELS_IQ4, src + 32 * b, at(weights, 32 * b), n_blocks, targets_iq4);
        for (int i = 0; i < n_blocks; i++, block++) {
            uint8_t codes[32];
            store_codes(LEVELS_IQ4, src + 32 * (b + i), 32, scales.inverse[i], codes);
            block->d = (uint16_t)scales.bits[i];
            pack_nibbles(codes, block->qs);
        }
    }
}

/* No search: with 255 levels there is nothing to gain, and the engine writes its cache with this one. The integers are
 * those of the rounded scale. */
static void encode_q8_0(const float *src, void *dst, int64_t n, const float *weights, float inverse_multiplier) {
    dg_block_q8_0 *block = dst;
    for (int64_t b = 0; b < n / 32; b += N_LANES) {
        int n_blocks = batch_size(n / 32 - b);
        float maxima[N_LANES * N_LANES] = {0}; /* of each block, lane by lane */
        for (int i = 0; i < n_blocks; i++) {
            floats most = {0};
            for (int j = 0; j < 32; j += N_LANES) most = larger(most, magnitude(load(src + 32 * (b + i) + j)));
            store(maxima + N_LANES * i, most);
        }
        floats by_block[N_LANES], most = {0};
        load_groups(maxima, N_LANES, by_block);
        for (int j = 0; j < N_LANES; j++) most = larger(most, by_block[j]);

        block_scales scales = keep_scales(most / 127.0f);
        for (int i = 0; i < n_blocks; i++, block++) {
            store_codes(LEVELS_8_BIT, src + 32 * (b + i), 32, scales.inverse[i], (uint8_t *)block->qs);
            block->d = (uint16_t)scales.bits[i];
        }
    }
}

/* ---- Blocks of 32 with an offset ----------------------------------------------------------------------------- */

/* Likewise, into how many steps the range of the elements is divided; within 0.4 %. */
static const float spans_4_bit[8] = {13.0f, 14.0f, 14.25f, 14.75f, 15.0f, 15.25f, 15.5f, 15.75f};
static const float spans_5_bit[8] = {29.0f, 29.75f, 30.0f, 30.25f, 30.75f, 31.0f, 31.25f, 31.5f};

typedef struct affine_scales {
    int32_t scale_bits[N_LANES], offset_bits[N_LANES];
    float inverse[N_LANES], offset[N_LANES];
} affine_scales;

LANES_INLINE affine_scales search_affine_blocks(float high, const float *src, const float *weights, int n_blocks,
                                                const float *spans) {
    group_batch batch;
    affine_scales scales;
    load_batch(&batch, src, weights, n_blocks, 32);
    affine fit = search_affine(high, false, batch.x, batch.w, 32, spans, weights != NULL);
    ints scale = scale_bits(fit.scale);
    /* The best offset for the rounded scale is another, by much where one element is far larger than the rest. */
    floats kept = f16_value(scale), inverse_scale = inverse(kept);
    affine_sums sums;
    sum_affine_trials(high, batch.x, batch.w, 32, 1, &inverse_scale, &fit.offset, &sums);
    moment_sums moments = sum_moments(batch.x, batch.w, 32);
    ints offset = f16_bits((moments.x - kept * sums.q) * inverse(moments.w));
    memcpy(scales.scale_bits, &scale, sizeof scale);
    memcpy(scales.offset_bits, &offset, sizeof offset);
    store(scales.inverse, inverse(f16_value(scale)));
    store(scales.offset, f16_value(offset));
    return scales;
}

static void encode_q4_1(const float *src, void *dst, int64_t n, const float *weights, float inverse_multiplier) {
    dg_block_q4_1 *block = dst;
    for (int64_t b = 0; b < n / 32; b += N_LANES) {
        int n_blocks = batch_size(n / 32 - b);
        affine_scales scales = search_affine_blocks(15, src + 32 * b, at(weights, 32 * b), n_blocks, spans_4_bit);
        for (int i = 0; i < n_blocks; i++, block++) {
            uint8_t codes[32];
            store_affine_codes(15, src + 32 * (b + i), 32, scales.inverse[i], scales.offset[i], codes);
            block->d = (uint16_t)scales.scale_bits[i];
            block->m = (uint16_t)scales.offset_bits[i];
            pack_nibbles(codes, block->qs);
        }
    }
}

static void encode_q5_1(const float *src, void *dst, int64_t n, const float *weights, float inverse_multiplier) {
    dg_block_q5_1 *block = dst;
    for (int64_t b = 0; b < n / 32; b += N_LANES) {
        int n_blocks = batch_size(n / 32 - b);
        affine_scales scales = search_affine_blocks(31, src + 32 * b, at(weights, 32 * b), n_blocks, spans_5_bit);
        for (int i = 0; i < n_blocks; i++, block++) {
            uint8_t codes[32];
            store_affine_codes(31, src + 32 * (b + i), 32, scales.inverse[i], scales.offset[i], codes);
            block->d = (uint16_t)scales.scale_bits[i];
            block->m = (uint16_t)scales.offset_bits[i];
            pack_nibbles(codes, block->qs);
            pack_fifth_bits(codes, block->qh);
        }
    }
}
