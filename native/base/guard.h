/* Reading mapped memory whose file may become shorter at any moment.
 *
 * A page that is no longer there raises SIGBUS in the thread that touches it, in the middle of a kernel. Asking
 * beforehand leaves a gap, and a second copy of the weights is out of the question. So a handler stands in while a call
 * reads a model: it has the owner of the mapping put zeros where the file is missing, and lets the thread go on. The
 * call ends in time and without harm, since nothing but results depends on a weight's value; the owner says afterwards
 * that what was read is worth nothing (dg_file_check). Any other SIGBUS goes to the handler that was there before. */
#ifndef DG_GUARD_H
#define DG_GUARD_H

#include <stdbool.h>

/* What may be read under guard; its owner embeds it. `mend` makes the page of `address` readable, or returns false
 * where the address is none of the owner's. It is called in a signal handler. */
typedef struct dg_guard {
    bool (*mend)(const void *owner, const void *address);
    const void *owner;
} dg_guard;

/* From `enter` to `leave`, reads by the calling thread, and by the pools that it runs, are guarded. Returns what
 * `leave` wants back: calls may nest, from a callback. */
const dg_guard *dg_guard_enter(const dg_guard *guard);
void dg_guard_leave(const dg_guard *outer);

/* What this thread reads under guard, or NULL; and the same for a thread that works for another. */
const dg_guard *dg_guard_current(void);
void dg_guard_adopt(const dg_guard *guard);

#endif
