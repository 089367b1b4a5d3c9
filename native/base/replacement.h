/* Writing a file as a whole: it appears under its name when all of it is on the disk, and not before. Whoever opens the
 * name finds the older file or the new one, whatever fails, and however many write to it at once: the last to finish
 * wins. What a killed process has left half written is removed by the next one that writes to the same name. */
#ifndef DG_REPLACEMENT_H
#define DG_REPLACEMENT_H

#include <stdio.h>

#include "dgemma.h"

typedef struct dg_replacement {
    FILE *file;   /* to be written to; the replacement's own */
    char *path;   /* of the target */
    char *beside; /* of what is being written: a hidden file in the same folder */
} dg_replacement;

/* Opens a fresh file in the folder of `path`. DG_ERROR_IO where that cannot be, or where `path` names a folder, a
 * device or a pipe. */
dg_status dg_replacement_begin(const char *path, dg_replacement *replacement, dg_error *error);
/* Puts the file in the target's place. After a failure the target is as it was, and nothing is left beside it. */
dg_status dg_replacement_commit(dg_replacement *replacement, dg_error *error);
/* Gives up; the target is as it was. */
void dg_replacement_abandon(dg_replacement *replacement);

#endif
