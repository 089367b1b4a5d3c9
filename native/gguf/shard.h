/* One GGUF file, read and checked: the keys and the list of tensors in memory, the tensors' data mapped or read.
 * Used by gguf.c alone, which puts the shards of a model together. */
#ifndef DG_GGUF_SHARD_H
#define DG_GGUF_SHARD_H

#include <stdatomic.h>
#include <time.h>

#include "dgemma.h"

/* Positions are offsets into dg_shard.metadata. */
typedef struct dg_shard_key {
    uint64_t name;
    uint64_t data;
    uint64_t n_bytes;
    int64_t n;
    dg_value_type type;
    dg_value_type element_type;
} dg_shard_key;

typedef struct dg_shard_tensor {
    uint64_t name;
    uint64_t offset; /* into dg_shard.data */
    uint64_t n_bytes;
    int64_t shape[4]; /* rows first */
    int32_t n_dims;
    int32_t type;
} dg_shard_tensor;

typedef struct dg_name {
    const char *name;
    int64_t index;
} dg_name;

typedef struct dg_shard {
    char *path;
    int fd; /* −1: not open. Kept while the file is mapped, for dg_shard_check */
    uint64_t n_bytes;
    struct timespec modified;

    uint8_t *metadata; /* copy of the file up to the tensors' data; names in it end with a zero byte */
    uint64_t data_offset;
    dg_shard_key *keys;       /* (n_keys) in the file's order */
    dg_name *keys_by_name;    /* (n_keys) */
    dg_shard_tensor *tensors; /* (n_tensors) in the file's order */
    int64_t n_keys;
    int64_t n_tensors;

    const uint8_t *data; /* (n_bytes − data_offset); NULL without tensors */
    void *mapping;       /* (n_bytes) or NULL */
    void *memory;        /* (n_bytes − data_offset) or NULL */
    atomic_bool mended;  /* zeros stand in for a part of the mapping: see dg_shard_mend */
} dg_shard;

/* Opens `path`, and reads and checks everything but the tensors' values. `shard` must be zeroed, with fd −1; close it
 * in any case. */
dg_status dg_shard_open(dg_shard *shard, const char *path, dg_error *error);
void dg_shard_close(dg_shard *shard);

/* Makes `data` available. `done` and `total` are bytes over all shards, for `progress`. */
dg_status dg_shard_map(dg_shard *shard, dg_error *error);
dg_status dg_shard_read(dg_shard *shard, uint64_t *done, uint64_t total, dg_progress_callback progress, void *user,
                        dg_error *error);

/* See dg_file_check and dg_file_guard. */
dg_status dg_shard_check(const dg_shard *shard, dg_error *error);
bool dg_shard_mend(dg_shard *shard, const void *address);

bool dg_shard_find_key(const dg_shard *shard, const char *name, dg_value *value);
void dg_shard_key_at(const dg_shard *shard, int64_t index, const char **name, dg_value *value);

/* Sorts names (n) for dg_names_find; returns a name that occurs twice, or NULL. Sorted rather than hashed, because a
 * hostile file can choose names that collide. */
const char *dg_names_sort(dg_name *names, int64_t n);
const dg_name *dg_names_find(const dg_name *names, int64_t n, const char *name);

/* Reads exactly n bytes at `offset` of the shard's file; DG_ERROR_MODEL_FILE where it ends before. */
dg_status dg_shard_pread(const dg_shard *shard, void *bytes, uint64_t n, uint64_t offset, dg_error *error);

/* parse.c: fills metadata, keys and tensors from the open file. */
dg_status dg_shard_parse(dg_shard *shard, dg_error *error);

#endif
