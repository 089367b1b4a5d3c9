#define _DEFAULT_SOURCE /* madvise */
#include "base/pages.h"

#include <stddef.h>
#include <stdlib.h>
#include <sys/mman.h>

#define VECTOR_BYTES ((uint64_t)64)
#define HUGE_PAGE_BYTES ((uint64_t)2 << 20)

void dg_pages_advise(void *mapping, uint64_t n_bytes) {
#if defined(MADV_HUGEPAGE)
    (void)madvise(mapping, (size_t)n_bytes, MADV_HUGEPAGE);
#else
    (void)mapping;
    (void)n_bytes;
#endif
}

void *dg_pages_allocate(uint64_t n_bytes) {
    const uint64_t alignment = n_bytes < HUGE_PAGE_BYTES ? VECTOR_BYTES : HUGE_PAGE_BYTES;
    void *memory;
    if (n_bytes == 0) n_bytes = 1;
    if (n_bytes > SIZE_MAX - HUGE_PAGE_BYTES || posix_memalign(&memory, (size_t)alignment, (size_t)n_bytes) != 0)
        return NULL;
    if (alignment == HUGE_PAGE_BYTES) dg_pages_advise(memory, n_bytes);
    return memory;
}
