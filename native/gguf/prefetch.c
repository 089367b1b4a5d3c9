/* Reads the mapped shards from front to back on a thread of its own; the first call that needs them waits for it.
 *
 * A file that is in the page cache is mapped in bulk this way (14 GB in 0.2 s), where every touch would be a fault of
 * its own. A file that is not comes from the disk in order, and not in the order in which kernels touch pages; what
 * that gains is in bench/results/loading.md, and not conclusive. MADV_WILLNEED for a whole file does not do this: Linux
 * reads one read-ahead window and stops. */
#define _DEFAULT_SOURCE /* madvise */
#include "gguf/prefetch.h"

#include <errno.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/machine.h"
#include "base/threads.h"

#if defined(__linux__) && !defined(MADV_POPULATE_READ)
#define MADV_POPULATE_READ 22 /* Linux 5.14 */
#endif

#define PIECE_BYTES ((uint64_t)32 << 20)   /* short enough that stopping is prompt */
#define WINDOW_BYTES ((uint64_t)128 << 10) /* the usual read-ahead window */

/* Never touches the pages itself: those of a file that became shorter would end the process, while madvise fails. */
static void map_piece(char *start, uint64_t n) {
#if defined(MADV_POPULATE_READ)
    if (madvise(start, (size_t)n, MADV_POPULATE_READ) == 0 || errno != EINVAL) return;
#endif
    for (uint64_t at = 0; at < n; at += WINDOW_BYTES)
        (void)madvise(start + at, (size_t)(n - at < WINDOW_BYTES ? n - at : WINDOW_BYTES), MADV_WILLNEED);
}

static void *prefetch(void *argument) {
    dg_prefetch *p = argument;
    for (int32_t i = 0; i < p->n_shards; i++) {
        const dg_shard *shard = &p->shards[i];
        for (uint64_t at = 0; shard->mapping != NULL && at < shard->n_bytes; at += PIECE_BYTES) {
            if (atomic_load(&p->stop)) return NULL;
            map_piece((char *)shard->mapping + at,
                      shard->n_bytes - at < PIECE_BYTES ? shard->n_bytes - at : PIECE_BYTES);
        }
    }
    atomic_store(&p->done, true);
    return NULL;
}

bool dg_prefetch_under_way(const dg_prefetch *p) {
    return !atomic_load(&p->done) && atomic_load(&p->process) == getpid();
}

void dg_prefetch_start(dg_prefetch *p, const dg_shard *shards, int32_t n_shards) {
    uint64_t n_bytes = 0;
    if (atomic_exchange(&p->asked, true)) return;
    for (int32_t i = 0; i < n_shards; i++) n_bytes += shards[i].n_bytes;
    /* Where not all of it fits, its end would push its beginning out. */
    if (n_bytes > dg_available_memory()) return;
    p->shards = shards;
    p->n_shards = n_shards;
    if (dg_thread_start(&p->thread, prefetch, p)) atomic_store(&p->process, getpid());
}

void dg_prefetch_stop(dg_prefetch *p) {
    if (atomic_load(&p->process) != getpid()) return; /* not started, or before a fork, which threads do not survive */
    atomic_store(&p->stop, true);
    pthread_join(p->thread, NULL);
    atomic_store(&p->process, 0);
}
