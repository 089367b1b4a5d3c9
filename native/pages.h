/* Memory on huge pages, where the system has them: a processor remembers the addresses of few pages, and to look one up
 * takes longer than to read what lies there. Asking is all that can be done; refusals go unnoticed. */
#ifndef DG_PAGES_H
#define DG_PAGES_H

#include <stdint.h>

/* n_bytes of memory, not zeroed, aligned for vectors at least; NULL where there is none. free() releases it. */
void *dg_pages_allocate(uint64_t n_bytes);

/* Asks for huge pages for a mapped file. Linux uses them for files that it reads from then on, on file systems that can
 * (XFS, ext4 since 6.16), and for what is cached in such pieces already; parts cached in small ones stay so. */
void dg_pages_advise(void *mapping, uint64_t n_bytes);

#endif
