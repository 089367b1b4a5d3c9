/* Which GPUs a model goes to. */
#ifndef DG_GPU_CHOICE_H
#define DG_GPU_CHOICE_H

#include "dgemma.h"

typedef struct dg_gpu_choice {
    int32_t n;
    const dg_gpu_info *gpus[DG_MAX_GPUS]; /* (n) candidates; the first one comes first in the model as well */
    float proportions[DG_MAX_GPUS];       /* (n) of the layers; all 0: by what is free */
    bool all;                             /* divide over all of them; otherwise the first alone is tried before */
} dg_gpu_choice;

/* Reads `device` and `tensor_split` as dg_model_params has them. DG_ERROR_ARGUMENT where they name no GPU of `found`,
 * or more than one with one name; DG_ERROR_BACKEND where none, or one that they name, can be used. */
dg_status dg_choose_gpus(const dg_gpu_info *found, int32_t n_found, const char *device, const char *tensor_split,
                         dg_gpu_choice *choice, dg_error *error);

#endif
