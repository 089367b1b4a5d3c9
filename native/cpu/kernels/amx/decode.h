/* Weights to tiles of bfloat16. Included by body_amx.h.
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
 * decoded at a time, since two registers of floats are rounded as fast as one. What limits decoding is the one unit
 * that moves bytes between lanes; hence vpermb, which needs it once, and not vpermw, which needs it as well as the
 * other vector unit, and scales that are broadcast by loading them. */

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

/* ---- Codes by table ---------------------------------------------------------------------------------------------- */

/* A table has 32 values; value i is in bytes 2i and 2i + 1, and a word of an index names both. */
#define UPPER_BYTES 0x0100 /* what the second has in addition */

/* Where to take the bytes of an index from, for vpmultishiftqb: bit `to` of both bytes of word k of quadword i is to be
 * bit from_i + step · k of the quadword's source. */
ALWAYS_INLINE __m512i bit_offsets(const int to, const int step, int from_0, int from_1, int from_2, int from_3,
                                  int from_4, int from_5, int from_6, int from_7) {
    const int64_t each = 0x0101010101010101;
    const __m512i words = _mm512_set1_epi64(step * 0x0303020201010000);
    const __m512i first = _mm512_setr_epi64(
        (from_0 + 64 - to) * each, (from_1 + 64 - to) * each, (from_2 + 64 - to) * each, (from_3 + 64 - to) * each,
        (from_4 + 64 - to) * each, (from_5 + 64 - to) * each, (from_6 + 64 - to) * each, (from_7 + 64 - to) * each);
    return _mm512_add_epi8(words, first);
}
/* The same for the nibbles of sixteen bytes that are repeated four times. */
ALWAYS_INLINE __m512i nibble_offsets(void) { return bit_offsets(1, 16, 0, 0, 4, 4, 8, 8, 12, 12); }
/* For bits that begin at bit `from` of 32 bytes, repeated twice: a column to a byte. */
ALWAYS_INLINE __m512i plane_offsets(const int from, const int to) {
    return bit_offsets(to, 16, from, from, from, from, from + 8, from + 8, from + 8, from + 8);
}

ALWAYS_INLINE __m512i four_times(const uint8_t *sixteen_bytes) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)sixteen_bytes));
}
ALWAYS_INLINE __m512i twice(const uint8_t *bytes) {
    return _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)bytes));
}
ALWAYS_INLINE __m512i take(__m512i offsets, __m512i source) { return _mm512_multishift_epi64_epi8(offsets, source); }

/* a & mask | b, and the bits of a where there are some in `mask`, else those of b */
ALWAYS_INLINE __m512i masked_or(__m512i a, __m512i mask, __m512i b) {
    return _mm512_ternarylogic_epi64(a, mask, b, 0xea);
}
ALWAYS_INLINE __m512i choose(__m512i mask, __m512i a, __m512i b) { return _mm512_ternarylogic_epi64(mask, a, b, 0xca); }

ALWAYS_INLINE __m512i table_of(__m512 lower, __m512 upper) { return (__m512i)_mm512_cvtne2ps_pbh(upper, lower); }

/* What a word of an index begins with where its code follows: the lower or the upper sixteen values. */
ALWAYS_INLINE __m512i lower_values(void) { return _mm512_set1_epi16(UPPER_BYTES); }
ALWAYS_INLINE __m512i upper_values(void) { return _mm512_set1_epi16(UPPER_BYTES + 0x2020); }

ALWAYS_INLINE void put(__m512i index, __m512i table, uint8_t *tile) {
    _mm512_storeu_si512(tile, _mm512_permutexvar_epi8(index, table));
}

ALWAYS_INLINE __m512 levels_from(float first) {
    return _mm512_add_ps(_mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_ps(first));
}
ALWAYS_INLINE __m512 sixteen_levels(const int8_t levels[16]) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)levels)));
}

/* ---- Blocks of 32 ------------------------------------------------------------------------------------------------ */

/* A head of `head` bytes, which begins with the scale and may go on with a minimum, and sixteen bytes of nibbles. */
ALWAYS_INLINE void put_nibble_blocks(const int head, __m512 levels, const uint8_t *src, bool single, float multiplier,
                                     uint8_t *tiles) {
    const __m512i nibbles = _mm512_set1_epi8(0x1e);
    const uint8_t *second = single ? src : src + head + 16;
    float heads[2][8];
    load_halves(src, multiplier, heads[0]);
    load_halves(second, multiplier, heads[1]);
    __m512 values[2];
    for (int i = 0; i < 2; i++) {
        const __m512 scale = _mm512_set1_ps(heads[i][0]);
        values[i] =
            head == 4 ? _mm512_fmadd_ps(levels, scale, _mm512_set1_ps(heads[i][1])) : _mm512_mul_ps(levels, scale);
    }
    const __m512i table = table_of(values[0], values[1]);
    put(masked_or(take(nibble_offsets(), four_times(src + head)), nibbles, lower_values()), table, tiles);
    if (single) return;
    put(masked_or(take(nibble_offsets(), four_times(second + head)), nibbles, upper_values()), table,
        tiles + TILES_BYTES);
}

ALWAYS_INLINE void q4_0_pair(const uint8_t *src, int64_t j, bool single, float multiplier, const row_scales *scales,
                             uint8_t *tiles) {
    put_nibble_blocks(2, levels_from(-8), src, single, multiplier, tiles);
}
ALWAYS_INLINE void q4_1_pair(const uint8_t *src, int64_t j, bool single, float multiplier, const row_scales *scales,
                             uint8_t *tiles) {
    put_nibble_blocks(4, levels_from(0), src, single, multiplier, tiles);
}
ALWAYS_INLINE void iq4_nl_pair(const uint8_t *src, int64_t j, bool single, float multiplier, const row_scales *scales,
                               uint8_t *tiles) {
    put_nibble_blocks(2, sixteen_levels(dg_iq4_values), src, single, multiplier, tiles);
}

/* With fifth bits, between head and nibbles. */
ALWAYS_INLINE void put_five_bit_block(const int head, const float first_level, const uint8_t *src, float multiplier,
                                      uint8_t *tile) {
    const __m512i fifth_offsets = bit_offsets(5, 2, 0, 8, 16, 24, 1, 9, 17, 25);
    float heads[8];
    load_halves(src, multiplier, heads);
    const __m512 scale = _mm512_set1_ps(heads[0]), min = _mm512_set1_ps(heads[1]);
    const __m512 lower_levels = levels_from(first_level), upper_levels = levels_from(first_level + 16);
    const __m512 lower = head == 4 ? _mm512_fmadd_ps(lower_levels, scale, min) : _mm512_mul_ps(lower_levels, scale);
    const __m512 upper = head == 4 ? _mm512_fmadd_ps(upper_levels, scale, min) : _mm512_mul_ps(upper_levels, scale);
    const __m512i fifth = take(fifth_offsets, _mm512_set1_epi32((int32_t)word_at(src + head)));
    put(choose(_mm512_set1_epi8(0x1e), take(nibble_offsets(), four_times(src + head + 4)),
               masked_or(fifth, _mm512_set1_epi8(0x20), lower_values())),
        table_of(lower, upper), tile);
}

ALWAYS_INLINE void q5_0_pair(const uint8_t *src, int64_t j, bool single, float multiplier, const row_scales *scales,
                             uint8_t *tiles) {
    put_five_bit_block(2, -16, src, multiplier, tiles);
    if (!single) put_five_bit_block(2, -16, src + sizeof(dg_block_q5_0), multiplier, tiles + TILES_BYTES);
}
ALWAYS_INLINE void q5_1_pair(const uint8_t *src, int64_t j, bool single, float multiplier, const row_scales *scales,
                             uint8_t *tiles) {
    put_five_bit_block(4, 0, src, multiplier, tiles);
    if (!single) put_five_bit_block(4, 0, src + sizeof(dg_block_q5_1), multiplier, tiles + TILES_BYTES);
}

/* Block i of two whose codes are bytes without a sign, columns ascending: (code − offset) · scale. Over a code 2^23 is
 * written, so that it is a float without being converted. */
ALWAYS_INLINE void put_bytes(const int i, __m512i codes, const float offset, __m512 scale, uint8_t *tile) {
    const __m512i power = _mm512_set1_epi32(0x4b000000);
    const __m512 zero = _mm512_set1_ps(0x1p23f + offset);
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i first = _mm512_add_epi32(even, _mm512_set1_epi32(32 * i));
    const __m512i second = _mm512_add_epi32(even, _mm512_set1_epi32(32 * i + 1));
    const __mmask64 lowest = 0x1111111111111111;
    const __m512 a = _mm512_castsi512_ps(_mm512_mask_permutexvar_epi8(power, lowest, first, codes));
    const __m512 b = _mm512_castsi512_ps(_mm512_mask_permutexvar_epi8(power, lowest, second, codes));
    _mm512_storeu_si512(
        tile, table_of(_mm512_mul_ps(_mm512_sub_ps(a, zero), scale), _mm512_mul_ps(_mm512_sub_ps(b, zero), scale)));
}

ALWAYS_INLINE void q8_0_pair(const uint8_t *src, int64_t j, bool single, float multiplier, const row_scales *scales,
                             uint8_t *tiles) {
    const uint8_t *second = single ? src : src + sizeof(dg_block_q8_0);
    const __m512i loaded = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)(src + 2))),
                                              _mm256_loadu_si256((const __m256i *)(second + 2)), 1);
    const __m512i codes = _mm512_xor_si512(loaded, _mm512_set1_epi8((char)0x80));
    float heads[2][8];
    load_halves(src, multiplier, heads[0]);
    load_halves(second, multiplier, heads[1]);
    put_bytes(0, codes, 128, _mm512_set1_ps(heads[0][0]), tiles);
    if (!single) put_bytes(1, codes, 128, _mm512_set1_ps(heads[1][0]), tiles + TILES_BYTES);
}

/* ---- NVFP4 ---------------------------------------------------------------------------------------------------------
 */

/* A block: two groups of eight bytes. */
ALWAYS_INLINE void put_nvfp4_block(const uint8_t *groups, __m512 levels, float scale, float second_scale,
                                   uint8_t *tile) {
    const __m512i offsets = bit_offsets(1, 16, 0, 4, 0, 4, 8, 12, 8, 12);
    const __m512i source = _mm512_mask_set1_epi64(_mm512_set1_epi64((int64_t)long_word_at(groups)), 0xcc,
                                                  (int64_t)long_word_at(groups + 8));
    const __m512i groups_values = _mm512_mask_blend_epi64(0xcc, lower_values(), upper_values());
    put(masked_or(take(offsets, source), _mm512_set1_epi8(0x1e), groups_values),
        table_of(_mm512_mul_ps(levels, _mm512_set1_ps(scale)), _mm512_mul_ps(levels, _mm512_set1_ps(second_scale))),
        tile);
}

/* Halves of E4M3 numbers, since the levels are doubled; the code of NaN stands for zero. */
#define SEVEN(step) 8 * step, 9 * step, 10 * step, 11 * step, 12 * step, 13 * step, 14 * step
#define EIGHT(step) SEVEN(step), 15 * step
static const float halves_of_e4m3[128] = {
    0 * 0x1p-10f,   1 * 0x1p-10f,   2 * 0x1p-10f,    3 * 0x1p-10f,   4 * 0x1p-10f,   5 * 0x1p-10f,
    6 * 0x1p-10f,   7 * 0x1p-10f,   EIGHT(0x1p-10f), EIGHT(0x1p-9f), EIGHT(0x1p-8f), EIGHT(0x1p-7f),
    EIGHT(0x1p-6f), EIGHT(0x1p-5f), EIGHT(0x1p-4f),  EIGHT(0x1p-3f), EIGHT(0x1p-2f), EIGHT(0x1p-1f),
    EIGHT(0x1p0f),  EIGHT(0x1p1f),  EIGHT(0x1p2f),   EIGHT(0x1p3f),  SEVEN(0x1p4f),  0};
#undef SEVEN
#undef EIGHT

ALWAYS_INLINE void nvfp4_pair(const uint8_t *src, int64_t j, bool single, float multiplier, const row_scales *scales,
                              uint8_t *tiles) {
    const __m512 levels = _mm512_mul_ps(sixteen_levels(dg_e2m1_doubled), _mm512_set1_ps(multiplier));
    put_nvfp4_block(src + 4, levels, halves_of_e4m3[src[0] & 127], halves_of_e4m3[src[1] & 127], tiles);
    if (!single)
        put_nvfp4_block(src + 20, levels, halves_of_e4m3[src[2] & 127], halves_of_e4m3[src[3] & 127],
                        tiles + TILES_BYTES);
}

/* ---- Super-blocks of 256: eight blocks ------------------------------------------------------------------------- */

/* Eight scales and minima of six bits each: scale i in lane i, minimum i in lane 8 + i. The lower bits first, which for
 * the second four minima are upper nibbles. */
ALWAYS_INLINE void decode_scales_and_mins(const uint8_t *src, float multiplier, row_scales *scales) {
    const __m512i low_bytes = _mm512_setr_epi32(4, 5, 6, 7, 12, 13, 14, 15, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i high_bytes = _mm512_setr_epi32(0, 0, 0, 0, 4, 5, 6, 7, 0, 0, 0, 0, 8, 9, 10, 11);
    const __m512i shifts = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4, 4, 4, 4);
    const __m512i low_bits = _mm512_setr_epi32(63, 63, 63, 63, 15, 15, 15, 15, 63, 63, 63, 63, 15, 15, 15, 15);
    const __m512i high_bits = _mm512_setr_epi32(0, 0, 0, 0, 48, 48, 48, 48, 0, 0, 0, 0, 48, 48, 48, 48);
    const __m128i head = _mm_loadu_si128((const __m128i *)src);
    const __m512i bytes = _mm512_castsi128_si512(head);
    const __m512i low = _mm512_srlv_epi32(_mm512_permutexvar_epi8(low_bytes, bytes), shifts);
    const __m512i high = _mm512_srli_epi32(_mm512_permutexvar_epi8(high_bytes, bytes), 2);
    const __m512i both = masked_or(low, low_bits, _mm512_and_si512(high, high_bits));
    const __m512 d = _mm512_permutexvar_ps(_mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1),
                                           _mm512_castps128_ps512(_mm_cvtph_ps(head)));
    const __m512 all = _mm512_mul_ps(_mm512_mul_ps(d, _mm512_cvtepi32_ps(both)), _mm512_set1_ps(multiplier));
    _mm256_store_ps(scales->scales, _mm512_castps512_ps256(all));
    _mm256_store_ps(scales->mins, _mm512_extractf32x8_ps(all, 1));
}

/* The values of sixteen levels by scale and minimum j. */
ALWAYS_INLINE __m512 scaled_levels(__m512 levels, const row_scales *scales, int64_t j) {
    return _mm512_fmsub_ps(levels, _mm512_set1_ps(scales->scales[j]), _mm512_set1_ps(scales->mins[j]));
}

ALWAYS_INLINE void q4_k_pair(const uint8_t *src, int64_t j, bool single, float multiplier, const row_scales *scales,
                             uint8_t *tiles) {
    const __m512i nibbles = _mm512_set1_epi8(0x1e), bytes = twice(src + 16 + 16 * j);
    const __m512i table =
        table_of(scaled_levels(levels_from(0), scales, j), scaled_levels(levels_from(0), scales, j + 1));
    put(masked_or(take(plane_offsets(0, 1), bytes), nibbles, lower_values()), table, tiles);
    put(masked_or(take(plane_offsets(4, 1), bytes), nibbles, upper_values()), table, tiles + TILES_BYTES);
}

ALWAYS_INLINE void put_q5_k_block(int64_t j, __m512i low, __m512i high, const row_scales *scales, uint8_t *tile) {
    put(choose(_mm512_set1_epi8(0x1e), low, masked_or(high, _mm512_set1_epi8(0x20), lower_values())),
        table_of(scaled_levels(levels_from(0), scales, j), scaled_levels(levels_from(16), scales, j)), tile);
}
ALWAYS_INLINE void q5_k_pair(const uint8_t *src, int64_t j, bool single, float multiplier, const row_scales *scales,
                             uint8_t *tiles) {
    const __m512i bytes = twice(src + 48 + 16 * j), high = twice(src + 16), at_j = _mm512_set1_epi8((char)j);
    put_q5_k_block(j, take(plane_offsets(0, 1), bytes), take(_mm512_add_epi8(plane_offsets(0, 5), at_j), high), scales,
                   tiles);
    put_q5_k_block(j + 1, take(plane_offsets(4, 1), bytes), take(_mm512_add_epi8(plane_offsets(1, 5), at_j), high),
                   scales, tiles + TILES_BYTES);
}

ALWAYS_INLINE void q6_k_scales(const uint8_t *src, float multiplier, row_scales *scales) {
    const __m512 d = _mm512_mul_ps(half_in_all_lanes(src + 208), _mm512_set1_ps(multiplier));
    _mm512_store_ps(scales->scales, _mm512_mul_ps(sixteen_levels((const int8_t *)src + 192), d));
}
/* Scales of the groups of 16 columns of block j, in the lanes where these stand in put_bytes. */
ALWAYS_INLINE __m512 scales_of_groups(const row_scales *scales, int64_t j) {
    return _mm512_mask_blend_ps(0xff00, _mm512_set1_ps(scales->scales[2 * j]),
                                _mm512_set1_ps(scales->scales[2 * j + 1]));
}
ALWAYS_INLINE void q6_k_pair(const uint8_t *src, int64_t j, bool single, float multiplier, const row_scales *scales,
                             uint8_t *tiles) {
    const int64_t half = j / 4, quarter = j % 4;                 /* 0 or 2 */
    const __m512i bytes = _mm512_set1_epi64(0x3830282018100800); /* where each byte of a quadword begins */
    const __m512i from =
        _mm512_add_epi8(bytes, _mm512_mask_blend_epi64(0xf0, _mm512_set1_epi8(-4), _mm512_set1_epi8(-2)));
    const __m512i high =
        take(_mm512_add_epi8(from, _mm512_set1_epi8((char)(2 * quarter))), twice(src + 128 + 32 * half));
    const __m512i low =
        _mm512_srlv_epi16(_mm512_loadu_si512(src + 64 * half), _mm512_set1_epi16((int16_t)(2 * quarter)));
    const __m512i codes = _mm512_and_si512(choose(_mm512_set1_epi8(15), low, high), _mm512_set1_epi8(63));
    put_bytes(0, codes, 32, scales_of_groups(scales, j), tiles);
    put_bytes(1, codes, 32, scales_of_groups(scales, j + 1), tiles + TILES_BYTES);
}

/* Q2_K and Q3_K have four groups of 16 columns in two blocks, and four or eight values for each: value 4 · code + group
 * of the table, so that scales need only be loaded. */
ALWAYS_INLINE __m512 four_groups(const float *x) { return _mm512_broadcast_f32x4(_mm_load_ps(x)); }
ALWAYS_INLINE __m512 four_levels_from(float first) {
    return _mm512_add_ps(_mm512_setr_ps(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3), _mm512_set1_ps(first));
}
/* What a word of an index begins with: block i has groups 2i and 2i + 1. */
ALWAYS_INLINE __m512i group_values(const int i) {
    const int64_t first = 0x0100010001000100 + 4 * i * 0x0101010101010101, second = first + 2 * 0x0101010101010101;
    return _mm512_setr_epi64(first, first, second, second, first, first, second, second);
}

ALWAYS_INLINE void q2_k_scales(const uint8_t *src, float multiplier, row_scales *scales) {
    const __m512 all = _mm512_set1_ps(multiplier);
    const __m512i both = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)src));
    const __m512i low = _mm512_and_si512(both, _mm512_set1_epi32(15)), high = _mm512_srli_epi32(both, 4);
    const __m512 d = _mm512_mul_ps(half_in_all_lanes(src + 80), all);
    const __m512 dmin = _mm512_mul_ps(half_in_all_lanes(src + 82), all);
    _mm512_store_ps(scales->scales, _mm512_mul_ps(_mm512_cvtepi32_ps(low), d));
    _mm512_store_ps(scales->mins, _mm512_mul_ps(_mm512_cvtepi32_ps(high), dmin));
}
ALWAYS_INLINE void q2_k_pair(const uint8_t *src, int64_t j, bool single, float multiplier, const row_scales *scales,
                             uint8_t *tiles) {
    const __m512 values =
        _mm512_fmsub_ps(four_levels_from(0), four_groups(scales->scales + 2 * j), four_groups(scales->mins + 2 * j));
    const __m512i table = _mm512_castsi256_si512((__m256i)_mm512_cvtneps_pbh(values));
    const __m512i bytes = twice(src + 16 + 32 * (j / 4)), at_j = _mm512_set1_epi8((char)(2 * (j % 4)));
    const __m512i two_bits = _mm512_set1_epi8(0x18);
    put(masked_or(take(_mm512_add_epi8(plane_offsets(0, 3), at_j), bytes), two_bits, group_values(0)), table, tiles);
    put(masked_or(take(_mm512_add_epi8(plane_offsets(2, 3), at_j), bytes), two_bits, group_values(1)), table,
        tiles + TILES_BYTES);
}

ALWAYS_INLINE void q3_k_scales(const uint8_t *src, float multiplier, row_scales *scales) {
    const __m512i low_shifts = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 4, 4, 4, 4, 4, 4, 4, 4);
    const __m512i high_shifts = _mm512_setr_epi32(0, 0, 0, 0, 2, 2, 2, 2, 4, 4, 4, 4, 6, 6, 6, 6);
    const __m128i nibbles = _mm_set1_epi64x((int64_t)long_word_at(src + 96));
    const __m128i pairs = _mm_set1_epi32((int32_t)word_at(src + 104));
    const __m512i low = _mm512_srlv_epi32(_mm512_cvtepu8_epi32(nibbles), low_shifts);
    const __m512i high = _mm512_srlv_epi32(_mm512_cvtepu8_epi32(pairs), high_shifts);
    const __m512i codes =
        _mm512_and_si512(choose(_mm512_set1_epi32(15), low, _mm512_slli_epi32(high, 4)), _mm512_set1_epi32(63));
    const __m512 d = _mm512_mul_ps(half_in_all_lanes(src + 108), _mm512_set1_ps(multiplier));
    _mm512_store_ps(scales->scales,
                    _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(codes, _mm512_set1_epi32(32))), d));
}
ALWAYS_INLINE void q3_k_pair(const uint8_t *src, int64_t j, bool single, float multiplier, const row_scales *scales,
                             uint8_t *tiles) {
    const __m512 scale = four_groups(scales->scales + 2 * j);
    const __m512i table =
        table_of(_mm512_mul_ps(four_levels_from(-4), scale), _mm512_mul_ps(four_levels_from(0), scale));
    const __m512i bytes = twice(src + 32 + 32 * (j / 4)), masks = twice(src);
    const __m512i at_low = _mm512_set1_epi8((char)(2 * (j % 4))), at_high = _mm512_set1_epi8((char)j);
    const __m512i two_bits = _mm512_set1_epi8(0x18), third_bit = _mm512_set1_epi8(0x20);
    const __m512i high = take(_mm512_add_epi8(plane_offsets(0, 5), at_high), masks);
    const __m512i second_high = take(_mm512_add_epi8(plane_offsets(1, 5), at_high), masks);
    put(masked_or(take(_mm512_add_epi8(plane_offsets(0, 3), at_low), bytes), two_bits,
                  masked_or(high, third_bit, group_values(0))),
        table, tiles);
    put(masked_or(take(_mm512_add_epi8(plane_offsets(2, 3), at_low), bytes), two_bits,
                  masked_or(second_high, third_bit, group_values(1))),
        table, tiles + TILES_BYTES);
}

ALWAYS_INLINE void iq4_xs_scales(const uint8_t *src, float multiplier, row_scales *scales) {
    const __m256i low_shifts = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
    const __m256i high_shifts = _mm256_setr_epi32(16, 18, 20, 22, 24, 26, 28, 30);
    const __m256i low = _mm256_srlv_epi32(_mm256_set1_epi32((int32_t)word_at(src + 4)), low_shifts);
    const __m256i high = _mm256_srlv_epi32(_mm256_set1_epi32((int32_t)word_at(src)), high_shifts);
    const __m256i codes = _mm256_or_si256(_mm256_and_si256(low, _mm256_set1_epi32(15)),
                                          _mm256_slli_epi32(_mm256_and_si256(high, _mm256_set1_epi32(3)), 4));
    const __m256 d = _mm512_castps512_ps256(half_in_all_lanes(src));
    const __m256 scale = _mm256_cvtepi32_ps(_mm256_sub_epi32(codes, _mm256_set1_epi32(32)));
    _mm256_store_ps(scales->scales, _mm256_mul_ps(_mm256_mul_ps(d, scale), _mm256_set1_ps(multiplier)));
}
ALWAYS_INLINE void iq4_xs_pair(const uint8_t *src, int64_t j, bool single, float multiplier, const row_scales *scales,
                               uint8_t *tiles) {
    const __m512i nibbles = _mm512_set1_epi8(0x1e);
    const __m512 levels = sixteen_levels(dg_iq4_values);
    const __m512i table = table_of(_mm512_mul_ps(levels, _mm512_set1_ps(scales->scales[j])),
                                   _mm512_mul_ps(levels, _mm512_set1_ps(scales->scales[j + 1])));
    const uint8_t *bytes = src + 8 + 16 * j;
    put(masked_or(take(nibble_offsets(), four_times(bytes)), nibbles, lower_values()), table, tiles);
    put(masked_or(take(nibble_offsets(), four_times(bytes + 16)), nibbles, upper_values()), table, tiles + TILES_BYTES);
}

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
