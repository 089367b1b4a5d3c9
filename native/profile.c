#include "profile.h"

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
        [DG_OP_HEAD] = "head and draw",
        [DG_OP_SAMPLER] = "sampler",
    };
    *profile = (dg_profile){0};
    for (int i = 0; i < DG_OP_COUNT; i++) profile->operations[i].name = names[i];
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
