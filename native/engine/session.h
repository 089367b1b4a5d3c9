/* What a session owns. */
#ifndef DG_SESSION_H
#define DG_SESSION_H

#include <sys/types.h>

#include "engine/denoise.h"
#include "engine/session_plan.h"

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
