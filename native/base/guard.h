/* Reading a mapped file that may become shorter at any moment.
 *
 * A page that is no longer there raises SIGBUS in the thread that touches it, in the middle of a kernel. Asking
 * beforehand (dg_file_check) leaves a gap, and a second copy of the weights is out of the question. So a handler stands
 * in while a call reads a model: it puts zeros where the file is missing, notes that in the file, and lets the thread
 * go on. The call ends in time and without harm, since nothing but results depends on a weight's value; dg_file_check
 * then fails with DG_ERROR_MODEL_FILE, now and at every later call. Any other SIGBUS goes to the handler that was there
 * before. */
#ifndef DG_GUARD_H
#define DG_GUARD_H

#include "dgemma.h"

/* From `enter` to `leave`, reads of `file` by the calling thread, and by the pools that it runs, are guarded. Returns
 * what `leave` wants back: calls may nest, from a callback. */
const dg_file *dg_guard_enter(const dg_file *file);
void dg_guard_leave(const dg_file *outer);

/* The file that this thread reads under guard, or NULL; and the same for a thread that works for another. */
const dg_file *dg_guard_current(void);
void dg_guard_adopt(const dg_file *file);

#endif
