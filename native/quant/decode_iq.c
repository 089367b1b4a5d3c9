/* Decoding of the codebook formats: IQ2 and IQ3. */
#include <string.h>

#include "quant/blocks.h"
#include "quant/decode.h"
#include "quant/float.h"
#include "quant/iq_grids.h"

/* Seven sign bits; the eighth makes their number even. */
static inline uint32_t complete_signs(uint32_t signs) {
    uint32_t parity = signs ^ signs >> 4;
    parity ^= parity >> 2;
    parity ^= parity >> 1;
    return signs | (parity & 1) << 7;
}

/* Writes scale · ± magnitude for the n elements of one point. */
static inline void put_point(float *dst, int n, int bits, uint32_t point, const uint8_t *magnitudes, uint32_t signs,
                             float scale) {
    for (int j = 0; j < n; j++) {
        float value = scale * (float)magnitudes[point >> bits * j & ((1u << bits) - 1)];
        dst[j] = signs >> j & 1 ? -value : value;
    }
}

static inline void put_8(float *dst, uint32_t point, const uint8_t *magnitudes, uint32_t signs, float scale) {
    put_point(dst, 8, 2, point, magnitudes, signs, scale);
}

static inline void put_4(float *dst, uint32_t point, const uint8_t *magnitudes, uint32_t signs, float scale) {
    put_point(dst, 4, 3, point, magnitudes, signs, scale);
}

void dg_decode_iq2_xxs(const void *src, float *dst, int64_t n) {
    const dg_block_iq2_xxs *block = src;
    for (int64_t b = 0; b < n / 256; b++, block++) {
        float d = dg_f16_to_f32(block->d);
        for (int i = 0; i < 8; i++) {
            const uint8_t *points = block->qs + 8 * i;
            uint32_t signs_scale;
            memcpy(&signs_scale, points + 4, sizeof signs_scale);
            float scale = d * (0.5f + (float)(signs_scale >> 28)) * 0.25f;
            for (int k = 0; k < 4; k++, dst += 8)
                put_8(dst, iq2_xxs_grid[points[k]], iq2_xxs_magnitudes, complete_signs(signs_scale >> 7 * k & 127),
                      scale);
        }
    }
}

void dg_decode_iq2_xs(const void *src, float *dst, int64_t n) {
    const dg_block_iq2_xs *block = src;
    for (int64_t b = 0; b < n / 256; b++, block++) {
        float d = dg_f16_to_f32(block->d);
        for (int k = 0; k < 32; k++, dst += 8) {
            float scale = d * (0.5f + (float)(block->scales[k / 4] >> 4 * (k / 2 % 2) & 15)) * 0.25f;
            put_8(dst, iq2_xs_grid[block->qs[k] & 511], iq2_xs_magnitudes, complete_signs(block->qs[k] >> 9), scale);
        }
    }
}

void dg_decode_iq2_s(const void *src, float *dst, int64_t n) {
    const dg_block_iq2_s *block = src;
    for (int64_t b = 0; b < n / 256; b++, block++) {
        float d = dg_f16_to_f32(block->d);
        for (int k = 0; k < 32; k++, dst += 8) {
            float scale = d * (0.5f + (float)(block->scales[k / 4] >> 4 * (k / 2 % 2) & 15)) * 0.25f;
            int point = block->qs[k] | (block->qh[k / 4] >> 2 * (k % 4) & 3) << 8;
            put_8(dst, iq2_s_grid[point], iq2_s_magnitudes, block->signs[k], scale);
        }
    }
}

void dg_decode_iq3_xxs(const void *src, float *dst, int64_t n) {
    const dg_block_iq3_xxs *block = src;
    for (int64_t b = 0; b < n / 256; b++, block++) {
        float d = dg_f16_to_f32(block->d);
        for (int k = 0; k < 64; k++, dst += 4) {
            uint32_t signs_scale = block->signs_scales[k / 8];
            uint32_t signs = complete_signs(signs_scale >> 7 * (k / 2 % 4) & 127);
            float scale = d * (0.5f + (float)(signs_scale >> 28)) * 0.5f;
            put_4(dst, iq3_xxs_grid[block->qs[k]], iq3_xxs_magnitudes, signs >> 4 * (k % 2), scale);
        }
    }
}

void dg_decode_iq3_s(const void *src, float *dst, int64_t n) {
    const dg_block_iq3_s *block = src;
    for (int64_t b = 0; b < n / 256; b++, block++) {
        float d = dg_f16_to_f32(block->d);
        for (int k = 0; k < 64; k++, dst += 4) {
            float scale = d * (float)(1 + 2 * (block->scales[k / 16] >> 4 * (k / 8 % 2) & 15));
            int point = block->qs[k] | (block->qh[k / 8] >> k % 8 & 1) << 8;
            put_4(dst, iq3_s_grid[point], iq3_s_magnitudes, block->signs[k / 2] >> 4 * (k % 2), scale);
        }
    }
}
