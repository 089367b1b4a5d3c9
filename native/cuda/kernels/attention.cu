/* Attention by key tiles (attention_block.cuh): the kernel, and the shapes that it comes in. */
#include "cuda/kernels/attention_block.cuh"

namespace {

constexpr int kMaxSplits = 16;

template <class S> __global__ void __launch_bounds__(kAttentionThreads, 1) attention_kernel(AttentionParams p) {
    KernelOrder launch_order;
    AttentionBlock<S> block(p);
    block.clear_columns();
    block.load_queries();
    int stage = 0;
    if (block.tile < block.tile_end) block.start_copies(block.tile, 0);
    cp_async_commit();
    for (; block.tile < block.tile_end; block.tile++) {
        cp_async_wait<0>();
        __syncthreads(); /* the tile has come, and all have finished with the last one */
        if constexpr (!S::kDirect) {
            block.convert(block.tile);
            __syncthreads();
        }
        if (block.tile + 1 < block.tile_end) block.start_copies(block.tile + 1, stage ^ 1);
        cp_async_commit();
        const uint16_t *const rows =
            reinterpret_cast<const uint16_t *>(block.shared + (S::kDirect && stage == 1 ? block.l.second : 0));
        float scores[S::kKeyTiles][4];
        block.score(scores, rows);
        if constexpr (S::kDimGroups > 1) block.exchange(scores);
        block.mask(scores);
        block.online_softmax(scores);
        block.accumulate(scores, rows);
        stage ^= 1;
    }
    cp_async_wait<0>();
    block.sum_denominators();
    if constexpr (S::kKeyGroups > 1) block.merge();
    block.write();
}

/* ---- Shapes --------------------------------------------------------------------------------------------------- */

/* Calls fn(the shape) if it has place for these heads. */
template <class S, class Fn> bool try_shape(const AttentionParams &p, Fn fn) {
    if (!fits<S>(p)) return false;
    fn(S());
    return true;
}
template <int kDim, int kKeys, class Fn> bool try_size(const AttentionParams &p, Fn fn) {
    return try_shape<AttentionShape<kDim, kKeys, true, true>>(p, fn) ||
           try_shape<AttentionShape<kDim, kKeys, false, true>>(p, fn) ||
           try_shape<AttentionShape<kDim, kKeys, true, false>>(p, fn) ||
           try_shape<AttentionShape<kDim, kKeys, false, false>>(p, fn);
}
/* False where there is no shape: for float32, and for rotations that fit no fragment. */
template <class Fn> bool with_shape(const AttentionParams &p, Fn fn) {
    if (p.type_k == DG_TYPE_F32 || p.type_v == DG_TYPE_F32) return false;
    return try_size<64, 32>(p, fn) || try_size<256, 32>(p, fn) ||
           /* Wider heads leave room for 32 keys in shared memory, and in registers, only where these are few and are
            * copied as they are. */
           try_shape<AttentionShape<512, 32, false, true>>(p, fn) || try_size<512, 16>(p, fn);
}

/* Shares of the keys: as many as make the whole soonest, in waves of one block a multiprocessor. A share costs a few
 * tiles' time besides its own. */
int choose_splits(const Queue &queue, int64_t blocks, int64_t n_tiles, int64_t most) {
    constexpr int64_t kOverhead = 3;
    int64_t best = 1, best_time = INT64_MAX;
    for (int64_t splits = 1; splits <= most && (splits == 1 || n_tiles / splits >= 4); splits++) {
        const int64_t waves = ceil_div(blocks * splits, queue.n_multiprocessors);
        const int64_t time = waves * (ceil_div(n_tiles, splits) + kOverhead) + (splits > 1 ? kOverhead + splits : 0);
        if (time < best_time) {
            best_time = time;
            best = splits;
        }
    }
    return (int)best;
}

} // namespace

Rows attend(const Queue &queue, const AttentionTask &t) {
    const dg_layer *layer = t.layer;
    AttentionParams p = {};
    int64_t n_keys = 0;
    for (int i = 0; i < t.n_spans; i++) {
        if (t.spans[i].n == 0) continue;
        const dg_kv *kv = t.spans[i].kv;
        p.spans[p.n_spans++] = {kv->k, kv->v, kv->capacity, t.spans[i].position, t.spans[i].n};
        n_keys += t.spans[i].n;
    }
    p.n_heads = t.n_heads;
    p.n_kv_heads = layer->n_kv_heads;
    p.head_dim = layer->head_dim;
    p.k_dim = dg_layer_k_dim(layer);
    p.n_rot = layer->n_rot;
    p.has_v = layer->attn_v.data != nullptr;
    p.n = t.n;
    p.position = t.position;
    p.causal = t.causal;
    p.window = t.window;
    p.type_k = t.type_k;
    p.type_v = t.type_v;
    p.direct = p.type_k == DG_TYPE_F16 && p.type_v == DG_TYPE_F16 && p.k_dim % 8 == 0;
    p.q = t.q;
    p.out = t.out;

    const int group = t.n_heads / layer->n_kv_heads;
    /* Of the keys that a block's rows see, the most. */
    if (t.causal && t.window > 0 && n_keys > t.window + kRows / group) n_keys = t.window + kRows / group;
    const int64_t row_blocks = ceil_div((int64_t)t.n * group, kRows);
    const int64_t row_floats = (int64_t)t.n * t.n_heads * (p.head_dim + 2);
    const int64_t most = t.scratch_floats / row_floats < kMaxSplits ? t.scratch_floats / row_floats : kMaxSplits;
    const bool done = with_shape(p, [&](auto shape) {
        using S = decltype(shape);
        p.n_splits = choose_splits(queue, row_blocks * p.n_kv_heads, ceil_div(n_keys, S::kKeys), most);
        p.partial = t.scratch;
        p.partial_max = t.scratch + (int64_t)p.n_splits * t.n * t.n_heads * p.head_dim;
        launch(attention_kernel<S>, dim3((unsigned)row_blocks, (unsigned)p.n_kv_heads, (unsigned)p.n_splits),
               dim3(kAttentionThreads), layout_of<S>(p).bytes, queue.stream, p);
    });
    if (!done) attend_exactly(queue, p);
    if (p.n_splits <= 1) return stored_rows(t.out);
    Rows rows = {};
    rows.kind = kAttended;
    rows.values = p.partial;
    rows.statistics = p.partial_max;
    rows.n_splits = p.n_splits;
    rows.head_dim = p.head_dim;
    rows.n_rows = (int64_t)t.n * t.n_heads;
    return rows;
}
