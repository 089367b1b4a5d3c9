/* How a tile of keys and values comes into shared memory.
 *
 * A tile holds kKeys keys, a row each, as float16:
 *
 *     row     key (key_columns) │ value (kDim) │ 8 halves, so that the eight rows of a matrix lie in different banks
 *
 * Two stages take turns: while one is multiplied, the other one's copies are on their way. A cache of float16 is copied
 * as it is. Of another type the bytes of a tile are copied into the second stage's place, and made float16 in the first
 * one's when they have come:
 *
 *     raw row     bytes of the key │ bytes of the value          each as far behind its start as in its 16 bytes */
#ifndef DG_CUDA_ATTENTION_TILES_CUH
#define DG_CUDA_ATTENTION_TILES_CUH

#include "cuda/kernels/attention_params.cuh"

constexpr int kAttentionWarps = 8;
constexpr int kAttentionThreads = 32 * kAttentionWarps;

static __host__ __device__ inline int pad_16(int n) { return (n + 15) / 16 * 16; }

/* Bytes of a cached row of n values. */
static __host__ __device__ inline int cache_row_bytes(int type, int n) {
    return type == DG_TYPE_Q8_0 ? (n + 31) / 32 * (int)sizeof(dg_block_q8_0) : 2 * n;
}
/* Bytes of its place in a raw row: a row that does not begin at a multiple of 16 bytes begins behind one. */
static __host__ __device__ inline int raw_bytes(int row_bytes) {
    return row_bytes % 16 == 0 ? row_bytes : (row_bytes + 15) / 16 * 16 + 16;
}

/* One half of a tile: its keys, or its values. */
struct CachePart {
    const char *rows; /* of the block's head, in the span at hand */
    int type, n;      /* values of a row */
    int row_bytes;
    int column; /* where it begins in a row of the tile */
    int width;  /* halves that it fills there: zeros from n on */
    int raw;    /* where it begins in a raw row, bytes */

    /* How far a row begins behind a multiple of 16 bytes. */
    __device__ __forceinline__ int shift(int64_t slot) const {
        return (int)(((uint32_t) reinterpret_cast<uintptr_t>(rows) + (uint32_t)slot * (uint32_t)row_bytes) & 15);
    }

    /* Copies the row in `slot` as it is, 16 bytes a lane; zeros where it is not valid. */
    __device__ __forceinline__ void copy(uint16_t *to, int64_t slot, bool valid, int lane) const {
        const char *const from = rows + slot * row_bytes;
#pragma unroll 2 /* registers are scarce while queries and sums are kept */
        for (int piece = lane; piece < n / 8; piece += 32)
            cp_async_16(to + column + piece * 8, from + piece * 16, valid);
    }
    /* Copies the 16-byte pieces that the row lies in; nothing behind it is read. */
    __device__ __forceinline__ void copy_raw(char *to, int64_t slot, int lane) const {
        const int before = shift(slot), end = before + row_bytes;
        const char *const from = rows + slot * row_bytes - before;
#pragma unroll 1
        for (int piece = lane; piece * 16 < end; piece += 32)
            cp_async_part(to + raw + piece * 16, from + piece * 16, min(16, end - piece * 16));
    }
    /* Makes values 8·group … + 7 of a raw row float16. */
    __device__ __forceinline__ void convert(uint16_t *to, const char *from, int64_t slot, bool valid, int group) const {
        uint32_t halves[4] = {0, 0, 0, 0};
        const char *const row = from + raw + shift(slot);
        if (valid && group * 8 < n) {
            if (type == DG_TYPE_Q8_0) {
                const uint16_t *block =
                    reinterpret_cast<const uint16_t *>(row + group / 4 * (int)sizeof(dg_block_q8_0));
                const uint16_t *codes = block + 1 + group % 4 * 4;
                const uint32_t words[2] = {codes[0] | (uint32_t)codes[1] << 16, codes[2] | (uint32_t)codes[3] << 16};
                uint32_t pair[2];
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    scale_codes(pair, words[i], block[0]);
                    halves[2 * i] = pair[0];
                    halves[2 * i + 1] = pair[1];
                }
            } else {
                const uint32_t *words = reinterpret_cast<const uint32_t *>(row) + group * 4;
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const bool exists = group * 8 + 2 * i < n; /* n is even */
                    const uint32_t word = exists ? words[i] : 0;
                    halves[i] = type == DG_TYPE_F16
                                    ? word
                                    : pack_halves(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
                }
            }
        }
        *reinterpret_cast<uint4 *>(to + column + group * 8) = make_uint4(halves[0], halves[1], halves[2], halves[3]);
    }
};

/* Some keys of a span that follow each other: their slots may wrap around the end. */
struct KeyRun {
    int n;
    uint32_t first, capacity;
    __device__ __forceinline__ int64_t slot(int key) const {
        const uint32_t slot = first + (uint32_t)key;
        return slot >= capacity ? slot - capacity : slot;
    }
};

/* Starts the copies of a tile of up to kKeys keys, a warp a row in turn. */
template <int kKeys, bool kDirect>
static __device__ __forceinline__ void copy_tile(void *to, int stride, const KeyRun &keys, const CachePart &k,
                                                 const CachePart &v) {
    const int thread = opaque((int)threadIdx.x), lane = thread % 32, warp = thread / 32;
#pragma unroll 1
    for (int i = 0; i < kKeys / kAttentionWarps; i++) {
        const int key = warp + i * kAttentionWarps;
        const bool valid = key < keys.n;
        const int64_t slot = keys.slot(valid ? key : 0);
        if constexpr (kDirect) {
            uint16_t *const row = static_cast<uint16_t *>(to) + key * stride;
            k.copy(row, slot, valid, lane);
            v.copy(row, slot, valid, lane);
        } else if (valid) {
            char *const row = static_cast<char *>(to) + key * stride;
            k.copy_raw(row, slot, lane);
            v.copy_raw(row, slot, lane);
        }
    }
}

/* Makes a tile of what has been copied; zeros where there is no key. */
template <int kKeys>
static __device__ __forceinline__ void convert_tile(uint16_t *to, int stride, const char *raw, int raw_stride,
                                                    const KeyRun &keys, const CachePart &k, const CachePart &v) {
    const int thread = opaque((int)threadIdx.x), lane = thread % 32, warp = thread / 32;
#pragma unroll 1
    for (int key = warp; key < kKeys; key += kAttentionWarps) {
        const bool valid = key < keys.n;
        const int64_t slot = keys.slot(valid ? key : 0);
        const char *const from = raw + key * raw_stride;
        for (int group = lane; group < k.width / 8; group += 32) k.convert(to + key * stride, from, slot, valid, group);
        for (int group = lane; group < v.width / 8; group += 32) v.convert(to + key * stride, from, slot, valid, group);
    }
}

#endif
