/* What a session owns. */
#ifndef DG_SESSION_H
#define DG_SESSION_H

#include "denoise.h"

struct dg_session {
    dg_model *model;
    dg_session_params params;
    dg_backend *backend;
    dg_kv_cache cache;
    dg_forward forward;
    dg_denoiser denoiser;
    dg_profile profile;
    atomic_bool cancel;
    dg_collector *collector; /* or NULL */
};

#endif
