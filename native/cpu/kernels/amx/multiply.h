/* Packing activations for tiles, and their products. Included by amx/body.h. */

#define TILE_BYTES 1024
#define CACHE_LINE 64

static dg_form tiled_form_of(int32_t type) {
    return tile_decoder_of(type) != NULL ? (dg_form){.weight_tiles = true} : form_of(type);
}

/* ---- Packing ----------------------------------------------------------------------------------------------------- */

/* A block of columns as pairs of bfloat16, in the order of weights. */
ALWAYS_INLINE __m512i pairs_of(const float *x) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    const __m512 low = _mm512_loadu_ps(x), high = _mm512_loadu_ps(x + 16);
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_permutex2var_ps(low, odd, high),
                                        _mm512_permutex2var_ps(low, even, high));
}

/* Pairs of columns go to rows of a tile, 64 bytes apart, where each row of activations has its place. */
static void pack_tiles(const dg_rows *rows, int32_t row, int64_t first_col, const float *x, int64_t n_cols) {
    const int64_t n_blocks = rows->n_cols / DG_BLOCK;
    uint32_t *dst = (uint32_t *)rows->pairs +
                    (row / rows->per_tile * n_blocks + first_col / DG_BLOCK) * (TILE_BYTES / 4) + row % rows->per_tile;
    for (int64_t c = 0; c < n_cols; c += DG_BLOCK, dst += TILE_BYTES / 4) {
        uint32_t pairs[16];
        _mm512_storeu_si512(pairs, pairs_of(x + c));
        UNROLL
        for (int i = 0; i < 16; i++) dst[i * ACTIVATION_ROWS] = pairs[i];
    }
}

/* All rows of a tile at once: its lines are written whole, and sixteen at a time, not a word of each for every row. */
static void pack_tile(const dg_rows *rows, int32_t tile, const float *const *x, int32_t n) {
    uint8_t *dst = (uint8_t *)rows->pairs + tile * (rows->n_cols / DG_BLOCK) * TILE_BYTES;
    _Alignas(64) uint8_t lines[ACTIVATION_ROWS][BLOCK_BYTES];
    memset(lines, 0, sizeof lines);
    for (int64_t c = 0; c < rows->n_cols; c += DG_BLOCK) {
        for (int32_t r = 0; r < n; r++) _mm512_store_si512(lines[r], pairs_of(x[r] + c));
        UNROLL
        for (int i = 0; i < BLOCK_BYTES; i += 16) {
            vi m[4];
            vi_load_rows(&lines[0][i], BLOCK_BYTES, m);
            UNROLL
            for (int k = 0; k < 4; k++, dst += CACHE_LINE) vi_store(dst, m[k]);
        }
    }
}

static void tiled_pack(const dg_rows *rows, int32_t row, int64_t first_col, const float *x, int64_t n_cols) {
    if (rows->form.weight_tiles)
        pack_tiles(rows, row, first_col, x, n_cols);
    else
        pack_floats(rows, row, first_col, x, n_cols);
}

/* ---- Products ---------------------------------------------------------------------------------------------------- */

/* Tiles 0 … 3 are sums: of weights 0-15 and 16-31 with the first tile of activations, then with the second; 4 and 5 are
 * weights, 6 and 7 activations. */
static void begin_tiles(void) {
    static const struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t n_rows[16];
    } shapes = {
        .palette = 1, .row_bytes = {64, 64, 64, 64, 64, 64, 64, 64}, .n_rows = {16, 16, 16, 16, 16, 16, 16, 16}};
    _tile_loadconfig(&shapes);
}

/* The compiler does not know that tile instructions read and write memory. */
#define MEMORY_FENCE __asm__ volatile("" ::: "memory")

ALWAYS_INLINE void zero_sums(void) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

/* One of the four products of a block of columns; they come in this order, and load what they need first. */
ALWAYS_INLINE void multiply_part(const int part, const bool two, const uint8_t *w, const uint8_t *x,
                                 const uint8_t *x_second) {
    switch (part) {
    case 0:
        _tile_loadd(4, w, BLOCK_BYTES);
        _tile_loadd(6, x, BLOCK_BYTES);
        _tile_dpbf16ps(0, 4, 6);
        break;
    case 1:
        _tile_loadd(5, w + TILE_BYTES, BLOCK_BYTES);
        _tile_dpbf16ps(1, 5, 6);
        break;
    case 2:
        if (!two) break;
        _tile_loadd(7, x_second, BLOCK_BYTES);
        _tile_dpbf16ps(2, 4, 7);
        break;
    default:
        if (two) _tile_dpbf16ps(3, 5, 7);
        break;
    }
}

typedef struct tile_sums {
    _Alignas(64) float sums[4][16][16]; /* (as the tiles 0 … 3, weight, row of activations) */
} tile_sums;

/* The second tile's sums, too, where there are two. */
ALWAYS_INLINE void save_sums(bool two, tile_sums *t) {
    _tile_stored(0, t->sums[0], 64);
    _tile_stored(1, t->sums[1], 64);
    if (two) {
        _tile_stored(2, t->sums[2], 64);
        _tile_stored(3, t->sums[3], 64);
    }
    MEMORY_FENCE;
}
ALWAYS_INLINE void restore_sums(bool two, const tile_sums *t) {
    _tile_loadd(0, t->sums[0], 64);
    _tile_loadd(1, t->sums[1], 64);
    if (two) {
        _tile_loadd(2, t->sums[2], 64);
        _tile_loadd(3, t->sums[3], 64);
    }
}

/* Sums of one tile of activations, turned so that a row of activations has its n_lanes outputs side by side. */
static void write_sums(const float sums[2][16][16], int32_t n_rows, int32_t n_lanes, float *out, int64_t out_stride) {
    for (int half = 0; half * LANES < n_lanes; half++) {
        const int left = n_lanes - half * LANES;
        for (int32_t r = 0; r < n_rows; r += 4) {
            vi m[4];
            vi_load_rows((const uint8_t *)&sums[half][0][r], sizeof sums[half][0], m);
            for (int k = 0; k < 4 && r + k < n_rows; k++) {
                float *at = out + (r + k) * out_stride + half * LANES;
                if (left >= LANES)
                    vf_store(at, vf_from_bits(m[k]));
                else
                    vf_store_part(at, vf_from_bits(m[k]), left);
            }
        }
    }
}

static int32_t rows_in_tile(const dg_rows *rows, int32_t tile) {
    const int32_t left = rows->n - tile * rows->per_tile;
    return left < rows->per_tile ? left : rows->per_tile;
}

/* Writes the sums of tiles `tile` and, where there is one, the next. */
static void write_pair(const tile_sums *t, const dg_rows *rows, int32_t tile, int32_t n_lanes, float *out,
                       int64_t out_stride) {
    for (int i = 0; i < 2 && tile + i < rows->n_tiles; i++)
        write_sums(&t->sums[2 * i], rows_in_tile(rows, tile + i), n_lanes,
                   out + (int64_t)(tile + i) * rows->per_tile * out_stride, out_stride);
}

/* Fetches the next weights, a few lines with each step, so that all are there in the end. */
typedef struct prefetching {
    const uint8_t *next, *end;
    int64_t lines;
} prefetching;

static prefetching prefetching_of(const dg_panel *panel, int64_t n_steps) {
    if (panel->prefetch == NULL || n_steps == 0) return (prefetching){0};
    return (prefetching){panel->prefetch, panel->prefetch + panel->prefetch_bytes,
                         (panel->prefetch_bytes / CACHE_LINE + n_steps - 1) / n_steps};
}
ALWAYS_INLINE void prefetch_some(prefetching *f) {
    for (int64_t i = 0; i < f->lines && f->next < f->end; i++, f->next += CACHE_LINE) __builtin_prefetch(f->next, 0, 2);
}

/* ---- Products, and decoding meanwhile ---------------------------------------------------------------------------- */

/* The tile unit works beside the vector units. While it multiplies some columns of the weights, these decode the next
 * ones, a little after each tile product. Decoding must come in small portions, and the compiler must not gather them
 * in one place, or the tile unit runs dry. */

/* Two blocks of columns of up to two tiles of activations with a panel, where decoding takes longer than multiplying:
 * blocks `coming` and on of four rows of weights are decoded after each product. */
ALWAYS_INLINE void multiply_two_blocks(const bool two, const int64_t n_now, const int64_t n_coming, const uint8_t *w,
                                       const uint8_t *x, const uint8_t *x_second, const tile_source *s, int64_t coming,
                                       uint8_t *decoded, prefetching *fetch) {
    UNROLL
    for (int i = 0; i < 2; i++) {
        UNROLL
        for (int part = 0; part < 4; part++) {
            if (i < n_now) multiply_part(part, two, w + i * TILES_BYTES, x + i * TILE_BYTES, x_second + i * TILE_BYTES);
            if (n_coming == 0) continue;
            prefetch_some(fetch);
            const int64_t row = 16 * i + 4 * part, left = s->n_rows - row;
            if (left > 0) s->decode(s, row, left < 4 ? left : 4, coming, n_coming, decoded + row * BLOCK_BYTES);
        }
    }
}

ALWAYS_INLINE void multiply_few(const bool two, const tile_source *s, const dg_rows *rows, uint8_t *scratch,
                                prefetching *fetch, tile_sums *sums) {
    const int64_t n_blocks = s->n_blocks;
    const uint8_t *x = (const uint8_t *)rows->pairs, *x_second = x + n_blocks * TILE_BYTES;
    uint8_t *decoded = scratch, *coming = scratch + 2 * TILES_BYTES;
    s->decode(s, 0, s->n_rows, 0, n_blocks < 2 ? n_blocks : 2, decoded);
    zero_sums();
    int64_t b = 0;
    for (; b + 4 <= n_blocks; b += 2) {
        MEMORY_FENCE;
        multiply_two_blocks(two, 2, 2, decoded, x + b * TILE_BYTES, x_second + b * TILE_BYTES, s, b + 2, coming, fetch);
        uint8_t *swapped = decoded;
        decoded = coming;
        coming = swapped;
    }
    if (n_blocks - b == 3) {
        MEMORY_FENCE;
        multiply_two_blocks(two, 2, 1, decoded, x + b * TILE_BYTES, x_second + b * TILE_BYTES, s, b + 2, coming, fetch);
        decoded = coming;
        b += 2;
    }
    MEMORY_FENCE;
    multiply_two_blocks(two, n_blocks - b, 0, decoded, x + b * TILE_BYTES, x_second + b * TILE_BYTES, s, 0, NULL,
                        fetch);
    save_sums(two, sums);
}

/* With more activations the work is cut into pieces: a panel by a chunk of its columns, few enough that the decoded
 * piece stays in the nearest cache while all activations pass by. Sums that have to make room for others wait in
 * memory. */

#define MAX_PANELS                                                                                                     \
    (DG_TILED_FEATURES / PANEL_LANES) /* for which activations are fetched into the second cache once                  \
                                       */
#define MAX_PAIRS 8                   /* of tiles of activations whose sums wait */
#define CHUNK 8
_Static_assert(DG_TILED_SCRATCH == MAX_PANELS * MAX_PAIRS * sizeof(tile_sums) + 2 * CHUNK * TILES_BYTES, "scratch");

/* One piece, which is decoded row by row. */
typedef struct decoding {
    uint8_t *tiles;
    int64_t row, first, n_blocks, n_rows_left;
} decoding;

/* Piece i in the order of columns, then features. */
static decoding piece_of(const tile_source *s, int64_t piece, int64_t n_panels, uint8_t *tiles) {
    const int64_t first = piece / n_panels * CHUNK, row = piece % n_panels * PANEL_LANES;
    const int64_t blocks_left = s->n_blocks - first, rows_left = s->n_rows - row;
    return (decoding){.tiles = tiles,
                      .row = row,
                      .first = first,
                      .n_blocks = blocks_left < CHUNK ? blocks_left : CHUNK,
                      .n_rows_left = rows_left < PANEL_LANES ? rows_left : PANEL_LANES};
}

static void decode_a_row(const tile_source *s, decoding *d) {
    s->decode(s, d->row, 1, d->first, d->n_blocks, d->tiles);
    d->row++;
    d->tiles += BLOCK_BYTES;
    d->n_rows_left--;
}

/* Activations from first_tile on, n_pairs pairs of tiles, with all rows of the source. */
static void multiply_many(const tile_source *s, const dg_rows *rows, int32_t first_tile, int64_t n_pairs,
                          uint8_t *scratch, prefetching *fetch, float *out, int64_t out_stride) {
    const int64_t n_panels = (s->n_rows + PANEL_LANES - 1) / PANEL_LANES;
    const int64_t n_pieces = (s->n_blocks + CHUNK - 1) / CHUNK * n_panels;
    const int64_t x_stride = s->n_blocks * TILE_BYTES; /* from tile to tile of activations */
    tile_sums *waiting = (tile_sums *)scratch;
    uint8_t *tiles[2];
    tiles[0] = scratch + MAX_PANELS * MAX_PAIRS * sizeof(tile_sums);
    tiles[1] = tiles[0] + CHUNK * TILES_BYTES;

    decoding next = piece_of(s, 0, n_panels, tiles[0]);
    while (next.n_rows_left > 0) decode_a_row(s, &next);
    for (int64_t piece = 0; piece < n_pieces; piece++) {
        const int64_t panel = piece % n_panels, first = next.first, n_blocks = next.n_blocks;
        const bool last = first + n_blocks == s->n_blocks;
        next = (decoding){0};
        if (piece + 1 < n_pieces) next = piece_of(s, piece + 1, n_panels, tiles[(piece + 1) % 2]);
        const int64_t steps_a_row = n_pairs * n_blocks / PANEL_LANES;
        int64_t wait = 0;
        for (int64_t pair = 0; pair < n_pairs; pair++) {
            tile_sums *sums = &waiting[panel * n_pairs + pair];
            const int32_t tile = first_tile + 2 * (int32_t)pair;
            const bool two = tile + 1 < rows->n_tiles;
            const uint8_t *w = tiles[piece % 2];
            const uint8_t *x = (const uint8_t *)rows->pairs + tile * x_stride + first * TILE_BYTES;
            MEMORY_FENCE;
            if (first == 0)
                zero_sums();
            else
                restore_sums(two, sums);
            for (int64_t b = 0; b < n_blocks; b++, w += TILES_BYTES, x += TILE_BYTES) {
                UNROLL
                for (int part = 0; part < 4; part++) multiply_part(part, two, w, x, x + x_stride);
                if (--wait <= 0 && next.n_rows_left > 0) {
                    decode_a_row(s, &next);
                    wait = steps_a_row;
                }
                prefetch_some(fetch);
            }
            save_sums(two, sums);
            if (last) {
                const int64_t left = s->n_rows - panel * PANEL_LANES;
                write_pair(sums, rows, tile, left < PANEL_LANES ? (int32_t)left : PANEL_LANES,
                           out + panel * PANEL_LANES, out_stride);
            }
        }
        while (next.n_rows_left > 0) decode_a_row(s, &next);
    }
}

static void multiply_tiles(const dg_weight *weight, int64_t matrix, int64_t first_row, int32_t n, const dg_panel *panel,
                           const dg_rows *rows, void *memory, float *out, int64_t out_stride) {
    const bool few = rows->n_tiles <= 2;
    const int32_t at_once = few ? PANEL_LANES : n, n_panels = (n + PANEL_LANES - 1) / PANEL_LANES;
    const int64_t n_blocks = weight->n_cols / DG_BLOCK;
    uint8_t *scratch = memory;
    row_scales scales[PANEL_LANES];
    prefetching fetch = prefetching_of(panel, few ? 8 * ((n_blocks - 1) / 2) * n_panels
                                                  : n_blocks * n_panels * ((rows->n_tiles + 1) / 2));
    begin_tiles();
    for (int32_t done = 0; done < n; done += at_once) {
        const tile_source s =
            tile_source_of(weight, matrix, first_row + done, n - done < at_once ? n - done : at_once, scales);
        if (few) {
            tile_sums sums;
            multiply_few(rows->n_tiles == 2, &s, rows, scratch, &fetch, &sums);
            write_pair(&sums, rows, 0, (int32_t)s.n_rows, out + done, out_stride);
            continue;
        }
        for (int32_t tile = 0; tile < rows->n_tiles; tile += 2 * MAX_PAIRS) {
            const int32_t left = (rows->n_tiles - tile + 1) / 2, n_pairs = left < MAX_PAIRS ? left : MAX_PAIRS;
            multiply_many(&s, rows, tile, n_pairs, scratch, &fetch, out + done, out_stride);
        }
    }
    _tile_release();
}

/* ---- Strips that are decoded beforehand, for the head -------------------------------------------------------------
 */

static void tiled_decode(const dg_weight *weight, int64_t matrix, int64_t first_row, int32_t n_rows, dg_panel *panel) {
    if (!panel->form.weight_tiles) {
        decode(weight, matrix, first_row, n_rows, panel);
        return;
    }
    row_scales scales[PANEL_LANES];
    const tile_source s = tile_source_of(weight, matrix, first_row, n_rows, scales);
    s.decode(&s, 0, n_rows, panel->first_col / DG_BLOCK, panel->n_cols / DG_BLOCK, (uint8_t *)panel->values);
}

static void tiled_multiply(const dg_panel *panel, const dg_rows *rows, float *sums, float *out, int64_t out_stride,
                           int32_t n_lanes) {
    if (!rows->form.weight_tiles) {
        multiply_floats(panel, rows, sums, out, out_stride, n_lanes);
        return;
    }
    const int64_t n_blocks = panel->n_cols / DG_BLOCK, x_stride = rows->n_cols / DG_BLOCK * TILE_BYTES;
    const bool last = panel->first_col + panel->n_cols == rows->n_cols;
    prefetching fetch = prefetching_of(panel, n_blocks * ((rows->n_tiles + 1) / 2));
    begin_tiles();
    for (int32_t tile = 0; tile < rows->n_tiles; tile += 2, sums += sizeof(tile_sums) / sizeof *sums) {
        const bool two = tile + 1 < rows->n_tiles;
        const uint8_t *w = (const uint8_t *)panel->values;
        const uint8_t *x = (const uint8_t *)rows->pairs + tile * x_stride + panel->first_col / DG_BLOCK * TILE_BYTES;
        MEMORY_FENCE;
        if (panel->first_col == 0)
            zero_sums();
        else
            restore_sums(two, (const tile_sums *)sums);
        for (int64_t b = 0; b < n_blocks; b++, w += TILES_BYTES, x += TILE_BYTES) {
            UNROLL
            for (int part = 0; part < 4; part++) multiply_part(part, two, w, x, x + x_stride);
            prefetch_some(&fetch);
        }
        save_sums(two, (tile_sums *)sums);
        if (last) write_pair((const tile_sums *)sums, rows, tile, n_lanes, out, out_stride);
    }
    _tile_release();
}
