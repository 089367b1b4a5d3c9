/* How a model is divided between GPUs and the CPU, and what that takes. Needs neither a GPU nor CUDA. */
#ifndef DG_GPU_PLAN_H
#define DG_GPU_PLAN_H

#include "engine/session_plan.h"

/* Left free on each GPU beyond what is planned: captured steps, kernels' code, and what the driver rounds up. */
#define DG_GPU_RESERVE (UINT64_C(256) << 20)

/* dg_model_plan_gpu (dgemma.h) for GPUs of so many multiprocessors, (DG_MAX_GPUS). `session` is what sessions will be
 * created with; NULL: the defaults. A context longer than the model's is taken as the model's. */
dg_status dg_gpu_plan_for(const dg_model *model, const dg_session_params *session, const int32_t *n_multiprocessors,
                          dg_gpu_plan *plan, dg_error *error);

/* One line for the user: what is where, and why. */
void dg_gpu_explain(const dg_model *model, const dg_gpu_plan *plan, char *text, size_t size);

#endif
