/* Parameters of a session, checked, and what follows from them: how its cache and its backend are made, and how much
 * memory they take. */
#ifndef DG_SESSION_PLAN_H
#define DG_SESSION_PLAN_H

#include "engine/kv_cache.h"

typedef struct dg_session_plan {
    dg_session_params params;
    dg_kv_plan kv;
    dg_backend_params backend;
} dg_session_plan;

/* `given` may be NULL, or a shorter struct of an older header. */
dg_status dg_session_plan_of(const dg_model *model, const dg_session_params *given, dg_session_plan *plan,
                             dg_error *error);

#endif
