/* The experts: choice, sorting by expert, and the two grouped products; who reads the results makes the weighted sum.
 * Nothing returns to the host in between: the list of work is built on the device, and blocks beyond its end have
 * nothing to do. */
#include "cuda/device.cuh"
#include "cuda/kernels/matmul.cuh"
#include "cuda/kernels/reduce.cuh"

namespace {

constexpr int kBlockFeatures = 64; /* gate and up rows of as many features, or twice as many rows of down */

/* ---- Choice --------------------------------------------------------------------------------------------------- */

constexpr int kRouteWarps = 4;

struct RouteParams {
    Partials logits; /* (n, n_experts) */
    int n_used;
    const float *expert_scale;
    int32_t *ids;
    float *shares;
};

/* A warp for each token. Softmax over all experts, the n_used most probable (the lower number first among equals),
 * their shares normalised to one and multiplied by each expert's factor. The softmax's own denominator cancels. */
__global__ void __launch_bounds__(32 * kRouteWarps) route_kernel(RouteParams p) {
    KernelOrder launch_order;
    const int lane = (int)threadIdx.x % 32, n_experts = p.logits.n_columns;
    const int token = (int)blockIdx.x * kRouteWarps + (int)threadIdx.x / 32;
    if (token >= p.logits.n) return;
    float *logits = shared_memory<float>() + threadIdx.x / 32 * n_experts;
    float largest = -INFINITY;
    for (int e = lane; e < n_experts; e += 32) {
        logits[e] = partial_sum(p.logits, token, e);
        largest = fmaxf(largest, logits[e]);
    }
    largest = warp_max(largest);
    float sum = 0;
    for (int k = 0; k < p.n_used; k++) {
        float best = -INFINITY;
        int best_expert = n_experts;
        for (int e = lane; e < n_experts; e += 32)
            if (logits[e] > best) {
                best = logits[e];
                best_expert = e;
            }
        for (int bits = 16; bits > 0; bits /= 2) {
            float other = __shfl_xor_sync(0xffffffff, best, bits);
            int other_expert = __shfl_xor_sync(0xffffffff, best_expert, bits);
            if (other > best || (other == best && other_expert < best_expert)) {
                best = other;
                best_expert = other_expert;
            }
        }
        /* Logits that are not numbers leave nothing to choose from; any expert then carries them on. */
        if (best_expert >= n_experts) best_expert = k;
        float share = expf(best - largest);
        sum += share;
        if (lane == 0) {
            p.ids[token * p.n_used + k] = best_expert;
            p.shares[token * p.n_used + k] = share;
        }
        if (best_expert % 32 == lane) logits[best_expert] = -INFINITY;
        __syncwarp();
    }
    for (int k = lane; k < p.n_used; k += 32)
        p.shares[token * p.n_used + k] *= p.expert_scale[p.ids[token * p.n_used + k]] / sum;
}

/* ---- Sorting -------------------------------------------------------------------------------------------------- */

constexpr int kSortWarps = 32;

size_t sort_bytes(int n_experts) { return (size_t)n_experts * (kSortWarps * sizeof(uint16_t) + sizeof(int32_t)); }

/* One block. Each warp takes a share of the choices in the order of tokens, 32 at a time, and counts them by expert;
 * sums over warps and experts then say where each choice goes. Within an expert choices stay in the order of tokens, so
 * that nothing depends on timing. */
__global__ void __launch_bounds__(32 * kSortWarps, 1)
    sort_kernel(const int32_t *ids, int n_choices, int n_used, int n_experts, int32_t *slots, int32_t *slot_tokens,
                int32_t *work, int max_work) {
    KernelOrder launch_order;
    int32_t *starts = shared_memory<int32_t>();                          /* (n_experts) */
    uint16_t *counts = reinterpret_cast<uint16_t *>(starts + n_experts); /* (kSortWarps, n_experts) */
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    const int share = ((n_choices + 31) / 32 + kSortWarps - 1) / kSortWarps * 32;
    const int begin = warp * share, end = min(begin + share, n_choices);
    uint16_t *mine = counts + warp * n_experts;
    for (int i = (int)threadIdx.x; i < kSortWarps * n_experts; i += 32 * kSortWarps) counts[i] = 0;
    __syncthreads();
    for (int first = begin; first < end; first += 32) {
        const int i = first + lane, expert = i < end ? ids[i] : -1;
        const unsigned same = __match_any_sync(0xffffffff, expert);
        const int rank = __popc(same & ((1u << lane) - 1)), before = expert >= 0 ? mine[expert] : 0;
        __syncwarp();
        if (expert >= 0) {
            if (rank == 0) mine[expert] = (uint16_t)(before + __popc(same));
            slots[i] = before + rank; /* among the warp's own */
        }
        __syncwarp();
    }
    __syncthreads();
    for (int e = (int)threadIdx.x; e < n_experts; e += 32 * kSortWarps) {
        int sum = 0;
        for (int w = 0; w < kSortWarps; w++) {
            const int count = counts[w * n_experts + e];
            counts[w * n_experts + e] = (uint16_t)sum;
            sum += count;
        }
        starts[e] = sum;
    }
    __syncthreads();
    if (warp == 0) {
        int n_slots = 0, n_work = 0;
        for (int first = 0; first < n_experts; first += 32) {
            const int e = first + lane, count = e < n_experts ? starts[e] : 0;
            const int tiles = (count + kWorkTokens - 1) / kWorkTokens;
            int slot = count, entry = tiles; /* sums up to and with this lane's */
            for (int distance = 1; distance < 32; distance *= 2) {
                const int other_slot = __shfl_up_sync(0xffffffff, slot, distance);
                const int other_entry = __shfl_up_sync(0xffffffff, entry, distance);
                if (lane >= distance) {
                    slot += other_slot;
                    entry += other_entry;
                }
            }
            const int all_slots = __shfl_sync(0xffffffff, slot, 31), all_entries = __shfl_sync(0xffffffff, entry, 31);
            slot += n_slots - count;
            entry += n_work - tiles;
            if (e < n_experts) starts[e] = slot;
            for (int done = 0; done < count; done += kWorkTokens, entry++) {
                work[3 * entry] = e;
                work[3 * entry + 1] = slot + done;
                work[3 * entry + 2] = min(count - done, kWorkTokens);
            }
            n_slots += all_slots;
            n_work += all_entries;
        }
        if (lane == 0) work[3 * max_work] = n_work;
    }
    __syncthreads();
    for (int i = begin + lane; i < end; i += 32) {
        const int expert = ids[i], slot = starts[expert] + mine[expert] + slots[i];
        slots[i] = slot;
        slot_tokens[slot] = i / n_used;
    }
}

/* Blocks that shall fit a multiprocessor: two warps for each quarter of it, with as many registers as there are. Six
 * would leave a thread 168, which are too few; five no more than that, since a quarter takes whole warps. */
constexpr int kExpertBlocks = 4;

/* ---- Products ------------------------------------------------------------------------------------------------- */

struct ExpertParams {
    const char *gate, *up;              /* tiles of expert 0 */
    uint64_t expert_bytes;              /* from one expert's to the next one's, gate and up alike */
    const float *gate_scale, *up_scale; /* (n_experts), or NULL */
    uint64_t row_tile_bytes;
    int64_t k_tiles;
    int n_rows; /* features, or rows of down */
    Activations x;
    const int32_t *slot_tokens;
    const int32_t *work;
    int max_work;
    bool integer_hidden;
    Activations hidden;
    float *out;
};

/* hidden = gelu(gate) · up for 64 features and up to 32 choices of an expert, ready for the product with down. Warp w
 * has features 32·w … + 31: their gate rows in the first two of its row tiles, their up rows in the other two. */
template <class F>
__global__ void __launch_bounds__(ExpertProduct<F>::kThreads, kExpertBlocks) gate_up_kernel(ExpertParams p) {
    KernelOrder launch_order;
    using P = ExpertProduct<F>;
    if ((int)blockIdx.y >= p.work[3 * p.max_work]) return;
    const int expert = p.work[3 * blockIdx.y], slot0 = p.work[3 * blockIdx.y + 1], n = p.work[3 * blockIdx.y + 2];
    const int feature_tiles = p.n_rows / kTileRows;
    typename P::Accumulators acc;
    P::run(
        acc, p.x, p.k_tiles, 0, (int)p.k_tiles, n,
        [&](int i) -> const char * {
            const int tile = min((int)blockIdx.x * 4 + i / 4 * 2 + i % 2, feature_tiles - 1);
            return (i % 4 < 2 ? p.gate : p.up) + (uint64_t)expert * p.expert_bytes + (uint64_t)tile * p.row_tile_bytes;
        },
        [&](int j) { return p.slot_tokens[slot0 + j]; });

    const float gate_scale = p.gate_scale != nullptr ? p.gate_scale[expert] : 1.0f;
    const float up_scale = p.up_scale != nullptr ? p.up_scale[expert] : 1.0f;
    const int lane = (int)threadIdx.x % 32, g = lane / 4, warp = P::row_warp();
    const int64_t hidden_tiles = (p.n_rows + 63) / 64;
#pragma unroll
    for (int t = 0; t < 4; t++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int token = t * 8 + lane % 4 * 2 + i;
            /* Features and tokens that do not exist become zeros: down reads whole tiles of features. */
            const bool exists = token < n && (int)blockIdx.x * 64 + warp * 32 < p.n_rows;
            const float multiplier = exists ? P::multiplier(p.x, p.slot_tokens[slot0 + token]) : 0.0f;
            float h[2][2]; /* row tile, half */
            float largest = 0;
#pragma unroll
            for (int m = 0; m < 2; m++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    h[m][half] = exists ? gelu_tanh(acc[m][t][2 * half + i] * (gate_scale * multiplier)) *
                                              (acc[m + 2][t][2 * half + i] * (up_scale * multiplier))
                                        : 0.0f;
                    largest = fmaxf(largest, fabsf(h[m][half]));
                }
            const int64_t slot = slot0 + token;
            if (p.integer_hidden) {
                /* The 32 features of a token are held by the eight lanes of one t. */
#pragma unroll
                for (int bits = 4; bits <= 16; bits *= 2)
                    largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, bits));
                int sum = 0, codes[2][2];
#pragma unroll
                for (int m = 0; m < 2; m++)
#pragma unroll
                    for (int half = 0; half < 2; half++) sum += codes[m][half] = quantize(h[m][half], largest);
#pragma unroll
                for (int bits = 4; bits <= 16; bits *= 2) sum += __shfl_xor_sync(0xffffffff, sum, bits);
                if (token < n) {
                    const int64_t chunk = slot * hidden_tiles + blockIdx.x;
#pragma unroll
                    for (int m = 0; m < 2; m++)
#pragma unroll
                        for (int half = 0; half < 2; half++)
                            p.hidden.codes[chunk * 64 + code_position(warp * 32 + m * 16 + half * 8 + g)] =
                                (int8_t)codes[m][half];
                    if (g == 0) {
                        p.hidden.scales[chunk * 2 + warp] = largest / 127.0f;
                        p.hidden.sums[chunk * 2 + warp] = largest / 127.0f * (float)sum;
                    }
                }
            } else if (exists) {
#pragma unroll
                for (int m = 0; m < 2; m++)
#pragma unroll
                    for (int half = 0; half < 2; half++)
                        p.hidden.values[slot * p.n_rows + value_position((int)blockIdx.x * 64 + warp * 32 + m * 16 +
                                                                         half * 8 + g)] = h[m][half];
            }
        }
}

template <class F>
__global__ void __launch_bounds__(ExpertProduct<F>::kThreads, kExpertBlocks) down_kernel(ExpertParams p) {
    KernelOrder launch_order;
    using P = ExpertProduct<F>;
    if ((int)blockIdx.y >= p.work[3 * p.max_work]) return;
    const int expert = p.work[3 * blockIdx.y], slot0 = p.work[3 * blockIdx.y + 1], n = p.work[3 * blockIdx.y + 2];
    const int row_tiles = (p.n_rows + kTileRows - 1) / kTileRows, tile0 = (int)blockIdx.x * P::kBlockRowTiles;
    typename P::Accumulators acc;
    P::run(
        acc, p.hidden, p.k_tiles, 0, (int)p.k_tiles, n,
        [&](int i) {
            const int tile = min(tile0 + i, row_tiles - 1);
            return p.gate + (uint64_t)expert * p.expert_bytes + (uint64_t)tile * p.row_tile_bytes;
        },
        ConsecutiveRows{slot0});
    const float scale = p.gate_scale != nullptr ? p.gate_scale[expert] : 1.0f;
    P::for_each(acc, [&](int row, int token, float value) {
        row += tile0 * kTileRows;
        if (token < n && row < p.n_rows)
            p.out[(int64_t)(slot0 + token) * p.n_rows + row] = value * scale * P::multiplier(p.hidden, slot0 + token);
    });
}

} // namespace

Rows mix_experts(const Queue &queue, const MoeTask &task) {
    const dg_model *model = task.model;
    const MoeScratch &s = task.scratch;
    const int n_used = model->n_experts_used, n_choices = task.n * n_used;
    const int max_work = (int)dg_cuda_moe_work_entries(model, task.n);

    RouteParams route = {task.router_logits, n_used, task.expert_scale, s.ids, s.shares};
    launch(route_kernel, dim3((unsigned)ceil_div(task.n, kRouteWarps)), dim3(32 * kRouteWarps),
           (size_t)(kRouteWarps * model->n_experts) * sizeof(float), queue.stream, route);
    launch(sort_kernel, dim3(1), dim3(32 * kSortWarps), sort_bytes(model->n_experts), queue.stream,
           (const int32_t *)s.ids, n_choices, n_used, (int)model->n_experts, s.slots, s.slot_tokens, s.work, max_work);

    const DeviceWeight &gate = task.gate, &up = task.up, &down = task.down;
    const bool merged = gate.tiles == up.tiles;
    PackedShape shape = packed_shape(gate.type, gate.n_rows, gate.n_cols);
    PackedShape down_shape = packed_shape(down.type, down.n_rows, down.n_cols);
    ExpertParams p = {};
    p.gate = gate.tiles;
    p.up = up.tiles + (merged ? (uint64_t)(model->n_ff_expert / kTileRows) * shape.row_tile_bytes : 0);
    p.expert_bytes = shape.bytes;
    p.gate_scale = gate.scale;
    p.up_scale = up.scale;
    p.row_tile_bytes = shape.row_tile_bytes;
    p.k_tiles = shape.k_tiles;
    p.n_rows = model->n_ff_expert;
    p.x = task.x;
    p.slot_tokens = s.slot_tokens;
    p.work = s.work;
    p.max_work = max_work;
    p.integer_hidden = down_shape.activations == kInt8;
    p.hidden = s.hidden;
    with_format(gate.type, [&](auto format) {
        using P = ExpertProduct<decltype(format)>;
        static_assert(P::kBlockTokens == kWorkTokens && P::kBlockRowTiles * kTileRows == 2 * kBlockFeatures, "");
        dim3 grid((unsigned)ceil_div(p.n_rows, kBlockFeatures), (unsigned)max_work);
        launch(gate_up_kernel<decltype(format)>, grid, dim3(P::kThreads), P::kSharedBytes, queue.stream, p);
    });

    p.gate = down.tiles;
    p.expert_bytes = down_shape.bytes;
    p.gate_scale = down.scale;
    p.row_tile_bytes = down_shape.row_tile_bytes;
    p.k_tiles = down_shape.k_tiles;
    p.n_rows = model->n_embd;
    p.out = s.out;
    with_format(down.type, [&](auto format) {
        using P = ExpertProduct<decltype(format)>;
        dim3 grid((unsigned)ceil_div(p.n_rows, P::kBlockRowTiles * kTileRows), (unsigned)max_work);
        launch(down_kernel<decltype(format)>, grid, dim3(P::kThreads), P::kSharedBytes, queue.stream, p);
    });
    Rows rows = {};
    rows.kind = kMixed;
    rows.values = s.out;
    rows.slots = s.slots;
    rows.shares = s.shares;
    rows.n_used = n_used;
    return rows;
}
