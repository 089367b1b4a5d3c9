/* Decodes the input as rows of a tensor type, which the first byte names: arbitrary bytes are weights, whatever they
 * say, and nothing is read or written outside of the row. */
#include <string.h>

#include "quant/quant.h"
#include "target.h"

enum { MAX_BLOCKS = 3, MAX_BLOCK = 256 };

static const int32_t types[] = {
    DG_TYPE_F32,    DG_TYPE_F16,     DG_TYPE_BF16,   DG_TYPE_Q4_0,  DG_TYPE_Q4_1,  DG_TYPE_Q5_0,   DG_TYPE_Q5_1,
    DG_TYPE_Q8_0,   DG_TYPE_Q2_K,    DG_TYPE_Q3_K,   DG_TYPE_Q4_K,  DG_TYPE_Q5_K,  DG_TYPE_Q6_K,   DG_TYPE_IQ2_XXS,
    DG_TYPE_IQ2_XS, DG_TYPE_IQ3_XXS, DG_TYPE_IQ4_NL, DG_TYPE_IQ3_S, DG_TYPE_IQ2_S, DG_TYPE_IQ4_XS, DG_TYPE_NVFP4,
};

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t n_bytes) {
    if (n_bytes < 1) return 0;
    const dg_type_traits *type = dg_type_traits_of(types[input[0] % (sizeof types / sizeof *types)]);
    PROMISE(type != NULL && type->decode != NULL && type->block_size <= MAX_BLOCK);
    size_t n_blocks = (n_bytes - 1) / (size_t)type->block_bytes;
    if (n_blocks > MAX_BLOCKS) n_blocks = MAX_BLOCKS;
    if (n_blocks == 0) return 0;
    const size_t n_source = n_blocks * (size_t)type->block_bytes, n = n_blocks * (size_t)type->block_size;
    /* Of exactly these lengths, so that the sanitizers see what lies outside; a mapped row begins at any even byte. */
    uint8_t *source = malloc(n_source);
    float *whole = malloc(n * sizeof *whole), *single = malloc(n * sizeof *single);
    PROMISE(source != NULL && whole != NULL && single != NULL);
    memcpy(source, input + 1, n_source);
    type->decode(source, whole, (int64_t)n);
    for (size_t i = 0; i < n_blocks; i++) /* block by block it is the same */
        type->decode(source + i * (size_t)type->block_bytes, single + i * (size_t)type->block_size, type->block_size);
    PROMISE(memcmp(whole, single, n * sizeof *whole) == 0);
    free(source);
    free(whole);
    free(single);
    return 0;
}
