/* The types of tensors: their blocks' sizes, and how to decode and encode them. */
#ifndef DG_QUANT_H
#define DG_QUANT_H

#include "dgemma.h"
#include "quant/blocks.h"

typedef struct dg_type_traits {
    const char *name;
    int32_t block_size; /* elements */
    int32_t block_bytes;
    float max_magnitude; /* the largest |x| that an encoder takes */
    dg_decode decode;
} dg_type_traits;

/* NULL for a number that no type of this engine has. Lives for ever. */
const dg_type_traits *dg_type_traits_of(int32_t type);

/* The fastest encoder that this machine runs; all give the same bytes. NULL for types that are only read. */
dg_encode dg_encoder_of(int32_t type);

/* Bytes of a row of n_cols elements, a multiple of the type's block size; the type must be known. */
uint64_t dg_row_bytes(int32_t type, int64_t n_cols);

#endif
