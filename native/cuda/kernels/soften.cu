/* The soft embedding of wide distributions: softmax(z) times the whole embedding, a chunk of the vocabulary at a time.
 *
 * Weights exp(z − maximum) of a chunk are written as float16, scaled by 2^14 so that they keep their precision down to
 * 2^-28, and multiplied with the embedding's rows, decoded to float16 in shared memory. Float embeddings are meant to
 * be exact: theirs and the weights are split into two float16 each (kTerms). */
#include "cuda/hopper/hopper.cuh"
#include "cuda/kernels/head.cuh"
#include "cuda/kernels/reduce.cuh"

namespace {

/* Weights (kTerms, n, kChunk) of one chunk. */
template <class F>
__global__ void __launch_bounds__(DenseProduct<F>::kThreads, kDenseBlocks<F>)
    weights_kernel(HeadParams p, int first_vocab_block) {
    KernelOrder launch_order;
    using P = DenseProduct<F>;
    static_assert(P::kBlockTokens == kSoftTokens, "");
    if (p.scratch.any_dense[blockIdx.x] == 0) return;
    const int vocab_block = first_vocab_block + (int)blockIdx.y, token0 = (int)blockIdx.x * P::kBlockTokens;
    const int n_tokens = min(p.n - token0, P::kBlockTokens);
    typename P::Accumulators z;
    head_logits<P>(z, p, vocab_block * P::kBlockRowTiles, n_tokens, ConsecutiveRows{token0});
    P::for_each(z, [&](int row, int token, float value) {
        if (token >= n_tokens) return;
        float weight = kWeightScale * expf(value - p.scratch.rows[token0 + token].maximum);
        int64_t index = (int64_t)(token0 + token) * kChunk<F> + (int)blockIdx.y * kVocabularyBlock + row;
        for (int i = 0; i < kTerms<F>; i++) p.scratch.chunk[(int64_t)i * p.n * kChunk<F> + index] = term(weight, i);
    });
}

/* ---- Weights times embedding ---------------------------------------------------------------------------------- */

constexpr int kColumns = 64; /* of a block */
constexpr int kSoftThreads = 128;
constexpr int kStep = 64;             /* tokens of the vocabulary per step */
constexpr int kStride = kColumns + 8; /* halves between rows in shared memory: rows of a matrix in different banks */

struct SoftenParams {
    HeadParams head;
    const uint16_t *weights; /* (kTerms, n, stride) */
    int64_t stride, term_stride;
    int first_tile; /* of 16 rows of the embedding */
    int n_steps, steps_per_split;
    int n_embd;
    bool begin; /* sums start at zero */
};

/* Decodes kStep rows × kColumns of the embedding to float16 (kTerms, kStep, kStride); a warp takes 16 rows. */
template <class F> __device__ void decode_rows(const SoftenParams &p, int step, int column0, uint16_t *to) {
    constexpr int kTilesAcross = kColumns / F::kTileCols;
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    const int row_tile = p.first_tile + step * (kStep / kTileRows) + warp;
    for (int i = 0; i < kTilesAcross; i++) {
        const int64_t k_tile = column0 / F::kTileCols + i;
        uint16_t *rows = to + (warp * kTileRows + lane / 4) * kStride + i * F::kTileCols;
        if (row_tile < p.head.row_tiles && k_tile < p.head.k_tiles) {
            const char *tiles = p.head.tiles + (uint64_t)row_tile * p.head.row_tile_bytes;
            for_each_value<F>(tiles, k_tile, lane, [&](int half, int slot, float value) {
                for (int j = 0; j < kTerms<F>; j++)
                    rows[j * kStep * kStride + half * 8 * kStride + F::lane_column(slot, lane % 4)] = term(value, j);
            });
        } else {
            for (int slot = 0; slot < F::kLaneColumns * 2; slot++)
                for (int j = 0; j < kTerms<F>; j++)
                    rows[j * kStep * kStride + slot % 2 * 8 * kStride + F::lane_column(slot / 2, lane % 4)] = 0;
        }
    }
}

/* A block adds 128 tokens × 64 columns over its share of the chunk; each warp has 32 of the tokens. */
template <class F> __global__ void __launch_bounds__(kSoftThreads) soften_kernel(SoftenParams p) {
    KernelOrder launch_order;
    constexpr int kN = kTerms<F>;
    if (p.head.scratch.any_dense[blockIdx.y] == 0) return;
    uint16_t *weights = shared_memory<uint16_t>();         /* (kTerms, kSoftTokens, kStride) */
    uint16_t *rows = weights + kN * kSoftTokens * kStride; /* (kTerms, kStep, kStride) */
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    const int token0 = (int)blockIdx.y * kSoftTokens, column0 = (int)blockIdx.x * kColumns;
    const int n = p.head.n;
    float *out = p.head.scratch.soft_sums + (int64_t)blockIdx.z * n * p.n_embd;
    float acc[2][8][4];
    auto for_each = [&](auto fn) {
#pragma unroll
        for (int m = 0; m < 2; m++)
#pragma unroll
            for (int i = 0; i < 8; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    int token = token0 + warp * 32 + m * 16 + lane / 4 + j / 2 * 8;
                    int column = column0 + i * 8 + lane % 4 * 2 + j % 2;
                    fn(acc[m][i][j], token < n && column < p.n_embd, (int64_t)token * p.n_embd + column);
                }
    };
    for_each([&](float &sum, bool inside, int64_t index) { sum = inside && !p.begin ? out[index] : 0.0f; });

    const int last = min(((int)blockIdx.z + 1) * p.steps_per_split, p.n_steps);
    for (int step = (int)blockIdx.z * p.steps_per_split; step < last; step++) {
        __syncthreads(); /* the last step has been read */
        for (int i = (int)threadIdx.x; i < kN * kSoftTokens * (kStep / 8); i += kSoftThreads) {
            int piece = i % (kStep / 8), token = i / (kStep / 8) % kSoftTokens, j = i / (kStep / 8) / kSoftTokens;
            bool valid = token0 + token < n;
            const uint16_t *from = p.weights + j * p.term_stride + (int64_t)(valid ? token0 + token : 0) * p.stride +
                                   step * kStep + piece * 8;
            cp_async_16(weights + (j * kSoftTokens + token) * kStride + piece * 8, from, valid);
        }
        cp_async_commit();
        decode_rows<F>(p, step, column0, rows);
        cp_async_wait<0>();
        __syncthreads();
#pragma unroll
        for (int v = 0; v < kStep; v += 16) {
            uint32_t a[kN][2][4];
#pragma unroll
            for (int j = 0; j < kN; j++)
#pragma unroll
                for (int m = 0; m < 2; m++)
                    ldmatrix_x4(a[j][m],
                                weights +
                                    (j * kSoftTokens + warp * 32 + m * 16 + lane / 8 % 2 * 8 + lane % 8) * kStride + v +
                                    lane / 16 * 8);
#pragma unroll
            for (int i = 0; i < 8; i += 2)
#pragma unroll
                for (int j = 0; j < kN; j++) { /* term j of the embedding */
                    uint32_t b[4];
                    ldmatrix_x4_trans(b, rows + (j * kStep + v + lane / 8 % 2 * 8 + lane % 8) * kStride + i * 8 +
                                             lane / 16 * 8);
#pragma unroll
                    for (int k = 0; k < kN - j; k++) /* the product of two second terms is below rounding */
#pragma unroll
                        for (int m = 0; m < 2; m++) {
                            mma_f16_k16(acc[m][i], a[k][m], b);
                            mma_f16_k16(acc[m][i + 1], a[k][m], b + 2);
                        }
                }
        }
    }
    for_each([&](float &sum, bool inside, int64_t index) {
        if (inside) out[index] = sum;
    });
}

constexpr int kFinishThreads = 256;

/* soft = sums / denominator for the tokens that need the dense form. */
__global__ void __launch_bounds__(kFinishThreads) finish_kernel(HeadParams p, int n_embd, float gain, float *soft) {
    KernelOrder launch_order;
    const int token = (int)blockIdx.x;
    const HeadRow &row = p.scratch.rows[token];
    if (row.n_looks >= 0) return;
    if (p.scale != nullptr) gain *= *p.scale;
    for (int i = (int)threadIdx.x; i < n_embd; i += kFinishThreads) {
        float sum = 0;
        for (int s = 0; s < kSoftSplits; s++) sum += p.scratch.soft_sums[((int64_t)s * p.n + token) * n_embd + i];
        soft[(int64_t)token * n_embd + i] = sum * (gain / kWeightScale) / row.denominator;
    }
}

template <class F>
void add_chunk(const Queue &queue, const HeadTask &task, const uint16_t *weights, int64_t stride, int64_t first,
               int64_t count) {
    SoftenParams s = {};
    s.head = head_params(task);
    s.weights = weights;
    s.stride = stride;
    s.term_stride = stride * task.n;
    s.first_tile = (int)(first / kTileRows);
    s.n_steps = (int)ceil_div(count, kStep);
    s.steps_per_split = (int)ceil_div(s.n_steps, kSoftSplits);
    s.n_embd = task.model->n_embd;
    s.begin = first == 0;
    dim3 grid((unsigned)ceil_div(s.n_embd, kColumns), (unsigned)ceil_div(task.n, kSoftTokens), kSoftSplits);
    launch(soften_kernel<F>, grid, dim3(kSoftThreads),
           (size_t)kTerms<F> * (kSoftTokens + kStep) * kStride * sizeof(uint16_t), queue.stream, s);
}

void finish(const Queue &queue, const HeadTask &task) {
    const int n_embd = task.model->n_embd;
    launch(finish_kernel, dim3((unsigned)task.n), dim3(kFinishThreads), 0, queue.stream, head_params(task), n_embd,
           sqrtf((float)n_embd), task.soft);
}

/* ---- Given z -------------------------------------------------------------------------------------------------- */

__global__ void begin_kernel(HeadRow *rows, int32_t *any_dense, int n) {
    KernelOrder launch_order;
    for (int i = (int)threadIdx.x; i < n; i += (int)blockDim.x) {
        rows[i].maximum = -INFINITY;
        rows[i].denominator = 0;
        rows[i].n_looks = -1;
        any_dense[i / kSoftTokens] = 1;
    }
}

/* A block for each position: the running maximum and denominator. */
__global__ void __launch_bounds__(kFinishThreads) given_statistics_kernel(const float *z, int count, HeadRow *rows) {
    KernelOrder launch_order;
    float *shared = shared_memory<float>(); /* (32), (kFinishThreads) */
    z += (int64_t)blockIdx.x * kGivenChunk;
    float largest = rows[blockIdx.x].maximum;
    const float before = largest;
    for (int i = (int)threadIdx.x; i < count; i += kFinishThreads) largest = fmaxf(largest, z[i]);
    shared[32 + threadIdx.x] = largest;
    __syncthreads();
    for (int i = 0; i < kFinishThreads; i++) largest = fmaxf(largest, shared[32 + i]);
    float sum = 0;
    for (int i = (int)threadIdx.x; i < count; i += kFinishThreads) sum += expf(z[i] - largest);
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) {
        rows[blockIdx.x].maximum = largest;
        rows[blockIdx.x].denominator = rows[blockIdx.x].denominator * expf(before - largest) + sum;
    }
}

/* Weights (n_terms, n, kGivenChunk); zeros behind the last. */
__global__ void __launch_bounds__(kFinishThreads)
    given_weights_kernel(const float *z, int count, const HeadRow *rows, int n, int n_terms, uint16_t *weights) {
    KernelOrder launch_order;
    const int64_t row = (int64_t)blockIdx.x * kGivenChunk;
    for (int i = (int)threadIdx.x; i < kGivenChunk; i += kFinishThreads) {
        float weight = i < count ? kWeightScale * expf(z[row + i] - rows[blockIdx.x].maximum) : 0.0f;
        for (int j = 0; j < n_terms; j++) weights[(int64_t)j * n * kGivenChunk + row + i] = term(weight, j);
    }
}

} // namespace

void soften_dense(const Queue &queue, const HeadTask &task) {
    HeadParams p = head_params(task);
    with_format(task.embedding.type, [&](auto format) {
        using F = decltype(format);
        using P = DenseProduct<F>;
        for (int64_t first = 0; first < p.n_vocab; first += kChunk<F>) {
            int64_t count = p.n_vocab - first < kChunk<F> ? p.n_vocab - first : kChunk<F>;
            dim3 grid((unsigned)ceil_div(task.n, P::kBlockTokens), (unsigned)ceil_div(count, kVocabularyBlock));
            if (queue.hopper)
                hopper_weights(queue, task, first, count);
            else
                launch(weights_kernel<F>, grid, dim3(P::kThreads), P::kSharedBytes, queue.stream, p,
                       (int)(first / kVocabularyBlock));
            add_chunk<F>(queue, task, task.scratch.chunk, kChunk<F>, first, count);
        }
    });
    finish(queue, task);
}

/* The chunk of weights holds z in its first half and the weights made of it, of up to two terms, in the other. */
float *given_chunk(const HeadTask &task) { return (float *)task.scratch.chunk; }

static uint16_t *given_weights(const HeadTask &task) { return task.scratch.chunk + (int64_t)task.n * kGivenChunk * 2; }

void soften_begin(const Queue &queue, const HeadTask &task) {
    launch(begin_kernel, dim3(1), dim3(256), 0, queue.stream, task.scratch.rows, task.scratch.any_dense, task.n);
}

void soften_statistics(const Queue &queue, const HeadTask &task, int count) {
    launch(given_statistics_kernel, dim3((unsigned)task.n), dim3(kFinishThreads), (32 + kFinishThreads) * sizeof(float),
           queue.stream, (const float *)given_chunk(task), count, task.scratch.rows);
}

void soften_add(const Queue &queue, const HeadTask &task, int64_t first, int count) {
    with_format(task.embedding.type, [&](auto format) {
        using F = decltype(format);
        launch(given_weights_kernel, dim3((unsigned)task.n), dim3(kFinishThreads), 0, queue.stream,
               (const float *)given_chunk(task), count, (const HeadRow *)task.scratch.rows, task.n, kTerms<F>,
               given_weights(task));
        add_chunk<F>(queue, task, given_weights(task), kGivenChunk, first, count);
    });
}

void soften_end(const Queue &queue, const HeadTask &task) { finish(queue, task); }
