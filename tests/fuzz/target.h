/* What every fuzz target has. */
#ifndef DG_FUZZ_TARGET_H
#define DG_FUZZ_TARGET_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t n_bytes);
/* libFuzzer's own changes, or driver.c's; a target that knows its format better has a LLVMFuzzerCustomMutator. */
size_t LLVMFuzzerMutate(uint8_t *bytes, size_t n_bytes, size_t max_bytes);
size_t LLVMFuzzerCustomMutator(uint8_t *bytes, size_t n_bytes, size_t max_bytes, unsigned seed);

/* What a caller relies on; a broken promise ends the run. */
#define PROMISE(condition)                                                                                             \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "broken promise: %s (%s:%d)\n", #condition, __FILE__, __LINE__);                           \
            abort();                                                                                                   \
        }                                                                                                              \
    } while (0)

#endif
