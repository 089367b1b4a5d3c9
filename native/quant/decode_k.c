/* Decoding of super-blocks of 256 with scales of their own: Q2_K … Q6_K and IQ4_XS. */
#include "quant/blocks.h"
#include "quant/decode.h"
#include "quant/float.h"

void dg_decode_q2_k(const void *src, float *dst, int64_t n) {
    const dg_block_q2_k *block = src;
    for (int64_t b = 0; b < n / 256; b++, block++) {
        float d = dg_f16_to_f32(block->d), dmin = dg_f16_to_f32(block->dmin);
        for (int i = 0; i < 16; i++, dst += 16) {
            const uint8_t *qs = block->qs + 32 * (i / 8) + 16 * (i % 2);
            int shift = i % 8 / 2 * 2;
            float scale = d * (float)(block->scales[i] & 15), minimum = dmin * (float)(block->scales[i] >> 4);
            for (int j = 0; j < 16; j++) dst[j] = scale * (float)(qs[j] >> shift & 3) - minimum;
        }
    }
}

void dg_decode_q3_k(const void *src, float *dst, int64_t n) {
    const dg_block_q3_k *block = src;
    for (int64_t b = 0; b < n / 256; b++, block++) {
        float d = dg_f16_to_f32(block->d);
        for (int i = 0; i < 16; i++, dst += 16) {
            const uint8_t *qs = block->qs + 32 * (i / 8) + 16 * (i % 2), *hmask = block->hmask + 16 * (i % 2);
            int shift = i % 8 / 2 * 2;
            int low = block->scales[i % 8] >> 4 * (i / 8) & 15, high = block->scales[8 + i % 4] >> 2 * (i / 4) & 3;
            float scale = d * (float)((low | high << 4) - 32);
            for (int j = 0; j < 16; j++) {
                int q = (qs[j] >> shift & 3) - (hmask[j] >> i / 2 & 1 ? 0 : 4);
                dst[j] = scale * (float)q;
            }
        }
    }
}

/* The 6-bit scale and minimum of group i of a Q4_K or Q5_K block. */
static inline void unpack_scale(const uint8_t *scales, int i, int *scale, int *minimum) {
    if (i < 4) {
        *scale = scales[i] & 63;
        *minimum = scales[4 + i] & 63;
    } else {
        *scale = (scales[4 + i] & 15) | scales[i - 4] >> 6 << 4;
        *minimum = scales[4 + i] >> 4 | scales[i] >> 6 << 4;
    }
}

void dg_decode_q4_k(const void *src, float *dst, int64_t n) {
    const dg_block_q4_k *block = src;
    for (int64_t b = 0; b < n / 256; b++, block++) {
        float d = dg_f16_to_f32(block->d), dmin = dg_f16_to_f32(block->dmin);
        for (int i = 0; i < 8; i++, dst += 32) {
            const uint8_t *qs = block->qs + 32 * (i / 2);
            int scale, minimum, shift = 4 * (i % 2);
            unpack_scale(block->scales, i, &scale, &minimum);
            float step = d * (float)scale, offset = dmin * (float)minimum;
            for (int j = 0; j < 32; j++) dst[j] = step * (float)(qs[j] >> shift & 15) - offset;
        }
    }
}

void dg_decode_q5_k(const void *src, float *dst, int64_t n) {
    const dg_block_q5_k *block = src;
    for (int64_t b = 0; b < n / 256; b++, block++) {
        float d = dg_f16_to_f32(block->d), dmin = dg_f16_to_f32(block->dmin);
        for (int i = 0; i < 8; i++, dst += 32) {
            const uint8_t *qs = block->qs + 32 * (i / 2);
            int scale, minimum, shift = 4 * (i % 2);
            unpack_scale(block->scales, i, &scale, &minimum);
            float step = d * (float)scale, offset = dmin * (float)minimum;
            for (int j = 0; j < 32; j++) {
                int q = (qs[j] >> shift & 15) | (block->qh[j] >> i & 1) << 4;
                dst[j] = step * (float)q - offset;
            }
        }
    }
}

void dg_decode_q6_k(const void *src, float *dst, int64_t n) {
    const dg_block_q6_k *block = src;
    for (int64_t b = 0; b < n / 256; b++, block++) {
        float d = dg_f16_to_f32(block->d);
        for (int i = 0; i < 16; i++, dst += 16) {
            int half = i / 8, plane = i % 8 / 2, offset = 16 * (i % 2); /* planes a, b, c, d of the drawing */
            const uint8_t *ql = block->ql + 64 * half + 32 * (plane % 2) + offset;
            const uint8_t *qh = block->qh + 32 * half + offset;
            float scale = d * (float)block->scales[i];
            for (int j = 0; j < 16; j++) {
                int q = (ql[j] >> 4 * (plane / 2) & 15) | (qh[j] >> 2 * plane & 3) << 4;
                dst[j] = scale * (float)(q - 32);
            }
        }
    }
}

void dg_decode_iq4_xs(const void *src, float *dst, int64_t n) {
    const dg_block_iq4_xs *block = src;
    for (int64_t b = 0; b < n / 256; b++, block++) {
        float d = dg_f16_to_f32(block->d);
        for (int i = 0; i < 8; i++, dst += 32) {
            const uint8_t *qs = block->qs + 16 * i;
            int low = block->scales_l[i / 2] >> 4 * (i % 2) & 15, high = block->scales_h >> 2 * i & 3;
            float scale = d * (float)((low | high << 4) - 32);
            for (int j = 0; j < 16; j++) {
                dst[j] = scale * (float)dg_iq4_values[qs[j] & 15];
                dst[j + 16] = scale * (float)dg_iq4_values[qs[j] >> 4];
            }
        }
    }
}
