/* Dense products of a few hundred tokens. */
#include "cuda/kernels/matmul.cuh"

#include "cuda/device.cuh"
#include "cuda/hopper/hopper.cuh"

namespace {

struct MatmulPart {
    const char *tiles;
    const float *scale; /* of all values, or NULL */
    int n_rows;
    int row_tiles;
    int first_block; /* blocks before this part's */
    int out_column;
};

struct MatmulParams {
    MatmulPart parts[3];
    int n_parts;
    Activations x;
    int n, out_columns;
    int64_t k_tiles;
    int tiles_per_split;
    uint64_t row_tile_bytes;
    float *out; /* (splits, n, out_columns) */
};

template <class F, class P>
__global__ void __launch_bounds__(P::kThreads, kDenseBlocks<F>) matmul_kernel(MatmulParams p) {
    KernelOrder launch_order;
    int part = 0;
    while (part + 1 < p.n_parts && (int)blockIdx.y >= p.parts[part + 1].first_block) part++;
    const MatmulPart &w = p.parts[part];
    const int row_tile0 = ((int)blockIdx.y - w.first_block) * P::kBlockRowTiles;
    const int token0 = (int)blockIdx.x * P::kBlockTokens;
    const int n_tokens = min(p.n - token0, P::kBlockTokens);
    const int first = (int)blockIdx.z * p.tiles_per_split;
    const int last = min(first + p.tiles_per_split, (int)p.k_tiles);

    typename P::Accumulators acc;
    P::run(
        acc, p.x, p.k_tiles, first, last, n_tokens,
        [&](int i) { return w.tiles + (uint64_t)min(row_tile0 + i, w.row_tiles - 1) * p.row_tile_bytes; },
        ConsecutiveRows{token0});

    const float scale = w.scale != nullptr ? *w.scale : 1.0f;
    float *out = p.out + ((int64_t)blockIdx.z * p.n + token0) * p.out_columns + w.out_column + row_tile0 * kTileRows;
    P::for_each(acc, [&](int row, int token, float value) {
        if (token < n_tokens && row_tile0 * kTileRows + row < w.n_rows)
            out[(int64_t)token * p.out_columns + row] = value * scale * P::multiplier(p.x, token0 + token);
    });
}

/* A split costs a pass over the result, so columns are split only where blocks would leave multiprocessors idle: blocks
 * never exceed two waves, which is what the scratch is sized for (layout.c). */
int choose_splits(const Queue &queue, int64_t blocks, int64_t k_columns) {
    int64_t wanted = 2 * queue.n_multiprocessors / blocks;
    int64_t splits = wanted < kProductSplits ? wanted : kProductSplits;
    if (splits > k_columns / 256) splits = k_columns / 256;
    return splits < 1 ? 1 : (int)splits;
}

/* Launches the product of parts whose weights are of format F. */
template <class F, class P> void launch_product(const Queue &queue, MatmulParams p, int splits) {
    int n_blocks = 0;
    for (int i = 0; i < p.n_parts; i++) {
        p.parts[i].first_block = n_blocks;
        n_blocks += (int)ceil_div(p.parts[i].row_tiles, P::kBlockRowTiles);
    }
    /* Blocks that share weights follow each other, so that memory is read once. */
    dim3 grid((unsigned)ceil_div(p.n, P::kBlockTokens), (unsigned)n_blocks, (unsigned)splits);
    launch(matmul_kernel<F, P>, grid, dim3(P::kThreads), P::kSharedBytes, queue.stream, p);
}

void multiply(const Queue &queue, const DeviceWeight *weights, int n_weights, const Activations &x, int n, bool router,
              Partials *out) {
    int64_t blocks = 0, columns = 0;
    for (int i = 0; i < n_weights; i++) {
        blocks += ceil_div(weights[i].n_rows, kProductRows) * ceil_div(n, kProductTokens);
        columns += weights[i].n_rows;
    }
    int splits = choose_splits(queue, blocks, weights[0].n_cols);
    while (splits > 1 && (int64_t)splits * n * columns > out->capacity) splits--;

    /* Weights of one type share a launch. Splits are counted in tiles of columns, which differ between types; each type
     * fills all splits, with zeros where it runs out of columns. */
    out->n = n;
    out->n_columns = (int)columns;
    out->n_splits = splits;
    bool done[3] = {false, false, false};
    for (int i = 0; i < n_weights; i++) {
        if (done[i]) continue;
        PackedShape shape = packed_shape(weights[i].type, weights[i].n_rows, weights[i].n_cols);
        MatmulParams p = {};
        p.x = x;
        p.n = n;
        p.out_columns = (int)columns;
        p.k_tiles = shape.k_tiles;
        p.tiles_per_split = (int)ceil_div(shape.k_tiles, splits);
        p.row_tile_bytes = shape.row_tile_bytes;
        p.out = out->values;
        int column = 0;
        for (int j = 0; j < n_weights; j++) {
            const DeviceWeight &w = weights[j];
            if (w.type == weights[i].type) {
                p.parts[p.n_parts++] = {w.tiles, w.scale, (int)w.n_rows, (int)ceil_div(w.n_rows, kTileRows), 0, column};
                done[j] = true;
            }
            column += (int)w.n_rows;
        }
        if (router)
            launch_product<FormatF32, RouterProduct>(queue, p, splits);
        else
            with_format(weights[i].type, [&](auto format) {
                using P = DenseProduct<decltype(format)>;
                static_assert(P::kBlockRowTiles * kTileRows == kProductRows && P::kBlockTokens == kProductTokens, "");
                launch_product<decltype(format), P>(queue, p, splits);
            });
    }
}

} // namespace

void matmul(const Queue &queue, const DeviceWeight *weights, int n_weights, const Activations &x, int n,
            Partials *out) {
    if (queue.hopper) return hopper_matmul(queue, weights, n_weights, x, n, out);
    multiply(queue, weights, n_weights, x, n, false, out);
}

void matmul_router(const Queue &queue, const DeviceWeight &router, const Activations &x, int n, Partials *out) {
    multiply(queue, &router, 1, x, n, true, out);
}
