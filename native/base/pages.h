/* Weights on huge pages, where the system has them: a processor remembers the addresses of few pages, and to look one
 * up takes longer than to read what lies there. Asking is all that can be done; refusals go unnoticed. (A session's
 * scratch and cache stay on ordinary ones: a step gains 2 %, but to find whole huge pages in a full memory takes a
 * second.) */
#ifndef DG_PAGES_H
#define DG_PAGES_H

#include <stdint.h>

/* n_bytes of memory, not zeroed, aligned for vectors at least; NULL where there is none. free() releases it. */
void *dg_pages_allocate(uint64_t n_bytes);

/* Asks for huge pages for a mapped file. Linux uses them for files that it reads from then on, on file systems that can
 * (XFS, ext4 since 6.16), and for what is cached in such pieces already; parts cached in small ones stay so. */
void dg_pages_advise(void *mapping, uint64_t n_bytes);

#endif
