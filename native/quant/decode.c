/* Decoding of the plain formats, of blocks of 32, and of NVFP4. */
#include "quant/decode.h"

#include <string.h>

#include "quant/blocks.h"
#include "quant/float.h"

const int8_t dg_iq4_values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
const int8_t dg_e2m1_doubled[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

void dg_decode_f32(const void *src, float *dst, int64_t n) { memcpy(dst, src, (size_t)n * sizeof *dst); }

void dg_decode_f16(const void *src, float *dst, int64_t n) {
    const uint8_t *bytes = src;
    for (int64_t i = 0; i < n; i++) {
        uint16_t half;
        memcpy(&half, bytes + 2 * i, sizeof half);
        dst[i] = dg_f16_to_f32(half);
    }
}

void dg_decode_bf16(const void *src, float *dst, int64_t n) {
    const uint8_t *bytes = src;
    for (int64_t i = 0; i < n; i++) {
        uint16_t half;
        memcpy(&half, bytes + 2 * i, sizeof half);
        dst[i] = dg_bf16_to_f32(half);
    }
}

void dg_decode_q8_0(const void *src, float *dst, int64_t n) {
    const dg_block_q8_0 *block = src;
    for (int64_t b = 0; b < n / 32; b++, block++, dst += 32) {
        float d = dg_f16_to_f32(block->d);
        for (int j = 0; j < 32; j++) dst[j] = d * (float)block->qs[j];
    }
}

void dg_decode_q4_0(const void *src, float *dst, int64_t n) {
    const dg_block_q4_0 *block = src;
    for (int64_t b = 0; b < n / 32; b++, block++, dst += 32) {
        float d = dg_f16_to_f32(block->d);
        for (int j = 0; j < 16; j++) {
            dst[j] = d * (float)((block->qs[j] & 15) - 8);
            dst[j + 16] = d * (float)((block->qs[j] >> 4) - 8);
        }
    }
}

void dg_decode_q4_1(const void *src, float *dst, int64_t n) {
    const dg_block_q4_1 *block = src;
    for (int64_t b = 0; b < n / 32; b++, block++, dst += 32) {
        float d = dg_f16_to_f32(block->d), m = dg_f16_to_f32(block->m);
        for (int j = 0; j < 16; j++) {
            dst[j] = d * (float)(block->qs[j] & 15) + m;
            dst[j + 16] = d * (float)(block->qs[j] >> 4) + m;
        }
    }
}

static inline uint32_t read_u32(const uint8_t *bytes) {
    uint32_t value;
    memcpy(&value, bytes, sizeof value);
    return value;
}

void dg_decode_q5_0(const void *src, float *dst, int64_t n) {
    const dg_block_q5_0 *block = src;
    for (int64_t b = 0; b < n / 32; b++, block++, dst += 32) {
        float d = dg_f16_to_f32(block->d);
        uint32_t high = read_u32(block->qh);
        for (int j = 0; j < 16; j++) {
            int low = block->qs[j] & 15, upper = block->qs[j] >> 4;
            dst[j] = d * (float)((low | (int)(high >> j & 1) << 4) - 16);
            dst[j + 16] = d * (float)((upper | (int)(high >> (j + 16) & 1) << 4) - 16);
        }
    }
}

void dg_decode_q5_1(const void *src, float *dst, int64_t n) {
    const dg_block_q5_1 *block = src;
    for (int64_t b = 0; b < n / 32; b++, block++, dst += 32) {
        float d = dg_f16_to_f32(block->d), m = dg_f16_to_f32(block->m);
        uint32_t high = read_u32(block->qh);
        for (int j = 0; j < 16; j++) {
            int low = block->qs[j] & 15, upper = block->qs[j] >> 4;
            dst[j] = d * (float)(low | (int)(high >> j & 1) << 4) + m;
            dst[j + 16] = d * (float)(upper | (int)(high >> (j + 16) & 1) << 4) + m;
        }
    }
}

void dg_decode_iq4_nl(const void *src, float *dst, int64_t n) {
    const dg_block_iq4_nl *block = src;
    for (int64_t b = 0; b < n / 32; b++, block++, dst += 32) {
        float d = dg_f16_to_f32(block->d);
        for (int j = 0; j < 16; j++) {
            dst[j] = d * (float)dg_iq4_values[block->qs[j] & 15];
            dst[j + 16] = d * (float)dg_iq4_values[block->qs[j] >> 4];
        }
    }
}

void dg_decode_nvfp4(const void *src, float *dst, int64_t n) {
    const dg_block_nvfp4 *block = src;
    for (int64_t b = 0; b < n / 64; b++, block++, dst += 64) {
        for (int g = 0; g < 4; g++) {
            float d = 0.5f * dg_e4m3_to_f32(block->scales[g]); /* the table below is doubled */
            for (int j = 0; j < 8; j++) {
                uint8_t q = block->qs[8 * g + j];
                dst[16 * g + j] = d * (float)dg_e2m1_doubled[q & 15];
                dst[16 * g + j + 8] = d * (float)dg_e2m1_doubled[q >> 4];
            }
        }
    }
}
