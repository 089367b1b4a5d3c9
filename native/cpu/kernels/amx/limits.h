/* What the tile unit can do at most; as limits.h. Included by amx/body.h. */

/* Operations of four tile products of `width` columns for each round. */
static double tile_operations(int64_t n_rounds, int width) { return (double)n_rounds * 4 * 16 * 16 * width * 2; }

static void begin_limit(void) {
    begin_tiles();
    zero_sums();
    _tile_zero(4);
    _tile_zero(5);
    _tile_zero(6);
    _tile_zero(7);
}

static double tiled_peak_int8(int64_t n_rounds, float *sink) {
    begin_limit();
    for (int64_t round = 0; round < n_rounds; round++) {
        _tile_dpbusd(0, 4, 6);
        _tile_dpbusd(1, 5, 6);
        _tile_dpbusd(2, 4, 7);
        _tile_dpbusd(3, 5, 7);
    }
    _tile_release();
    return tile_operations(n_rounds, 64);
}

static double tiled_peak_bf16(int64_t n_rounds, float *sink) {
    begin_limit();
    for (int64_t round = 0; round < n_rounds; round++) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_release();
    return tile_operations(n_rounds, 32);
}
