#include "base/error.h"

#include <stdarg.h>
#include <stdio.h>

dg_status dg_fail(dg_error *error, dg_status status, const char *format, ...) {
    if (error != NULL) {
        va_list arguments;
        va_start(arguments, format);
        vsnprintf(error->message, sizeof error->message, format, arguments);
        va_end(arguments);
        /* Names come from files: a line break in one must not forge a second line of output. */
        for (char *c = error->message; *c != '\0'; c++)
            if ((unsigned char)*c < 0x20 || *c == 0x7f) *c = ' ';
        error->status = status;
    }
    return status;
}
