/* Repacking of a file's blocks into the tiles of formats.cuh, on the device. */
#ifndef DG_CUDA_PACK_CUH
#define DG_CUDA_PACK_CUH

#include "formats.cuh"

extern "C" {
#include "quant/quant.h"
}

/* Calls fn(a value of the format type that weights of `type`, a dg_type, are stored as); false where there is none. */
template <class Fn> bool with_format(int32_t type, Fn fn) {
    switch (type) {
    case DG_TYPE_Q4_0: fn(FormatQ4_0()); return true;
    case DG_TYPE_Q4_1:
    case DG_TYPE_Q4_K: fn(FormatNibbleMin()); return true;
    case DG_TYPE_Q5_0:
    case DG_TYPE_Q5_1:
    case DG_TYPE_Q5_K: fn(FormatFiveMin()); return true;
    case DG_TYPE_Q6_K: fn(FormatQ6K()); return true;
    case DG_TYPE_Q8_0: fn(FormatQ8_0()); return true;
    case DG_TYPE_IQ4_NL: fn(FormatIq4Nl()); return true;
    case DG_TYPE_NVFP4: fn(FormatNvfp4()); return true;
    case DG_TYPE_F16: fn(FormatF16()); return true;
    case DG_TYPE_BF16: fn(FormatBf16()); return true;
    case DG_TYPE_F32: fn(FormatF32()); return true;
    default: return false;
    }
}

struct PackedShape {
    bool known;         /* the type has a format */
    bool integer;       /* which kind of activations it is multiplied with */
    int tile_cols;      /* columns of a tile */
    int64_t k_tiles;    /* tiles across a row */
    int64_t row_tiles;  /* tiles down a matrix */
    uint64_t row_tile_bytes; /* of the k_tiles of 16 rows, which follow each other */
    uint64_t bytes;     /* of a matrix */
};

PackedShape packed_shape(int32_t type, int64_t n_rows, int64_t n_cols);

/* Packs `n_rows` rows of `type` at `raw` (device memory, rows of `row_bytes` as in a file) into `tiles`. A last tile that
 * is not full is padded with zeros. */
void pack_rows(int32_t type, const uint8_t *raw, uint64_t row_bytes, int64_t n_rows, int64_t n_cols, char *tiles,
               cudaStream_t stream);

#endif
