/* Takes an input apart into the fields of structs. */
#ifndef DG_FUZZ_TAKE_H
#define DG_FUZZ_TAKE_H

#include <string.h>

#include "target.h"

/* Moves `input` on; zeros where it has ended. */
static inline void take(const uint8_t **input, size_t *n_left, void *out, size_t n) {
    memset(out, 0, n);
    const size_t n_taken = n < *n_left ? n : *n_left;
    memcpy(out, *input, n_taken);
    *input += n_taken;
    *n_left -= n_taken;
}

#endif
