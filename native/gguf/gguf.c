/* The shards of a model put together: one list of keys (the first shard's), one list of tensors (everybody's). */
#include "gguf/gguf.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "gguf/prefetch.h"

enum { MAX_SHARDS = 1000 }; /* each keeps a file open */

struct dg_file {
    dg_shard *shards; /* (n_shards) */
    int32_t n_shards;
    dg_tensor_info *tensors;  /* (n_tensors) shard by shard, in the files' order */
    dg_name *tensors_by_name; /* (n_tensors) */
    int64_t n_tensors;
    dg_prefetch prefetch;
    dg_guard guard;
};

/* The integer of a split.* key. */
static dg_status split_key(const dg_shard *shard, const char *key, int64_t min, int64_t max, int64_t *number,
                           dg_error *error) {
    dg_value value;
    if (!dg_shard_find_key(shard, key, &value))
        return dg_fail(error, DG_ERROR_MODEL_FILE,
                       "%s: key \"%s\" is missing, which every shard of a model has: put all "
                       "shards of one model together again",
                       shard->path, key);
    if (value.type == DG_VALUE_ARRAY || !dg_value_integer(&value, 0, number) || *number < min || *number > max)
        return dg_fail(error, DG_ERROR_MODEL_FILE,
                       "%s: key \"%s\" should be an integer from %" PRId64 " to %" PRId64
                       ": the file is damaged: fetch it again",
                       shard->path, key, min, max);
    return DG_OK;
}

/* Refuses a shard whose keys contradict the first one's. Most writers give the later shards no keys but split.*, so
 * this finds some strangers only; the rest is found by their tensors. */
static dg_status check_same_model(const dg_shard *first, const dg_shard *other, dg_error *error) {
    for (int64_t i = 0; i < other->n_keys; i++) {
        const char *name;
        dg_value theirs, ours;
        dg_shard_key_at(other, i, &name, &theirs);
        if (strcmp(name, "split.no") == 0 || !dg_shard_find_key(first, name, &ours)) continue;
        if (theirs.type == ours.type && theirs.element_type == ours.element_type && theirs.n_bytes == ours.n_bytes &&
            memcmp(theirs.data, ours.data, ours.n_bytes) == 0)
            continue;
        return dg_fail(error, DG_ERROR_MODEL_FILE,
                       "%s: key \"%.100s\" differs from that in %s: a shard of another model; "
                       "put all shards of one model together again",
                       other->path, name, first->path);
    }
    return DG_OK;
}

/* Opens the shards after the first. Their names are made from the first one's path alone, as …-00002-of-00003.gguf:
 * nothing that stands in a file can lead out of the folder. */
static dg_status open_shards(dg_file *file, dg_error *error) {
    const dg_shard *first = &file->shards[0];
    int64_t n_shards, number;
    if (!dg_shard_find_key(first, "split.count", NULL)) return DG_OK;
    DG_TRY(split_key(first, "split.count", 0, MAX_SHARDS, &n_shards, error));
    if (n_shards <= 1) return DG_OK;
    DG_TRY(split_key(first, "split.no", 0, n_shards - 1, &number, error));
    if (number != 0)
        return dg_fail(error, DG_ERROR_MODEL_FILE,
                       "%s: shard %" PRId64 " of %" PRId64 ": open the first one, "
                       "…-00001-of-%05" PRId64 ".gguf",
                       first->path, number + 1, n_shards, n_shards);

    char ending[64];
    size_t n_ending = (size_t)snprintf(ending, sizeof ending, "-00001-of-%05" PRId64 ".gguf", n_shards);
    size_t n_path = strlen(first->path);
    if (n_path < n_ending || strcmp(first->path + n_path - n_ending, ending) != 0)
        return dg_fail(error, DG_ERROR_MODEL_FILE,
                       "%s: the first of %" PRId64 " shards, so its name should end with %s: "
                       "give the shards their names back",
                       first->path, n_shards, ending);

    const char *first_path = first->path;
    dg_shard *shards = realloc(file->shards, (size_t)n_shards * sizeof *shards);
    size_t path_bytes = n_path + sizeof ending;
    char *path = malloc(path_bytes);
    if (shards != NULL) file->shards = shards;
    dg_status status = DG_OK;
    if (shards == NULL || path == NULL)
        status = dg_fail(error, DG_ERROR_OUT_OF_MEMORY, "no memory for %" PRId64 " shards", n_shards);
    for (int64_t i = 1; i < n_shards && status == DG_OK; i++) {
        dg_shard *shard = &file->shards[i];
        *shard = (dg_shard){.fd = -1};
        file->n_shards++;
        snprintf(path, path_bytes, "%.*s-%05" PRId64 "-of-%05" PRId64 ".gguf", (int)(n_path - n_ending), first_path,
                 i + 1, n_shards);
        status = dg_shard_open(shard, path, error);
        if (status == DG_OK) status = split_key(shard, "split.no", 0, n_shards - 1, &number, error);
        if (status == DG_OK && number != i)
            status = dg_fail(error, DG_ERROR_MODEL_FILE,
                             "%s: the file is shard %" PRId64 ", its name says %" PRId64 ": give "
                             "the shards their names back",
                             path, number + 1, i + 1);
        if (status == DG_OK) status = check_same_model(&file->shards[0], shard, error);
    }
    free(path);
    return status;
}

/* Lists the tensors of all shards. */
static dg_status list_tensors(dg_file *file, dg_error *error) {
    const char *path = dg_file_path(file);
    for (int32_t i = 0; i < file->n_shards; i++) file->n_tensors += file->shards[i].n_tensors;
    file->tensors = malloc((size_t)(file->n_tensors + 1) * sizeof *file->tensors);
    file->tensors_by_name = malloc((size_t)(file->n_tensors + 1) * sizeof *file->tensors_by_name);
    if (file->tensors == NULL || file->tensors_by_name == NULL)
        return dg_fail(error, DG_ERROR_OUT_OF_MEMORY, "%s: no memory for a list of %" PRId64 " tensors", path,
                       file->n_tensors);
    int64_t n = 0;
    for (int32_t i = 0; i < file->n_shards; i++) {
        const dg_shard *shard = &file->shards[i];
        for (int64_t j = 0; j < shard->n_tensors; j++, n++) {
            const dg_shard_tensor *tensor = &shard->tensors[j];
            dg_tensor_info *info = &file->tensors[n];
            *info = (dg_tensor_info){.name = (const char *)shard->metadata + tensor->name,
                                     .type = tensor->type,
                                     .n_dims = tensor->n_dims,
                                     .n_bytes = tensor->n_bytes,
                                     .data = shard->data + tensor->offset};
            memcpy(info->shape, tensor->shape, sizeof info->shape);
            file->tensors_by_name[n] = (dg_name){info->name, n};
        }
    }
    const char *twice = dg_names_sort(file->tensors_by_name, n);
    if (twice != NULL)
        return dg_fail(error, DG_ERROR_MODEL_FILE,
                       "%s: tensor \"%s\" is there twice: the file is damaged, or two shards "
                       "are of different models: fetch it again",
                       path, twice);
    int64_t expected;
    if (file->n_shards == 1) return DG_OK;
    DG_TRY(split_key(&file->shards[0], "split.tensors.count", 0, INT64_MAX, &expected, error));
    if (expected != n)
        return dg_fail(error, DG_ERROR_MODEL_FILE,
                       "%s: the shards have %" PRId64 " tensors, expected %" PRId64 " (key "
                       "\"split.tensors.count\"): put all shards of one model together again",
                       path, n, expected);
    return DG_OK;
}

static dg_status open_file(dg_file *file, const char *path, bool use_mmap, dg_progress_callback progress, void *user,
                           dg_error *error) {
    file->shards = malloc(sizeof *file->shards);
    if (file->shards == NULL) return dg_fail(error, DG_ERROR_OUT_OF_MEMORY, "%s: no memory to open it", path);
    file->shards[0] = (dg_shard){.fd = -1};
    file->n_shards = 1;
    DG_TRY(dg_shard_open(&file->shards[0], path, error));
    DG_TRY(open_shards(file, error));
    uint64_t done = 0, total = 0;
    for (int32_t i = 0; i < file->n_shards; i++) total += file->shards[i].n_bytes - file->shards[i].data_offset;
    for (int32_t i = 0; i < file->n_shards; i++) {
        dg_shard *shard = &file->shards[i];
        DG_TRY(use_mmap ? dg_shard_map(shard, error) : dg_shard_read(shard, &done, total, progress, user, error));
    }
    return list_tensors(file, error);
}

static bool mend(const void *owner, const void *address) {
    const dg_file *file = owner;
    for (int32_t i = 0; i < file->n_shards; i++)
        if (dg_shard_mend(&file->shards[i], address)) return true;
    return false;
}

dg_status dg_file_open_with(const char *path, bool use_mmap, dg_progress_callback progress, void *user, dg_file **file,
                            dg_error *error) {
    if (path == NULL || file == NULL)
        return dg_fail(error, DG_ERROR_ARGUMENT, "dg_file_open: `path` and `file` must not be NULL");
    *file = NULL;
    dg_file *opened = calloc(1, sizeof *opened);
    if (opened == NULL) return dg_fail(error, DG_ERROR_OUT_OF_MEMORY, "%s: no memory to open it", path);
    opened->guard = (dg_guard){mend, opened};
    dg_status status = open_file(opened, path, use_mmap, progress, user, error);
    if (status == DG_OK)
        *file = opened;
    else
        dg_file_close(opened);
    return status;
}

dg_status dg_file_open(const char *path, dg_file **file, dg_error *error) {
    return dg_file_open_with(path, true, NULL, NULL, file, error);
}

void dg_file_close(dg_file *file) {
    if (file == NULL) return;
    dg_prefetch_stop(&file->prefetch);
    for (int32_t i = 0; i < file->n_shards; i++) dg_shard_close(&file->shards[i]);
    free(file->tensors_by_name);
    free(file->tensors);
    free(file->shards);
    free(file);
}

dg_status dg_file_check(const dg_file *file, dg_error *error) {
    for (int32_t i = 0; i < file->n_shards; i++) DG_TRY(dg_shard_check(&file->shards[i], error));
    return DG_OK;
}

const dg_guard *dg_file_guard(const dg_file *file) { return &file->guard; }

bool dg_file_prefetching(const dg_file *file) { return dg_prefetch_under_way(&file->prefetch); }

void dg_file_prefetch(dg_file *file) { dg_prefetch_start(&file->prefetch, file->shards, file->n_shards); }

const char *dg_file_path(const dg_file *file) { return file->shards[0].path; }

int64_t dg_file_n_keys(const dg_file *file) { return file->shards[0].n_keys; }

int64_t dg_file_n_tensors(const dg_file *file) { return file->n_tensors; }

uint64_t dg_file_n_bytes(const dg_file *file) {
    uint64_t n_bytes = 0;
    for (int32_t i = 0; i < file->n_shards; i++) n_bytes += file->shards[i].n_bytes;
    return n_bytes;
}

void dg_file_key(const dg_file *file, int64_t index, const char **name, dg_value *value) {
    dg_shard_key_at(&file->shards[0], index, name, value);
}

bool dg_file_find_key(const dg_file *file, const char *name, dg_value *value) {
    return dg_shard_find_key(&file->shards[0], name, value);
}

void dg_file_tensor(const dg_file *file, int64_t index, dg_tensor_info *info) { *info = file->tensors[index]; }

int64_t dg_file_tensor_index(const dg_file *file, const char *name) {
    const dg_name *found = dg_names_find(file->tensors_by_name, file->n_tensors, name);
    return found != NULL ? found->index : -1;
}

bool dg_file_find_tensor(const dg_file *file, const char *name, dg_tensor_info *info) {
    const dg_name *found = dg_names_find(file->tensors_by_name, file->n_tensors, name);
    if (found != NULL && info != NULL) *info = file->tensors[found->index];
    return found != NULL;
}

dg_status dg_file_read(const dg_file *file, const char *name, uint64_t first, uint64_t n, void *bytes,
                       dg_error *error) {
    const dg_name *found = dg_names_find(file->tensors_by_name, file->n_tensors, name);
    if (found == NULL) return dg_fail(error, DG_ERROR_ARGUMENT, "%s: has no tensor \"%s\"", dg_file_path(file), name);
    const dg_tensor_info *info = &file->tensors[found->index];
    if (first > info->n_bytes || n > info->n_bytes - first)
        return dg_fail(error, DG_ERROR_ARGUMENT,
                       "tensor \"%s\" has %" PRIu64 " bytes; bytes %" PRIu64 " to %" PRIu64 " were asked for", name,
                       info->n_bytes, first, first + n);
    int64_t index = found->index;
    const dg_shard *shard = file->shards;
    while (index >= shard->n_tensors) index -= shard++->n_tensors;
    if (shard->fd < 0) { /* read into memory when it was opened */
        memcpy(bytes, (const uint8_t *)info->data + first, (size_t)n);
        return DG_OK;
    }
    return dg_shard_pread(shard, bytes, n, shard->data_offset + shard->tensors[index].offset + first, error);
}
