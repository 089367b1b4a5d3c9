/* Weights as float16 operands of a warpgroup's products, decoded in registers: the one decode interface of this path.
 *
 *     StageWeights<F> w;    load_stage<F>(w, row, k, k_tiles, lane)    64 columns of 16 rows, as the tiles hold them
 *     uint32_t a[4];        fragment<F>(a, w, step, lane)              16 of the columns: step 0 … 3
 *
 * A lane holds columns 4·t … 4·t + 3 of rows g and g + 8 of each 16, for every type:
 *
 *     position of a fragment   2·t      2·t + 1   2·t + 8   2·t + 9
 *     column of the 16         4·t      4·t + 2   4·t + 1   4·t + 3        half_position is the way back
 *
 * so that the even and the odd bytes of a word of codes make a pair each. Activations of kHalves stand in the same
 * order. A weight is its exact code times its scale, rounded once to 11 bits (types with factors of their own for
 * scales: the scale as well). */
#ifndef DG_CUDA_HOPPER_FRAGMENTS_CUH
#define DG_CUDA_HOPPER_FRAGMENTS_CUH

#include "cuda/formats/formats.cuh"
#include "cuda/hopper/intrinsics.cuh"

constexpr int kStageColumns = 64;

template <class F> struct StageWeights {
    static constexpr int kTiles = kStageColumns / F::kTileCols;
    typename F::Raw tiles[kTiles];
};

/* Stage k of a row of tiles. Float tiles are narrower than a stage: those behind the last count as zeros. */
template <class F>
static __device__ __forceinline__ void load_stage(StageWeights<F> &w, const char *row, int k, int k_tiles, int lane) {
    if constexpr (StageWeights<F>::kTiles == 1) {
        F::load(w.tiles[0], row + tile_offset<F>(k), row + header_offset<F>(k), lane);
    } else {
#pragma unroll
        for (int i = 0; i < StageWeights<F>::kTiles; i++) {
            const int tile = k * StageWeights<F>::kTiles + i;
            if (tile < k_tiles)
                F::load(w.tiles[i], row + tile_offset<F>(tile), nullptr, lane);
            else
                w.tiles[i] = {};
        }
    }
}

/* The same float16 twice. */
static __device__ __forceinline__ uint32_t lower_twice(uint32_t word) { return __byte_perm(word, 0, 0x1010); }
static __device__ __forceinline__ uint32_t upper_twice(uint32_t word) { return __byte_perm(word, 0, 0x3232); }
static __device__ __forceinline__ uint32_t half_twice(uint32_t word, int upper) {
    return upper ? upper_twice(word) : lower_twice(word);
}

/* A byte (in the lowest bits of `byte`, which must be 0 above) as a float16, twice. */
static __device__ __forceinline__ uint32_t unsigned_twice(uint32_t byte) { /* 1024 + byte, less 1024 */
    return pair_subtract(lower_twice(byte) | 0x64006400u, 0x64006400u);
}
static __device__ __forceinline__ uint32_t signed_twice(uint32_t byte) {
    return pair_subtract(lower_twice(byte ^ 0x80) | 0x64006400u, 0x64806480u);
}

/* ---- Integers ------------------------------------------------------------------------------------------------- */

/* Scale, or minimum, of row g + 8·half in the group that the step lies in, twice; `words` as of F::load_scales. */
template <class F>
static __device__ __forceinline__ uint32_t stored_twice(const uint32_t *words, uint32_t factors, int step, int half) {
    const int i = half * F::kGroups + step * F::kGroups / 4;
    if constexpr (F::kHasSuper) {
        constexpr bool is_signed = F::kKind == kSixBits || F::kKind == kThreeBits || F::kKind == kTableIq4;
        const uint32_t byte = words[i / 4] >> i % 4 * 8 & 0xff;
        return pair_multiply(is_signed ? signed_twice(byte) : unsigned_twice(byte), half_twice(factors, half));
    } else if constexpr (F::kKind == kTableE2m1) {
        /* E4M3 in float16's fields is too small by 2^8; E2M1 is doubled in the table. */
        return pair_multiply(lower_twice((words[i / 4] >> i % 4 * 8 & 0x7f) << 7), 0x58005800u /* 2^7 */);
    } else {
        return half_twice(words[i / 2], i % 2);
    }
}

/* A word of four codes as F::fragment has them, times F::kCodeFactor: the even ones and the odd ones. A byte becomes
 * the lowest bits of a float16 whose last place is worth kCodeFactor. */
template <class F> static __device__ __forceinline__ void code_pairs(uint32_t (&pairs)[2], uint32_t codes) {
    constexpr uint32_t exponent = F::kCodeFactor == 1.0f      ? 0x64
                                  : F::kCodeFactor == 0.25f   ? 0x5c
                                  : F::kCodeFactor == 0.125f  ? 0x58
                                  : F::kCodeFactor == 0.0625f ? 0x54
                                                              : 0x50;
    static_assert(exponent != 0x50 || F::kCodeFactor == 0.03125f, "");
    constexpr uint32_t offset = exponent * 0x01000100u | 0x00800080u;
    const uint32_t bytes = codes ^ 0x80808080u;
    pairs[0] = pair_subtract(__byte_perm(bytes, exponent * 0x01010101u, 0x4240), offset);
    pairs[1] = pair_subtract(__byte_perm(bytes, exponent * 0x01010101u, 0x4341), offset);
}

/* Q4_0, whose nibbles need no detour over bytes: 1024 + u and 1024 + 16·u with u = code + 8. */
template <class F>
static __device__ __forceinline__ void nibble_fragment(uint32_t (&a)[4], const typename F::Raw &r, int step) {
    const uint32_t even = r.codes[step], odd = even >> 8;
    const uint32_t scale0 = stored_twice<F>(r.scales, 0, step, 0), scale1 = stored_twice<F>(r.scales, 0, step, 1);
    const auto lower = [](uint32_t w) { return pair_subtract((w & 0x000f000f) ^ 0x64086408u, 0x64086408u); };
    const auto upper = [](uint32_t w) { /* · 1/16 − 72 */
                                        return pair_fma((w & 0x00f000f0) ^ 0x64806480u, 0x2c002c00u, 0xd480d480u);
    };
    a[0] = pair_multiply(lower(even), scale0);
    a[1] = pair_multiply(upper(even), scale1);
    a[2] = pair_multiply(lower(odd), scale0);
    a[3] = pair_multiply(upper(odd), scale1);
}

template <class F>
static __device__ __forceinline__ void integer_fragment(uint32_t (&a)[4], const typename F::Raw &r, int step) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        uint32_t pairs[2], scale, minimum = 0;
        code_pairs<F>(pairs, F::fragment(r, step / 2, step % 2 * 2 + half));
        if constexpr (F::kKind == kTwoBits) { /* scale and minimum share a byte */
            const uint32_t both = r.scales[half] >> step * 8;
            scale = pair_multiply(unsigned_twice(both & 15), half_twice(r.factors, half));
            minimum = pair_multiply(unsigned_twice(both >> 4 & 15), half_twice(r.minimum_factors, half));
        } else {
            scale = stored_twice<F>(r.scales, r.factors, step, half);
            if constexpr (F::kHasMinimum) minimum = stored_twice<F>(r.minima, r.minimum_factors, step, half);
        }
#pragma unroll
        for (int i = 0; i < 2; i++)
            a[2 * i + half] = F::kHasMinimum ? pair_fma(pairs[i], scale, minimum) : pair_multiply(pairs[i], scale);
    }
}

/* ---- Floats --------------------------------------------------------------------------------------------------- */

/* Rows g and g + 8 of column 4·s + t of a tile, as a pair. */
template <class F> static __device__ __forceinline__ uint32_t float_pair(const typename F::Raw &r, int s) {
    if constexpr (F::kKind == kFloat16) return r.words[s];
    const int block = s / 2, w = s % 2 * 2;
    return make_pair(__uint_as_float(F::value(r, block, w)), __uint_as_float(F::value(r, block, w + 1)));
}

/* A float tile gives lane t columns t, 4 + t, 8 + t and 12 + t. The four lanes of a group transpose them: first pairs
 * of lanes, then pairs of pairs. */
template <class F>
static __device__ __forceinline__ void float_fragment(uint32_t (&a)[4], const typename F::Raw &r, int lane) {
    uint32_t v[4];
#pragma unroll
    for (int s = 0; s < 4; s++) v[s] = float_pair<F>(r, s);
#pragma unroll
    for (int bit = 1; bit <= 2; bit *= 2)
#pragma unroll
        for (int s = 0; s < 4; s++) {
            if (s & bit) continue;
            const bool upper = (lane & bit) != 0; /* keeps slot s + bit, gives away slot s */
            const uint32_t other = __shfl_xor_sync(0xffffffff, upper ? v[s] : v[s + bit], bit);
            v[s] = upper ? other : v[s];
            v[s + bit] = upper ? v[s + bit] : other;
        }
    a[0] = __byte_perm(v[0], v[2], 0x5410);
    a[1] = __byte_perm(v[0], v[2], 0x7632);
    a[2] = __byte_perm(v[1], v[3], 0x5410);
    a[3] = __byte_perm(v[1], v[3], 0x7632);
}

template <class F>
static __device__ __forceinline__ void fragment(uint32_t (&a)[4], const StageWeights<F> &w, int step, int lane) {
    if constexpr (F::kActivations == kFloats)
        float_fragment<F>(a, w.tiles[step], lane);
    else if constexpr (F::kKind == kSignedNibble)
        nibble_fragment<F>(a, w.tiles[0], step);
    else
        integer_fragment<F>(a, w.tiles[0], step);
}

#endif
