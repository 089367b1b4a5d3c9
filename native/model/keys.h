/* The types of all keys that the engine or its bindings read: a file that breaks one is refused when it is opened. */
#ifndef DG_MODEL_KEYS_H
#define DG_MODEL_KEYS_H

#include "gguf/gguf.h"

/* Keys that are there have the type that they should; the tokenizer's lists are as long as each other, and its token
 * ids are among them. Missing keys are the business of whoever needs them. */
dg_status dg_keys_check(const dg_file *file, dg_error *error);

#endif
