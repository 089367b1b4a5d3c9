/* The head on compute capability 9.0: logits by products of a warpgroup (product.cuh), and what is made of them.
 *
 * A block takes 128 tokens of the vocabulary for the canvas's positions, 256 at a time, then the next 128 that no other
 * block has: its loading warp is stages ahead while the others make use of their sums. Each warpgroup has 64 tokens of
 * the vocabulary, which is a vocabulary block:
 *
 *     sums of a thread     rows g and g + 8 of its warp's 16, positions 8·j + 2·t + i
 *       → its two rows     a Part each: largest, Σ exp, Σ exp · (z − largest), where
 *       → eight lanes      of one t: of eight positions each lane ends with one (halve)
 *       → four warps       through shared memory
 *
 * Second looks, at one vocabulary block for one position, decode the same operands and add up in float32, so that a
 * logit is the same there but for the order of its sum. */
#include "cuda/hopper/hopper.cuh"
#include "cuda/hopper/product.cuh"
#include "cuda/kernels/head.cuh"
#include "cuda/kernels/reduce.cuh"

namespace {

enum HeadUse { kStatistics, kLogits, kWeights };

struct HopperHeadParams {
    TensorMap tokens;
    HeadParams head;
    HeadUse use;
    int first_tile;  /* vocabulary blocks before the first one */
    int n_positions; /* blocks of positions */
    int n_blocks;    /* of 128 tokens of the vocabulary */
    int n_stages;
    float *logits;
};

constexpr int kHeadStages = 5;
template <class F> using HeadProduct = HopperProduct<F, kMostTokens<F>, kHeadStages>;

/* softcap · tanh(logit / softcap), to 2^-22 of the cap, in a few instructions. */
__device__ __forceinline__ float soft_capped(float logit, float softcap) {
    return softcap * (1.0f - __fdividef(2.0f, 1.0f + __expf(2.0f * logit / softcap)));
}

/* z of a sum; `factor`: of the weights' scale and the position. */
__device__ __forceinline__ float z_of(const HeadParams &p, float sum, float factor, int token, float temperature) {
    return token < p.n_vocab ? soft_capped(sum * factor, p.softcap) / temperature : -INFINITY;
}

__device__ __forceinline__ float scale_of(const HeadParams &p) { return p.scale != nullptr ? *p.scale : 1.0f; }
__device__ __forceinline__ float temperature_of(const HeadParams &p) {
    return p.temperature != nullptr ? *p.temperature : 1.0f;
}

/* ---- Statistics of a vocabulary block ------------------------------------------------------------------------- */

struct Part {
    float largest, sum, weighted;
    int where;
};

/* Of two tokens, the one of `a` the smaller. */
__device__ __forceinline__ Part part_of(float a, float b, int where_a, int where_b) {
    const bool second = b > a;
    const float largest = second ? b : a, other = second ? a : b;
    const float d = other > -INFINITY ? other - largest : 0.0f; /* a NaN is carried on */
    const float e = other > -INFINITY ? __expf(d) : other != other ? other : 0.0f;
    return {largest,
            (largest > -INFINITY  ? 1.0f
             : largest != largest ? largest
                                  : 0.0f) +
                e,
            e > 0 ? e * d : 0.0f, second ? where_b : where_a};
}

__device__ __forceinline__ Part merge(const Part &a, const Part &b) {
    const bool second = b.largest > a.largest || (b.largest == a.largest && b.where < a.where);
    const float high = second ? b.largest : a.largest, low = second ? a.largest : b.largest;
    const float high_sum = second ? b.sum : a.sum, low_sum = second ? a.sum : b.sum;
    const float high_weighted = second ? b.weighted : a.weighted, low_weighted = second ? a.weighted : b.weighted;
    const float d = low > -INFINITY ? low - high : 0.0f;
    const float e = low > -INFINITY ? __expf(d) : 0.0f; /* times a NaN it is one */
    return {high, high_sum + e * low_sum, high_weighted + (e > 0 ? e * (low_weighted + d * low_sum) : 0.0f),
            second ? b.where : a.where};
}

__device__ __forceinline__ Part exchanged(Part mine, int bit) {
    return {__shfl_xor_sync(0xffffffff, mine.largest, bit), __shfl_xor_sync(0xffffffff, mine.sum, bit),
            __shfl_xor_sync(0xffffffff, mine.weighted, bit), __shfl_xor_sync(0xffffffff, mine.where, bit)};
}

__device__ __forceinline__ Part chosen(bool first, const Part &a, const Part &b) { /* by fields, so in registers */
    return {first ? a.largest : b.largest, first ? a.sum : b.sum, first ? a.weighted : b.weighted,
            first ? a.where : b.where};
}

/* Of 2·n positions a lane keeps n, the upper ones where its bit is set, and gets the other's of these. */
template <int n> __device__ __forceinline__ void halve(Part *parts, int lane, int bit) {
    const bool upper = (lane & bit) != 0;
#pragma unroll
    for (int i = 0; i < n; i++) {
        const Part keep = chosen(upper, parts[i + n], parts[i]);
        parts[i] = merge(keep, exchanged(chosen(upper, parts[i], parts[i + n]), bit));
    }
}

/* Of z[16], this thread's of a chunk of 32 positions, what its warp makes of eight positions of each t. */
template <class P> __device__ __forceinline__ void keep_parts(const float *z, int chunk, int row, float4 *parts) {
    const int lane = P::lane();
    Part mine[8];
#pragma unroll
    for (int i = 0; i < 8; i++) mine[i] = part_of(z[i / 2 * 4 + i % 2], z[i / 2 * 4 + i % 2 + 2], row, row + 8);
    halve<4>(mine, lane, 16);
    halve<2>(mine, lane, 8);
    halve<1>(mine, lane, 4);
    const int i = (lane & 16) / 4 + (lane & 8) / 4 + (lane & 4) / 4;
    parts[P::warp() % 4 * P::kTokens + chunk * 32 + i / 2 * 8 + lane % 4 * 2 + i % 2] =
        make_float4(mine[0].largest, mine[0].sum, mine[0].weighted, __int_as_float(mine[0].where));
}

/* Puts the four warps' parts together: the statistics of vocabulary block `tile`. */
template <class P>
__device__ __forceinline__ void keep_statistics(const HeadParams &p, int tile, int position0, const float4 *parts) {
    const int n_tiles = (p.n_vocab + kVocabularyBlock - 1) / kVocabularyBlock, group = P::warp() / 4;
    meet<kWarpgroup>(1 + group);
    for (int j = (int)threadIdx.x % kWarpgroup; j < P::kTokens; j += kWarpgroup) {
        Part all = {-INFINITY, 0, 0, 0};
        for (int w = 0; w < 4; w++) {
            const float4 v = parts[w * P::kTokens + j];
            const Part part = {v.x, v.y, v.z, __float_as_int(v.w)};
            all = w == 0 ? part : merge(all, part);
        }
        if (position0 + j < p.n && tile < n_tiles)
            reinterpret_cast<float4 *>(p.scratch.statistics)[(int64_t)(position0 + j) * n_tiles + tile] =
                make_float4(all.largest, all.sum, all.weighted, __int_as_float(all.where));
    }
    meet<kWarpgroup>(1 + group); /* the next vocabulary block's parts overwrite these */
}

/* ---- The pass over the vocabulary ----------------------------------------------------------------------------- */

/* Weights exp(z − maximum) as float16 (kTerms, n, kChunk): soften.cu. */
template <class F> __device__ __forceinline__ void keep_weight(const HeadParams &p, int position, int column, float z) {
    const float weight = kWeightScale * expf(z - p.scratch.rows[position].maximum);
    const int64_t index = (int64_t)position * kChunk<F> + column;
#pragma unroll
    for (int i = 0; i < kTerms<F>; i++) p.scratch.chunk[(int64_t)i * p.n * kChunk<F> + index] = term(weight, i);
}

template <class F>
__device__ __forceinline__ void use_sums(typename HeadProduct<F>::Sums &sums, const HopperHeadParams &p, int block,
                                         int position0) {
    using P = HeadProduct<F>;
    const float scale = scale_of(p.head), temperature = temperature_of(p.head);
    const int token0 = p.first_tile * kVocabularyBlock + block * kHopperRows;
    float4 *const parts = reinterpret_cast<float4 *>(P::shared() + P::kEnd) + P::warp() / 4 * 4 * P::kTokens;
#pragma unroll
    for (int chunk = 0; chunk < P::kTokens / 32; chunk++) {
        __syncwarp(); /* keeps one chunk behind the other: without it registers run out */
        float *const z = sums + chunk * 16;
#pragma unroll
        for (int i = 0; i < 16; i++) {
            const int position = min(position0 + P::token_of(chunk * 16 + i), p.head.n - 1);
            const float factor = scale * p.head.x.half_multipliers[position];
            z[i] = z_of(p.head, z[i], factor, token0 + P::row_of(i), temperature);
        }
        if (p.use == kStatistics) {
            keep_parts<P>(z, chunk, token0 + P::row_of(0), parts);
            continue;
        }
#pragma unroll
        for (int i = 0; i < 16; i++) {
            const int position = position0 + P::token_of(chunk * 16 + i), column = block * kHopperRows + P::row_of(i);
            if (position >= p.head.n) continue;
            if (p.use == kLogits)
                p.logits[(int64_t)position * kLogitsChunk + column] = z[i];
            else
                keep_weight<F>(p.head, position, column, z[i]);
        }
    }
    if (p.use == kStatistics) keep_statistics<P>(p.head, p.first_tile + block * 2 + P::warp() / 4, position0, parts);
}

/* Whether anyone wants the results of a block of positions. */
template <class F> __device__ __forceinline__ bool is_wanted(const HopperHeadParams &p, int position0) {
    if (p.use != kWeights) return true;
    const int end = min(position0 + HeadProduct<F>::kTokens, p.head.n);
    bool wanted = false;
    for (int i = position0 / kSoftTokens; i * kSoftTokens < end; i++) wanted |= p.head.scratch.any_dense[i] != 0;
    return wanted;
}

template <class F>
__global__ void __launch_bounds__(kHopperThreads, 1) hopper_head_kernel(const __grid_constant__ HopperHeadParams p) {
    using P = HeadProduct<F>;
    const int k_tiles = (int)p.head.k_tiles;
    P::begin();
    KernelOrder launch_order;
    /* Calls work(block of the vocabulary, first position, this lane's or warp's row of tiles) for all of this block. */
    auto for_each_unit = [&](auto work) {
        for (int unit = (int)blockIdx.x; unit < p.n_blocks * p.n_positions; unit += (int)gridDim.x) {
            const int block = unit / p.n_positions, position0 = unit % p.n_positions * P::kTokens;
            if (!is_wanted<F>(p, position0)) continue;
            const int tile = p.first_tile * (kVocabularyBlock / kTileRows) + block * kHopperRowTiles +
                             (P::loads() ? P::lane() % kHopperRowTiles : P::warp());
            work(block, position0, p.head.tiles + (uint64_t)min(tile, p.head.row_tiles - 1) * p.head.row_tile_bytes);
        }
    };
    int use = 0;
    if (P::loads()) {
        leave_registers<kLoadRegisters>();
        if (P::warp() != kHopperWarps) return;
        for_each_unit([&](int, int position0, const char *row) {
            P::prefetch_weights(row, 0, p.n_stages, k_tiles);
            P::load(p.tokens, position0, row, k_tiles, 0, p.n_stages, use);
            use += p.n_stages;
        });
    } else {
        take_registers<kMultiplyRegisters>();
        for_each_unit([&](int block, int position0, const char *row) {
            typename P::Sums sums;
            P::multiply(sums, row, k_tiles, 0, p.n_stages, use);
            use += p.n_stages;
            use_sums<F>(sums, p, block, position0);
        });
    }
}

/* ---- Second looks --------------------------------------------------------------------------------------------- */

constexpr int kLookThreads = 2 * kVocabularyBlock; /* a warp for each 16 tokens */

__device__ __forceinline__ float dot(uint32_t a, uint32_t b, float sum) {
    sum = fmaf(half_to_float((uint16_t)a), half_to_float((uint16_t)b), sum);
    return fmaf(half_to_float((uint16_t)(a >> 16)), half_to_float((uint16_t)(b >> 16)), sum);
}

/* exp(z − maximum) of one vocabulary block for one position, into shared memory (kVocabularyBlock). */
template <class F> __device__ float *look_halves(const HeadParams &p, int position, int tile) {
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    const int n_stages = (int)(p.k_tiles * F::kTileCols + kStageColumns - 1) / kStageColumns;
    const int row_tile = tile * (kVocabularyBlock / kTileRows) + warp;
    const char *row = p.tiles + (uint64_t)min(row_tile, p.row_tiles - 1) * p.row_tile_bytes;
    const uint32_t *x =
        reinterpret_cast<const uint32_t *>(p.x.halves + (int64_t)position * n_stages * kStageColumns) + lane % 4;
    float sums[2] = {0, 0};
    for (int k = 0; k < n_stages; k++, x += kStageColumns / 2) {
        StageWeights<F> w;
        load_stage<F>(w, row, k, (int)p.k_tiles, lane);
#pragma unroll
        for (int step = 0; step < 4; step++) {
            uint32_t a[4];
            fragment<F>(a, w, step, lane);
            const uint32_t low = x[step * 8], high = x[step * 8 + 4];
#pragma unroll
            for (int half = 0; half < 2; half++) sums[half] = dot(a[2 + half], high, dot(a[half], low, sums[half]));
        }
    }
    float *weights = shared_memory<float>();
    const float factor = scale_of(p) * p.x.half_multipliers[position], temperature = temperature_of(p);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int i = warp * kTileRows + lane / 4 + 8 * half;
        const float z = z_of(p, group_sum<4>(sums[half]), factor, tile * kVocabularyBlock + i, temperature);
        if (lane % 4 == 0) weights[i] = expf(z - p.scratch.rows[position].maximum);
    }
    __syncthreads();
    return weights;
}

template <class F> __global__ void __launch_bounds__(kLookThreads) hopper_candidate_kernel(HeadParams p) {
    KernelOrder launch_order;
    const int position = (int)blockIdx.x;
    const float *weights = look_halves<F>(p, position, p.scratch.rows[position].vocab_block);
    if (threadIdx.x == 0) choose_candidate(p, position, weights);
}

template <class F> __global__ void __launch_bounds__(kLookThreads) hopper_look_kernel(HeadParams p) {
    KernelOrder launch_order;
    const int position = (int)blockIdx.x, i = (int)blockIdx.y;
    const HeadRow &row = p.scratch.rows[position];
    if (i >= row.n_looks) return;
    const float *weights = look_halves<F>(p, position, row.looks[i]);
    if (threadIdx.x < kVocabularyBlock) keep_look(p, position, i, weights);
}

/* ---- Launches ------------------------------------------------------------------------------------------------- */

/* Calls fn(the format of the embedding); native FP4 is no device's that comes here. */
template <class Fn> void with_embedding(const HeadTask &task, Fn fn) {
    with_format(task.embedding.type, [&](auto format) {
        if constexpr (decltype(format)::kActivations != kFp4Terms) fn(format);
    });
}

/* Puts `count` tokens of the vocabulary from `first` on to a use. */
void pass(const Queue &queue, const HeadTask &task, HeadUse use, int64_t first, int64_t count) {
    HopperHeadParams p = {};
    p.head = head_params(task);
    if (use == kLogits) p.head.temperature = nullptr;
    p.use = use;
    p.first_tile = (int)(first / kVocabularyBlock);
    p.n_blocks = (int)ceil_div(count, kHopperRows);
    p.n_stages = (int)ceil_div(task.embedding.n_cols, kStageColumns);
    p.logits = (float *)task.scratch.chunk;
    with_embedding(task, [&](auto format) {
        using P = HeadProduct<decltype(format)>;
        constexpr int shared_bytes = P::kSharedBytes + 2 * 4 * P::kTokens * (int)sizeof(float4);
        p.n_positions = (int)ceil_div(task.n, P::kTokens);
        if (!map_tensor(&p.tokens, task.x.halves, task.n, (int64_t)p.n_stages * kStageColumns, P::kTokens)) return;
        const int64_t units = (int64_t)p.n_blocks * p.n_positions;
        const int64_t blocks = units < queue.n_multiprocessors ? units : queue.n_multiprocessors;
        launch(hopper_head_kernel<decltype(format)>, dim3((unsigned)blocks), dim3(kHopperThreads), shared_bytes,
               queue.stream, p);
    });
}

} // namespace

void hopper_statistics(const Queue &queue, const HeadTask &task) {
    pass(queue, task, kStatistics, 0, task.embedding.n_rows);
}

void hopper_logits(const Queue &queue, const HeadTask &task, int64_t first, int count) {
    pass(queue, task, kLogits, first, count);
}

void hopper_weights(const Queue &queue, const HeadTask &task, int64_t first, int64_t count) {
    pass(queue, task, kWeights, first, count);
}

void hopper_candidates(const Queue &queue, const HeadTask &task) {
    with_embedding(task, [&](auto format) {
        launch(hopper_candidate_kernel<decltype(format)>, dim3((unsigned)task.n), dim3(kLookThreads),
               kVocabularyBlock * sizeof(float), queue.stream, head_params(task));
    });
}

void hopper_looks(const Queue &queue, const HeadTask &task) {
    with_embedding(task, [&](auto format) {
        launch(hopper_look_kernel<decltype(format)>, dim3((unsigned)task.n, kMaxLooks), dim3(kLookThreads),
               kVocabularyBlock * sizeof(float), queue.stream, head_params(task));
    });
}
