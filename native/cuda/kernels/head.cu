/* Logits, their statistics, the draw, and the soft embedding of narrow distributions, without ever holding the logits.
 *
 * One pass over the vocabulary leaves of each vocabulary block (64 tokens) and each position: the largest z,
 * Σ exp(z − largest), Σ exp(z − largest) · (z − largest), and where the largest stands. From these follow argmax,
 * denominator and entropy, which block a draw falls into, and how much probability each block has. Only a few blocks
 * are then looked at again: the draw's, and those that make up the soft embedding but for the mass that may be dropped.
 * Where that takes more than kMaxLooks blocks, soften.cu takes all. */
#include "cuda/kernels/head.cuh"

#include "cuda/hopper/hopper.cuh"
#include "cuda/kernels/reduce.cuh"

namespace {

/* ---- The pass over the vocabulary ----------------------------------------------------------------------------- */

template <class F>
__global__ void __launch_bounds__(DenseProduct<F>::kThreads, kDenseBlocks<F>) statistics_kernel(HeadParams p) {
    KernelOrder launch_order;
    using P = DenseProduct<F>;
    static_assert(P::kBlockRowTiles * kTileRows == kVocabularyBlock, "");
    const int vocab_block = (int)blockIdx.y, token0 = (int)blockIdx.x * P::kBlockTokens;
    const int n_tokens = min(p.n - token0, P::kBlockTokens);
    typename P::Accumulators z;
    head_logits<P>(z, p, vocab_block * P::kBlockRowTiles, n_tokens, ConsecutiveRows{token0});

    /* A token's 64 values are held by the eight lanes of one t in both warps of rows. */
    float4 *halves = shared_memory<float4>(); /* (kBlockTokens) of the second warp of rows */
    const int lane = (int)threadIdx.x % 32, row0 = vocab_block * kVocabularyBlock + P::row_warp() * 32 + lane / 4;
    float4 mine[8][2];
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float largest = -INFINITY;
            int where = 0;
#pragma unroll
            for (int j = 0; j < 4; j++) { /* rows of this lane, ascending */
                float value = z[j / 2][n][j % 2 * 2 + i];
                if (value > largest) {
                    largest = value;
                    where = row0 + j * 8;
                }
            }
#pragma unroll
            for (int bits = 4; bits <= 16; bits *= 2) {
                float other = __shfl_xor_sync(0xffffffff, largest, bits);
                int other_where = __shfl_xor_sync(0xffffffff, where, bits);
                if (other > largest || (other == largest && other_where < where)) {
                    largest = other;
                    where = other_where;
                }
            }
            float sum = 0, weighted = 0;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                float value = z[j / 2][n][j % 2 * 2 + i], d = value - largest;
                float e = value > -INFINITY ? expf(d) : 0.0f; /* nothing beyond the vocabulary */
                if (value != value) e = value;                /* a NaN is carried on */
                sum += e;
                if (e > 0) weighted += e * d;
            }
#pragma unroll
            for (int bits = 4; bits <= 16; bits *= 2) {
                sum += __shfl_xor_sync(0xffffffff, sum, bits);
                weighted += __shfl_xor_sync(0xffffffff, weighted, bits);
            }
            mine[n][i] = make_float4(largest, sum, weighted, __int_as_float(where));
            int token = (P::token_warp() * 8 + n) * 8 + lane % 4 * 2 + i;
            if (P::row_warp() == 1 && lane < 4) halves[token] = mine[n][i];
        }
    __syncthreads();
    if (P::row_warp() == 1 || lane >= 4) return;
    const int64_t n_vocab_blocks = gridDim.y;
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int token = (P::token_warp() * 8 + n) * 8 + lane % 4 * 2 + i;
            if (token >= n_tokens) continue;
            float4 a = mine[n][i], b = halves[token];
            if (b.x > -INFINITY) {
                float largest = fmaxf(a.x, b.x), da = a.x - largest, db = b.x - largest;
                float ea = expf(da), eb = expf(db);
                a = make_float4(largest, ea * a.y + eb * b.y, ea * (a.z + da * a.y) + eb * (b.z + db * b.y),
                                b.x > a.x ? b.w : a.w);
            } else {
                a.y += b.y; /* nothing, or a NaN to be carried on */
            }
            reinterpret_cast<float4 *>(p.scratch.statistics)[(token0 + token) * n_vocab_blocks + vocab_block] = a;
        }
}

/* ---- What the statistics say ---------------------------------------------------------------------------------- */

constexpr int kDrawThreads = 256;
constexpr int kBisections = 14;

/* Finds the smallest set of vocabulary blocks whose complement has at most `allowed` of the probability. */
__device__ void choose_looks(const HeadParams &p, HeadRow *row, const float *shares, int n_vocab_blocks, int begin,
                             int end, float allowed, float *sums, int *counts) {
    /* Blocks with a share below a threshold are dropped; the threshold is found by bisection of its logarithm. */
    float low = -100, high = 0;
    for (int step = 0; step < kBisections; step++) {
        float middle = 0.5f * (low + high), threshold = exp2f(middle), dropped = 0;
        for (int i = (int)threadIdx.x; i < n_vocab_blocks; i += kDrawThreads)
            dropped += shares[i] < threshold ? shares[i] : 0.0f;
        if (block_sum(dropped, sums) <= allowed)
            low = middle;
        else
            high = middle;
    }
    const float threshold = exp2f(low);
    int count = 0;
    for (int i = begin; i < end; i++) count += !(shares[i] < threshold);
    counts[threadIdx.x] = count;
    __syncthreads();
    int before = 0, all = 0;
    for (int i = 0; i < kDrawThreads; i++) {
        if (i == (int)threadIdx.x) before = all;
        all += counts[i];
    }
    const bool dense = allowed <= 0 || all > kMaxLooks;
    for (int i = begin; i < end && !dense; i++)
        if (!(shares[i] < threshold)) row->looks[before++] = i;
    if (threadIdx.x == 0) {
        row->n_looks = dense ? -1 : all;
        if (dense) p.scratch.any_dense[blockIdx.x / kSoftTokens] = 1;
    }
}

/* A block for each position. Sums over vocabulary blocks are in float64 and in the order of the vocabulary. */
__global__ void __launch_bounds__(kDrawThreads) draw_kernel(HeadParams p, int n_vocab_blocks, bool soft) {
    KernelOrder launch_order;
    double *sums = shared_memory<double>(); /* (kDrawThreads) of each thread's vocabulary blocks */
    double *weighted = sums + kDrawThreads; /* (kDrawThreads) */
    float *reduce = reinterpret_cast<float *>(weighted + kDrawThreads); /* (32) */
    int *wheres = reinterpret_cast<int *>(reduce + 32);                 /* (kDrawThreads) */
    float *largests = reinterpret_cast<float *>(wheres + kDrawThreads); /* (kDrawThreads) */
    float *shares = largests + kDrawThreads;                            /* (n_vocab_blocks) */
    const int token = (int)blockIdx.x, thread = (int)threadIdx.x;
    const float4 *statistics = reinterpret_cast<const float4 *>(p.scratch.statistics) + (int64_t)token * n_vocab_blocks;
    HeadRow *row = p.scratch.rows + token;
    const int per_thread = (n_vocab_blocks + kDrawThreads - 1) / kDrawThreads;
    const int begin = min(thread * per_thread, n_vocab_blocks), end = min(begin + per_thread, n_vocab_blocks);

    float maximum = -INFINITY;
    int where = 0;
    for (int i = begin; i < end; i++)
        if (statistics[i].x > maximum) {
            maximum = statistics[i].x;
            where = __float_as_int(statistics[i].w);
        }
    largests[thread] = maximum;
    wheres[thread] = where;
    __syncthreads();
    for (int i = 0; i < kDrawThreads; i++) /* ascending: the first of equals stays */
        if (largests[i] > maximum || (largests[i] == maximum && wheres[i] < where)) {
            maximum = largests[i];
            where = wheres[i];
        }

    double sum = 0, weight = 0;
    for (int i = begin; i < end; i++) {
        float4 s = statistics[i];
        float d = s.x - maximum, e = expf(d);
        shares[i] = e * s.y;
        sum += (double)e * s.y;
        if (e > 0) weight += (double)e * (s.z + d * s.y);
        if (s.y != s.y) sum = s.y;
    }
    sums[thread] = sum;
    weighted[thread] = weight;
    __syncthreads();
    double denominator = 0, total = 0;
    for (int i = 0; i < kDrawThreads; i++) {
        denominator += sums[i];
        total += weighted[i];
    }
    if (thread == 0) {
        p.canvas.argmax[token] = where;
        p.canvas.entropies[token] = fmaxf(0.0f, (float)(log(denominator) - total / denominator));
        if (!(denominator > 0) || denominator > 1e30) p.canvas.entropies[token] = NAN; /* damaged weights */
        row->maximum = maximum;
        row->denominator = (float)denominator;

        const float uniform = dg_candidate_uniform(p.canvas.rules, p.canvas.progress->step + 1, token);
        const double target = (double)uniform * denominator;
        double before = 0;
        int part = 0;
        while (part + 1 < kDrawThreads && before + sums[part] <= target && (part + 1) * per_thread < n_vocab_blocks)
            before += sums[part++];
        int vocab_block = part * per_thread;
        const int last = min(vocab_block + per_thread, n_vocab_blocks) - 1;
        while (vocab_block < last && before + shares[vocab_block] <= target) before += shares[vocab_block++];
        row->vocab_block = vocab_block;
        row->remainder = (float)(target - before);
    }
    if (!soft) return;
    __syncthreads();
    for (int i = begin; i < end; i++) shares[i] = (float)(shares[i] / denominator);
    __syncthreads();
    choose_looks(p, row, shares, n_vocab_blocks, begin, end, 0.5f * p.bound, reduce, wheres);
}

/* ---- Second looks --------------------------------------------------------------------------------------------- */

/* exp(z − maximum) of one vocabulary block for one token, into shared memory (kVocabularyBlock). */
template <class F> __device__ float *look(const HeadParams &p, int token, int vocab_block) {
    using P = LookProduct<F>;
    typename P::Accumulators z;
    head_logits<P>(z, p, vocab_block * P::kBlockRowTiles, 1, ConsecutiveRows{token});
    float *weights = shared_memory<float>();
    const float maximum = p.scratch.rows[token].maximum;
    P::for_each(z, [&](int row, int column, float value) {
        if (column == 0) weights[row] = expf(value - maximum);
    });
    __syncthreads();
    return weights;
}

/* A block for each position. */
template <class F> __global__ void __launch_bounds__(LookProduct<F>::kThreads, 8) candidate_kernel(HeadParams p) {
    KernelOrder launch_order;
    const int token = (int)blockIdx.x;
    const float *weights = look<F>(p, token, p.scratch.rows[token].vocab_block);
    if (threadIdx.x == 0) choose_candidate(p, token, weights);
}

/* A block for each position and look. */
template <class F> __global__ void __launch_bounds__(LookProduct<F>::kThreads, 8) look_kernel(HeadParams p) {
    KernelOrder launch_order;
    const int token = (int)blockIdx.x, i = (int)blockIdx.y;
    const HeadRow &row = p.scratch.rows[token];
    if (i >= row.n_looks) return;
    const float *weights = look<F>(p, token, row.looks[i]);
    keep_look(p, token, i, weights);
}

constexpr int kGatherThreads = 192;

/* A block for each position: the weighted sum of the embedding's rows. */
template <class F>
__global__ void __launch_bounds__(kGatherThreads) gather_kernel(HeadParams p, int n_embd, float gain, float *soft) {
    KernelOrder launch_order;
    const int token = (int)blockIdx.x;
    const HeadRow &row = p.scratch.rows[token];
    if (row.n_looks < 0) return;
    if (p.scale != nullptr) gain *= *p.scale;
    const float *weights = p.scratch.look_weights + (int64_t)token * kMaxLooks * kVocabularyBlock;
    const float least = 0.5f * p.bound / (kMaxLooks * kVocabularyBlock); /* together at most half of the bound */
    for (int item = (int)threadIdx.x; item < (int)p.k_tiles * 4; item += kGatherThreads) {
        const int k_tile = item / 4, t = item % 4;
        float acc[F::kLaneColumns];
#pragma unroll
        for (int i = 0; i < F::kLaneColumns; i++) acc[i] = 0;
        for (int i = 0; i < row.n_looks; i++)
            for (int r = 0; r < kVocabularyBlock; r += r % 16 == 7 ? 9 : 1) { /* rows r and r + 8 lie in one lane */
                const float w[2] = {weights[i * kVocabularyBlock + r], weights[i * kVocabularyBlock + r + 8]};
                if (w[0] < least && w[1] < least) continue;
                const int row_tile = row.looks[i] * (kVocabularyBlock / kTileRows) + r / 16;
                if (row_tile >= p.row_tiles) continue;
                for_each_value<F>(p.tiles + (uint64_t)row_tile * p.row_tile_bytes, k_tile, r % 8 * 4 + t,
                                  [&](int half, int slot, float value) { acc[slot] += w[half] * value; });
            }
#pragma unroll
        for (int i = 0; i < F::kLaneColumns; i++) {
            int column = k_tile * F::kTileCols + F::lane_column(i, t);
            if (column < n_embd) soft[(int64_t)token * n_embd + column] = acc[i] * gain;
        }
    }
}

/* ---- Logits for a caller -------------------------------------------------------------------------------------- */

template <class F>
__global__ void __launch_bounds__(DenseProduct<F>::kThreads, kDenseBlocks<F>)
    logits_kernel(HeadParams p, int first_vocab_block, float *out) {
    KernelOrder launch_order;
    using P = DenseProduct<F>;
    const int vocab_block = first_vocab_block + (int)blockIdx.y, token0 = (int)blockIdx.x * P::kBlockTokens;
    const int n_tokens = min(p.n - token0, P::kBlockTokens);
    typename P::Accumulators z;
    head_logits<P>(z, p, vocab_block * P::kBlockRowTiles, n_tokens, ConsecutiveRows{token0});
    P::for_each(z, [&](int row, int token, float value) {
        if (token < n_tokens)
            out[(int64_t)(token0 + token) * kLogitsChunk + (int)blockIdx.y * kVocabularyBlock + row] = value;
    });
}

} // namespace

void sample_head(const Queue &queue, const HeadTask &task) {
    HeadParams p = head_params(task);
    const int n_vocab_blocks = (int)ceil_div(p.n_vocab, kVocabularyBlock);
    const unsigned n = (unsigned)task.n;
    cudaMemsetAsync(task.scratch.any_dense, 0, (size_t)ceil_div(task.n, kSoftTokens) * sizeof(int32_t), queue.stream);
    with_format(task.embedding.type, [&](auto format) {
        using F = decltype(format);
        dim3 grid((unsigned)ceil_div(task.n, DenseProduct<F>::kBlockTokens), (unsigned)n_vocab_blocks);
        if (queue.hopper)
            hopper_statistics(queue, task);
        else
            launch(statistics_kernel<F>, grid, dim3(DenseProduct<F>::kThreads), DenseProduct<F>::kSharedBytes,
                   queue.stream, p);
        size_t bytes = kDrawThreads * (2 * sizeof(double) + sizeof(int) + sizeof(float)) +
                       (size_t)(32 + n_vocab_blocks) * sizeof(float);
        launch(draw_kernel, dim3(n), dim3(kDrawThreads), bytes, queue.stream, p, n_vocab_blocks, task.soft != nullptr);
        using L = LookProduct<F>;
        static_assert(L::kThreads == kVocabularyBlock && L::kSharedBytes >= kVocabularyBlock * 4, "");
        if (queue.hopper)
            hopper_candidates(queue, task);
        else
            launch(candidate_kernel<F>, dim3(n), dim3(L::kThreads), L::kSharedBytes, queue.stream, p);
        if (task.soft == nullptr) return;
        if (p.bound > 0) {
            const int n_embd = task.model->n_embd;
            if (queue.hopper)
                hopper_looks(queue, task);
            else
                launch(look_kernel<F>, dim3(n, kMaxLooks), dim3(L::kThreads), L::kSharedBytes, queue.stream, p);
            launch(gather_kernel<F>, dim3(n), dim3(kGatherThreads), 0, queue.stream, p, n_embd, sqrtf((float)n_embd),
                   task.soft);
        }
    });
    if (task.soft != nullptr) soften_dense(queue, task);
}

void chunk_logits(const Queue &queue, const HeadTask &task, int64_t first, int count) {
    if (queue.hopper) return hopper_logits(queue, task, first, count);
    HeadParams p = head_params(task);
    p.temperature = nullptr;
    with_format(task.embedding.type, [&](auto format) {
        using P = DenseProduct<decltype(format)>;
        dim3 grid((unsigned)ceil_div(task.n, P::kBlockTokens), (unsigned)ceil_div(count, kVocabularyBlock));
        launch(logits_kernel<decltype(format)>, grid, dim3(P::kThreads), P::kSharedBytes, queue.stream, p,
               (int)(first / kVocabularyBlock), (float *)task.scratch.chunk);
    });
}
