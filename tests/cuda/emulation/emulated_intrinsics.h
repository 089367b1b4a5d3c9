/* What native/cuda/intrinsics.cuh writes in PTX, spelled out. Fragment layouts are those of the PTX manual. */
#ifndef DGEMMA_EMULATED_INTRINSICS_H
#define DGEMMA_EMULATED_INTRINSICS_H

#include "quant/float.h"

#include <tuple>

static inline float half_to_float(uint16_t h) { return dg_f16_to_f32(h); }
static inline uint16_t float_to_half(float x) { return dg_f32_to_f16(x); }

static inline uint32_t pack_halves(float low, float high) {
    return dg_f32_to_f16(low) | (uint32_t)dg_f32_to_f16(high) << 16;
}
static inline void scale_codes(uint32_t (&halves)[2], uint32_t codes, uint16_t scale) {
    float by = dg_f16_to_f32(scale), v[4];
    for (int i = 0; i < 4; i++) v[i] = (float)(int8_t)(codes >> 8 * i) * by;
    halves[0] = pack_halves(v[0], v[1]);
    halves[1] = pack_halves(v[2], v[3]);
}
static inline int opaque(int x) { return x; }
static inline float fast_exp2(float x) { return exp2f(x); }

template <class T> T tile_load(const void *from) {
    emulation::note_access(from, sizeof(T));
    return *(const T *)from;
}

static inline void cp_async_16(void *shared, const void *global, bool valid) {
    emulation::copy_later(shared, valid ? global : nullptr, 16);
}
static inline void cp_async_16(void *shared, const void *global) { emulation::copy_later(shared, global, 16); }
static inline void cp_async_part(void *shared, const void *global, int n_bytes) {
    emulation::copy_later(shared, global, 16, (size_t)n_bytes);
}
static inline void cp_async_8(void *shared, const void *global) { emulation::copy_later(shared, global, 8); }
static inline void cp_async_commit() { emulation::commit_copies(); }
template <int kGroupsLeft> void cp_async_wait() { emulation::wait_copies(kGroupsLeft); }

namespace emulation {

template <class C> struct Mma {
    C *c;
    const uint32_t *a, *b;
};

/* Element i of the k dimension in fragment words of 4 / sizeof(T) elements. */
template <class T> T element(const uint32_t *words, int word, int i) {
    T value;
    memcpy(&value, (const char *)&words[word] + (size_t)i * sizeof(T), sizeof value);
    return value;
}

/* A (16, K), B (K, 8), both with K along the lanes of a group of four: word w of lane 4g + t holds columns
 * kWordsK·… as in the manual: A words alternate rows g and g + 8, then step along k. */
template <class C, class T, class V, int kSteps, V (*convert)(T)> void mma(void *const *all) {
    constexpr int per_word = 4 / (int)sizeof(T);
    constexpr int k_size = kSteps * 4 * per_word;
    V a[16][k_size], b[8][k_size];
    for (int l = 0; l < 32; l++) {
        auto *m = (Mma<C> *)all[l];
        for (int s = 0; s < kSteps; s++)
            for (int i = 0; i < per_word; i++) {
                int k = s * 4 * per_word + l % 4 * per_word + i;
                a[l / 4][k] = convert(element<T>(m->a, 2 * s, i));
                a[l / 4 + 8][k] = convert(element<T>(m->a, 2 * s + 1, i));
                b[l / 4][k] = convert(element<T>(m->b, s, i));
            }
    }
    for (int l = 0; l < 32; l++) {
        auto *m = (Mma<C> *)all[l];
        for (int i = 0; i < 4; i++) {
            const V *row = a[l / 4 + (i >= 2 ? 8 : 0)], *column = b[l % 4 * 2 + i % 2];
            C sum = m->c[i];
            for (int k = 0; k < k_size; k++) sum += (C)row[k] * (C)column[k];
            m->c[i] = sum;
        }
    }
}

inline int from_s8(int8_t x) { return x; }
inline float from_half(uint16_t x) { return dg_f16_to_f32(x); }
inline float from_tf32(uint32_t x) { return dg_float_from_bits(x & 0xffffe000u); } /* the unit ignores 13 bits */

struct Matrices {
    uint32_t *r;
    const void *row;
};

/* Lane 8·i + j gives the address of row j of matrix i; lane l receives elements 2(l % 4), +1 of row l / 4 of each. */
template <bool kTransposed> void ldmatrix(void *const *all) {
    for (int l = 0; l < 32; l++)
        for (int i = 0; i < 4; i++) {
            uint16_t pair[2];
            for (int e = 0; e < 2; e++) {
                int row = kTransposed ? l % 4 * 2 + e : l / 4, column = kTransposed ? l / 4 : l % 4 * 2 + e;
                memcpy(&pair[e], (const char *)((Matrices *)all[8 * i + row])->row + 2 * column, 2);
            }
            memcpy(&((Matrices *)all[l])->r[i], pair, 4);
        }
}

} // namespace emulation

static inline void mma_s8_k32(int (&c)[4], const uint32_t *a, const uint32_t *b) {
    emulation::Mma<int> m = {c, a, b};
    emulation::warp_operation("mma.s8.k32", &m, emulation::mma<int, int8_t, int, 2, emulation::from_s8>);
}
static inline void mma_s8_k16(int (&c)[4], const uint32_t *a, const uint32_t *b) {
    emulation::Mma<int> m = {c, a, b};
    emulation::warp_operation("mma.s8.k16", &m, emulation::mma<int, int8_t, int, 1, emulation::from_s8>);
}
static inline void mma_f16_k16(float (&c)[4], const uint32_t *a, const uint32_t *b) {
    emulation::Mma<float> m = {c, a, b};
    emulation::warp_operation("mma.f16.k16", &m, emulation::mma<float, uint16_t, float, 2, emulation::from_half>);
}
static inline void mma_tf32_k8(float (&c)[4], const uint32_t *a, const uint32_t *b) {
    emulation::Mma<float> m = {c, a, b};
    emulation::warp_operation("mma.tf32.k8", &m, emulation::mma<float, uint32_t, float, 2, emulation::from_tf32>);
}
namespace emulation {
struct Fp4Mma {
    float *c;
    const uint32_t *a, *b;
    uint32_t scale_a, scale_b;
};
inline float e2m1(uint32_t code) {
    static const float magnitudes[8] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6};
    return code & 8 ? -magnitudes[code & 7] : magnitudes[code & 7];
}
inline float e4m3(uint32_t code) {
    int exponent = (int)(code >> 3 & 15), mantissa = (int)(code & 7);
    return exponent == 0 ? ldexpf((float)mantissa, -9) : ldexpf((float)(8 + mantissa), exponent - 10);
}
/* Eight nibbles a word, the first in the lowest bits: A words 2·h + half hold row g + 8·half, columns 32·h + 8·t …, B
 * words h column g. Scales of row g come from lane 4·g, of row g + 8 from lane 4·g + 1, of column g from lane 4·g. */
inline void mma_fp4(void *const *all) {
    float a[16][64], b[8][64];
    for (int l = 0; l < 32; l++) {
        auto *m = (Fp4Mma *)all[l];
        int g = l / 4, t = l % 4;
        for (int h = 0; h < 2; h++)
            for (int i = 0; i < 8; i++) {
                int k = 32 * h + 8 * t + i, shift = 8 * (k / 16);
                for (int half = 0; half < 2; half++)
                    a[g + 8 * half][k] = e2m1(m->a[2 * h + half] >> 4 * i & 15) *
                                         e4m3(((Fp4Mma *)all[4 * g + half])->scale_a >> shift & 0x7f);
                b[g][k] = e2m1(m->b[h] >> 4 * i & 15) * e4m3(((Fp4Mma *)all[4 * g])->scale_b >> shift & 0x7f);
            }
    }
    for (int l = 0; l < 32; l++) {
        auto *m = (Fp4Mma *)all[l];
        for (int i = 0; i < 4; i++)
            for (int k = 0; k < 64; k++) m->c[i] += a[l / 4 + i / 2 * 8][k] * b[l % 4 * 2 + i % 2][k];
    }
}
} // namespace emulation

#define kHasFp4Mma (emulation::has_fp4_mma())
static inline void mma_fp4_k64(float (&c)[4], const uint32_t *a, uint32_t scale_a, const uint32_t *b,
                               uint32_t scale_b) {
    emulation::Fp4Mma m = {c, a, b, scale_a, scale_b};
    emulation::warp_operation("mma.fp4.k64", &m, emulation::mma_fp4);
}
static inline void ldmatrix_x4(uint32_t (&r)[4], const void *row) {
    emulation::note_access(row, 16);
    emulation::Matrices m = {r, row};
    emulation::warp_operation("ldmatrix", &m, emulation::ldmatrix<false>);
}
static inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void *row) {
    emulation::note_access(row, 16);
    emulation::Matrices m = {r, row};
    emulation::warp_operation("ldmatrix.trans", &m, emulation::ldmatrix<true>);
}

struct KernelOrder {
    KernelOrder() { emulation::note_begin(); }
    ~KernelOrder() {}
};

template <class T> T *shared_memory() { return (T *)emulation::shared; }

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
            Arguments... arguments) {
    emulation::launch_kernel(
        stream, (void *)kernel, __PRETTY_FUNCTION__, grid, block, shared_bytes,
        [kernel, values = std::tuple<Parameters...>(arguments...)] { std::apply(kernel, values); });
}

#endif
