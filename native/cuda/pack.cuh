/* Repacking of a file's blocks into the tiles of formats.cuh, on the device. */
#ifndef DG_CUDA_PACK_CUH
#define DG_CUDA_PACK_CUH

#include "cuda/formats/formats.cuh"

extern "C" {
#include "quant/quant.h"
}

/* Calls fn(a value of the format type that weights of `type`, a dg_type, are stored as); false where there is none. */
template <class Fn> bool with_format(int32_t type, Fn fn) {
    switch (type) {
#define CASE(number, Format, columns, tile, header)                                                                    \
    case number:                                                                                                       \
        fn(Format());                                                                                                  \
        return true;
        DG_CUDA_FORMATS(CASE)
#undef CASE
    default:
        return false;
    }
}

struct PackedShape {
    bool known;                 /* the type has a format */
    ActivationKind activations; /* what it is multiplied with */
    int64_t k_tiles;            /* tiles across a row */
    int64_t row_tiles;          /* tiles down a matrix */
    uint64_t row_tile_bytes;    /* of the k_tiles of 16 rows and their headers */
    uint64_t bytes;             /* of a matrix */
};

PackedShape packed_shape(int32_t type, int64_t n_rows, int64_t n_cols);

/* Whether this device has the matrix instruction that FormatFp4 is for, and code that uses it. Waits for the device. */
bool has_fp4_mma();

/* Packs `n_rows` rows of `type` at `raw` (device memory, rows of `row_bytes` as in a file) into `tiles`. A last tile
 * that is not full is padded with zeros. */
void pack_rows(int32_t type, const uint8_t *raw, uint64_t row_bytes, int64_t n_rows, int64_t n_cols, char *tiles,
               cudaStream_t stream);

#endif
