#include "engine/step.h"

#include "base/error.h"
#include "engine/cost.h"

static dg_step_kind begin(dg_forward *f, const dg_step *step) {
    return f->ops->begin_step != NULL ? f->ops->begin_step(f->backend, step) : DG_STEP_PLAIN;
}

/* The whole step stands in the profile as one operation, at the costs of its parts. */
static dg_status wait_for_launched(dg_forward *f, const dg_profile *before, dg_error *error) {
    DG_TRY(dg_wait(f, error));
    dg_profile_stop(f->profile, DG_OP_WHOLE_STEP, before->step_flop, before->step_bytes);
    return DG_OK;
}

dg_status dg_step_run(dg_forward *f, const dg_kv_cache *cache, const dg_step *step, dg_error *error) {
    const dg_cost head = dg_cost_of_head(f->model);
    const dg_profile before = *f->profile;
    for (;;) {
        dg_profile_start(f->profile);
        const dg_step_kind kind = begin(f, step);
        if (kind == DG_STEP_LAUNCHED) return wait_for_launched(f, &before, error);
        DG_TRY(dg_forward_decode(f, cache, NULL, step->conditioned, error));
        dg_denoise(f, step->soft);
        if (kind == DG_STEP_CAPTURED && !f->ops->end_step(f->backend)) {
            *f->profile = before; /* nothing has been done, and `begin` will not try again */
            continue;
        }
        DG_TRY(dg_wait(f, error));
        dg_profile_stop(f->profile, DG_OP_HEAD, head.flop, head.bytes);
        if (kind == DG_STEP_CAPTURED) dg_profile_fold_step(f->profile, &before);
        return DG_OK;
    }
}
