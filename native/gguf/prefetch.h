/* A thread that makes mapped shards resident. */
#ifndef DG_GGUF_PREFETCH_H
#define DG_GGUF_PREFETCH_H

#include <pthread.h>

#include "gguf/shard.h"

/* Zeroed at first. */
typedef struct dg_prefetch {
    const dg_shard *shards; /* (n_shards) */
    int32_t n_shards;
    atomic_bool asked, stop, done;
    pthread_t thread;
    atomic_int process; /* that runs the thread; 0: none does */
} dg_prefetch;

/* Starts the thread at the first call, unless the shards are larger than memory; it reads `shards` until it is
 * stopped. */
void dg_prefetch_start(dg_prefetch *prefetch, const dg_shard *shards, int32_t n_shards);
void dg_prefetch_stop(dg_prefetch *prefetch);
bool dg_prefetch_under_way(const dg_prefetch *prefetch);

#endif
