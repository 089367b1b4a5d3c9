/* A mutator that knows what GGUF's keys and tensor list are made of. A change of single bytes nearly always ends at the
 * next length; here entries are taken out, doubled, moved and changed inside, and counts, lengths and offsets follow.
 */
#ifndef DG_FUZZ_GGUF_MUTATOR_H
#define DG_FUZZ_GGUF_MUTATOR_H

#include <string.h>

#include "quant/quant.h"
#include "target.h"

enum { GGUF_HEADER = 24, GGUF_ENTRIES = 64, GGUF_ENTRY_BYTES = 512, GGUF_ALIGNMENT = 32 };

typedef struct gguf_entry {
    uint8_t name[64];
    uint8_t rest[GGUF_ENTRY_BYTES]; /* behind the name */
    size_t n_name, n_rest;
} gguf_entry;

typedef struct gguf_parts {
    uint8_t header[GGUF_HEADER];
    gguf_entry entries[2][GGUF_ENTRIES]; /* keys, tensors */
    int n[2];
    const uint8_t *data; /* behind them, from the padding on */
    size_t n_data;
} gguf_parts;

static uint64_t gguf_u64(const uint8_t *at) {
    uint64_t number;
    memcpy(&number, at, sizeof number);
    return number;
}
static uint32_t gguf_u32(const uint8_t *at) {
    uint32_t number;
    memcpy(&number, at, sizeof number);
    return number;
}

/* Bytes of a key's value behind its type, or SIZE_MAX. */
static size_t gguf_value_bytes(const uint8_t *at, size_t n_left, uint32_t type) {
    static const uint8_t sizes[] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
    uint64_t n = 1;
    size_t used = 0;
    if (type == DG_VALUE_ARRAY) {
        if (n_left < 12) return SIZE_MAX;
        type = gguf_u32(at);
        n = gguf_u64(at + 4);
        used = 12;
    }
    if (type >= sizeof sizes || type == DG_VALUE_ARRAY || n > GGUF_ENTRY_BYTES) return SIZE_MAX;
    if (type != DG_VALUE_STRING) return used + (size_t)n * sizes[type];
    for (uint64_t i = 0; i < n; i++) {
        if (used + 8 > n_left || gguf_u64(at + used) > GGUF_ENTRY_BYTES) return SIZE_MAX;
        used += 8 + (size_t)gguf_u64(at + used);
    }
    return used;
}

static bool gguf_take_apart(const uint8_t *bytes, size_t n_bytes, gguf_parts *parts) {
    size_t at = GGUF_HEADER;
    if (n_bytes < GGUF_HEADER || memcmp(bytes, "GGUF", 4) != 0) return false;
    memcpy(parts->header, bytes, GGUF_HEADER);
    for (int kind = 0; kind < 2; kind++) {
        const uint64_t n = gguf_u64(bytes + (kind == 0 ? 16 : 8));
        if (n > GGUF_ENTRIES) return false;
        parts->n[kind] = (int)n;
        for (uint64_t i = 0; i < n; i++) {
            gguf_entry *entry = &parts->entries[kind][i];
            if (n_bytes - at < 12 || gguf_u64(bytes + at) > sizeof entry->name) return false;
            entry->n_name = (size_t)gguf_u64(bytes + at);
            at += 8;
            if (n_bytes - at < entry->n_name + 4) return false;
            memcpy(entry->name, bytes + at, entry->n_name);
            at += entry->n_name;
            const uint32_t number = gguf_u32(bytes + at);
            if (kind == 1 && number > 4) return false;
            const size_t n_more =
                kind == 0 ? gguf_value_bytes(bytes + at + 4, n_bytes - at - 4, number) : 8 * (size_t)number + 12;
            if (n_more > GGUF_ENTRY_BYTES - 4 || n_more > n_bytes - at - 4) return false;
            entry->n_rest = 4 + n_more;
            memcpy(entry->rest, bytes + at, entry->n_rest);
            at += entry->n_rest;
        }
    }
    parts->data = bytes + at;
    parts->n_data = n_bytes - at;
    return true;
}

/* Puts the tensors behind each other, as their shapes and types want it; returns where the last one ends. */
static uint64_t gguf_lay_out(gguf_parts *parts) {
    uint64_t offset = 0;
    for (int i = 0; i < parts->n[1]; i++) {
        gguf_entry *entry = &parts->entries[1][i];
        const uint32_t n_dims = gguf_u32(entry->rest);
        if (n_dims > 4 || entry->n_rest != 8 * (size_t)n_dims + 16) continue;
        uint64_t n = 1;
        for (uint32_t dim = 0; dim < n_dims; dim++) n *= gguf_u64(entry->rest + 4 + 8 * (size_t)dim);
        const dg_type_traits *type = dg_type_traits_of((int32_t)gguf_u32(entry->rest + 4 + 8 * (size_t)n_dims));
        memcpy(entry->rest + entry->n_rest - 8, &offset, 8);
        if (type != NULL) offset += n / (uint64_t)type->block_size * (uint64_t)type->block_bytes;
        offset = (offset + GGUF_ALIGNMENT - 1) / GGUF_ALIGNMENT * GGUF_ALIGNMENT;
    }
    return offset;
}

/* Returns the length, or 0 where it does not fit. */
static size_t gguf_put_together(gguf_parts *parts, uint64_t data_bytes, uint8_t *out, size_t max_bytes) {
    static uint8_t data[1 << 16];
    size_t n_data = parts->n_data < sizeof data ? parts->n_data : sizeof data, at = GGUF_HEADER;
    memcpy(data, parts->data, n_data); /* it lies in `out` */
    if (max_bytes < GGUF_HEADER) return 0;
    const uint64_t n_keys = (uint64_t)parts->n[0], n_tensors = (uint64_t)parts->n[1];
    memcpy(parts->header + 8, &n_tensors, 8);
    memcpy(parts->header + 16, &n_keys, 8);
    memcpy(out, parts->header, GGUF_HEADER);
    for (int kind = 0; kind < 2; kind++)
        for (int i = 0; i < parts->n[kind]; i++) {
            const gguf_entry *entry = &parts->entries[kind][i];
            const uint64_t n_name = entry->n_name;
            if (max_bytes - at < 8 + entry->n_name + entry->n_rest) return 0;
            memcpy(out + at, &n_name, 8);
            memcpy(out + at + 8, entry->name, entry->n_name);
            memcpy(out + at + 8 + entry->n_name, entry->rest, entry->n_rest);
            at += 8 + entry->n_name + entry->n_rest;
        }
    if (data_bytes > 0) {
        const size_t begin = (at + GGUF_ALIGNMENT - 1) / GGUF_ALIGNMENT * GGUF_ALIGNMENT;
        if (data_bytes > sizeof data || begin + data_bytes > max_bytes) return 0;
        memset(out + at, 0, begin + (size_t)data_bytes - at);
        return begin + (size_t)data_bytes;
    }
    if (n_data > max_bytes - at) n_data = max_bytes - at;
    memcpy(out + at, data, n_data);
    return at + n_data;
}

static size_t gguf_mutate(uint8_t *bytes, size_t n_bytes, size_t max_bytes, uint32_t seed) {
    static gguf_parts parts;
    uint32_t draw = seed * 2654435761u;
#define DRAW(n) ((draw = draw * 1664525u + 1013904223u, (draw >> 8) % (uint32_t)(n)))
    if (DRAW(3) == 0 || !gguf_take_apart(bytes, n_bytes, &parts)) return LLVMFuzzerMutate(bytes, n_bytes, max_bytes);
    const int kind = (int)DRAW(2), n = parts.n[kind];
    uint64_t data_bytes = 0;
    if (n > 0) {
        gguf_entry *entries = parts.entries[kind], *entry = &entries[DRAW(n)], other = entries[DRAW(n)];
        switch (DRAW(6)) {
        case 0:
            *entry = entries[n - 1];
            parts.n[kind]--;
            break;
        case 1:
            if (n < GGUF_ENTRIES) entries[parts.n[kind]++] = other;
            break;
        case 2: /* another's name, or another's content */
            if (DRAW(2) == 0) {
                memcpy(entry->rest, other.rest, other.n_rest);
                entry->n_rest = other.n_rest;
            } else {
                memcpy(entry->name, other.name, other.n_name);
                entry->n_name = other.n_name;
            }
            break;
        case 3:
            entry->n_name = LLVMFuzzerMutate(entry->name, entry->n_name, sizeof entry->name);
            break;
        default:
            entry->n_rest = LLVMFuzzerMutate(entry->rest, entry->n_rest, sizeof entry->rest);
        }
    }
    if (DRAW(2) == 0) data_bytes = gguf_lay_out(&parts);
    const size_t made = gguf_put_together(&parts, data_bytes, bytes, max_bytes);
    return made > 0 ? made : LLVMFuzzerMutate(bytes, n_bytes, max_bytes);
#undef DRAW
}

#endif
