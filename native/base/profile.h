/* Where the time of a session goes, operation by operation. */
#ifndef DG_PROFILE_H
#define DG_PROFILE_H

#include "dgemma.h"

typedef enum dg_operation_id {
    DG_OP_EMBED,
    DG_OP_SELF_CONDITIONING,
    DG_OP_QKV,
    DG_OP_ATTENTION,
    DG_OP_ATTENTION_OUTPUT,
    DG_OP_MLP,
    DG_OP_EXPERTS,
    DG_OP_NORMS,
    DG_OP_HEAD,
    DG_OP_WHOLE_STEP, /* a captured one, launched as a whole */
    DG_OP_COUNT
} dg_operation_id;

typedef struct dg_profile {
    dg_operation operations[DG_OP_COUNT];
    double last;                  /* seconds, when the operation under way began */
    double step_flop, step_bytes; /* of the step that was captured last */
} dg_profile;

void dg_profile_reset(dg_profile *profile);
/* The next operation begins now. */
void dg_profile_start(dg_profile *profile);
/* The operation that began at the last start or stop ends now. */
void dg_profile_stop(dg_profile *profile, dg_operation_id id, double flop, double bytes);
/* The operations since `before` were captured as one step, and have run as one: they become DG_OP_WHOLE_STEP. */
void dg_profile_fold_step(dg_profile *profile, const dg_profile *before);

#endif
