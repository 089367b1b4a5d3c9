/* Dense products on compute capability 9.0, for canvases and for prompts.
 *
 *     grid    x   tokens, kTokens at a time           neighbours share their weights
 *             y   128 rows of one of the weights
 *             z   a share of the columns: as many as fill the multiprocessors; whoever reads the result adds them up
 *
 * What a block does is drawn in product.cuh. */
#include "cuda/hopper/hopper.cuh"
#include "cuda/hopper/product.cuh"

namespace {

struct HopperPart {
    const char *tiles;
    const float *scale; /* of all values, or NULL */
    int n_rows;
    int first_block; /* blocks before this part's */
    int out_column;
};

struct HopperMatmulParams {
    TensorMap tokens;
    HopperPart parts[3];
    int n_parts;
    const float *multipliers; /* (n) of the tokens */
    int n, out_columns;
    int k_tiles, n_stages;
    uint64_t row_tile_bytes;
    float *out; /* (splits, n, out_columns) */
};

/* Scales and stores a block's sums. */
template <class P>
__device__ __forceinline__ void store_sums(const typename P::Sums &sums, const HopperMatmulParams &p,
                                           const HopperPart &w, int row0) {
    const int token0 = (int)blockIdx.x * P::kTokens;
    const float scale = w.scale != nullptr ? *w.scale : 1.0f;
    float *out = p.out + ((int64_t)blockIdx.z * p.n + token0) * p.out_columns + w.out_column + row0;
#pragma unroll
    for (int i = 0; i < P::kTokens / 2; i++) {
        const int row = P::row_of(i), token = P::token_of(i);
        if (token0 + token < p.n && row0 + row < w.n_rows)
            out[(int64_t)token * p.out_columns + row] = sums[i] * scale * p.multipliers[token0 + token];
    }
}

template <class F, int kTokens>
__global__ void __launch_bounds__(kHopperThreads, 1)
    hopper_matmul_kernel(const __grid_constant__ HopperMatmulParams p) {
    using P = HopperProduct<F, kTokens>;
    int part = 0;
    while (part + 1 < p.n_parts && (int)blockIdx.y >= p.parts[part + 1].first_block) part++;
    const HopperPart &w = p.parts[part];
    const int row0 = ((int)blockIdx.y - w.first_block) * kHopperRows;
    const int first = (int)blockIdx.z * p.n_stages / (int)gridDim.z;
    const int last = ((int)blockIdx.z + 1) * p.n_stages / (int)gridDim.z;
    /* The row tile of a warp that multiplies, or of a lane that prefetches; the last one in place of those behind. */
    const int tile = min(row0 / kTileRows + (P::loads() ? P::lane() % kHopperRowTiles : P::warp()),
                         (w.n_rows + kTileRows - 1) / kTileRows - 1);
    const char *row = w.tiles + (uint64_t)tile * p.row_tile_bytes;

    P::begin();
    if (P::warp() == kHopperWarps) P::prefetch_weights(row, first, last, p.k_tiles); /* no kernel writes weights */
    KernelOrder launch_order;
    if (P::loads()) {
        leave_registers<kLoadRegisters>();
        if (P::warp() == kHopperWarps) P::load(p.tokens, (int)blockIdx.x * kTokens, row, p.k_tiles, first, last, 0);
    } else {
        take_registers<kMultiplyRegisters>();
        typename P::Sums sums;
        P::multiply(sums, row, p.k_tiles, first, last, 0);
        store_sums<P>(sums, p, w, row0);
    }
}

/* The number of splits that takes the shortest time: waves of blocks, each of a split's share, and a fiftieth of the
 * product for adding up another split. At least four stages each. */
int choose_splits(int n_multiprocessors, int64_t blocks, int n_stages) {
    int best = 1;
    float least = INFINITY;
    for (int splits = 1; splits <= kProductSplits && (splits == 1 || splits * 4 <= n_stages); splits++) {
        const float time = (float)ceil_div(blocks * splits, n_multiprocessors) / (float)splits + 0.02f * (float)splits;
        if (time < least) best = splits;
        least = fminf(least, time);
    }
    return best;
}

int tokens_of_block(int n, int most) { return n <= 64 ? 64 : n <= 128 || most == 128 ? 128 : 256; }

template <class F, int kTokens>
void launch_product(const Queue &queue, HopperMatmulParams p, const uint16_t *halves, int n_blocks, int splits) {
    if (!map_tensor(&p.tokens, halves, p.n, (int64_t)p.n_stages * kStageColumns, kTokens)) return;
    const dim3 grid((unsigned)ceil_div(p.n, kTokens), (unsigned)n_blocks, (unsigned)splits);
    launch(hopper_matmul_kernel<F, kTokens>, grid, dim3(kHopperThreads), HopperProduct<F, kTokens>::kSharedBytes,
           queue.stream, p);
}

/* Launches the product of those parts whose weights are of one type. */
void launch_parts(const Queue &queue, int32_t type, const HopperMatmulParams &p, const uint16_t *halves, int n_blocks,
                  int splits) {
    with_format(type, [&](auto format) {
        using F = decltype(format);
        if constexpr (F::kActivations != kFp4Terms) { /* which no such device has */
            const int tokens = tokens_of_block(p.n, kMostTokens<F>);
            if (tokens == 64)
                launch_product<F, 64>(queue, p, halves, n_blocks, splits);
            else if (tokens == 128)
                launch_product<F, 128>(queue, p, halves, n_blocks, splits);
            else if constexpr (kMostTokens<F> == 256)
                launch_product<F, 256>(queue, p, halves, n_blocks, splits);
        }
    });
}

} // namespace

bool hopper_available(const cudaDeviceProp &device) {
    return dg_cuda_hopper_wanted() && device.major == 9 && device.minor == 0 && can_map_tensors();
}

void hopper_matmul(const Queue &queue, const DeviceWeight *weights, int n_weights, const Activations &x, int n,
                   Partials *out) {
    const int n_stages = (int)ceil_div(weights[0].n_cols, kStageColumns);
    int64_t blocks = 0, columns = 0;
    for (int i = 0; i < n_weights; i++) {
        blocks += ceil_div(weights[i].n_rows, kHopperRows);
        columns += weights[i].n_rows;
    }
    int splits = choose_splits(queue.n_multiprocessors, blocks * ceil_div(n, tokens_of_block(n, 256)), n_stages);
    while (splits > 1 && (int64_t)splits * n * columns > out->capacity) splits--;
    out->n = n;
    out->n_columns = (int)columns;
    out->n_splits = splits;

    /* Weights of one type share a launch. */
    bool done[3] = {false, false, false};
    for (int i = 0; i < n_weights; i++) {
        if (done[i]) continue;
        const PackedShape shape = packed_shape(weights[i].type, weights[i].n_rows, weights[i].n_cols);
        HopperMatmulParams p = {};
        p.multipliers = x.half_multipliers;
        p.n = n;
        p.out_columns = (int)columns;
        p.k_tiles = (int)shape.k_tiles;
        p.n_stages = n_stages;
        p.row_tile_bytes = shape.row_tile_bytes;
        p.out = out->values;
        int column = 0, n_blocks = 0;
        for (int j = 0; j < n_weights; j++) {
            const DeviceWeight &w = weights[j];
            if (w.type == weights[i].type) {
                p.parts[p.n_parts++] = {w.tiles, w.scale, (int)w.n_rows, n_blocks, column};
                n_blocks += (int)ceil_div(w.n_rows, kHopperRows);
                done[j] = true;
            }
            column += (int)w.n_rows;
        }
        launch_parts(queue, weights[i].type, p, x.halves, n_blocks, splits);
    }
}
