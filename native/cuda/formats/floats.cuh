/* Float weights. Part of formats.cuh.
 *
 * Multiplied as TF32 with the activations split in two, so that the products are exact but for 2^-21: float16 and
 * bfloat16 fit TF32's 11 bits; float32 weights are split as well. A tile of 16 × 16, by lane: block b (two of eight
 * columns), then
 *
 *     2·h + half    row g + 8·half, column 8·b + 4·h + t
 *
 * 16-bit types: all eight by lane. float32: the lanes of block 0, then those of block 1. */
enum FloatKind { kFloat16, kBfloat16, kFloat32 };

template <FloatKind kKind_> struct FloatFormat {
    static constexpr ActivationKind kActivations = kFloats;
    static constexpr bool kNeedsSums = false;
    static constexpr FloatKind kKind = kKind_;
    static constexpr bool kNeedsRegisters = false;
    static constexpr float kSumFactor = 1.0f;
    static constexpr int kTileCols = 16;
    static constexpr int kTileBytes = kKind == kFloat32 ? 1024 : 512;
    static constexpr int kHeaderBytes = 0;
    static constexpr int kLaneColumns = 4;

    struct Raw {
        uint32_t words[kKind == kFloat32 ? 8 : 4];
    };
    struct Weights {
        uint32_t a[4];
        uint32_t rest[4]; /* float32 only: what TF32 leaves out */
    };
    struct Tokens {
        uint32_t b[2], rest[2];
    };

    static __device__ __forceinline__ uint32_t leading(uint32_t bits) { return bits & 0xffffe000u; }
    static __device__ __forceinline__ uint32_t remainder(uint32_t bits) {
        return __float_as_uint(__uint_as_float(bits) - __uint_as_float(leading(bits)));
    }

    /* Float32 bits of word w of a block. */
    static __device__ __forceinline__ uint32_t value(const Raw &r, int block, int w) {
        if constexpr (kKind == kFloat32) return r.words[block * 4 + w];
        const uint32_t half = r.words[block * 2 + w / 2] >> w % 2 * 16 & 0xffff;
        if constexpr (kKind == kBfloat16) return half << 16;
        return __float_as_uint(half_to_float((uint16_t)half));
    }

    static __device__ __forceinline__ void load(Raw &r, const char *tile, const char *, int lane) {
#pragma unroll
        for (int s = 0; s < (kKind == kFloat32 ? 2 : 1); s++) {
            uint4 w = tile_load<uint4>(tile + (s * 32 + lane) * 16);
            r.words[4 * s] = w.x;
            r.words[4 * s + 1] = w.y;
            r.words[4 * s + 2] = w.z;
            r.words[4 * s + 3] = w.w;
        }
    }

    static __device__ __forceinline__ void decode(Weights &out, const Raw &r, int block) {
#pragma unroll
        for (int w = 0; w < 4; w++) {
            const uint32_t bits = value(r, block, w);
            out.a[w] = kKind == kFloat32 ? leading(bits) : bits;
            if constexpr (kKind == kFloat32) out.rest[w] = remainder(bits);
        }
    }

    static __device__ __forceinline__ void load(Tokens &x, const char *chunks, const char *, const char *, int,
                                                int lane) {
        const uint2 words = tile_load<uint2>(chunks + lane * 8);
        x.b[0] = leading(words.x);
        x.b[1] = leading(words.y);
        x.rest[0] = remainder(words.x);
        x.rest[1] = remainder(words.y);
    }

    static __device__ __forceinline__ void multiply(float (&acc)[4], const Weights &w, const Tokens &x) {
        if constexpr (kKind == kFloat32) mma_tf32_k8(acc, w.rest, x.b);
        mma_tf32_k8(acc, w.a, x.rest);
        mma_tf32_k8(acc, w.a, x.b);
    }

    static __device__ __forceinline__ int lane_column(int slot, int t) { return slot * 4 + t; }

    template <class Fn> static __device__ __forceinline__ void for_each_value(const Raw &raw, int, Fn fn) {
#pragma unroll
        for (int i = 0; i < 8; i++) fn(i % 2, i / 2, __uint_as_float(value(raw, i / 4, i % 4)));
    }
};
