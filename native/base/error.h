/* Statuses and the text that goes with them. */
#ifndef DG_ERROR_H
#define DG_ERROR_H

#include "dgemma.h"

/* Writes status and message (printf style, cut to fit, one line) into `error`, which may be NULL; returns `status`, so
 * that a failing check is one line: `return dg_fail(error, DG_ERROR_ARGUMENT, "…", …);` */
dg_status dg_fail(dg_error *error, dg_status status, const char *format, ...)
#if defined(__GNUC__)
    __attribute__((format(printf, 3, 4)))
#endif
    ;

#define DG_TRY(call)                                                                                                   \
    do {                                                                                                               \
        dg_status status_ = (call);                                                                                    \
        if (status_ != DG_OK) return status_;                                                                          \
    } while (0)

#endif
