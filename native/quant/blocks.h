/* Block formats: how weights are laid out in a file, and what decodes and encodes them.
 *
 * A row of a tensor is a whole number of blocks; blocks of consecutive rows follow each other without padding. In the
 * drawings below the most significant bit of a byte stands left; "e7" is element 7 of the block, `d` and `m` are
 * float16, stored as their bits. Everything is little endian. The structs are packed because a file may put a tensor
 * at any address.
 *
 * Sources: the `gguf` Python package, which decodes all of these, and the specification of the GGUF container. */
#ifndef DG_QUANT_BLOCKS_H
#define DG_QUANT_BLOCKS_H

#include <stdint.h>

#define DG_PACKED __attribute__((packed))

/* ---- Blocks of 32 -------------------------------------------------------------------------------------------- */

/* Nibbles of 32 elements: byte j holds e(j+16) in its upper half and e(j) in its lower one.
 *
 *     qs[j]  h h h h l l l l       l = e(j), h = e(j+16), 0 ≤ j < 16
 *
 * The fifth bits of Q5 stand in qh, bit j of the 32-bit number for e(j). */

/* x = d · (q − 8), q in 0 … 15 */
typedef struct DG_PACKED dg_block_q4_0 {
    uint16_t d;
    uint8_t qs[16];
} dg_block_q4_0;

/* x = d · q + m, q in 0 … 15 */
typedef struct DG_PACKED dg_block_q4_1 {
    uint16_t d, m;
    uint8_t qs[16];
} dg_block_q4_1;

/* x = d · (q − 16), q in 0 … 31 */
typedef struct DG_PACKED dg_block_q5_0 {
    uint16_t d;
    uint8_t qh[4];
    uint8_t qs[16];
} dg_block_q5_0;

/* x = d · q + m, q in 0 … 31 */
typedef struct DG_PACKED dg_block_q5_1 {
    uint16_t d, m;
    uint8_t qh[4];
    uint8_t qs[16];
} dg_block_q5_1;

/* x = d · q, q in −128 … 127 */
typedef struct DG_PACKED dg_block_q8_0 {
    uint16_t d;
    int8_t qs[32];
} dg_block_q8_0;

/* x = d · dg_iq4_values[q]: nibbles as above, on a non-linear scale */
typedef struct DG_PACKED dg_block_iq4_nl {
    uint16_t d;
    uint8_t qs[16];
} dg_block_iq4_nl;

/* Dense near zero, where weights are. */
extern const int8_t dg_iq4_values[16];

/* ---- NVFP4: 64 elements, four groups of 16 ------------------------------------------------------------------- */

/* x = E2M1(q) · scale[group] · m, with the multiplier m of the whole tensor, which stands outside of the blocks.
 *
 *     scales[g]      0 E E E E M M M   unsigned E4M3
 *     qs[8·g + j]    h h h h l l l l   l = e(16·g + j), h = e(16·g + j + 8), 0 ≤ j < 8 */
typedef struct DG_PACKED dg_block_nvfp4 {
    uint8_t scales[4];
    uint8_t qs[32];
} dg_block_nvfp4;

/* Values of the codes SEEM, doubled, so that they are integers. */
extern const int8_t dg_e2m1_doubled[16];

/* ---- Super-blocks of 256 ------------------------------------------------------------------------------------- */

/* Bit planes of 32 consecutive bytes, used by most types below. Four 2-bit elements a byte, for each half of the
 * super-block (128 elements, h = 0 or 1):
 *
 *     qs[32·h + j]   d d c c b b a a    a = e(128·h + j), b = e(128·h + 32 + j), c = …+ 64, d = … + 96, 0 ≤ j < 32
 *
 * two 4-bit elements a byte, for each quarter (64 elements, k = 0 … 3):
 *
 *     qs[32·k + j]   b b b b a a a a    a = e(64·k + j), b = e(64·k + 32 + j), 0 ≤ j < 32
 *
 * and single bits: bit k of qh[j] belongs to e(32·k + j). */

/* x = d · (scales[i] & 15) · q − dmin · (scales[i] >> 4), i = element / 16, q in 0 … 3 */
typedef struct DG_PACKED dg_block_q2_k {
    uint8_t scales[16];
    uint8_t qs[64]; /* four a byte */
    uint16_t d, dmin;
} dg_block_q2_k;

/* x = d · (scale[i] − 32) · q, i = element / 16, q in −4 … 3: two bits in qs, and minus 4 where the bit in hmask is
 * clear. The 6-bit scales s0 … s15 are split into nibbles and pairs of bits:
 *
 *     scales[j]       s(j+8) bits 3-0 | s(j) bits 3-0                            0 ≤ j < 8
 *     scales[8 + j]   s(j+12) bits 5-4 | s(j+8) 5-4 | s(j+4) 5-4 | s(j) 5-4      0 ≤ j < 4 */
typedef struct DG_PACKED dg_block_q3_k {
    uint8_t hmask[32]; /* single bits */
    uint8_t qs[64];    /* four a byte */
    uint8_t scales[12];
    uint16_t d;
} dg_block_q3_k;

/* x = d · scale[i] · q − dmin · min[i], i = element / 32, q in 0 … 15. The 6-bit scales s0 … s7 and minima m0 … m7:
 *
 *     scales[j]       s(j+4) bits 5-4 | s(j)  5-0      0 ≤ j < 4
 *     scales[4 + j]   m(j+4) bits 5-4 | m(j)  5-0
 *     scales[8 + j]   m(j+4) bits 3-0 | s(j+4) 3-0 */
typedef struct DG_PACKED dg_block_q4_k {
    uint16_t d, dmin;
    uint8_t scales[12];
    uint8_t qs[128]; /* two a byte */
} dg_block_q4_k;

/* As Q4_K with a fifth bit: q in 0 … 31 */
typedef struct DG_PACKED dg_block_q5_k {
    uint16_t d, dmin;
    uint8_t scales[12];
    uint8_t qh[32];  /* single bits */
    uint8_t qs[128]; /* two a byte */
} dg_block_q5_k;

/* x = d · scales[i] · (q − 32), i = element / 16, q in 0 … 63. For each half h, 0 ≤ j < 32:
 *
 *     ql[64·h + j]        c c c c a a a a   lower four bits; a = e(128·h + j), b = … + 32, c = … + 64, d = … + 96
 *     ql[64·h + 32 + j]   d d d d b b b b
 *     qh[32·h + j]        d d c c b b a a   upper two bits */
typedef struct DG_PACKED dg_block_q6_k {
    uint8_t ql[128];
    uint8_t qh[64];
    int8_t scales[16];
    uint16_t d;
} dg_block_q6_k;

/* x = d · (scale[i] − 32) · dg_iq4_values[q], i = element / 32. A scale has six bits; the elements of each group of 32
 * are laid out as in Q4_0.
 *
 *     scales_l[j]   s(2j+1) bits 3-0 | s(2j) 3-0                 0 ≤ j < 4
 *     scales_h      s7 bits 5-4 | … | s1 5-4 | s0 5-4 */
typedef struct DG_PACKED dg_block_iq4_xs {
    uint16_t d;
    uint16_t scales_h;
    uint8_t scales_l[4];
    uint8_t qs[128];
} dg_block_iq4_xs;

/* The IQ2 and IQ3 types name points of a codebook (iq_grids.h): eight or four magnitudes at a time, signs apart. Seven
 * sign bits stand for eight: the eighth makes the number of negative elements even. */

/* x = d · (1/2 + scale) / 4 · ± grid, a scale for each 32 elements, i = element / 32; eight bytes each:
 *
 *     bytes 0-3 of qs[8·i]   four points, 8 bits each
 *     bytes 4-7              a 32-bit number: scale in bits 31-28, then the signs of the points, 7 bits each, last
 *                            point first */
typedef struct DG_PACKED dg_block_iq2_xxs {
    uint16_t d;
    uint8_t qs[64];
} dg_block_iq2_xxs;

/* x = d · (1/2 + scale) / 4 · ± grid, a scale for each 16 elements:
 *
 *     qs[k]       SSSS SSSp pppp pppp       signs and point of elements 8k … 8k + 7
 *     scales[j]   scale(2j+1) | scale(2j) */
typedef struct DG_PACKED dg_block_iq2_xs {
    uint16_t d;
    uint16_t qs[32];
    uint8_t scales[8];
} dg_block_iq2_xs;

/* x = d · (1/2 + scale) / 4 · ± grid. A point has ten bits: qs[k], and bits 2(k % 4) and up of qh[k / 4]; bit j of
 * signs[k] belongs to e(8k + j). Scales as in IQ2_XS. */
typedef struct DG_PACKED dg_block_iq2_s {
    uint16_t d;
    uint8_t qs[32];
    uint8_t signs[32];
    uint8_t qh[8];
    uint8_t scales[8];
} dg_block_iq2_s;

/* x = d · (1/2 + scale) / 2 · ± grid, points of four. signs_scales[i] for each 32 elements: as bytes 4-7 of IQ2_XXS */
typedef struct DG_PACKED dg_block_iq3_xxs {
    uint16_t d;
    uint8_t qs[64];
    uint32_t signs_scales[8];
} dg_block_iq3_xxs;

/* x = d · (1 + 2 · scale) · ± grid, points of four, a scale for each 32 elements. A point has nine bits: qs[k], and
 * bit k % 8 of qh[k / 8]; bit j of signs[k] belongs to e(8k + j); scales[j] = scale(2j+1) | scale(2j). */
typedef struct DG_PACKED dg_block_iq3_s {
    uint16_t d;
    uint8_t qs[64];
    uint8_t qh[8];
    uint8_t signs[32];
    uint8_t scales[4];
} dg_block_iq3_s;

/* ---- Functions ---------------------------------------------------------------------------------------------- */

/* Decodes n elements, a multiple of block_size. */
typedef void (*dg_decode)(const void *src, float *dst, int64_t n);

/* Encodes n finite elements, a multiple of block_size, so that what is decoded times 1 / inverse_multiplier (1, but for
 * NVFP4) comes close to `src`. `weights` (n), positive: of each element's squared error, or NULL: all alike. */
typedef void (*dg_encode)(const float *src, void *dst, int64_t n, const float *weights, float inverse_multiplier);

#endif
