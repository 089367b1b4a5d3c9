/* What a session owns. */
#ifndef DG_SESSION_H
#define DG_SESSION_H

#include <sys/types.h>

#include "engine/denoise.h"

/* Checked parameters of a session, and what follows from them. */
typedef struct dg_session_plan {
    dg_session_params params;
    dg_kv_plan kv;
    dg_backend_params backend;
} dg_session_plan;

/* `given` may be NULL, or a shorter struct of an older header. */
dg_status dg_session_plan_of(const dg_model *model, const dg_session_params *given, dg_session_plan *plan,
                             dg_error *error);

struct dg_session {
    dg_model *model;
    dg_session_params params;
    dg_backend *backend;
    dg_kv_cache cache;
    dg_forward forward;
    dg_denoiser denoiser;
    dg_profile profile;
    atomic_bool cancel;
    pid_t process;           /* that created it: threads do not survive a fork */
    dg_collector *collector; /* or NULL */
};

#endif
