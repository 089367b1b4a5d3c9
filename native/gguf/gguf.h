/* GGUF files as the engine uses them: what dgemma.h offers, and besides it keys by type and files without a mapping.
 *
 * A mapped file may become shorter at any moment: dg_file_check is asked before every prefill and every denoising step,
 * and after it, at one system call a shard; guard.h keeps the process alive in between.
 *
 * Everything here is checked when the file is opened and trusted afterwards. Format: docs/format.md. */
#ifndef DG_GGUF_H
#define DG_GGUF_H

#include "base/guard.h"
#include "dgemma.h"

/* dg_file_open with a choice: `use_mmap` false reads all tensors into memory, so that nothing that happens to the file
 * afterwards matters. Reading takes a while: `progress` (or NULL) hears of it and may cancel (DG_ERROR_CANCELLED). */
dg_status dg_file_open_with(const char *path, bool use_mmap, dg_progress_callback progress, void *user, dg_file **file,
                            dg_error *error);

/* For reading the mapped file: where a part of it is gone, zeros take its place to the file's end, and dg_file_check
 * fails from then on. */
const dg_guard *dg_file_guard(const dg_file *file);

/* Begins to read all mapped tensors into memory, in the background, when called for the first time. */
void dg_file_prefetch(dg_file *file);
bool dg_file_prefetching(const dg_file *file);

const char *dg_file_path(const dg_file *file); /* as given to dg_file_open */
/* The index of a tensor as dg_file_tensor takes it, or −1. */
int64_t dg_file_tensor_index(const dg_file *file, const char *name);

/* ---- Keys by type ----
 *
 * Each fails with DG_ERROR_MODEL_FILE and a text that names file and key, where the key is missing, has another type or
 * is out of range. For an optional key ask dg_file_find_key(file, key, NULL) first. */

/* Any integer type whose value lies in [min, max]. */
dg_status dg_file_get_i32(const dg_file *file, const char *key, int32_t min, int32_t max, int32_t *value,
                          dg_error *error);
/* float32 or float64, finite and within [min, max]. */
dg_status dg_file_get_f32(const dg_file *file, const char *key, float min, float max, float *value, dg_error *error);
dg_status dg_file_get_bool(const dg_file *file, const char *key, bool *value, dg_error *error);
/* UTF-8 in the file's own memory, without a zero byte at the end. */
dg_status dg_file_get_string(const dg_file *file, const char *key, const char **text, size_t *n_bytes, dg_error *error);
/* An array of exactly n values, or one value that stands for all of them. values: (n). */
dg_status dg_file_get_i32s(const dg_file *file, const char *key, int32_t min, int32_t max, int32_t *values, int64_t n,
                           dg_error *error);
dg_status dg_file_get_bools(const dg_file *file, const char *key, bool *values, int64_t n, dg_error *error);
/* An array of `element_type` and any length. */
dg_status dg_file_get_array(const dg_file *file, const char *key, dg_value_type element_type, dg_value *array,
                            dg_error *error);

/* Element `index` of a value of any integer type (index 0 of a single one); false for other types, and for uint64
 * values that int64 does not hold. */
bool dg_value_integer(const dg_value *value, int64_t index, int64_t *number);

/* Whether a string equals `text`, which ends with a zero byte. */
bool dg_string_equals(const char *string, size_t n_bytes, const char *text);

/* Walks an array of strings: `offset` starts at 0 and is moved on; false behind the last one. */
bool dg_value_next_string(const dg_value *array, size_t *offset, const char **text, size_t *n_bytes);

/* "uint32", "array of string" … for messages. */
const char *dg_value_type_name(const dg_value *value);

#endif
