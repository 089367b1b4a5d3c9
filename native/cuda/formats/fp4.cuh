/* NVFP4 as the matrix units of sm_120 and sm_121 read it. Part of formats.cuh.
 *
 * Those multiply E2M1 by E2M1, with an E4M3 scale for each 16 columns of either side, at twice the rate of int8,
 * and nothing is left to do before or after. Four bits are too few for activations (a relative error of 9 %), so a row
 * is the sum of two such terms, the second one of what the first leaves: 0.9 %, where int8 with a scale per 32 has 0.5
 * % on Gaussian rows and the same 0.8 % on rows with outliers (bench/fp4_activations.py).
 *
 * Both terms are scaled by one factor per row, which makes use of E4M3's range; its inverse is in
 * Activations.term_multipliers. For each tile of 64 columns a term has 32 bytes,
 *
 *     byte 8·t + 4·h + i / 2    columns 32·h + 8·t + i in the lower (i even) or the upper nibble, 0 ≤ i < 8
 *
 * and a word of four scales, byte j for columns 16·j … 16·j + 15. Weights, 16 × 64:
 *
 *     codes     16 bytes a lane: word 2·h + half holds row g + 8·half, columns 32·h + 8·t + i in nibble i
 *     scales    (8, 2, 4): g, half, group */
static __device__ __forceinline__ float e4m3_value(uint32_t code) { /* 0 … 0x7e */
    return __uint_as_float(code << 20) * 0x1p120f;                  /* in float32's fields it is too small by 2^120 */
}
/* The nearest E4M3 of 0 ≤ x ≤ 448, of two the even one. */
static __device__ __forceinline__ uint32_t e4m3_code(float x) {
    const uint32_t bits = __float_as_uint(x * 0x1p-120f);
    return (bits + 0x7ffff + (bits >> 20 & 1)) >> 20;
}
static __device__ __forceinline__ float e2m1_value(uint32_t code) {
    const float magnitude = __uint_as_float((code & 7) << 22) * 0x1p126f; /* 0, 0.5 … 6; too small by 2^126 */
    return code & 8 ? -magnitude : magnitude;
}
/* The nearest E2M1; what is beyond 6 becomes 6. */
static __device__ __forceinline__ uint32_t e2m1_code(float x) {
    const float a = fabsf(x);
    const uint32_t code = (a > 0.25f) + (a > 0.75f) + (a > 1.25f) + (a > 1.75f) + (a > 2.5f) + (a > 3.5f) + (a > 5.0f);
    return x < 0 ? code | 8 : code;
}

struct NativeFp4Format {
    static constexpr ActivationKind kActivations = kFp4Terms;
    static constexpr bool kNeedsSums = false;
    static constexpr bool kNeedsRegisters = false;
    static constexpr float kSumFactor = 1.0f;
    static constexpr int kTileCols = 64;
    static constexpr int kScaleOffset = 512;
    static constexpr int kTileBytes = 576;
    static constexpr int kHeaderBytes = 0;
    static constexpr int kLaneColumns = 16;

    struct Raw {
        uint32_t a[4];
        uint32_t scales[2]; /* of rows g and g + 8 */
        uint32_t scale;     /* what the instruction takes from this lane: row g's where it is even, g + 8's where odd */
    };
    struct Weights {
        uint32_t a[4];
        uint32_t scale;
    };
    struct Tokens {
        uint32_t b[2];
        uint32_t scale; /* of token g */
    };

    static __device__ __forceinline__ void load(Raw &r, const char *tile, const char *, int lane) {
        uint4 w = tile_load<uint4>(tile + lane * 16);
        r.a[0] = w.x;
        r.a[1] = w.y;
        r.a[2] = w.z;
        r.a[3] = w.w;
        uint2 scales = tile_load<uint2>(tile + kScaleOffset + lane / 4 * 8);
        r.scales[0] = scales.x;
        r.scales[1] = scales.y;
        r.scale = lane % 2 == 0 ? scales.x : scales.y;
    }

    static __device__ __forceinline__ void decode(Weights &out, const Raw &r, int) {
#pragma unroll
        for (int i = 0; i < 4; i++) out.a[i] = r.a[i];
        out.scale = r.scale;
    }

    /* A block is a term here. */
    static __device__ __forceinline__ void load(Tokens &x, const char *chunks, const char *scales, const char *,
                                                int term, int lane) {
        const uint2 words = tile_load<uint2>(chunks + lane * 8);
        x.b[0] = words.x;
        x.b[1] = words.y;
        x.scale = tile_load<uint32_t>(scales + lane / 4 * 8 + term * 4);
    }

    static __device__ __forceinline__ void multiply(float (&acc)[4], const Weights &w, const Tokens &x) {
        mma_fp4_k64(acc, w.a, w.scale, x.b, x.scale);
    }

    static __device__ __forceinline__ int lane_column(int slot, int t) { return slot / 8 * 32 + t * 8 + slot % 8; }

    template <class Fn> static __device__ __forceinline__ void for_each_value(const Raw &r, int lane, Fn fn) {
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int slot = 0; slot < 16; slot++) {
                const uint32_t code = r.a[slot / 8 * 2 + half] >> slot % 8 * 4 & 15;
                const int group = slot / 8 * 2 + lane % 4 / 2;
                fn(half, slot, e2m1_value(code) * e4m3_value(r.scales[half] >> 8 * group & 0x7f));
            }
    }
};
