/* Opens the input as a GGUF file, or as two shards with MARKER between them, and, where it is accepted, reads
 * everything that the file says it holds. */
#define _GNU_SOURCE /* memmem */
#include "gguf/gguf.h"

#include <string.h>

#include "gguf_mutator.h"
#include "memory_file.h"
#include "target.h"

#define MARKER "--NEXT-SHARD--"

static volatile uint8_t sink;

/* Touches every byte: the sanitizers see what lies outside. */
static void read_all(const void *data, size_t n_bytes) {
    uint8_t sum = 0;
    for (size_t i = 0; i < n_bytes; i++) sum ^= ((const uint8_t *)data)[i];
    sink = sum;
}

static void read_keys(const dg_file *file) {
    for (int64_t i = 0; i < dg_file_n_keys(file); i++) {
        const char *name, *text;
        dg_value value, found;
        dg_file_key(file, i, &name, &value);
        PROMISE(strlen(name) > 0);
        PROMISE(dg_file_find_key(file, name, &found));
        PROMISE(found.data == value.data && found.n == value.n);
        PROMISE(strlen(dg_value_type_name(&value)) > 0);
        read_all(value.data, value.n_bytes);
        if (value.type == DG_VALUE_ARRAY && value.element_type == DG_VALUE_STRING) {
            size_t offset = 0, n_text;
            int64_t n = 0;
            for (; dg_value_next_string(&value, &offset, &text, &n_text); n++) read_all(text, n_text);
            PROMISE(n == value.n && offset == value.n_bytes);
        }
        dg_error error;
        int32_t number, numbers[4];
        float real;
        bool flag, flags[4];
        size_t n_text;
        if (dg_file_get_i32(file, name, -5, 5, &number, &error) == DG_OK) PROMISE(number >= -5 && number <= 5);
        if (dg_file_get_f32(file, name, 0.0f, 1.0f, &real, &error) == DG_OK) PROMISE(real >= 0.0f && real <= 1.0f);
        (void)dg_file_get_i32s(file, name, 0, INT32_MAX, numbers, 4, &error);
        (void)dg_file_get_bool(file, name, &flag, &error);
        (void)dg_file_get_bools(file, name, flags, 4, &error);
        if (dg_file_get_string(file, name, &text, &n_text, &error) == DG_OK) read_all(text, n_text);
        (void)dg_file_get_array(file, name, DG_VALUE_STRING, &found, &error);
    }
}

static void read_tensors(const dg_file *file) {
    uint64_t n_bytes = 0;
    for (int64_t i = 0; i < dg_file_n_tensors(file); i++) {
        dg_tensor_info info, found;
        dg_type_info type;
        dg_file_tensor(file, i, &info);
        PROMISE(strlen(info.name) > 0 && strlen(info.name) <= 64);
        PROMISE(dg_file_find_tensor(file, info.name, &found) && found.data == info.data);
        PROMISE(dg_type_describe(info.type, &type, NULL) == DG_OK);
        PROMISE(info.n_dims >= 1 && info.n_dims <= 4);
        uint64_t n_elements = 1;
        for (int dim = 0; dim < 4; dim++) {
            PROMISE(info.shape[dim] >= 1 && (dim < info.n_dims || info.shape[dim] == 1));
            n_elements *= (uint64_t)info.shape[dim];
        }
        PROMISE(info.shape[info.n_dims - 1] % type.block_size == 0);
        PROMISE(info.n_bytes == n_elements / (uint64_t)type.block_size * (uint64_t)type.block_bytes);
        read_all(info.data, info.n_bytes);
        n_bytes += info.n_bytes;
    }
    PROMISE(n_bytes <= dg_file_n_bytes(file)); /* nothing overlaps */
}

static memory_file first, second; /* the second one is only there where the input has it */

static void remove_first(void) { memory_file_remove(&first); }

size_t LLVMFuzzerCustomMutator(uint8_t *bytes, size_t n_bytes, size_t max_bytes, unsigned seed) {
    return gguf_mutate(bytes, n_bytes, max_bytes, seed);
}

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t n_bytes) {
    if (first.path[0] == '\0') {
        first = memory_file_open("-00001-of-00002.gguf");
        atexit(remove_first);
    }
    const uint8_t *marker = n_bytes == 0 ? NULL : memmem(input, n_bytes, MARKER, strlen(MARKER));
    size_t n_first = marker == NULL ? n_bytes : (size_t)(marker - input);
    memory_file_write(&first, input, n_first);
    if (marker != NULL) {
        second = memory_file_open("-00002-of-00002.gguf");
        memory_file_write(&second, marker + strlen(MARKER), n_bytes - n_first - strlen(MARKER));
    }
    for (int use_mmap = 0; use_mmap < 2; use_mmap++) {
        dg_file *file;
        dg_error error;
        if (dg_file_open_with(first.path, use_mmap != 0, NULL, NULL, &file, &error) == DG_OK) {
            read_keys(file);
            read_tensors(file);
            PROMISE(!dg_file_find_key(file, "", NULL));
            PROMISE(!dg_file_find_tensor(file, "", NULL));
            PROMISE(dg_file_check(file, &error) == DG_OK);
            dg_file_close(file);
        } else {
            PROMISE(file == NULL && error.status != DG_OK);
            const size_t n_name = strlen(first.path) - strlen("00001-of-00002.gguf");
            PROMISE(strncmp(error.message, first.path, n_name) == 0);
        }
    }
    if (marker != NULL) memory_file_remove(&second);
    return 0;
}
