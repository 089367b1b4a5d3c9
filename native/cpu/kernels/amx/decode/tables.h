/* Codes of up to five bits become bfloat16 by looking them up in a table of the values that they stand for. Included by
 * amx/decode.h. */

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
