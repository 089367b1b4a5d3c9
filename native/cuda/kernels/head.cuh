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

/* ---- Second looks: weights exp(z − maximum) of a vocabulary block, in shared memory (kVocabularyBlock) ----------- */

/* The first token of its vocabulary block at which the running sum exceeds the remainder. One thread. */
static __device__ __forceinline__ void choose_candidate(const HeadParams &p, int position, const float *weights) {
    const HeadRow &row = p.scratch.rows[position];
    double sum = 0;
    int chosen = 0; /* rounding may leave the sum short of the remainder: then the last token that has any weight */
    for (int i = 0; i < kVocabularyBlock; i++) {
        if (!(weights[i] > 0)) continue;
        chosen = i;
        sum += weights[i];
        if (sum > row.remainder) break;
    }
    p.canvas.candidates[position] = min(row.vocab_block * kVocabularyBlock + chosen, p.n_vocab - 1);
}

/* Keeps look i's probabilities. The first kVocabularyBlock threads. */
static __device__ __forceinline__ void keep_look(const HeadParams &p, int position, int i, const float *weights) {
    p.scratch.look_weights[((int64_t)position * kMaxLooks + i) * kVocabularyBlock + threadIdx.x] =
        weights[threadIdx.x] / p.scratch.rows[position].denominator;
}

/* ---- Weights of the dense soft embedding ------------------------------------------------------------------------ */

constexpr float kWeightScale = 16384.0f;

template <class F> constexpr int kTerms = F::kActivations == kFloats ? 2 : 1;

/* Tokens of the vocabulary in a chunk: with two terms, half as many fit. */
template <class F> constexpr int kChunk = kVocabularyChunk / kTerms<F>;

/* Term i of a value: what float16 leaves of it after i terms. */
static __device__ __forceinline__ uint16_t term(float value, int i) {
    const uint16_t first = float_to_half(value);
    return i == 0 ? first : float_to_half(value - half_to_float(first));
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
