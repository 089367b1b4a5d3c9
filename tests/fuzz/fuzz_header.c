/* Parses the input as what stands before the tensors' data in a GGUF file: the reader alone, without opening, mapping
 * and shards (fuzz_gguf), so that it is tried often. */
#include <string.h>

#include "gguf/shard.h"
#include "gguf_mutator.h"
#include "target.h"

size_t LLVMFuzzerCustomMutator(uint8_t *bytes, size_t n_bytes, size_t max_bytes, unsigned seed) {
    return gguf_mutate(bytes, n_bytes, max_bytes, seed);
}

static void check(const dg_shard *shard) {
    for (int64_t i = 0; i < shard->n_keys; i++) {
        const char *name;
        dg_value value, found;
        dg_shard_key_at(shard, i, &name, &value);
        PROMISE(name[0] != '\0' && value.n >= 0);
        PROMISE(dg_shard_find_key(shard, name, &found) && found.data == value.data);
        const uint8_t *begin = value.data;
        PROMISE(begin >= shard->metadata && value.n_bytes <= shard->n_bytes);
        if (value.n_bytes > 0) PROMISE(*(volatile const uint8_t *)(begin + value.n_bytes - 1) <= 255);
    }
    for (int64_t i = 0; i < shard->n_tensors; i++) {
        const dg_shard_tensor *tensor = &shard->tensors[i];
        const dg_type_traits *type = dg_type_traits_of(tensor->type);
        PROMISE(type != NULL && tensor->n_dims >= 1 && tensor->n_dims <= 4);
        PROMISE(tensor->shape[tensor->n_dims - 1] % type->block_size == 0);
        PROMISE(shard->data_offset + tensor->offset + tensor->n_bytes <= shard->n_bytes);
        for (int64_t j = 0; j < i; j++) { /* apart from each other */
            const dg_shard_tensor *other = &shard->tensors[j];
            PROMISE(tensor->offset + tensor->n_bytes <= other->offset ||
                    other->offset + other->n_bytes <= tensor->offset);
        }
    }
}

static const uint8_t *memory;

/* The linker puts it in the place of dg_shard_pread. */
dg_status __wrap_dg_shard_pread(const dg_shard *shard, void *bytes, uint64_t n, uint64_t offset, dg_error *error);
dg_status __wrap_dg_shard_pread(const dg_shard *shard, void *bytes, uint64_t n, uint64_t offset, dg_error *error) {
    (void)error;
    PROMISE(offset <= shard->n_bytes && n <= shard->n_bytes - offset);
    memcpy(bytes, memory + offset, n);
    return DG_OK;
}

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t n_bytes) {
    dg_shard shard = {.fd = -1, .n_bytes = n_bytes, .path = strdup("memory")};
    memory = input;
    dg_error error = {0};
    const dg_status status = dg_shard_parse(&shard, &error);
    if (status == DG_OK)
        check(&shard);
    else
        PROMISE(status == DG_ERROR_MODEL_FILE && strncmp(error.message, "memory: ", 8) == 0);
    dg_shard_close(&shard);
    return 0;
}
