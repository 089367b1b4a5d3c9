/* The forward pass, written once for every device (docs/model.md). */
#ifndef DG_FORWARD_H
#define DG_FORWARD_H

#include "engine/operations.h"

/* Encodes `tokens` (n ≤ max_rows) behind the cache and appends them to it. */
dg_status dg_forward_encode(dg_forward *forward, dg_kv_cache *cache, const int32_t *tokens, int32_t n, dg_error *error);

/* Decodes the canvas `tokens` (canvas_length), or with NULL the canvas under way, into forward->x, conditioned on
 * forward->soft unless it is the first step. The head comes next: ops->logits or ops->denoise. */
dg_status dg_forward_decode(dg_forward *forward, const dg_kv_cache *cache, const int32_t *tokens, bool conditioned,
                            dg_error *error);

#endif
