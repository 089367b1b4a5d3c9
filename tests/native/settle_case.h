/* One settling of a canvas, as tests/cuda/test_canvas.py states it: for the engine (kernels_api.c) and for the emulated
 * device (tests/cuda/emulation/settle_api.cpp). */
#ifndef DG_SETTLE_CASE_H
#define DG_SETTLE_CASE_H

#include "device/canvas.h"

typedef struct test_settle_case {
    dg_canvas_rules rules;
    dg_canvas_progress progress;   /* of the step before; afterwards of this one */
    int32_t *pinned, *ids, *draft; /* (n) */
    float *entropies;              /* (n) */
    int32_t *argmax, *candidates;  /* (n) */
    int32_t *replayed[2];          /* (steps, n) candidates and fresh tokens, where rules.replayed */
} test_settle_case;

#endif
