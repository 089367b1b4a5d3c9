/* Decoders of the types with super-blocks of 256 columns, which are eight blocks, to weight tiles. Included by
 * amx/decode.h. */

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
