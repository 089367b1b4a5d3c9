/* How weights lie in device memory, and how a tile of them is multiplied.
 *
 * A file's blocks are repacked once, when a model is loaded (pack.cu), into tiles of 16 rows × 64 columns (floats: 16 × 16)
 * in the order in which the 32 lanes of a warp need them for a matrix instruction. A lane then reads its share of a tile
 * with one or two 16-byte loads, whole tiles are copied with 16-byte asynchronous copies, and nothing is shuffled.
 *
 * In what follows lane = 4·g + t: g (0 … 7) is a row of the fragment, t (0 … 3) a step along its columns. The instruction
 * m16n8k32 wants four 32-bit words of weights per lane and block of 32 columns,
 *
 *     word 2·h + half    rows g + 8·half, columns 16·h + 4·t … + 3        h, half in 0, 1
 *
 * and, for each of eight tokens, two words of activations: word h of lane t, token g. */
#ifndef DG_CUDA_FORMATS_CUH
#define DG_CUDA_FORMATS_CUH

#include "intrinsics.cuh"

#include "layout.h"

/* Rows of activations as the products read them, for one kind of weights or the other.
 *
 * Integer weights: int8 codes with a scale per 32 columns. The 64 bytes of each 64 columns are stored by lane,
 *
 *     byte 16·t + 8·block + 4·h + i    column 32·block + 16·h + 4·t + i
 *
 * Float weights: float32, the 64 bytes of each 16 columns stored by lane: float 4·t + s is column t + 4·s.
 * Columns are padded with zeros to whole tiles. struct Activations is in layout.h. */

static __device__ __forceinline__ int code_position(int column) {
    return column / 64 * 64 + column % 16 / 4 * 16 + column % 64 / 32 * 8 + column % 32 / 16 * 4 + column % 4;
}
static __device__ __forceinline__ int value_position(int column) {
    return column / 16 * 16 + column % 4 * 4 + column % 16 / 4;
}

/* ---- Integer weights ------------------------------------------------------------------------------------------ */

enum Codes {
    kSignedNibble, /* two's complement */
    kNibble,       /* 0 … 15 */
    kTableIq4,     /* 16 values of dg_iq4_values */
    kTableE2m1,    /* E2M1, doubled */
    kFiveBits,     /* 0 … 31 */
    kSixBits,      /* two's complement */
    kByte          /* two's complement */
};

/* Value = scale · code + minimum. A tile of 16 × 64, in this order:
 *
 *     codes     by lane. Four-bit parts: word 2·block + h holds the eight codes of fragment words 2·h and 2·h + 1; those
 *               of word 2·h in the lower nibbles of the bytes, the others in the upper ones (tables: in the lower and the
 *               upper 16 bits). kByte: the lanes of block 0, then those of block 1, four words each
 *     high      kFiveBits: a word per lane, bit 8·i + w for byte i of fragment word w (0 … 7 over both blocks);
 *               kSixBits: a word per lane and block, bits 8·i + 2·w and up for word w (0 … 3)
 *     scales    (8, 2, groups): g, half, group. float16, or for kTableE2m1 unsigned E4M3
 *     minima    (8, 2, 2) float16 */
template <Codes kCodes, int kGroup, bool kMinimum> struct IntegerFormat {
    static constexpr bool kInteger = true;
    static constexpr bool kHasMinimum = kMinimum;
    static constexpr Codes kKind = kCodes;
    static constexpr int kTileCols = 64;
    static constexpr int kGroups = 64 / kGroup;      /* scales of a row in a tile */
    static constexpr int kBlockGroups = 32 / kGroup; /* in a block of 32 columns */
    static constexpr int kHighOffset = kCodes == kByte ? 1024 : 512;
    static constexpr int kScaleOffset = kHighOffset + (kCodes == kFiveBits ? 128 : kCodes == kSixBits ? 256 : 0);
    static constexpr int kMinimumOffset = kScaleOffset + kTileRows * kGroups * (kCodes == kTableE2m1 ? 1 : 2);
    static constexpr int kTileBytes = kMinimumOffset + (kMinimum ? kTileRows * 2 * 2 : 0);
    static constexpr int kLaneColumns = 16; /* columns of each of a lane's two rows */

    struct Fragment {
        uint32_t a[2][4];
        float scale[2][kBlockGroups][2]; /* block, group, half */
        float minimum[2][2];             /* block, half */
    };

    struct Tokens { /* of eight: the codes of token g; the scales of tokens 2·t and 2·t + 1 */
        uint32_t b[2][2];
        float scale[2][2]; /* token, block */
        float sum[2][2];
    };

    static __device__ __forceinline__ uint32_t table(uint32_t nibbles) {
        /* Bytes 0 … 7 and 8 … 15 of the table. __byte_perm looks four nibbles up in each half by their lower three bits;
         * the third lookup takes byte i from the second half where bit 3 of nibble i is set. */
        constexpr bool e2m1 = kCodes == kTableE2m1;
        uint32_t lower = __byte_perm(e2m1 ? 0x03020100u : 0xbfad9881u, e2m1 ? 0x0c080604u : 0xf6eaddcfu,
                                     nibbles & 0x7777);
        uint32_t upper = __byte_perm(e2m1 ? 0xfdfeff00u : 0x26190d01u, e2m1 ? 0xf4f8fafcu : 0x71594535u,
                                     nibbles & 0x7777);
        return __byte_perm(lower, upper, 0x3210 | (nibbles & 0x8888) >> 1);
    }

    static __device__ __forceinline__ void load_codes(uint32_t (&a)[2][4], const char *tile, int lane) {
        if constexpr (kCodes == kByte) {
            for (int block = 0; block < 2; block++) {
                uint4 w = reinterpret_cast<const uint4 *>(tile)[block * 32 + lane];
                a[block][0] = w.x;
                a[block][1] = w.y;
                a[block][2] = w.z;
                a[block][3] = w.w;
            }
            return;
        }
        uint4 w = reinterpret_cast<const uint4 *>(tile)[lane];
        uint32_t words[4] = {w.x, w.y, w.z, w.w};
        uint32_t high[2] = {0, 0};
        if constexpr (kCodes == kFiveBits) {
            high[0] = reinterpret_cast<const uint32_t *>(tile + kHighOffset)[lane];
            high[1] = high[0] >> 4;
        }
        if constexpr (kCodes == kSixBits) {
            uint2 both = reinterpret_cast<const uint2 *>(tile + kHighOffset)[lane];
            high[0] = both.x;
            high[1] = both.y;
        }
#pragma unroll
        for (int i = 0; i < 8; i++) { /* fragment word i % 4 of block i / 4 */
            uint32_t word = words[i / 2];
            uint32_t &out = a[i / 4][i % 4];
            if constexpr (kCodes == kSignedNibble) /* 16 · code, in the upper nibble; see kCodeFactor */
                out = (i % 2 == 0 ? word << 4 : word) & 0xf0f0f0f0;
            else if constexpr (kCodes == kTableIq4 || kCodes == kTableE2m1)
                out = table(i % 2 == 0 ? word : word >> 16);
            else {
                uint32_t nibbles = (i % 2 == 0 ? word : word >> 4) & 0x0f0f0f0f;
                if constexpr (kCodes == kFiveBits)
                    out = nibbles | (high[i / 4] >> i % 4 & 0x01010101) << 4;
                else if constexpr (kCodes == kSixBits) /* 4 · code */
                    out = nibbles << 2 | (high[i / 4] >> i % 4 * 2 & 0x03030303) << 6;
                else
                    out = nibbles;
            }
        }
    }

    /* What a code has been multiplied by in `a`, undone through the scale. */
    static constexpr float kCodeFactor = kCodes == kSignedNibble ? 1.0f / 16
                                         : kCodes == kSixBits    ? 1.0f / 4
                                                                 : 1.0f;

    static __device__ __forceinline__ void load(Fragment &f, const char *tile, int lane) {
        load_codes(f.a, tile, lane);
        int g = lane / 4;
        if constexpr (kCodes == kTableE2m1) {
            uint2 codes = reinterpret_cast<const uint2 *>(tile + kScaleOffset)[g];
            /* E4M3 in float32's fields is too small by 2^120, and E2M1 was doubled. */
#pragma unroll
            for (int group = 0; group < 4; group++) {
                f.scale[group / 2][group % 2][0] = __uint_as_float((codes.x >> 8 * group & 0x7f) << 20) * 0x1p119f;
                f.scale[group / 2][group % 2][1] = __uint_as_float((codes.y >> 8 * group & 0x7f) << 20) * 0x1p119f;
            }
        } else {
            uint32_t words[2 * kGroups / 2]; /* a half's groups, two a word, then the other half's */
            const uint32_t *scales = reinterpret_cast<const uint32_t *>(tile + kScaleOffset) + g * kGroups;
#pragma unroll
            for (int i = 0; i < kGroups; i++) words[i] = scales[i];
#pragma unroll
            for (int i = 0; i < 2 * kGroups; i++) {
                int half = i / kGroups, group = i % kGroups;
                f.scale[group / kBlockGroups][group % kBlockGroups][half] =
                    half_to_float((uint16_t)(words[i / 2] >> i % 2 * 16)) * kCodeFactor;
            }
        }
        if constexpr (kMinimum) {
            uint2 words = reinterpret_cast<const uint2 *>(tile + kMinimumOffset)[g];
            f.minimum[0][0] = half_to_float((uint16_t)words.x);
            f.minimum[1][0] = half_to_float((uint16_t)(words.x >> 16));
            f.minimum[0][1] = half_to_float((uint16_t)words.y);
            f.minimum[1][1] = half_to_float((uint16_t)(words.y >> 16));
        }
    }

    /* `chunks`, `scales`, `sums`: eight tokens' rows of one tile of columns, (8, 64 bytes), (8, 2), (8, 2). */
    static __device__ __forceinline__ void load(Tokens &tokens, const char *chunks, const float *scales,
                                                const float *sums, int lane) {
        uint4 w = reinterpret_cast<const uint4 *>(chunks)[lane];
        tokens.b[0][0] = w.x;
        tokens.b[0][1] = w.y;
        tokens.b[1][0] = w.z;
        tokens.b[1][1] = w.w;
        float4 s = reinterpret_cast<const float4 *>(scales)[lane % 4];
        tokens.scale[0][0] = s.x;
        tokens.scale[0][1] = s.y;
        tokens.scale[1][0] = s.z;
        tokens.scale[1][1] = s.w;
        if constexpr (kMinimum) {
            float4 m = reinterpret_cast<const float4 *>(sums)[lane % 4];
            tokens.sum[0][0] = m.x;
            tokens.sum[0][1] = m.y;
            tokens.sum[1][0] = m.z;
            tokens.sum[1][1] = m.w;
        }
    }

    /* acc (16 rows, 8 tokens) += the product over the tile's columns. acc[2·half + i]: row g + 8·half, token 2·t + i. */
    static __device__ __forceinline__ void multiply(float (&acc)[4], const Fragment &f, const Tokens &tokens) {
        /* Sums start from the bits of 1.5 · 2^23 in place of 0: read as a float the integer sum then stands in the lowest
         * bits of that number (it stays below 2^22), and one subtraction converts it, at four times the rate of the
         * conversion instruction. */
        constexpr int kZero = 0x4b400000;
        constexpr float kZeroValue = 12582912.0f;
#pragma unroll
        for (int block = 0; block < 2; block++) {
            int c[kBlockGroups][4];
#pragma unroll
            for (int group = 0; group < kBlockGroups; group++) {
                c[group][0] = c[group][1] = c[group][2] = c[group][3] = kZero;
                if constexpr (kGroup == 32)
                    mma_s8_k32(c[0], f.a[block], tokens.b[block]);
                else
                    mma_s8_k16(c[group], f.a[block] + 2 * group, tokens.b[block] + group);
            }
#pragma unroll
            for (int i = 0; i < 4; i++) {
                if constexpr (kGroup == 32) {
                    float factor = f.scale[block][0][i / 2] * tokens.scale[i % 2][block];
                    acc[i] = fmaf(__int_as_float(c[0][i]) - kZeroValue, factor, acc[i]);
                } else {
                    float sum = (__int_as_float(c[0][i]) - kZeroValue) * f.scale[block][0][i / 2];
                    sum = fmaf(__int_as_float(c[kBlockGroups - 1][i]) - kZeroValue,
                               f.scale[block][kBlockGroups - 1][i / 2], sum);
                    acc[i] = fmaf(sum, tokens.scale[i % 2][block], acc[i]);
                }
                if constexpr (kMinimum) acc[i] = fmaf(f.minimum[block][i / 2], tokens.sum[i % 2][block], acc[i]);
            }
        }
    }

    static __device__ __forceinline__ int lane_column(int slot, int t) { return slot / 4 * 16 + t * 4 + slot % 4; }

    /* Calls fn(half, slot, value) for the values that `lane` holds: row g + 8·half, column lane_column(slot, t). */
    template <class Fn> static __device__ __forceinline__ void for_each_value(const char *tile, int lane, Fn fn) {
        Fragment f;
        load(f, tile, lane);
#pragma unroll
        for (int block = 0; block < 2; block++)
#pragma unroll
            for (int w = 0; w < 4; w++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    int half = w % 2, h = w / 2;
                    float value = (float)(int8_t)(f.a[block][w] >> 8 * i) *
                                  f.scale[block][h * kBlockGroups / 2][half];
                    if constexpr (kMinimum) value += f.minimum[block][half];
                    fn(half, block * 8 + h * 4 + i, value);
                }
    }
};

/* ---- Float weights -------------------------------------------------------------------------------------------- */

/* Multiplied as TF32 with the activations split in two, so that the products are exact but for 2^-21: float16 and bfloat16
 * fit TF32's 11 bits; float32 weights are split as well. A tile of 16 × 16, by lane: step s (two of eight columns), then
 *
 *     2·h + half    row g + 8·half, column 8·s + 4·h + t
 *
 * 16-bit types: all eight by lane. float32: the lanes of step 0, then those of step 1. */
enum FloatKind { kFloat16, kBfloat16, kFloat32 };

template <FloatKind kKind_> struct FloatFormat {
    static constexpr bool kInteger = false;
    static constexpr bool kHasMinimum = false;
    static constexpr FloatKind kKind = kKind_;
    static constexpr int kTileCols = 16;
    static constexpr int kTileBytes = kKind == kFloat32 ? 1024 : 512;
    static constexpr int kLaneColumns = 4;

    struct Fragment {
        uint32_t a[2][4];
        uint32_t rest[2][4]; /* float32 only: what TF32 leaves out */
    };
    struct Tokens {
        uint32_t b[4], rest[4];
    };

    static __device__ __forceinline__ uint32_t leading(uint32_t bits) { return bits & 0xffffe000u; }
    static __device__ __forceinline__ uint32_t remainder(uint32_t bits) {
        return __float_as_uint(__uint_as_float(bits) - __uint_as_float(leading(bits)));
    }

    static __device__ __forceinline__ uint32_t widen(uint32_t half) {
        if constexpr (kKind == kBfloat16) return half << 16;
        return __float_as_uint(half_to_float((uint16_t)half));
    }

    static __device__ __forceinline__ void load(Fragment &f, const char *tile, int lane) {
        if constexpr (kKind == kFloat32) {
#pragma unroll
            for (int s = 0; s < 2; s++) {
                uint4 w = reinterpret_cast<const uint4 *>(tile)[s * 32 + lane];
                uint32_t words[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    f.a[s][i] = leading(words[i]);
                    f.rest[s][i] = remainder(words[i]);
                }
            }
        } else {
            uint4 w = reinterpret_cast<const uint4 *>(tile)[lane];
            uint32_t words[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
            for (int i = 0; i < 8; i++) f.a[i / 4][i % 4] = widen(words[i / 2] >> i % 2 * 16 & 0xffff);
        }
    }

    static __device__ __forceinline__ void load(Tokens &tokens, const char *chunks, const float *, const float *,
                                                int lane) {
        uint4 w = reinterpret_cast<const uint4 *>(chunks)[lane];
        uint32_t words[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            tokens.b[i] = leading(words[i]);
            tokens.rest[i] = remainder(words[i]);
        }
    }

    static __device__ __forceinline__ void multiply(float (&acc)[4], const Fragment &f, const Tokens &tokens) {
#pragma unroll
        for (int s = 0; s < 2; s++) {
            if constexpr (kKind == kFloat32) mma_tf32_k8(acc, f.rest[s], tokens.b + 2 * s);
            mma_tf32_k8(acc, f.a[s], tokens.rest + 2 * s);
            mma_tf32_k8(acc, f.a[s], tokens.b + 2 * s);
        }
    }

    static __device__ __forceinline__ int lane_column(int slot, int t) { return slot * 4 + t; }

    template <class Fn> static __device__ __forceinline__ void for_each_value(const char *tile, int lane, Fn fn) {
        Fragment f;
        load(f, tile, lane);
#pragma unroll
        for (int s = 0; s < 2; s++)
#pragma unroll
            for (int w = 0; w < 4; w++) {
                float value = __uint_as_float(f.a[s][w]);
                if constexpr (kKind == kFloat32) value += __uint_as_float(f.rest[s][w]);
                fn(w % 2, s * 2 + w / 2, value);
            }
    }
};

/* ---- By type -------------------------------------------------------------------------------------------------- */

using FormatQ4_0 = IntegerFormat<kSignedNibble, 32, false>;
using FormatNibbleMin = IntegerFormat<kNibble, 32, true>;   /* q4_1, q4_k */
using FormatFiveMin = IntegerFormat<kFiveBits, 32, true>;   /* q5_0, q5_1, q5_k */
using FormatQ6K = IntegerFormat<kSixBits, 16, false>;
using FormatQ8_0 = IntegerFormat<kByte, 32, false>;
using FormatIq4Nl = IntegerFormat<kTableIq4, 32, false>;
using FormatNvfp4 = IntegerFormat<kTableE2m1, 16, false>;
using FormatF16 = FloatFormat<kFloat16>;
using FormatBf16 = FloatFormat<kBfloat16>;
using FormatF32 = FloatFormat<kFloat32>;

#endif
