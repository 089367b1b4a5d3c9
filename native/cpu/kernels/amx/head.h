/* The head by tiles: logits, their statistics and the soft embedding of a span of the vocabulary. Included by
 * amx/body.h.
 *
 * Logits are products as in amx/multiply.h, a panel of tokens at a time. Their sums lie with rows of activations
 * in the vector lanes, so that statistics need no sums across lanes.
 *
 * The soft embedding is the product of the weights exp(z − max), rounded to bfloat16, with the same bfloat16 table, two
 * tokens side by side. All tokens of a span are added to the sums at once, since these are too many to stay in a cache.
 * The table is decoded for the second time then: that takes less than keeping it. */

#define SPAN_BLOCKS (DG_VOCABULARY_SPAN / DG_VOCABULARY_BLOCK)
#define SPAN_PANELS (DG_VOCABULARY_SPAN / PANEL_LANES)
#define PANELS_A_BLOCK (DG_VOCABULARY_BLOCK / PANEL_LANES)
#define BLOCK_LOGITS (DG_VOCABULARY_BLOCK * ACTIVATION_ROWS)

typedef struct head_scratch {
    uint8_t *table; /* bfloat16: a panel, (n_cols/32, 32 tokens, 32); then, in turn, (CHUNK, SPAN_PANELS, 2, 16, 16, 2)
                       by pairs of tokens */
    uint8_t *chunk; /* (CHUNK, 32 tokens, 32) likewise */
    uint8_t *weights; /* (n_tiles, SPAN_PANELS, 16 rows, 32 tokens) bfloat16 */
    float *logits;    /* (n_tiles, DG_VOCABULARY_BLOCK, 16 rows), then their exponentials */
    uint8_t *matters; /* (n_tiles, SPAN_BLOCKS): whether they add to the sums */
} head_scratch;

static int64_t table_bytes(int64_t n_cols) {
    const int64_t panel = n_cols / DG_BLOCK * TILES_BYTES, chunks = CHUNK * SPAN_PANELS * TILES_BYTES;
    return panel > chunks ? panel : chunks;
}

static int64_t head_span_bytes(int64_t n_cols, int32_t n_tiles) {
    return table_bytes(n_cols) + CHUNK * TILES_BYTES +
           n_tiles * (SPAN_PANELS * TILE_BYTES + BLOCK_LOGITS * (int64_t)sizeof(float) + SPAN_BLOCKS);
}

static head_scratch head_scratch_in(uint8_t *memory, int64_t n_cols, int32_t n_tiles) {
    head_scratch s = {.table = memory};
    s.chunk = s.table + table_bytes(n_cols);
    s.weights = s.chunk + CHUNK * TILES_BYTES;
    s.logits = (float *)(s.weights + (int64_t)n_tiles * SPAN_PANELS * TILE_BYTES);
    s.matters = (uint8_t *)(s.logits + (int64_t)n_tiles * BLOCK_LOGITS);
    return s;
}

static int32_t at_most(int32_t n, int32_t most) { return n < most ? n : most; }

/* Blocks first … first + n_blocks − 1 of the panel that begins at row `row` of the source; rows beyond it become 0. */
static void decode_panel(const tile_source *s, int64_t row, int64_t first, int64_t n_blocks, uint8_t *tiles) {
    const int64_t left = s->n_rows - row, n = left < PANEL_LANES ? left : PANEL_LANES;
    if (n > 0) s->decode(s, row, n, first, n_blocks, tiles);
    for (int64_t r = n > 0 ? n : 0; r < PANEL_LANES; r++)
        for (int64_t b = 0; b < n_blocks; b++) memset(tiles + b * TILES_BYTES + r * BLOCK_BYTES, 0, BLOCK_BYTES);
}

/* ---- Logits ------------------------------------------------------------------------------------------------------ */

/* logits (n_tiles, DG_VOCABULARY_BLOCK, 16 rows), from the panel's first token on. */
static void multiply_panel(const dg_rows *rows, const uint8_t *panel, prefetching *fetch, float *logits) {
    const int64_t n_blocks = rows->n_cols / DG_BLOCK, x_stride = n_blocks * TILE_BYTES;
    for (int32_t tile = 0; tile < rows->n_tiles; tile += 2, logits += 2 * BLOCK_LOGITS) {
        const bool two = tile + 1 < rows->n_tiles;
        const uint8_t *w = panel, *x = (const uint8_t *)rows->pairs + tile * x_stride;
        MEMORY_FENCE;
        zero_sums();
        for (int64_t b = 0; b < n_blocks; b++, w += TILES_BYTES, x += TILE_BYTES) {
            UNROLL
            for (int part = 0; part < 4; part++) multiply_part(part, two, w, x, x + x_stride);
            prefetch_some(fetch);
        }
        _tile_stored(0, logits, 64);
        _tile_stored(1, logits + 16 * ACTIVATION_ROWS, 64);
        if (two) {
            _tile_stored(2, logits + BLOCK_LOGITS, 64);
            _tile_stored(3, logits + BLOCK_LOGITS + 16 * ACTIVATION_ROWS, 64);
        }
        MEMORY_FENCE;
    }
}

/* The same from logits that are given, of n_tokens tokens from `first` of the span on. */
static void load_logits(const dg_head_span *span, int32_t first, int32_t n_tokens, float *logits) {
    memset(logits, 0, (size_t)span->rows->n_tiles * BLOCK_LOGITS * sizeof *logits);
    for (int32_t r = 0; r < span->rows->n; r++) {
        const float *z = span->z + r * span->z_stride + span->first + first;
        float *to = logits + r / span->rows->per_tile * BLOCK_LOGITS + r % span->rows->per_tile;
        for (int32_t i = 0; i < n_tokens; i++) to[i * ACTIVATION_ROWS] = z[i];
    }
}

/* What is known of some tokens' logits, by rows of activations. */
typedef struct row_statistics {
    float max[ACTIVATION_ROWS], sum[ACTIVATION_ROWS], weighted[ACTIVATION_ROWS];
    int32_t argmax[ACTIVATION_ROWS];
} row_statistics;

/* z (DG_VOCABULARY_BLOCK, 16 rows), n_tokens of them: products become logits, then exp(z − max). */
static void block_exponentials(const dg_head_span *span, float *z, int32_t n_tokens, row_statistics *t) {
    const soft_cap cap = soft_cap_of(span->softcap, span->temperature);
    const bool given = span->z != NULL;
    vf max = vf_set(-INFINITY), sum = vf_set(0), weighted = vf_set(0);
    for (int32_t i = 0; i < n_tokens; i++) {
        const vf product = vf_load(z + i * ACTIVATION_ROWS), logit = given ? product : capped(product, &cap);
        vf_store(z + i * ACTIVATION_ROWS, logit);
        max = vf_max(max, logit);
    }
    vi argmax = vi_set(n_tokens - 1);
    for (int32_t i = n_tokens - 1; i >= 0; i--) {
        const vf logit = vf_load(z + i * ACTIVATION_ROWS), below = vf_sub(logit, max), e = vf_exp(below);
        argmax = _mm512_mask_mov_epi32(argmax, _mm512_cmp_ps_mask(logit, max, _CMP_EQ_OQ), vi_set(i));
        sum = vf_add(sum, e);
        weighted = vf_fma(e, below, weighted);
        vf_store(z + i * ACTIVATION_ROWS, e);
    }
    vf_store(t->max, max);
    vf_store(t->sum, sum);
    vf_store(t->weighted, weighted);
    vi_store(t->argmax, argmax);
}

/* ---- Weights of the soft embedding ------------------------------------------------------------------------------- */

/* A row has found a larger logit. Its sums so far, and its weights in the span's first n_panels panels, were scaled by
 * the maximum before: they are brought down to the new one. */
static void raise_max(const dg_head_span *span, const head_scratch *s, int32_t tile, int32_t r, float max,
                      int32_t n_panels) {
    dg_online_softmax *softmax = &span->softmax[tile * span->rows->per_tile + r];
    const float factor = expf(softmax->max - max);
    const vf factors = vf_set(factor);
    float *sums = span->sums + ((int64_t)tile * ACTIVATION_ROWS + r) * PANEL_LANES;
    uint8_t *weights = s->weights + (int64_t)tile * SPAN_PANELS * TILE_BYTES + r * BLOCK_BYTES;
    for (int64_t c = 0; c < span->rows->n_cols; c += PANEL_LANES, sums += span->n_sums * PANEL_LANES)
        for (int64_t i = 0; i < PANEL_LANES; i += LANES) vf_store(sums + i, vf_mul(vf_load(sums + i), factors));
    for (int32_t i = 0; i < n_panels; i++, weights += TILE_BYTES) {
        const uint16_t *halves = (const uint16_t *)weights;
        _mm512_storeu_si512(weights, (__m512i)_mm512_cvtne2ps_pbh(vf_mul(vf_load_bf16(halves + 16), factors),
                                                                  vf_mul(vf_load_bf16(halves), factors)));
    }
    softmax->max = max;
    softmax->denominator *= (double)factor;
}

/* e (32, 16 rows; e_stride) · factor[row] to a tile (16 rows, 32) of bfloat16; without factors, as they are. */
static void turn_weights(const float *e, int64_t e_stride, const float *factor, uint8_t *tile) {
    for (int r = 0; r < ACTIVATION_ROWS; r += 4, tile += 4 * BLOCK_BYTES) {
        vi low[4], high[4];
        vi_load_rows((const uint8_t *)(e + r), e_stride * (int64_t)sizeof *e, low);
        vi_load_rows((const uint8_t *)(e + 16 * e_stride + r), e_stride * (int64_t)sizeof *e, high);
        UNROLL
        for (int k = 0; k < 4; k++) {
            const vf factors = vf_set(factor != NULL ? factor[r + k] : 1.0f);
            _mm512_storeu_si512(tile + k * BLOCK_BYTES,
                                (__m512i)_mm512_cvtne2ps_pbh(vf_mul(vf_from_bits(high[k]), factors),
                                                             vf_mul(vf_from_bits(low[k]), factors)));
        }
    }
}

/* Weighs the span's vocabulary block j, e (DG_VOCABULARY_BLOCK, 16 rows), for the rows of a tile. A row to which it
 * adds no more than `negligible` of its mass leaves it out, whatever the others do: its mass can only grow, so what is
 * negligible now stays so. */
static void weigh_block(const dg_head_span *span, const head_scratch *s, int32_t tile, int32_t j,
                        const row_statistics *t, float *e, int32_t n_tokens) {
    const int32_t n_rows = rows_in_tile(span->rows, tile), first = tile * span->rows->per_tile;
    float below[ACTIVATION_ROWS] = {0}, factor[ACTIVATION_ROWS];
    uint8_t *weights = s->weights + ((int64_t)tile * SPAN_PANELS + PANELS_A_BLOCK * j) * TILE_BYTES;
    bool matters = false;
    for (int32_t r = 0; r < n_rows; r++) {
        const dg_online_softmax *softmax = &span->softmax[first + r];
        if (!(t->max[r] <= softmax->max)) raise_max(span, s, tile, r, t->max[r], PANELS_A_BLOCK * j);
        below[r] = t->max[r] - softmax->max;
    }
    vf_store(factor, vf_exp(vf_load(below)));
    for (int32_t r = 0; r < n_rows; r++) {
        dg_online_softmax *softmax = &span->softmax[first + r];
        const double mass = (double)factor[r] * (double)t->sum[r];
        softmax->denominator += mass;
        if (mass <= span->negligible * softmax->denominator)
            factor[r] = 0;
        else
            matters = true;
    }
    for (int32_t r = n_rows; r < ACTIVATION_ROWS; r++) factor[r] = 0;
    s->matters[tile * SPAN_BLOCKS + j] = matters;
    if (!matters) { /* the next tile of rows may want these tokens, and goes through the products beside this one */
        memset(weights, 0, PANELS_A_BLOCK * TILE_BYTES);
        return;
    }
    memset(e + n_tokens * ACTIVATION_ROWS, 0, (size_t)(DG_VOCABULARY_BLOCK - n_tokens) * ACTIVATION_ROWS * sizeof *e);
    for (int p = 0; p < PANELS_A_BLOCK; p++)
        turn_weights(e + p * PANEL_LANES * ACTIVATION_ROWS, ACTIVATION_ROWS, factor, weights + p * TILE_BYTES);
}

/* ---- Sums of the soft embedding ---------------------------------------------------------------------------------- */

/* Where words of columns 0 … 15 stand in two rows of a tile, the second 32 further; those of columns 16 … 31 stand 8
 * beyond them. */
static const uint16_t ascending_pairs[32] = {0, 32, 16, 48, 1, 33, 17, 49, 2, 34, 18, 50, 3, 35, 19, 51,
                                             4, 36, 20, 52, 5, 37, 21, 53, 6, 38, 22, 54, 7, 39, 23, 55};

/* A row for each of 32 tokens to a row for each pair of them: two tiles, of columns 0 … 15 and 16 … 31. */
ALWAYS_INLINE void pair_tokens(const uint8_t *rows, uint8_t *tiles) {
    const __m512i first_half = _mm512_loadu_si512(ascending_pairs);
    const __m512i second_half = _mm512_add_epi16(first_half, _mm512_set1_epi16(8));
    for (int pair = 0; pair < 16; pair++, rows += 2 * BLOCK_BYTES, tiles += 64) {
        const __m512i a = _mm512_loadu_si512(rows), b = _mm512_loadu_si512(rows + BLOCK_BYTES);
        _mm512_storeu_si512(tiles, _mm512_permutex2var_epi16(a, first_half, b));
        _mm512_storeu_si512(tiles + TILE_BYTES, _mm512_permutex2var_epi16(a, second_half, b));
    }
}

/* sums (16 or 32 rows, 32 columns) += weights · table, for those of n_parts vocabulary blocks that matter. */
ALWAYS_INLINE void add_products(const bool two, const uint8_t *table, const uint8_t *weights, const uint8_t *matters,
                                int32_t n_parts, float *sums) {
    enum { STRIDE = PANEL_LANES * sizeof(float), NEXT = ACTIVATION_ROWS * PANEL_LANES };
    const uint8_t *second = weights + SPAN_PANELS * TILE_BYTES;
    MEMORY_FENCE;
    _tile_loadd(0, sums, STRIDE);
    _tile_loadd(1, sums + LANES, STRIDE);
    if (two) {
        _tile_loadd(2, sums + NEXT, STRIDE);
        _tile_loadd(3, sums + NEXT + LANES, STRIDE);
    }
    for (int32_t j = 0; j < n_parts; j++) {
        if (!matters[j]) continue;
        for (int p = PANELS_A_BLOCK * j; p < PANELS_A_BLOCK * (j + 1); p++) {
            _tile_loadd(4, weights + p * TILE_BYTES, BLOCK_BYTES);
            _tile_loadd(6, table + p * TILES_BYTES, BLOCK_BYTES);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, table + p * TILES_BYTES + TILE_BYTES, BLOCK_BYTES);
            _tile_dpbf16ps(1, 4, 7);
            if (!two) continue;
            _tile_loadd(5, second + p * TILE_BYTES, BLOCK_BYTES);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums, STRIDE);
    _tile_stored(1, sums + LANES, STRIDE);
    if (two) {
        _tile_stored(2, sums + NEXT, STRIDE);
        _tile_stored(3, sums + NEXT + LANES, STRIDE);
    }
    MEMORY_FENCE;
}

/* Marks in `together` the vocabulary blocks that matter to one of n_row_tiles row tiles at least; returns whether there
 * is one. A tile to which such a block does not matter has weights of zero for it. */
static bool matter_together(const uint8_t *matters, int32_t n_row_tiles, int32_t n_parts, uint8_t *together) {
    bool any = false;
    memset(together, 0, SPAN_BLOCKS);
    for (int32_t i = 0; i < n_row_tiles; i++)
        for (int32_t j = 0; j < n_parts; j++) any |= together[j] |= matters[i * SPAN_BLOCKS + j];
    return any;
}

static void add_span(const dg_head_span *span, const tile_source *source, const head_scratch *s) {
    const dg_rows *rows = span->rows;
    const int32_t n_parts = (span->n_tokens + DG_VOCABULARY_BLOCK - 1) / DG_VOCABULARY_BLOCK;
    uint8_t all[SPAN_BLOCKS], pair[SPAN_BLOCKS];
    if (!matter_together(s->matters, rows->n_tiles, n_parts, all)) return;
    for (int64_t first = 0; first < source->n_blocks; first += CHUNK) {
        const int64_t n_blocks = source->n_blocks - first < CHUNK ? source->n_blocks - first : CHUNK;
        for (int32_t p = 0; p < n_parts * PANELS_A_BLOCK; p++) {
            if (!all[p / PANELS_A_BLOCK]) continue;
            decode_panel(source, p * PANEL_LANES, first, n_blocks, s->chunk);
            for (int64_t b = 0; b < n_blocks; b++)
                pair_tokens(s->chunk + b * TILES_BYTES, s->table + (b * SPAN_PANELS + p) * TILES_BYTES);
        }
        for (int32_t tile = 0; tile < rows->n_tiles; tile += 2) {
            const bool two = tile + 1 < rows->n_tiles;
            if (!matter_together(s->matters + tile * SPAN_BLOCKS, 1 + two, n_parts, pair)) continue;
            const uint8_t *weights = s->weights + (int64_t)tile * SPAN_PANELS * TILE_BYTES, *table = s->table;
            float *sums = span->sums + (first * span->n_sums + tile * ACTIVATION_ROWS) * PANEL_LANES;
            for (int64_t b = 0; b < n_blocks;
                 b++, table += SPAN_PANELS * TILES_BYTES, sums += span->n_sums * PANEL_LANES) {
                if (two)
                    add_products(true, table, weights, pair, n_parts, sums);
                else
                    add_products(false, table, weights, pair, n_parts, sums);
            }
        }
    }
}

/* ---- A span ------------------------------------------------------------------------------------------------------ */

static void head_span(const dg_head_span *span) {
    const dg_rows *rows = span->rows;
    row_scales scales[PANEL_LANES];
    const tile_source source = tile_source_of(span->table, 0, span->first, span->n_tokens, scales);
    const head_scratch s = head_scratch_in(span->scratch, rows->n_cols, rows->n_tiles);
    const int64_t n_steps = source.n_blocks * ((rows->n_tiles + 1) / 2);
    begin_tiles();
    for (int32_t i = 0; i < span->n_tokens; i += DG_VOCABULARY_BLOCK) {
        const int32_t n_tokens = at_most(span->n_tokens - i, DG_VOCABULARY_BLOCK), j = i / DG_VOCABULARY_BLOCK;
        if (span->z != NULL) load_logits(span, i, n_tokens, s.logits);
        for (int32_t p = 0; span->z == NULL && p < n_tokens; p += PANEL_LANES) {
            const uint8_t *next = source.rows + (i + p + PANEL_LANES) * source.row_bytes;
            const dg_panel coming = {.prefetch = next, .prefetch_bytes = PANEL_LANES * source.row_bytes};
            prefetching fetch = prefetching_of(&coming, n_steps);
            decode_panel(&source, i + p, 0, source.n_blocks, s.table);
            multiply_panel(rows, s.table, &fetch, s.logits + p * ACTIVATION_ROWS);
        }
        for (int32_t tile = 0; tile < rows->n_tiles; tile++) {
            float *z = s.logits + (int64_t)tile * BLOCK_LOGITS;
            const int32_t first = tile * rows->per_tile, n_rows = rows_in_tile(rows, tile);
            row_statistics t;
            block_exponentials(span, z, n_tokens, &t);
            for (int32_t r = 0; r < n_rows; r++)
                span->statistics[(first + r) * span->statistics_stride + j] =
                    (dg_block_statistics){t.max[r], t.sum[r], t.weighted[r], (int32_t)span->first + i + t.argmax[r]};
            if (span->softmax != NULL) weigh_block(span, &s, tile, j, &t, z, n_tokens);
        }
    }
    if (span->softmax != NULL) add_span(span, &source, &s);
    _tile_release();
}
