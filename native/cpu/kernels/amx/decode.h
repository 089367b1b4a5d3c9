/* Weights to tiles of bfloat16. Included by amx/body.h.
 *
 * A tile holds 16 rows of a weight by one block of 32 columns, 64 bytes a row: what the tile unit takes as its first
 * operand, and what one row of most formats decodes to, so that nothing is transposed. The scale is multiplied in
 * (in float32, then rounded to nearest even), so that sums need no scales afterwards.
 *
 * The columns of a block stand in the order in which sixteen bytes of nibbles give them up with a single shift:
 *
 *     0 2 4 … 14   16 18 … 30   1 3 5 … 15   17 19 … 31
 *
 * Codes of up to five bits stand for few values: these are made, 32 at most, and looked up. Two blocks of a row are
 * decoded at a time, since two registers of floats are rounded as fast as one. Decoding is limited by the one unit that
 * moves bytes between lanes. vpermb needs it once, where vpermw needs another vector unit as well, so vpermb looks the
 * values up. Scales are broadcast by loads, which do not need that unit. */

#define BLOCK_BYTES (DG_BLOCK * 2)              /* of bfloat16 */
#define TILES_BYTES (PANEL_LANES * BLOCK_BYTES) /* a block of columns of all rows of a panel: two tiles */

/* Of the super-block of a row that is being decoded. */
typedef struct row_scales {
    _Alignas(64) float scales[16], mins[16];
} row_scales;

typedef struct tile_source tile_source;

/* Blocks first … first + n_blocks − 1, of 32 columns each, of rows row … row + n_rows − 1: to places TILES_BYTES apart,
 * those of the next row BLOCK_BYTES further. `first` is even. Where a super-block is decoded in several calls, the
 * first of them leaves the scales to the others. */
typedef void (*tile_decoder)(const tile_source *s, int64_t row, int64_t n_rows, int64_t first, int64_t n_blocks,
                             uint8_t *tiles);

/* Some rows of a weight. */
struct tile_source {
    const uint8_t *rows;
    int64_t row_bytes;
    int64_t n_rows;
    int64_t n_blocks; /* of 32 columns, in a row */
    float multiplier;
    tile_decoder decode;
    row_scales *scales; /* (PANEL_LANES) that of row % PANEL_LANES */
};

/* Two blocks of a row from the encoded block at src, of which they are blocks j and j + 1 (or, where a block has 32
 * columns, this and the next one). Only the first is there, and is written, if `single`. */
typedef void (*pair_decoder)(const uint8_t *src, int64_t j, bool single, float multiplier, const row_scales *scales,
                             uint8_t *tiles);
typedef void (*scale_decoder)(const uint8_t *src, float multiplier, row_scales *scales);

/* `unit`: blocks of 32 columns in an encoded block, which takes unit_bytes; decode_scales is NULL but for
 * super-blocks. */
ALWAYS_INLINE void decode_rows(scale_decoder decode_scales, pair_decoder decode_pair, const uint64_t unit,
                               const int64_t unit_bytes, const tile_source *s, int64_t row, int64_t n_rows,
                               int64_t first, int64_t n_blocks, uint8_t *tiles) {
    const float multiplier = s->multiplier;
    const int64_t row_bytes = s->row_bytes;
    const uint8_t *rows = s->rows + row * row_bytes;
    row_scales *scales = &s->scales[row % PANEL_LANES];
    for (int64_t b = first; b < first + n_blocks; b += 2, tiles += 2 * TILES_BYTES) {
        const int64_t j = (int64_t)((uint64_t)b % unit);
        const bool single = b + 1 == first + n_blocks;
        const uint8_t *src = rows + (int64_t)((uint64_t)b / unit) * unit_bytes;
        for (int64_t r = 0; r < n_rows; r++, src += row_bytes) {
            /* What this row will give next, but for what is already there: the processor does not see it coming. */
            __builtin_prefetch(src + (unit == 8 ? unit_bytes + 32 * j : 128), 0, 3);
            if (decode_scales != NULL && j == 0) decode_scales(src, multiplier, &scales[r]);
            decode_pair(src, j, single, multiplier, &scales[r], tiles + r * BLOCK_BYTES);
        }
    }
}

ALWAYS_INLINE uint32_t word_at(const uint8_t *p) {
    uint32_t bits;
    memcpy(&bits, p, sizeof bits);
    return bits;
}
ALWAYS_INLINE uint64_t long_word_at(const uint8_t *p) {
    uint64_t bits;
    memcpy(&bits, p, sizeof bits);
    return bits;
}
ALWAYS_INLINE __m512 half_in_all_lanes(const uint8_t *p) {
    int16_t bits;
    memcpy(&bits, p, sizeof bits);
    return _mm512_cvtph_ps(_mm256_set1_epi16(bits));
}
/* Eight times the multiplier, of which only the first or the first two are wanted: that takes the other unit. So does
 * loading them again, in all lanes, of which the compiler must not know that it could be done in registers. */
ALWAYS_INLINE void load_halves(const uint8_t *p, float multiplier, float x[8]) {
    const __m256 halves = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
    _mm256_storeu_ps(x, _mm256_mul_ps(halves, _mm256_set1_ps(multiplier)));
    __asm__("" : "+m"(*(float(*)[8])x));
}

#include "cpu/kernels/amx/decode/tables.h"

#include "cpu/kernels/amx/decode/blocks.h"

#include "cpu/kernels/amx/decode/super_blocks.h"

/* ---- Any type -------------------------------------------------------------------------------------------------- */

#define DECODER(type, unit, decode_scales)                                                                             \
    static void decode_tiles_##type(const tile_source *s, int64_t row, int64_t n_rows, int64_t first,                  \
                                    int64_t n_blocks, uint8_t *tiles) {                                                \
        decode_rows(decode_scales, type##_pair, unit, sizeof(dg_block_##type), s, row, n_rows, first, n_blocks,        \
                    tiles);                                                                                            \
    }
DECODER(q4_0, 1, NULL)
DECODER(q4_1, 1, NULL)
DECODER(q5_0, 1, NULL)
DECODER(q5_1, 1, NULL)
DECODER(q8_0, 1, NULL)
DECODER(iq4_nl, 1, NULL)
DECODER(nvfp4, 2, NULL)
DECODER(q2_k, 8, q2_k_scales)
DECODER(q3_k, 8, q3_k_scales)
DECODER(q4_k, 8, decode_scales_and_mins)
DECODER(q5_k, 8, decode_scales_and_mins)
DECODER(q6_k, 8, q6_k_scales)
DECODER(iq4_xs, 8, iq4_xs_scales)
#undef DECODER

/* NULL for types that are multiplied in float32. */
static tile_decoder tile_decoder_of(int32_t type) {
    switch (type) {
    case DG_TYPE_Q4_0:
        return decode_tiles_q4_0;
    case DG_TYPE_Q4_1:
        return decode_tiles_q4_1;
    case DG_TYPE_Q5_0:
        return decode_tiles_q5_0;
    case DG_TYPE_Q5_1:
        return decode_tiles_q5_1;
    case DG_TYPE_Q8_0:
        return decode_tiles_q8_0;
    case DG_TYPE_IQ4_NL:
        return decode_tiles_iq4_nl;
    case DG_TYPE_NVFP4:
        return decode_tiles_nvfp4;
    case DG_TYPE_Q2_K:
        return decode_tiles_q2_k;
    case DG_TYPE_Q3_K:
        return decode_tiles_q3_k;
    case DG_TYPE_Q4_K:
        return decode_tiles_q4_k;
    case DG_TYPE_Q5_K:
        return decode_tiles_q5_k;
    case DG_TYPE_Q6_K:
        return decode_tiles_q6_k;
    case DG_TYPE_IQ4_XS:
        return decode_tiles_iq4_xs;
    default:
        return NULL;
    }
}

static tile_source tile_source_of(const dg_weight *weight, int64_t matrix, int64_t first_row, int32_t n_rows,
                                  row_scales *scales) {
    const int64_t row_bytes = (int64_t)dg_row_bytes(weight->type, weight->n_cols);
    return (tile_source){.rows = (const uint8_t *)weight->data + (uint64_t)matrix * weight->matrix_bytes +
                                 first_row * row_bytes,
                         .row_bytes = row_bytes,
                         .n_rows = n_rows,
                         .n_blocks = weight->n_cols / DG_BLOCK,
                         .multiplier = weight->scale != NULL ? weight->scale[matrix] : 1.0f,
                         .decode = tile_decoder_of(weight->type),
                         .scales = scales};
}
