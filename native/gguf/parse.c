/* Parses the part of a GGUF file before the tensors' data:
 *
 *     "GGUF" · version u32 · n_tensors u64 · n_keys u64
 *     n_keys    × ( name: string · type: u32 · value )
 *     n_tensors × ( name: string · n_dims: u32 · n_dims × size u64, columns first · type: u32 · offset u64 )
 *     padding up to a multiple of general.alignment
 *
 * with string = length u64 · bytes, and array = element type u32 · n u64 · elements; all little endian.
 *
 * The file is not trusted. It is read through a cursor that checks every length against the bytes that remain before
 * anything is allocated or read, and copies it to memory as it goes: a file that is changed later cannot change what
 * was checked. */
#include "base/error.h"
#include "gguf/shard.h"
#include "quant/quant.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "GGUF is read as it is: this needs a little-endian machine"
#endif

enum {
    MAX_KEY_BYTES = 65535, /* the format's own limits */
    MAX_TENSOR_NAME_BYTES = 64,
    MAX_DIMS = 4,
    DEFAULT_ALIGNMENT = 32,
    MIN_ALIGNMENT = 8,       /* the format wants a multiple of 8; float32 rows must not straddle words */
    MAX_ALIGNMENT = 1 << 21, /* a huge page */
    MIN_KEY_ENTRY = 8 + 1 + 4 + 1,
    MIN_TENSOR_ENTRY = 8 + 1 + 4 + 4 + 8,
    MAX_ENTRIES = 1 << 20, /* keys, or tensors: a model has some hundred */
    FIRST_READ = 1 << 16
};

/* Sixteen times the metadata of the released model. Without a limit a sparse file of a terabyte, which costs its maker
 * nothing, would be read whole. */
static const uint64_t MAX_METADATA = (uint64_t)256 << 20;

#define INCOMPLETE "the file is damaged or was not downloaded completely: fetch it again"
#define DAMAGED "the file is damaged: fetch it again, or make it anew"

typedef struct cursor {
    dg_shard *shard;
    uint64_t at;      /* the next byte */
    uint64_t n_read;  /* bytes in shard->metadata */
    const char *kind; /* "key", "tensor" or, in the header, NULL: what is being read, for messages */
    uint64_t name;    /* its name in shard->metadata; 0 while not known */
    int64_t index;    /* its number */
    dg_error *error;
} cursor;

/* Writes at most `size` − 1 bytes of `text`, whole characters only. */
static void copy_cut(char *out, size_t size, const char *text) {
    size_t n = strlen(text);
    if (n >= size) {
        n = size - 1;
        while (n > 0 && ((unsigned char)text[n] & 0xC0) == 0x80) n--;
    }
    memcpy(out, text, n);
    out[n] = '\0';
}

/* Fails with the file and the place, which is at byte `at`, before the text. */
__attribute__((format(printf, 3, 4))) static dg_status fail_at(cursor *c, uint64_t at, const char *format, ...) {
    char text[400], name[97], place[160] = "";
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    if (c->kind != NULL && c->name != 0) {
        copy_cut(name, sizeof name, (const char *)c->shard->metadata + c->name);
        snprintf(place, sizeof place, "%s \"%s\", ", c->kind, name);
    } else if (c->kind != NULL) {
        snprintf(place, sizeof place, "%s %" PRId64 ", ", c->kind, c->index);
    }
    return dg_fail(c->error, DG_ERROR_MODEL_FILE, "%s: %sbyte %" PRIu64 ": %s", c->shard->path, place, at, text);
}

#define FAIL(c, ...) fail_at((c), (c)->at, __VA_ARGS__)

/* Makes the next n bytes available in shard->metadata, without moving on. */
static dg_status need(cursor *c, uint64_t n) {
    dg_shard *shard = c->shard;
    if (n > shard->n_bytes - c->at)
        return FAIL(c, "%" PRIu64 " bytes should follow, but the file ends after %" PRIu64 ": " INCOMPLETE, n,
                    shard->n_bytes - c->at);
    if (c->at + n <= c->n_read) return DG_OK;
    if (n > MAX_METADATA || c->at + n > MAX_METADATA)
        return FAIL(c, "keys and tensor list are longer than %" PRIu64 " MiB: " DAMAGED, MAX_METADATA >> 20);
    uint64_t wanted = c->n_read == 0 ? FIRST_READ : 2 * c->n_read;
    if (wanted < c->at + n) wanted = c->at + n;
    if (wanted > shard->n_bytes) wanted = shard->n_bytes;
    uint8_t *larger = realloc(shard->metadata, wanted);
    if (larger == NULL)
        return dg_fail(c->error, DG_ERROR_OUT_OF_MEMORY, "%s: no memory for %" PRIu64 " bytes of keys", shard->path,
                       wanted);
    shard->metadata = larger;
    DG_TRY(dg_shard_pread(shard, shard->metadata + c->n_read, wanted - c->n_read, c->n_read, c->error));
    c->n_read = wanted;
    return DG_OK;
}

static dg_status read_u32(cursor *c, uint32_t *value) {
    DG_TRY(need(c, 4));
    memcpy(value, c->shard->metadata + c->at, 4);
    c->at += 4;
    return DG_OK;
}

static dg_status read_u64(cursor *c, uint64_t *value) {
    DG_TRY(need(c, 8));
    memcpy(value, c->shard->metadata + c->at, 8);
    c->at += 8;
    return DG_OK;
}

/* Whether the n bytes are UTF-8: shortest forms only, no surrogates, nothing above U+10FFFF. */
static bool is_utf8(const uint8_t *s, uint64_t n) {
    for (uint64_t i = 0; i < n;) {
        uint8_t lead = s[i];
        if (lead < 0x80) {
            i++;
            continue;
        }
        uint64_t n_more = lead >= 0xF0 ? 3 : lead >= 0xE0 ? 2 : 1;
        if (lead < 0xC2 || lead > 0xF4 || n_more > n - i - 1) return false;
        for (uint64_t j = 1; j <= n_more; j++)
            if ((s[i + j] & 0xC0) != 0x80) return false;
        uint8_t second = s[i + 1];
        if ((lead == 0xE0 && second < 0xA0) || (lead == 0xED && second > 0x9F) || (lead == 0xF0 && second < 0x90) ||
            (lead == 0xF4 && second > 0x8F))
            return false;
        i += 1 + n_more;
    }
    return true;
}

/* Reads a string of [min, max] bytes; `at` becomes the offset of its first one. */
static dg_status read_string(cursor *c, uint64_t min, uint64_t max, uint64_t *at, uint64_t *n) {
    uint64_t start = c->at;
    DG_TRY(read_u64(c, n));
    if (*n > c->shard->n_bytes - c->at)
        return fail_at(c, start,
                       "a string of %" PRIu64 " bytes, but only %" PRIu64 " are left in the file: " INCOMPLETE, *n,
                       c->shard->n_bytes - c->at);
    if (*n < min || *n > max)
        return fail_at(c, start, "a name of %" PRIu64 " bytes, expected %" PRIu64 " to %" PRIu64 ": " DAMAGED, *n, min,
                       max);
    DG_TRY(need(c, *n));
    if (!is_utf8(c->shard->metadata + c->at, *n)) return fail_at(c, start, "a string is not valid UTF-8: " DAMAGED);
    *at = c->at;
    c->at += *n;
    return DG_OK;
}

/* Reads the name of an entry and the u32 behind it, which makes room for the zero byte that ends the name. */
static dg_status read_name(cursor *c, uint64_t max, uint64_t *at, uint32_t *next) {
    uint64_t n;
    DG_TRY(read_string(c, 1, max, at, &n));
    if (memchr(c->shard->metadata + *at, 0, n) != NULL) return fail_at(c, *at, "a zero byte in a name: " DAMAGED);
    DG_TRY(read_u32(c, next));
    c->shard->metadata[*at + n] = '\0';
    c->name = *at;
    return DG_OK;
}

/* Bytes of a value of fixed size; 0 for strings, arrays and unknown types. */
static uint64_t value_bytes(uint32_t type) {
    switch (type) {
    case DG_VALUE_UINT8:
    case DG_VALUE_INT8:
    case DG_VALUE_BOOL:
        return 1;
    case DG_VALUE_UINT16:
    case DG_VALUE_INT16:
        return 2;
    case DG_VALUE_UINT32:
    case DG_VALUE_INT32:
    case DG_VALUE_FLOAT32:
        return 4;
    case DG_VALUE_UINT64:
    case DG_VALUE_INT64:
    case DG_VALUE_FLOAT64:
        return 8;
    default:
        return 0;
    }
}

/* Reads key->n values of key->element_type. */
static dg_status read_elements(cursor *c, dg_shard_key *key) {
    uint64_t n = (uint64_t)key->n, bytes_left = c->shard->n_bytes - c->at;
    uint64_t least = key->element_type == DG_VALUE_STRING ? 8 : value_bytes(key->element_type);
    if (n > bytes_left / least)
        return FAIL(c,
                    "%" PRIu64 " values of at least %" PRIu64 " bytes, but only %" PRIu64
                    " bytes are left in the file: " INCOMPLETE,
                    n, least, bytes_left);
    key->data = c->at;
    if (key->element_type == DG_VALUE_STRING) {
        for (uint64_t i = 0; i < n; i++) {
            uint64_t at = 0, n_bytes = 0;
            DG_TRY(read_string(c, 0, UINT64_MAX, &at, &n_bytes));
            if (key->type == DG_VALUE_STRING) key->data = at; /* a single string goes without its length */
        }
        key->n_bytes = c->at - key->data;
        return DG_OK;
    }
    key->n_bytes = n * least;
    DG_TRY(need(c, key->n_bytes));
    if (key->element_type == DG_VALUE_BOOL)
        for (uint64_t i = 0; i < n; i++)
            if (c->shard->metadata[c->at + i] > 1)
                return fail_at(c, c->at + i, "a bool of value %d, expected 0 or 1: " DAMAGED,
                               c->shard->metadata[c->at + i]);
    c->at += key->n_bytes;
    return DG_OK;
}

static dg_status read_key(cursor *c, dg_shard_key *key) {
    uint32_t type;
    DG_TRY(read_name(c, MAX_KEY_BYTES, &key->name, &type));
    uint64_t n = 1;
    uint32_t element_type = type;
    if (type == DG_VALUE_ARRAY) {
        DG_TRY(read_u32(c, &element_type));
        if (element_type == DG_VALUE_ARRAY)
            return fail_at(c, c->at - 4, "an array of arrays, which no model has: " DAMAGED);
    }
    if (value_bytes(element_type) == 0 && element_type != DG_VALUE_STRING)
        return fail_at(c, c->at - 4, "unknown value type %" PRIu32 ", expected 0 to 12: " DAMAGED, element_type);
    if (type == DG_VALUE_ARRAY) DG_TRY(read_u64(c, &n));
    if (n > INT64_MAX) return fail_at(c, c->at - 8, "an array of %" PRIu64 " values: " DAMAGED, n);
    key->type = (dg_value_type)type;
    key->element_type = (dg_value_type)element_type;
    key->n = (int64_t)n;
    return read_elements(c, key);
}

/* Elements and bytes of a tensor, from its shape and type; anything that does not fit 64 bits is refused. */
static dg_status measure_tensor(cursor *c, dg_shard_tensor *tensor, const uint64_t *sizes, uint32_t type) {
    const dg_type_traits *traits = type <= INT32_MAX ? dg_type_traits_of((int32_t)type) : NULL;
    if (traits == NULL)
        return fail_at(c, c->at - 4,
                       "type %" PRIu32 " is not one that this engine reads: use a file of another type, "
                       "or convert the checkpoint with `dgemma convert`",
                       type);
    uint64_t n_elements = 1;
    for (int i = 0; i < tensor->n_dims; i++) {
        if (sizes[i] == 0 || sizes[i] > INT64_MAX)
            return FAIL(c, "dimension %d is %" PRId64 ", expected at least 1: " DAMAGED, i, (int64_t)sizes[i]);
        if (n_elements > INT64_MAX / sizes[i]) return FAIL(c, "more than 2^63 elements: " DAMAGED);
        n_elements *= sizes[i];
        tensor->shape[tensor->n_dims - 1 - i] = (int64_t)sizes[i];
    }
    uint64_t block_size = (uint64_t)traits->block_size, block_bytes = (uint64_t)traits->block_bytes;
    if (sizes[0] % block_size != 0)
        return FAIL(c,
                    "rows of %" PRIu64 " elements, expected a multiple of %" PRIu64 ", the block of type %s: " DAMAGED,
                    sizes[0], block_size, traits->name);
    if (n_elements / block_size > INT64_MAX / block_bytes) return FAIL(c, "more than 2^63 bytes: " DAMAGED);
    tensor->n_bytes = n_elements / block_size * block_bytes;
    tensor->type = (int32_t)type;
    return DG_OK;
}

static dg_status read_tensor(cursor *c, dg_shard_tensor *tensor) {
    uint32_t n_dims, type;
    uint64_t sizes[MAX_DIMS];
    DG_TRY(read_name(c, MAX_TENSOR_NAME_BYTES, &tensor->name, &n_dims));
    if (n_dims > MAX_DIMS)
        return fail_at(c, c->at - 4, "%" PRIu32 " dimensions, expected at most %d: " DAMAGED, n_dims, MAX_DIMS);
    for (uint32_t i = 0; i < n_dims; i++) DG_TRY(read_u64(c, &sizes[i]));
    for (int i = 0; i < MAX_DIMS; i++) tensor->shape[i] = 1;
    if (n_dims == 0) sizes[n_dims++] = 1; /* a scalar is a row of one */
    tensor->n_dims = (int32_t)n_dims;
    DG_TRY(read_u32(c, &type));
    DG_TRY(measure_tensor(c, tensor, sizes, type));
    return read_u64(c, &tensor->offset);
}

/* Returns `entries`, which hold n, with room for one more; NULL where there is no memory. Entries are allocated as they
 * are found, never by the count that the file claims. */
static void *grow(cursor *c, void *entries, int64_t n, size_t entry_bytes) {
    if ((n & (n - 1)) != 0) return entries; /* the capacity is the next power of two */
    size_t capacity = n == 0 ? 1 : 2 * (size_t)n;
    void *larger = realloc(entries, capacity * entry_bytes);
    if (larger == NULL)
        dg_fail(c->error, DG_ERROR_OUT_OF_MEMORY, "%s: no memory for %zu entries", c->shard->path, capacity);
    return larger;
}

static dg_status read_header(cursor *c, uint64_t *n_tensors, uint64_t *n_keys) {
    dg_shard *shard = c->shard;
    if (shard->n_bytes == 0)
        return dg_fail(c->error, DG_ERROR_MODEL_FILE, "%s: the file is empty: fetch it again", shard->path);
    DG_TRY(need(c, 4));
    const uint8_t *magic = shard->metadata;
    if (memcmp(magic, "GGUF", 4) != 0)
        return FAIL(c,
                    "not a GGUF file: it begins with %02x %02x %02x %02x, expected 47 47 55 46. A checkpoint of "
                    "another format is converted with `dgemma convert`",
                    magic[0], magic[1], magic[2], magic[3]);
    c->at += 4;
    uint32_t version;
    DG_TRY(read_u32(c, &version));
    if (version != 0 && (version & 0xFFFF) == 0)
        return fail_at(c, 4, "a big-endian file, expected little endian: use the file for little-endian machines");
    if (version != 2 && version != 3)
        return fail_at(c, 4, "GGUF version %" PRIu32 ", expected 2 or 3: convert the model anew", version);
    DG_TRY(read_u64(c, n_tensors));
    DG_TRY(read_u64(c, n_keys));
    uint64_t bytes_left = shard->n_bytes - c->at;
    if (*n_tensors > bytes_left / MIN_TENSOR_ENTRY)
        return fail_at(c, 8, "%" PRIu64 " tensors cannot stand in %" PRIu64 " bytes: " INCOMPLETE, *n_tensors,
                       bytes_left);
    if (*n_keys > bytes_left / MIN_KEY_ENTRY)
        return fail_at(c, 16, "%" PRIu64 " keys cannot stand in %" PRIu64 " bytes: " INCOMPLETE, *n_keys, bytes_left);
    if (*n_tensors > MAX_ENTRIES || *n_keys > MAX_ENTRIES)
        return fail_at(c, 8, "%" PRIu64 " tensors and %" PRIu64 " keys, expected at most %d of each: " DAMAGED,
                       *n_tensors, *n_keys, MAX_ENTRIES);
    return DG_OK;
}

/* Sorts the keys by name, so that they can be found, and none stands there twice. */
static dg_status index_keys(cursor *c) {
    dg_shard *shard = c->shard;
    shard->keys_by_name = malloc((size_t)(shard->n_keys + 1) * sizeof *shard->keys_by_name);
    if (shard->keys_by_name == NULL)
        return dg_fail(c->error, DG_ERROR_OUT_OF_MEMORY, "%s: no memory for %" PRId64 " keys", shard->path,
                       shard->n_keys);
    for (int64_t i = 0; i < shard->n_keys; i++)
        shard->keys_by_name[i] = (dg_name){(const char *)shard->metadata + shard->keys[i].name, i};
    const char *twice = dg_names_sort(shard->keys_by_name, shard->n_keys);
    if (twice == NULL) return DG_OK;
    c->kind = "key";
    c->name = (uint64_t)((const uint8_t *)twice - shard->metadata);
    return fail_at(c, c->name, "the key stands in the file twice: " DAMAGED);
}

static dg_status read_alignment(cursor *c, uint64_t *alignment) {
    dg_value value;
    *alignment = DEFAULT_ALIGNMENT;
    if (!dg_shard_find_key(c->shard, "general.alignment", &value)) return DG_OK;
    uint32_t found = 0;
    uint64_t at = (uint64_t)((const uint8_t *)value.data - c->shard->metadata);
    if (value.type != DG_VALUE_UINT32)
        return fail_at(c, at, "key \"general.alignment\" has value type %d, expected uint32: " DAMAGED,
                       (int)value.type);
    memcpy(&found, value.data, sizeof found);
    if (found < MIN_ALIGNMENT || found > MAX_ALIGNMENT || (found & (found - 1)) != 0)
        return fail_at(c, at,
                       "key \"general.alignment\" is %" PRIu32 ", expected a power of two from %d to %d: " DAMAGED,
                       found, MIN_ALIGNMENT, MAX_ALIGNMENT);
    *alignment = found;
    return DG_OK;
}

static int by_offset(const void *a, const void *b) {
    const dg_shard_tensor *left = *(const dg_shard_tensor *const *)a, *right = *(const dg_shard_tensor *const *)b;
    return (left->offset > right->offset) - (left->offset < right->offset);
}

/* Every tensor lies on the alignment, inside the file, and apart from the others. */
static dg_status check_offsets(cursor *c, uint64_t alignment) {
    dg_shard *shard = c->shard;
    int64_t n = shard->n_tensors;
    if (n == 0) return DG_OK;
    if (shard->data_offset > shard->n_bytes)
        return fail_at(c, shard->n_bytes, "the tensors' data is missing: " INCOMPLETE);
    uint64_t data_bytes = shard->n_bytes - shard->data_offset;
    const dg_shard_tensor **sorted = malloc((size_t)n * sizeof *sorted);
    if (sorted == NULL)
        return dg_fail(c->error, DG_ERROR_OUT_OF_MEMORY, "%s: no memory for %" PRId64 " tensors", shard->path, n);
    dg_status status = DG_OK;
    for (int64_t i = 0; i < n && status == DG_OK; i++) {
        const dg_shard_tensor *tensor = sorted[i] = &shard->tensors[i];
        c->name = tensor->name;
        if (tensor->offset % alignment != 0)
            status = fail_at(c, tensor->name,
                             "its data is at offset %" PRIu64 ", expected a multiple of %" PRIu64 ": " DAMAGED,
                             tensor->offset, alignment);
        else if (tensor->n_bytes > data_bytes || tensor->offset > data_bytes - tensor->n_bytes)
            status = fail_at(c, tensor->name,
                             "its data, %" PRIu64 " bytes at offset %" PRIu64 ", goes past the end of the "
                             "file, which has %" PRIu64 " bytes for tensors: " INCOMPLETE,
                             tensor->n_bytes, tensor->offset, data_bytes);
    }
    if (status == DG_OK) qsort(sorted, (size_t)n, sizeof *sorted, by_offset);
    for (int64_t i = 1; i < n && status == DG_OK; i++) {
        if (sorted[i]->offset - sorted[i - 1]->offset >= sorted[i - 1]->n_bytes) continue;
        char other[97];
        copy_cut(other, sizeof other, (const char *)shard->metadata + sorted[i - 1]->name);
        c->name = sorted[i]->name;
        status = fail_at(c, c->name, "its data at offset %" PRIu64 " overlaps that of tensor \"%s\": " DAMAGED,
                         sorted[i]->offset, other);
    }
    free(sorted);
    return status;
}

dg_status dg_shard_parse(dg_shard *shard, dg_error *error) {
    cursor c = {.shard = shard, .error = error};
    uint64_t n_tensors = 0, n_keys = 0, alignment;
    DG_TRY(read_header(&c, &n_tensors, &n_keys));

    c.kind = "key";
    for (uint64_t i = 0; i < n_keys; i++) {
        c.name = 0;
        c.index = (int64_t)i;
        void *larger = grow(&c, shard->keys, shard->n_keys, sizeof *shard->keys);
        if (larger == NULL) return DG_ERROR_OUT_OF_MEMORY;
        shard->keys = larger;
        DG_TRY(read_key(&c, &shard->keys[i]));
        shard->n_keys++;
    }
    c.kind = "tensor";
    for (uint64_t i = 0; i < n_tensors; i++) {
        c.name = 0;
        c.index = (int64_t)i;
        void *larger = grow(&c, shard->tensors, shard->n_tensors, sizeof *shard->tensors);
        if (larger == NULL) return DG_ERROR_OUT_OF_MEMORY;
        shard->tensors = larger;
        DG_TRY(read_tensor(&c, &shard->tensors[i]));
        shard->n_tensors++;
    }

    /* From here on the copy stays where it is, and pointers into it last. */
    uint8_t *exact = realloc(shard->metadata, c.at);
    if (exact != NULL) shard->metadata = exact;
    c.kind = NULL;
    DG_TRY(index_keys(&c));
    c.kind = NULL;
    DG_TRY(read_alignment(&c, &alignment));
    shard->data_offset = (c.at + alignment - 1) / alignment * alignment;
    c.kind = "tensor";
    return check_offsets(&c, alignment);
}
