/* Decoders of the types with blocks of 32 columns, and of NVFP4, to weight tiles. Included by amx/decode.h. */

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
