/* Weights to tiles of bfloat16. Included by body_amx.h.
 *
 * A tile holds 16 rows of a weight by one block of 32 columns, 64 bytes a row: what the tile unit takes as its first
 * operand, and what one row of most formats decodes to, so that nothing is transposed. The scale is multiplied in
 * (in float32, then rounded to nearest even), so that sums need no scales afterwards.
 *
 * The columns of a block stand in the order in which sixteen bytes of nibbles give them up with a single shift:
 *
 *     0 2 4 … 14   16 18 … 30   1 3 5 … 15   17 19 … 31 */

#define BLOCK_BYTES (DG_BLOCK * 2)              /* of bfloat16 */
#define TILES_BYTES (PANEL_LANES * BLOCK_BYTES) /* a block of columns of all rows of a panel: two tiles */

/* Blocks first … first + n_blocks − 1, of 32 columns each, of the row that begins at src, to places TILES_BYTES apart;
 * `first` is even. */
typedef void (*row_decoder)(const uint8_t *src, int64_t first, int64_t n_blocks, float multiplier, uint8_t *tiles);

ALWAYS_INLINE float half_at(const uint8_t *p) {
    uint16_t bits;
    memcpy(&bits, p, sizeof bits);
    return _cvtsh_ss(bits);
}

ALWAYS_INLINE __m512 half_in_all_lanes(const uint8_t *p) {
    int16_t bits;
    memcpy(&bits, p, sizeof bits);
    return _mm512_cvtph_ps(_mm256_set1_epi16(bits));
}

/* ---- Four bits a code, by table -------------------------------------------------------------------------------- */

/* Words whose low four bits are the nibbles of sixteen bytes, in the order above; the bits over them are others'. */
ALWAYS_INLINE __m512i nibble_words(const uint8_t *p) {
    const __m512i shifts = _mm512_set_epi64(0x000c000c000c000c, 0x000c000c000c000c, 0x0008000800080008,
                                            0x0008000800080008, 0x0004000400040004, 0x0004000400040004, 0, 0);
    return _mm512_srlv_epi16(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)p)), shifts);
}

/* Two blocks from the sixteen values that each may have: both tables side by side in one register, of which a code's
 * fifth bit picks the half. */
ALWAYS_INLINE void put_by_table(const uint8_t *first, const uint8_t *second, __m512 first_values, __m512 second_values,
                                uint8_t *tiles) {
    const __m512i table = (__m512i)_mm512_cvtne2ps_pbh(second_values, first_values);
    const __m512i four_bits = _mm512_set1_epi16(15), fifth_bit = _mm512_set1_epi16(16);
    const __m512i low = _mm512_and_si512(nibble_words(first), four_bits);
    const __m512i high = _mm512_ternarylogic_epi64(nibble_words(second), four_bits, fifth_bit, 0xea); /* a & b | c */
    _mm512_storeu_si512(tiles, _mm512_permutexvar_epi16(low, table));
    _mm512_storeu_si512(tiles + TILES_BYTES, _mm512_permutexvar_epi16(high, table));
}

/* Types whose blocks of 32 are a head of `head` bytes, which begins with the scale and may go on with a minimum, and
 * sixteen bytes of nibbles. */
ALWAYS_INLINE void decode_nibble_blocks(const int head, const bool has_min, __m512 levels, const uint8_t *src,
                                        int64_t first, int64_t n_blocks, float multiplier, uint8_t *tiles) {
    const int64_t block_bytes = head + 16;
    levels = _mm512_mul_ps(levels, _mm512_set1_ps(multiplier));
    src += first * block_bytes;
    for (int64_t b = 0; b < n_blocks; b += 2, src += 2 * block_bytes, tiles += 2 * TILES_BYTES) {
        const bool single = b + 1 == n_blocks;
        const uint8_t *second = single ? src : src + block_bytes;
        __m512 first_values = _mm512_mul_ps(levels, half_in_all_lanes(src));
        __m512 second_values = _mm512_mul_ps(levels, half_in_all_lanes(second));
        if (has_min) {
            first_values = _mm512_add_ps(first_values, _mm512_set1_ps(half_at(src + 2) * multiplier));
            second_values = _mm512_add_ps(second_values, _mm512_set1_ps(half_at(second + 2) * multiplier));
        }
        if (single) {
            const __m512i table = (__m512i)_mm512_cvtne2ps_pbh(first_values, first_values);
            _mm512_storeu_si512(tiles, _mm512_permutexvar_epi16(nibble_words(src + head), table));
            break;
        }
        put_by_table(src + head, second + head, first_values, second_values, tiles);
    }
}

ALWAYS_INLINE __m512 levels_from(float first) {
    return _mm512_add_ps(_mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_ps(first));
}

ALWAYS_INLINE void q4_0_row(const uint8_t *src, int64_t first, int64_t n_blocks, float multiplier, uint8_t *tiles) {
    decode_nibble_blocks(2, false, levels_from(-8), src, first, n_blocks, multiplier, tiles);
}
static void q4_1_row(const uint8_t *src, int64_t first, int64_t n_blocks, float multiplier, uint8_t *tiles) {
    decode_nibble_blocks(4, true, levels_from(0), src, first, n_blocks, multiplier, tiles);
}
static void iq4_nl_row(const uint8_t *src, int64_t first, int64_t n_blocks, float multiplier, uint8_t *tiles) {
    const __m512 levels = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)dg_iq4_values)));
    decode_nibble_blocks(2, false, levels, src, first, n_blocks, multiplier, tiles);
}

/* ---- Any codes of one byte ------------------------------------------------------------------------------------- */

/* Scales and minima of the two groups of 16 columns of a block. */
typedef struct group_scales {
    float scale[2], min[2];
} group_scales;

/* What two groups multiply or add, in the lanes where their columns stand. */
ALWAYS_INLINE __m512 by_group(const float pair[2]) {
    return _mm512_mask_blend_ps(0xff00, _mm512_set1_ps(pair[0]), _mm512_set1_ps(pair[1]));
}

/* A block of 32 signed codes, columns ascending: scale · code − min. */
ALWAYS_INLINE void put_codes_of(__m256i codes, const group_scales *s, uint8_t *tiles) {
    const __m256i order = _mm256_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30, 1, 3, 5, 7, 9, 11,
                                           13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    const __m256i ordered = _mm256_permutexvar_epi8(order, codes);
    const __m512 scale = by_group(s->scale), min = by_group(s->min);
    const __m512 even = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(ordered)));
    const __m512 odd = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(ordered, 1)));
    _mm512_storeu_si512(tiles, (__m512i)_mm512_cvtne2ps_pbh(_mm512_sub_ps(_mm512_mul_ps(odd, scale), min),
                                                            _mm512_sub_ps(_mm512_mul_ps(even, scale), min)));
}

ALWAYS_INLINE __m256i load_bytes(const uint8_t *p) { return _mm256_loadu_si256((const __m256i *)p); }
ALWAYS_INLINE __m256i all_bytes(int value) { return _mm256_set1_epi8((char)value); }
/* The bits `mask` of each byte, after a shift to the right. */
ALWAYS_INLINE __m256i byte_bits(__m256i a, int shift, int mask) {
    return _mm256_and_si256(_mm256_srl_epi16(a, _mm_cvtsi32_si128(shift)), all_bytes(mask));
}
/* Low nibbles of sixteen bytes, then the high ones. */
ALWAYS_INLINE __m256i split_nibbles(const uint8_t *p) {
    const __m128i bytes = _mm_loadu_si128((const __m128i *)p);
    return _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(bytes, 4), bytes), all_bytes(15));
}

static void q8_0_row(const uint8_t *src, int64_t first, int64_t n_blocks, float multiplier, uint8_t *tiles) {
    src += first * (int64_t)sizeof(dg_block_q8_0);
    for (int64_t b = 0; b < n_blocks; b++, src += sizeof(dg_block_q8_0), tiles += TILES_BYTES) {
        const float scale = half_at(src) * multiplier;
        put_codes_of(load_bytes(src + 2), &(group_scales){{scale, scale}, {0, 0}}, tiles);
    }
}

/* Nibbles with fifth bits: a head of `head` bytes, 32 bits, 16 bytes of nibbles. */
ALWAYS_INLINE void decode_five_bits(const int head, const int offset, const uint8_t *src, int64_t first,
                                    int64_t n_blocks, float multiplier, uint8_t *tiles) {
    src += first * (head + 20);
    for (int64_t b = 0; b < n_blocks; b++, src += head + 20, tiles += TILES_BYTES) {
        uint32_t fifth;
        memcpy(&fifth, src + head, sizeof fifth);
        const __m256i low = _mm256_sub_epi8(split_nibbles(src + head + 4), all_bytes(offset));
        const float scale = half_at(src) * multiplier, min = head == 4 ? -half_at(src + 2) * multiplier : 0;
        put_codes_of(_mm256_mask_add_epi8(low, fifth, low, all_bytes(16)), &(group_scales){{scale, scale}, {min, min}},
                     tiles);
    }
}
static void q5_0_row(const uint8_t *src, int64_t first, int64_t n_blocks, float multiplier, uint8_t *tiles) {
    decode_five_bits(2, 16, src, first, n_blocks, multiplier, tiles);
}
static void q5_1_row(const uint8_t *src, int64_t first, int64_t n_blocks, float multiplier, uint8_t *tiles) {
    decode_five_bits(4, 0, src, first, n_blocks, multiplier, tiles);
}

/* Half of an E4M3 number (the table of codes is doubled); the code of NaN stands for zero. Moved into float32's fields,
 * the number would be too small by 2^120, and slow to multiply where that makes it subnormal. */
ALWAYS_INLINE float half_e4m3_of(uint8_t code) {
    code &= 127;
    if (code == 127) return 0;
    return code < 8 ? (float)code * 0x1p-10f : dg_float_from_bits(((uint32_t)code << 20) + (119u << 23));
}

static void nvfp4_row(const uint8_t *src, int64_t first, int64_t n_blocks, float multiplier, uint8_t *tiles) {
    const __m256i values = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)dg_e2m1_doubled));
    src += first / 2 * (int64_t)sizeof(dg_block_nvfp4);
    for (int64_t b = first; b < first + n_blocks; b++, tiles += TILES_BYTES) {
        const int half = b % 2; /* of 64 columns */
        const __m256i nibbles = split_nibbles(src + 4 + 16 * half);
        const __m256i ascending = _mm256_permute4x64_epi64(nibbles, 0xd8); /* eight bytes are a group */
        const uint8_t *codes = src + 2 * half;
        put_codes_of(
            _mm256_shuffle_epi8(values, ascending),
            &(group_scales){{half_e4m3_of(codes[0]) * multiplier, half_e4m3_of(codes[1]) * multiplier}, {0, 0}}, tiles);
        if (half == 1) src += sizeof(dg_block_nvfp4);
    }
}

/* ---- Super-blocks of 256: eight blocks ------------------------------------------------------------------------- */

/* The six bits of scale j and minimum j of Q4_K and Q5_K. */
ALWAYS_INLINE group_scales scales_of_k(const uint8_t *head, int j, float multiplier) {
    const uint8_t *s = head + 4;
    const int scale = j < 4 ? s[j] & 63 : (s[4 + j] & 15) | s[j - 4] >> 6 << 4;
    const int min = j < 4 ? s[4 + j] & 63 : s[4 + j] >> 4 | s[j] >> 6 << 4;
    const float d = half_at(head) * (float)scale * multiplier, m = half_at(head + 2) * (float)min * multiplier;
    return (group_scales){{d, d}, {m, m}};
}

static void q4_k_row(const uint8_t *src, int64_t first, int64_t n_blocks, float multiplier, uint8_t *tiles) {
    src += first / 8 * (int64_t)sizeof(dg_block_q4_k);
    for (int64_t b = first; b < first + n_blocks; b++, tiles += TILES_BYTES) {
        const int j = b % 8;
        const group_scales s = scales_of_k(src, j, multiplier);
        put_codes_of(byte_bits(load_bytes(src + 16 + 32 * (j / 2)), 4 * (j % 2), 15), &s, tiles);
        if (j == 7) src += sizeof(dg_block_q4_k);
    }
}

static void q5_k_row(const uint8_t *src, int64_t first, int64_t n_blocks, float multiplier, uint8_t *tiles) {
    src += first / 8 * (int64_t)sizeof(dg_block_q5_k);
    for (int64_t b = first; b < first + n_blocks; b++, tiles += TILES_BYTES) {
        const int j = b % 8;
        const group_scales s = scales_of_k(src, j, multiplier);
        const __m256i low = byte_bits(load_bytes(src + 48 + 32 * (j / 2)), 4 * (j % 2), 15);
        const __m256i high = byte_bits(load_bytes(src + 16), j, 1);
        put_codes_of(_mm256_or_si256(low, _mm256_slli_epi16(high, 4)), &s, tiles);
        if (j == 7) src += sizeof(dg_block_q5_k);
    }
}

static void q6_k_row(const uint8_t *src, int64_t first, int64_t n_blocks, float multiplier, uint8_t *tiles) {
    src += first / 8 * (int64_t)sizeof(dg_block_q6_k);
    for (int64_t b = first; b < first + n_blocks; b++, tiles += TILES_BYTES) {
        const int j = b % 8, half = j / 4, quarter = j % 4;
        const __m256i low = byte_bits(load_bytes(src + 64 * half + 32 * (quarter % 2)), 4 * (quarter / 2), 15);
        const __m256i high = byte_bits(load_bytes(src + 128 + 32 * half), 2 * quarter, 3);
        const __m256i codes = _mm256_or_si256(low, _mm256_slli_epi16(high, 4));
        const int8_t *scales = (const int8_t *)src + 192 + 2 * j;
        const float d = half_at(src + 208) * multiplier;
        put_codes_of(_mm256_sub_epi8(codes, all_bytes(32)),
                     &(group_scales){{d * (float)scales[0], d * (float)scales[1]}, {0, 0}}, tiles);
        if (j == 7) src += sizeof(dg_block_q6_k);
    }
}

static void q2_k_row(const uint8_t *src, int64_t first, int64_t n_blocks, float multiplier, uint8_t *tiles) {
    src += first / 8 * (int64_t)sizeof(dg_block_q2_k);
    for (int64_t b = first; b < first + n_blocks; b++, tiles += TILES_BYTES) {
        const int j = b % 8;
        const uint8_t *s = src + 2 * j;
        const float d = half_at(src + 80) * multiplier, m = half_at(src + 82) * multiplier;
        put_codes_of(byte_bits(load_bytes(src + 16 + 32 * (j / 4)), 2 * (j % 4), 3),
                     &(group_scales){{d * (float)(s[0] & 15), d * (float)(s[1] & 15)},
                                     {m * (float)(s[0] >> 4), m * (float)(s[1] >> 4)}},
                     tiles);
        if (j == 7) src += sizeof(dg_block_q2_k);
    }
}

ALWAYS_INLINE float q3_k_scale(const uint8_t *scales, int i) {
    const int low = scales[i % 8] >> 4 * (i / 8) & 15, high = scales[8 + i % 4] >> 2 * (i / 4) & 3;
    return (float)((low | high << 4) - 32);
}

static void q3_k_row(const uint8_t *src, int64_t first, int64_t n_blocks, float multiplier, uint8_t *tiles) {
    src += first / 8 * (int64_t)sizeof(dg_block_q3_k);
    for (int64_t b = first; b < first + n_blocks; b++, tiles += TILES_BYTES) {
        const int j = b % 8;
        const __m256i low = byte_bits(load_bytes(src + 32 + 32 * (j / 4)), 2 * (j % 4), 3);
        const __m256i high = byte_bits(load_bytes(src), j, 1);
        const __m256i codes = _mm256_or_si256(low, _mm256_slli_epi16(high, 2));
        const float d = half_at(src + 108) * multiplier;
        put_codes_of(_mm256_sub_epi8(codes, all_bytes(4)),
                     &(group_scales){{d * q3_k_scale(src + 96, 2 * j), d * q3_k_scale(src + 96, 2 * j + 1)}, {0, 0}},
                     tiles);
        if (j == 7) src += sizeof(dg_block_q3_k);
    }
}

static void iq4_xs_row(const uint8_t *src, int64_t first, int64_t n_blocks, float multiplier, uint8_t *tiles) {
    const __m256i values = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)dg_iq4_values));
    src += first / 8 * (int64_t)sizeof(dg_block_iq4_xs);
    for (int64_t b = first; b < first + n_blocks; b++, tiles += TILES_BYTES) {
        const int j = b % 8;
        const int low = src[4 + j / 2] >> 4 * (j % 2) & 15, high = (src[2] | src[3] << 8) >> 2 * j & 3;
        const float scale = half_at(src) * (float)((low | high << 4) - 32) * multiplier;
        put_codes_of(_mm256_shuffle_epi8(values, split_nibbles(src + 8 + 16 * j)),
                     &(group_scales){{scale, scale}, {0, 0}}, tiles);
        if (j == 7) src += sizeof(dg_block_iq4_xs);
    }
}

/* ---- Any type -------------------------------------------------------------------------------------------------- */

/* NULL for types that are multiplied in float32. */
static row_decoder row_decoder_of(int32_t type) {
    switch (type) {
    case DG_TYPE_Q4_0:
        return q4_0_row;
    case DG_TYPE_Q4_1:
        return q4_1_row;
    case DG_TYPE_Q5_0:
        return q5_0_row;
    case DG_TYPE_Q5_1:
        return q5_1_row;
    case DG_TYPE_Q8_0:
        return q8_0_row;
    case DG_TYPE_IQ4_NL:
        return iq4_nl_row;
    case DG_TYPE_NVFP4:
        return nvfp4_row;
    case DG_TYPE_Q2_K:
        return q2_k_row;
    case DG_TYPE_Q3_K:
        return q3_k_row;
    case DG_TYPE_Q4_K:
        return q4_k_row;
    case DG_TYPE_Q5_K:
        return q5_k_row;
    case DG_TYPE_Q6_K:
        return q6_k_row;
    case DG_TYPE_IQ4_XS:
        return iq4_xs_row;
    default:
        return NULL;
    }
}

/* Some rows of a weight. */
typedef struct tile_source {
    const uint8_t *rows;
    int64_t row_bytes;
    int64_t n_rows;
    int64_t n_blocks; /* of 32 columns, in a row */
    float multiplier;
    row_decoder decode;
} tile_source;

static tile_source tile_source_of(const dg_weight *weight, int64_t matrix, int64_t first_row, int32_t n_rows) {
    const int64_t row_bytes = (int64_t)dg_row_bytes(weight->type, weight->n_cols);
    return (tile_source){.rows = (const uint8_t *)weight->data + (uint64_t)matrix * weight->matrix_bytes +
                                 first_row * row_bytes,
                         .row_bytes = row_bytes,
                         .n_rows = n_rows,
                         .n_blocks = weight->n_cols / DG_BLOCK,
                         .multiplier = weight->scale != NULL ? weight->scale[matrix] : 1.0f,
                         .decode = row_decoder_of(weight->type)};
}
