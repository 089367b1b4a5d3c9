/* Weights on huge pages, where the system has them. A processor remembers the addresses of few pages, and looking one
 * up takes longer than reading what lies there. The system can only be asked, and its refusal goes unnoticed.
 *
 * A session's scratch and cache stay on ordinary pages: huge ones save 2 % of a step, but the system needs a second to
 * find them in a full memory. */
#ifndef DG_PAGES_H
#define DG_PAGES_H

#include <stdint.h>

/* n_bytes of memory, not zeroed, aligned for vectors at least; NULL where there is none. free() releases it. */
void *dg_pages_allocate(uint64_t n_bytes);

/* Asks for huge pages for a mapped file. Linux uses them for files that it reads from then on, on file systems that can
 * (XFS, ext4 since 6.16), and for what is cached in such pieces already; parts cached in small ones stay so. */
void dg_pages_advise(void *mapping, uint64_t n_bytes);

#endif
