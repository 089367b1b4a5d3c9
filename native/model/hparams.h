/* Hyperparameters: the keys of a GGUF file that say what the model is (docs/format.md). */
#ifndef DG_HPARAMS_H
#define DG_HPARAMS_H

#include "gguf/gguf.h"
#include "model/model.h"

/* Reads them into `model`, whose `layers` it allocates. A missing key, one of another type and a value out of range are
 * errors that name it. */
dg_status dg_hparams_read(const dg_file *file, dg_model *model, dg_error *error);

#endif
