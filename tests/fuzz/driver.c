/* Stands in for libFuzzer where there is none: runs a fuzz target over a corpus, and over random changes to it.
 *
 *     fuzz_gguf -runs=20000 -seed=1 FILE-OR-FOLDER…
 *
 * It knows nothing of coverage; it is for machines without clang, and for runs that must be the same every time. */
#include <dirent.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "target.h"

#pragma weak LLVMFuzzerCustomMutator /* some targets have one */

enum { MAX_SEEDS = 1024, MAX_BYTES = 1 << 20 };

typedef struct seed_input {
    uint8_t *bytes;
    size_t n_bytes;
} seed_input;

static seed_input seeds[MAX_SEEDS];
static int n_seeds;
static uint64_t state = 1;

/* xorshift64*, n > 0. */
static uint64_t below(uint64_t n) {
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return (state * UINT64_C(2685821657736338717) >> 11) % n;
}

static void load_file(const char *path) {
    FILE *in = fopen(path, "rb");
    uint8_t *bytes = malloc(MAX_BYTES);
    if (in == NULL || bytes == NULL || n_seeds == MAX_SEEDS) {
        fprintf(stderr, "cannot load %s\n", path);
        exit(2);
    }
    seeds[n_seeds++] = (seed_input){bytes, fread(bytes, 1, MAX_BYTES, in)};
    fclose(in);
}

static int visible(const struct dirent *entry) { return entry->d_name[0] != '.'; }

static void load(const char *path) {
    struct dirent **entries;
    int n = scandir(path, &entries, visible, alphasort); /* sorted: the same order on every machine */
    if (n < 0) {
        load_file(path);
        return;
    }
    for (int i = 0; i < n; i++) {
        char inside[4096];
        snprintf(inside, sizeof inside, "%s/%s", path, entries[i]->d_name);
        load_file(inside);
        free(entries[i]);
    }
    free(entries);
}

/* Changes up to five places in `bytes`, which has room for `max_bytes`; returns the new length. */
size_t LLVMFuzzerMutate(uint8_t *bytes, size_t n_bytes, size_t max_bytes) {
    static const uint64_t extremes[] = {0,
                                        1,
                                        31,
                                        32,
                                        255,
                                        65535,
                                        0x7fffffff,
                                        0x80000000,
                                        0xffffffff,
                                        UINT64_C(1) << 32,
                                        INT64_MAX,
                                        UINT64_MAX,
                                        UINT64_MAX - 31};
    for (uint64_t i = 0, n = 1 + below(5); i < n && n_bytes > 0; i++) {
        size_t at = below(n_bytes), width = (size_t)1 << below(4), length = 1 + below(16);
        switch (below(6)) {
        case 0:
            bytes[at] ^= (uint8_t)(1u << below(8));
            break;
        case 1:
            bytes[at] = (uint8_t)below(256);
            break;
        case 2:
            if (at + width <= n_bytes) memcpy(bytes + at, &extremes[below(sizeof extremes / 8)], width);
            break;
        case 3: /* doubles a stretch */
            if (at + length <= n_bytes && n_bytes + length <= max_bytes) {
                memmove(bytes + at + length, bytes + at, n_bytes - at);
                n_bytes += length;
            }
            break;
        case 4: /* takes one out */
            if (at + length <= n_bytes) {
                memmove(bytes + at, bytes + at + length, n_bytes - at - length);
                n_bytes -= length;
            }
            break;
        default:
            if (below(8) == 0) n_bytes = at;
        }
    }
    return n_bytes;
}

int main(int argc, char **argv) {
    long n_runs = 0;
    for (int i = 1; i < argc; i++)
        if (strncmp(argv[i], "-runs=", 6) == 0)
            n_runs = atol(argv[i] + 6);
        else if (strncmp(argv[i], "-seed=", 6) == 0)
            state = strtoull(argv[i] + 6, NULL, 10) * 2 + 1;
        else if (argv[i][0] != '-')
            load(argv[i]);
    if (n_seeds == 0) {
        fprintf(stderr, "usage: %s [-runs=N] [-seed=N] FILE-OR-FOLDER…\n", argv[0]);
        return 2;
    }
    for (int i = 0; i < n_seeds; i++) LLVMFuzzerTestOneInput(seeds[i].bytes, seeds[i].n_bytes);
    for (long run = 0; run < n_runs; run++) {
        const seed_input *seed = &seeds[below((uint64_t)n_seeds)];
        static uint8_t changed[MAX_BYTES];
        memcpy(changed, seed->bytes, seed->n_bytes);
        size_t n_bytes = LLVMFuzzerCustomMutator == NULL
                             ? LLVMFuzzerMutate(changed, seed->n_bytes, MAX_BYTES)
                             : LLVMFuzzerCustomMutator(changed, seed->n_bytes, MAX_BYTES, (unsigned)below(UINT32_MAX));
        /* A copy of exactly that length, so that the sanitizers see a read behind it. */
        uint8_t *input = malloc(n_bytes + 1);
        if (input == NULL) return 2;
        memcpy(input, changed, n_bytes);
        LLVMFuzzerTestOneInput(input, n_bytes);
        free(input);
    }
    printf("%d seeds, %ld changed inputs: none broke a promise\n", n_seeds, n_runs);
    for (int i = 0; i < n_seeds; i++) free(seeds[i].bytes);
    return 0;
}
