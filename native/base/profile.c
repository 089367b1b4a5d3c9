#include "base/profile.h"

#include <time.h>

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

void dg_profile_reset(dg_profile *profile) {
    static const char *const names[DG_OP_COUNT] = {
        [DG_OP_EMBED] = "embedding",
        [DG_OP_SELF_CONDITIONING] = "self-conditioning",
        [DG_OP_QKV] = "attention projections",
        [DG_OP_ATTENTION] = "attention",
        [DG_OP_ATTENTION_OUTPUT] = "attention output",
        [DG_OP_MLP] = "dense mlp",
        [DG_OP_EXPERTS] = "experts",
        [DG_OP_NORMS] = "norms and residuals",
        [DG_OP_HEAD] = "head and sampler",
        [DG_OP_WHOLE_STEP] = "whole step",
    };
    /* A captured step stays captured. */
    *profile = (dg_profile){.step_flop = profile->step_flop, .step_bytes = profile->step_bytes};
    for (int i = 0; i < DG_OP_COUNT; i++) profile->operations[i].name = names[i];
}

void dg_profile_fold_step(dg_profile *profile, const dg_profile *before) {
    dg_profile folded = *before;
    dg_operation *step = &folded.operations[DG_OP_WHOLE_STEP];
    folded.step_flop = folded.step_bytes = 0;
    for (int i = 0; i < DG_OP_COUNT; i++) {
        folded.step_flop += profile->operations[i].flop - before->operations[i].flop;
        folded.step_bytes += profile->operations[i].bytes - before->operations[i].bytes;
        step->seconds += profile->operations[i].seconds - before->operations[i].seconds;
    }
    step->calls++;
    step->flop += folded.step_flop;
    step->bytes += folded.step_bytes;
    folded.last = profile->last;
    *profile = folded;
}

void dg_profile_start(dg_profile *profile) { profile->last = now(); }

void dg_profile_stop(dg_profile *profile, dg_operation_id id, double flop, double bytes) {
    double time = now();
    dg_operation *operation = &profile->operations[id];
    operation->calls++;
    operation->seconds += time - profile->last;
    operation->flop += flop;
    operation->bytes += bytes;
    profile->last = time;
}
