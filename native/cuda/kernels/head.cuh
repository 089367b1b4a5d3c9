/* The value of a logit, the same wherever it is computed again. */
#ifndef DG_CUDA_HEAD_CUH
#define DG_CUDA_HEAD_CUH

#include "cuda/device.cuh"
#include "cuda/kernels/matmul.cuh"

struct HeadParams {
    const char *tiles; /* of the embedding */
    const float *scale;
    uint64_t row_tile_bytes;
    int64_t k_tiles;
    int row_tiles, n_vocab;
    Activations x;
    int n;
    float softcap;
    const float *temperature; /* NULL: 1 */
    float bound;
    HeadScratch scratch;
    dg_cuda_canvas canvas;
};

static __device__ __forceinline__ float capped(float logit, float softcap) { return softcap * tanhf(logit / softcap); }

/* Logits of a block of vocabulary and tokens into accumulators, soft-capped and divided by the temperature; −inf beyond
 * the vocabulary. `row_tile0`: first row tile; token j's activations are row row_of(j). */
template <class P, class RowOf>
static __device__ __forceinline__ void head_logits(typename P::Accumulators &z, const HeadParams &p, int row_tile0,
                                                   int n_tokens, RowOf row_of) {
    P::run(
        z, p.x, p.k_tiles, 0, (int)p.k_tiles, n_tokens,
        [&](int i) { return p.tiles + (uint64_t)min(row_tile0 + i, p.row_tiles - 1) * p.row_tile_bytes; }, row_of);
    const float scale = p.scale != nullptr ? *p.scale : 1.0f;
    const float temperature = p.temperature != nullptr ? *p.temperature : 1.0f;
    P::for_each(z, [&](int row, int token, float &value) {
        const float factor = token < n_tokens ? scale * P::multiplier(p.x, row_of(token)) : 0.0f;
        value = row_tile0 * kTileRows + row < p.n_vocab ? capped(value * factor, p.softcap) / temperature : -INFINITY;
    });
}

static inline HeadParams head_params(const HeadTask &task) {
    const DeviceWeight &e = task.embedding;
    PackedShape shape = packed_shape(e.type, e.n_rows, e.n_cols);
    return {e.tiles,
            e.scale,
            shape.row_tile_bytes,
            shape.k_tiles,
            (int)shape.row_tiles,
            (int)e.n_rows,
            task.x,
            task.n,
            task.model->logit_softcap,
            &task.canvas.progress->next_temperature,
            task.bound,
            task.scratch,
            task.canvas};
}

#endif
