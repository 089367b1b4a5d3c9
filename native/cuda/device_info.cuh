/* Which device there is, and whether it can be used. */
#ifndef DG_CUDA_DEVICE_INFO_CUH
#define DG_CUDA_DEVICE_INFO_CUH

#include <stddef.h>

#include "cuda/layout.h"

/* dg_backend_ops.describe_device */
dg_status describe_device(dg_device *device, dg_error *error);

/* Why no device can be used, into `note`; false where one can. */
bool find_obstacle(char *note, size_t note_size);

#endif
