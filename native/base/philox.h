/* Philox4x32-10, the counter-based generator of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
 *
 * A draw depends on what it is for and on nothing else, so a seed gives the same text whatever the number of threads,
 * the batch or the device. */
#ifndef DG_PHILOX_H
#define DG_PHILOX_H

#include <stdint.h>

/* For functions that run on a CUDA device as well. */
#ifdef __CUDACC__
#define DG_ANYWHERE __host__ __device__
#else
#define DG_ANYWHERE
#endif

typedef enum dg_stream { DG_STREAM_INITIAL = 0, DG_STREAM_CANDIDATE = 1, DG_STREAM_RENOISE = 2 } dg_stream;

/* First 32-bit word of the block with key `seed` and counter (position, step, canvas, stream). */
static inline DG_ANYWHERE uint32_t dg_random(uint64_t seed, uint32_t canvas, uint32_t step, uint32_t position,
                                             dg_stream stream) {
    uint32_t key0 = (uint32_t)seed, key1 = (uint32_t)(seed >> 32);
    uint32_t c0 = position, c1 = step, c2 = canvas, c3 = (uint32_t)stream;
    for (int round = 0; round < 10; round++) {
        uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
        uint32_t n0 = (uint32_t)(p1 >> 32) ^ c1 ^ key0, n2 = (uint32_t)(p0 >> 32) ^ c3 ^ key1;
        c0 = n0;
        c1 = (uint32_t)p1;
        c2 = n2;
        c3 = (uint32_t)p0;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return c0;
}

/* Uniform token in [0, n_vocab). */
static inline DG_ANYWHERE int32_t dg_random_token(uint32_t bits, int32_t n_vocab) {
    return (int32_t)(((uint64_t)bits * (uint64_t)n_vocab) >> 32);
}

/* Uniform in [0, 1): the upper 24 bits, so that the float is exact and never 1. */
static inline DG_ANYWHERE float dg_random_uniform(uint32_t bits) { return (float)(bits >> 8) * 0x1p-24f; }

#endif
