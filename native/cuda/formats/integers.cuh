/* Weights as small integers with scales, multiplied in int8. Part of formats.cuh.
 *
 * The instruction m16n8k32 wants four 32-bit words of weights per lane and block of 32 columns,
 *
 *     word 2·h + half    rows g + 8·half, columns 16·h + 4·t … + 3        h, half in 0, 1
 *
 * and, for each of eight tokens, two words of activations: word h of lane t, token g. */

enum Codes {
    kSignedNibble,   /* two's complement */
    kNibble,         /* 0 … 15 */
    kTableIq4,       /* 16 values of dg_iq4_values */
    kTableE2m1,      /* E2M1, doubled */
    kTwoBits,        /* 0 … 3 */
    kThreeBits,      /* two's complement */
    kFiveBits,       /* 0 … 31 */
    kSignedFiveBits, /* two's complement */
    kSixBits,        /* two's complement */
    kByte            /* two's complement */
};

/* Value = scale · code + minimum. A tile of 16 × 64, in this order (fragment words are counted over both blocks, 0 …
 * 7):
 *
 *     nibbles   a 16-byte group per lane: word w holds the codes of fragment words 2·w in the lower nibbles of its
 * bytes and those of 2·w + 1 in the upper ones (tables: in the lower and the upper 16 bits) pairs     two bits of a
 * code (kTwoBits: all, kThreeBits: the lower ones, kSixBits: the upper ones): a word per lane and block, bits 8·i +
 * 2·(w % 4) and up for byte i of fragment word w bits      one bit of a code (the highest): a word per lane, bit 8·i +
 * w for byte i of fragment word w bytes     kByte: fragment words of the lanes of block 0, then of those of block 1, 16
 * bytes a lane scales    (8, 2, groups): g, half, group. float16; kTableE2m1: unsigned E4M3; kSuper: bytes minima (8,
 * 2, groups) float16; kSuper: bytes. kTwoBits: in the upper four bits of the scales
 *
 * With kSuper, bytes are multiplied by the header's factors: (8, 2) float16 for scales, then as many for minima. */
template <Codes kCodes, int kGroup, bool kMinimum, bool kSuper> struct IntegerFormat {
    static constexpr ActivationKind kActivations = kInt8;
    static constexpr Codes kKind = kCodes;
    static constexpr bool kHasSuper = kSuper;
    static constexpr bool kHasMinimum = kMinimum;
    static constexpr bool kNeedsSums = kMinimum && kCodes != kTwoBits;
    static constexpr bool kNeedsRegisters = kGroup == 16 || kMinimum || kSuper;
    static constexpr int kTileCols = 64;
    static constexpr int kGroups = 64 / kGroup;      /* scales of a row in a tile */
    static constexpr int kBlockGroups = 32 / kGroup; /* in a block of 32 columns */
    static constexpr bool kHasNibbles = kCodes != kTwoBits && kCodes != kThreeBits && kCodes != kByte;
    static constexpr bool kHasPairs = kCodes == kTwoBits || kCodes == kThreeBits || kCodes == kSixBits;
    static constexpr bool kHasBits = kCodes == kThreeBits || kCodes == kFiveBits || kCodes == kSignedFiveBits;
    static constexpr int kPairOffset = kCodes == kByte ? 1024 : kHasNibbles ? 512 : 0;
    static constexpr int kBitOffset = kPairOffset + (kHasPairs ? 256 : 0);
    static constexpr int kScaleOffset = kBitOffset + (kHasBits ? 128 : 0);
    static constexpr int kScaleBytes = kSuper || kCodes == kTableE2m1 ? 1 : 2;
    static constexpr int kMinimumOffset = kScaleOffset + kTileRows * kGroups * kScaleBytes;
    static constexpr int kTileBytes = kMinimumOffset + (kNeedsSums ? kTileRows * kGroups * kScaleBytes : 0);
    static constexpr int kHeaderBytes = kSuper ? kTileRows * 2 * (kMinimum ? 2 : 1) : 0;
    static constexpr int kLaneColumns = 16; /* columns of each of a lane's two rows */

    static constexpr int kScaleWords = 2 * kGroups * kScaleBytes / 4; /* of a lane's two rows */

    static constexpr int kCodeWords = kCodes == kByte ? 8 : 4;

    struct Raw {
        uint32_t codes[kCodeWords];
        uint32_t pairs[2], bits;
        uint32_t scales[kScaleWords], minima[kScaleWords];
        uint32_t factors, minimum_factors; /* kSuper: two float16 */
    };

    /* Of a block, but for kSumFactor. `minus_zero` is what a sum's starting value adds, see multiply. */
    struct Weights {
        uint32_t a[4];
        float scale[kBlockGroups][2]; /* group, half */
        float minus_zero[kBlockGroups][2];
        float minimum[2];            /* half */
        float minimum_minus_zero[2]; /* kTwoBits: minima are multiplied like codes, `minimum` being their scale */
        uint32_t m[4];
    };

    struct Tokens { /* of eight: the codes of token g; the scales of tokens 2·t and 2·t + 1 */
        uint32_t b[2];
        float scale[2], sum[2];
    };

    static __device__ __forceinline__ uint32_t table(uint32_t nibbles) {
        /* Bytes 0 … 7 and 8 … 15 of the table. __byte_perm looks four nibbles up in each half by their lower three
         * bits; the third lookup takes byte i from the second half where bit 3 of nibble i is set. */
        constexpr bool e2m1 = kCodes == kTableE2m1;
        uint32_t lower =
            __byte_perm(e2m1 ? 0x03020100u : 0xbfad9881u, e2m1 ? 0x0c080604u : 0xf6eaddcfu, nibbles & 0x7777);
        uint32_t upper =
            __byte_perm(e2m1 ? 0xfdfeff00u : 0x26190d01u, e2m1 ? 0xf4f8fafcu : 0x71594535u, nibbles & 0x7777);
        return __byte_perm(lower, upper, 0x3210 | (nibbles & 0x8888) >> 1);
    }

    /* What a code must be multiplied by, as it stands in Weights.a: with its sign at the top of a byte. */
    static constexpr float kCodeFactor = kCodes == kSignedNibble     ? 1.0f / 16
                                         : kCodes == kThreeBits      ? 1.0f / 32
                                         : kCodes == kSignedFiveBits ? 1.0f / 8
                                         : kCodes == kSixBits        ? 1.0f / 4
                                                                     : 1.0f;
    /* What sums must be multiplied by, once: a power of two, the same for all. E2M1 is doubled in the table. */
    static constexpr float kSumFactor = kCodes == kTableE2m1 ? 0.5f : kCodeFactor;
    static_assert(kSumFactor == 1.0f || !kMinimum, "minima are added to the sums");

    static __device__ __forceinline__ void load(Raw &r, const char *tile, const char *header, int lane) {
        const int g = lane / 4;
        if constexpr (kCodes == kByte) {
#pragma unroll
            for (int block = 0; block < 2; block++) load_words(r.codes + 4 * block, tile + block * 512 + lane * 16);
        } else if constexpr (kHasNibbles) {
            load_words(r.codes, tile + lane * 16);
        }
        if constexpr (kHasPairs) {
            uint2 both = tile_load<uint2>(tile + kPairOffset + lane * 8);
            r.pairs[0] = both.x;
            r.pairs[1] = both.y;
        }
        if constexpr (kHasBits) r.bits = tile_load<uint32_t>(tile + kBitOffset + lane * 4);
        load_scales(r.scales, tile + kScaleOffset, g);
        if constexpr (kNeedsSums) load_scales(r.minima, tile + kMinimumOffset, g);
        if constexpr (kSuper) {
            r.factors = tile_load<uint32_t>(header + g * 4);
            if constexpr (kMinimum) r.minimum_factors = tile_load<uint32_t>(header + 32 + g * 4);
        }
    }

    static __device__ __forceinline__ void load_words(uint32_t *words, const char *from) {
        uint4 w = tile_load<uint4>(from);
        words[0] = w.x;
        words[1] = w.y;
        words[2] = w.z;
        words[3] = w.w;
    }

    static __device__ __forceinline__ void load_scales(uint32_t (&words)[kScaleWords], const char *scales, int g) {
        if constexpr (kScaleWords == 1) {
            words[0] = tile_load<uint32_t>(scales + g * 4);
        } else {
#pragma unroll
            for (int i = 0; i < kScaleWords; i += 2) {
                uint2 both = tile_load<uint2>(scales + g * 4 * kScaleWords + i * 4);
                words[i] = both.x;
                words[i + 1] = both.y;
            }
        }
    }

    /* A byte as a float, by the lowest bits of 2^23: cheaper than a conversion. */
    static __device__ __forceinline__ float unsigned_byte(uint32_t byte) {
        return __uint_as_float(0x4b000000 | byte) - 8388608.0f;
    }
    static __device__ __forceinline__ float signed_byte(uint32_t byte) {
        return __uint_as_float(0x4b000000 | (byte ^ 0x80)) - 8388736.0f;
    }

    /* Scale or minimum of a group of a row, from the words of load_scales. */
    static __device__ __forceinline__ float stored(const uint32_t (&words)[kScaleWords], int group, int half,
                                                   float factor) {
        const int i = half * kGroups + group;
        if constexpr (kSuper) {
            constexpr bool is_signed = kCodes == kSixBits || kCodes == kThreeBits || kCodes == kTableIq4;
            const uint32_t byte = words[i / 4] >> i % 4 * 8 & 0xff;
            return factor * (is_signed ? signed_byte(byte) : unsigned_byte(byte));
        } else if constexpr (kCodes == kTableE2m1) {
            return e4m3_value(words[i / 4] >> i % 4 * 8 & 0x7f);
        } else {
            return half_to_float((uint16_t)(words[i / 2] >> i % 2 * 16));
        }
    }

    /* Factor of a row's scales or minima in the header. */
    static __device__ __forceinline__ float row_factor(uint32_t factors, int half) {
        return kSuper ? half_to_float((uint16_t)(factors >> 16 * half)) : 1.0f;
    }

    /* Fragment word w (0 … 3) of a block. */
    static __device__ __forceinline__ uint32_t fragment(const Raw &r, int block, int w) {
        uint32_t nibbles = 0, pair = 0, bit = 0;
        if constexpr (kHasPairs) pair = r.pairs[block] >> 2 * w & 0x03030303;
        if constexpr (kHasBits) bit = r.bits >> (block * 4 + w) & 0x01010101;
        if constexpr (kHasNibbles) {
            const uint32_t word = r.codes[block * 2 + w / 2];
            if constexpr (kCodes == kTableIq4 || kCodes == kTableE2m1) return table(w % 2 == 0 ? word : word >> 16);
            if constexpr (kCodes == kSignedNibble) return (w % 2 == 0 ? word << 4 : word) & 0xf0f0f0f0;
            nibbles = (w % 2 == 0 ? word : word >> 4) & 0x0f0f0f0f;
        }
        switch (kCodes) {
        case kByte:
            return r.codes[(block * 4 + w) % kCodeWords];
        case kTwoBits:
            return pair;
        case kThreeBits:
            return pair << 5 | bit << 7;
        case kFiveBits:
            return nibbles | bit << 4;
        case kSignedFiveBits:
            return nibbles << 3 | bit << 7;
        case kSixBits:
            return nibbles << 2 | pair << 6;
        default:
            return nibbles;
        }
    }

    /* Sums start from the bits of 1.5 · 2^23 in place of 0: read as a float the integer sum then stands in the lowest
     * bits of that number (it stays below 2^22). Adding −kZeroValue · scale while multiplying by the scale leaves scale
     * · sum, rounded once: both products fit 24 bits, as a scale has no more than 19. So a conversion costs nothing. */
    static constexpr int kZero = 0x4b400000;
    static constexpr float kZeroValue = 12582912.0f;

    static __device__ __forceinline__ void decode(Weights &out, const Raw &r, int block) {
#pragma unroll
        for (int w = 0; w < 4; w++) out.a[w] = fragment(r, block, w);
        if constexpr (kCodes == kTwoBits) { /* a group's 4-bit scale and minimum are multiplied into its bytes */
#pragma unroll
            for (int w = 0; w < 4; w++) {
                const uint32_t both =
                    r.scales[w % 2] >> (block * 2 + w / 2) * 8; /* kScaleWords is 2: a row's groups each */
                out.a[w] *= both & 15;
                out.m[w] = (both >> 4 & 15) * 0x01010101u;
            }
#pragma unroll
            for (int half = 0; half < 2; half++) {
                out.scale[0][half] = row_factor(r.factors, half);
                out.minus_zero[0][half] = out.scale[0][half] * -kZeroValue;
                out.minimum[half] = row_factor(r.minimum_factors, half);
                out.minimum_minus_zero[half] = out.minimum[half] * -kZeroValue;
            }
        } else {
#pragma unroll
            for (int half = 0; half < 2; half++) {
#pragma unroll
                for (int group = 0; group < kBlockGroups; group++) {
                    float scale = stored(r.scales, block * kBlockGroups + group, half, row_factor(r.factors, half));
                    out.scale[group][half] = scale;
                    out.minus_zero[group][half] = scale * -kZeroValue;
                }
                if constexpr (kMinimum)
                    out.minimum[half] = stored(r.minima, block, half, row_factor(r.minimum_factors, half));
            }
        }
    }

    /* `chunks`, `scales`, `sums`: of eight tokens, in shared memory: (8, 32 bytes) of the block, (8, 2), (8, 2). */
    static __device__ __forceinline__ void load(Tokens &x, const char *chunks, const char *scales, const char *sums,
                                                int block, int lane) {
        uint2 codes = tile_load<uint2>(chunks + lane * 8);
        x.b[0] = codes.x;
        x.b[1] = codes.y;
        float4 s = tile_load<float4>(scales + lane % 4 * 16);
        x.scale[0] = block == 0 ? s.x : s.y;
        x.scale[1] = block == 0 ? s.z : s.w;
        if constexpr (kNeedsSums) {
            float4 m = tile_load<float4>(sums + lane % 4 * 16);
            x.sum[0] = block == 0 ? m.x : m.y;
            x.sum[1] = block == 0 ? m.z : m.w;
        }
    }

    static __device__ __forceinline__ void multiply(float (&acc)[4], const Weights &w, const Tokens &x) {
        if constexpr (kCodes == kTwoBits) {
            int c[4] = {kZero, kZero, kZero, kZero}, m[4] = {kZero, kZero, kZero, kZero};
            mma_s8_k32(c, w.a, x.b);
            mma_s8_k32(m, w.m, x.b);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float sum = fmaf(__int_as_float(c[i]), w.scale[0][i / 2], w.minus_zero[0][i / 2]);
                float minima = fmaf(__int_as_float(m[i]), w.minimum[i / 2], w.minimum_minus_zero[i / 2]);
                acc[i] = fmaf(sum + minima, x.scale[i % 2], acc[i]);
            }
        } else {
#pragma unroll
            for (int group = 0; group < kBlockGroups; group++) {
                int c[4] = {kZero, kZero, kZero, kZero};
                if constexpr (kGroup == 32)
                    mma_s8_k32(c, w.a, x.b);
                else
                    mma_s8_k16(c, w.a + 2 * group, x.b + group);
#pragma unroll
                for (int i = 0; i < 4; i++)
                    acc[i] = fmaf(fmaf(__int_as_float(c[i]), w.scale[group][i / 2], w.minus_zero[group][i / 2]),
                                  x.scale[i % 2], acc[i]);
            }
            if constexpr (kMinimum)
#pragma unroll
                for (int i = 0; i < 4; i++) acc[i] = fmaf(w.minimum[i / 2], x.sum[i % 2], acc[i]);
        }
    }

    static __device__ __forceinline__ int lane_column(int slot, int t) { return slot / 4 * 16 + t * 4 + slot % 4; }

    template <class Fn> static __device__ __forceinline__ void for_each_value(const Raw &raw, int, Fn fn) {
#pragma unroll
        for (int block = 0; block < 2; block++) {
            Weights w;
            decode(w, raw, block);
#pragma unroll
            for (int word = 0; word < 4; word++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int half = word % 2, h = word / 2;
                    float value = (float)(int8_t)(w.a[word] >> 8 * i) *
                                  (w.scale[kCodes == kTwoBits ? 0 : h * kBlockGroups / 2][half] * kSumFactor);
                    if constexpr (kCodes == kTwoBits)
                        value += (float)(w.m[word] & 15) * w.minimum[half];
                    else if constexpr (kMinimum)
                        value += w.minimum[half];
                    fn(half, block * 8 + h * 4 + i, value);
                }
        }
    }
};
