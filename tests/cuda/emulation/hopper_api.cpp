/* The kernels of native/cuda/hopper alone, and kernels that use what they are made of wrongly: for test_hopper.py. */
#include "cuda/hopper/hopper.cuh"
#include "cuda/hopper/product.cuh"

#include <random>
#include <vector>

#define EXPORTED extern "C" __attribute__((visibility("default")))

/* ---- A product of random weights and tokens ------------------------------------------------------------------- */

namespace {

struct Random {
    std::mt19937 bits{1};
    float value(float size) { return ((float)(bits() >> 8) / 16777216.0f - 0.5f) * size; }
    /* n float16, or the upper halves of n floats. */
    void halves(char *to, int n, float size, bool bfloat) {
        for (int i = 0; i < n; i++) {
            const float x = value(size);
            const uint16_t half = bfloat ? (uint16_t)(__float_as_uint(x) >> 16) : float_to_half(x);
            memcpy(to + 2 * i, &half, 2);
        }
    }
};

/* Any codes, and scales of a sensible size. */
template <class F> void fill_tile(char *tile, char *header, Random *random) {
    for (int i = 0; i < F::kTileBytes; i++) tile[i] = (char)random->bits();
    if constexpr (F::kActivations == kFloats) {
        if (F::kKind != kFloat32) random->halves(tile, F::kTileBytes / 2, 1, F::kKind == kBfloat16);
        for (int i = 0; F::kKind == kFloat32 && i < F::kTileBytes; i += 4) {
            const float x = random->value(1);
            memcpy(tile + i, &x, 4);
        }
    } else {
        const int n_scales = F::kTileBytes - F::kScaleOffset;
        if (F::kScaleBytes == 2) random->halves(tile + F::kScaleOffset, n_scales / 2, 0.02f, false);
        for (int i = 0; F::kKind == kTableE2m1 && i < n_scales; i++) tile[F::kScaleOffset + i] &= 0x3f;
        if (F::kHeaderBytes > 0) random->halves(header, F::kHeaderBytes / 2, 0.001f, false);
    }
}

/* Two matrices of a type, packed and as numbers. */
struct TestWeights {
    std::vector<char> tiles;
    std::vector<float> values; /* (row tiles · 16, columns) */
    int64_t width = 0;

    template <class F> void fill(const PackedShape &shape, int64_t row_tiles, Random *random) {
        width = shape.k_tiles * F::kTileCols;
        tiles.assign((size_t)row_tiles * shape.row_tile_bytes + 16, 0);
        values.assign((size_t)(row_tiles * kTileRows * width), 0.0f);
        for (int64_t r = 0; r < row_tiles; r++) {
            char *row = tiles.data() + (size_t)r * shape.row_tile_bytes;
            for (int64_t k = 0; k < shape.k_tiles; k++) {
                fill_tile<F>(row + tile_offset<F>(k), row + header_offset<F>(k), random);
                if (F::kHeaderBytes > 0 && k % 4 != 3 && k + 1 < shape.k_tiles) continue; /* the header comes last */
                for (int64_t j = F::kHeaderBytes > 0 ? k / 4 * 4 : k; j <= k; j++)
                    for (int lane = 0; lane < 32; lane++)
                        for_each_value<F>(row, j, lane, [&](int half, int slot, float value) {
                            values[(size_t)((r * kTileRows + lane / 4 + 8 * half) * width + j * F::kTileCols +
                                            F::lane_column(slot, lane % 4))] = value;
                        });
            }
        }
    }
};

} // namespace

/* The largest relative error among the results of n tokens times two matrices of `type`, of n_rows and 16 rows; −1
 * where the type has no kernel. Tokens are of very different sizes, and some of their channels `outlier` times larger.
 */
EXPORTED double emulation_hopper_product(int32_t type, int32_t n, int32_t n_rows, int32_t n_cols, float outlier,
                                         int32_t n_multiprocessors, int32_t *n_splits) {
    Random random;
    TestWeights w;
    const PackedShape shape = packed_shape(type, n_rows, n_cols);
    with_format(type, [&](auto format) {
        using F = decltype(format);
        if constexpr (F::kActivations != kFp4Terms) w.fill<F>(shape, shape.row_tiles + 1, &random);
    });
    if (w.width == 0) return -1;
    const int64_t pitch = ceil_div(n_cols, kStageColumns) * kStageColumns, columns = n_rows + 16;
    std::vector<float> tokens((size_t)(n * n_cols)), multipliers((size_t)n), out((size_t)(n * columns * 8), NAN);
    std::vector<uint16_t> halves((size_t)(n * pitch + 8), 0xffff);
    for (int i = 0; i < n * n_cols; i++)
        tokens[(size_t)i] = ldexpf(random.value(i % n_cols % 97 == 5 ? outlier : 1), i / n_cols * 7 % 60 - 30);
    const float scale = 0.75f;
    const DeviceWeight weights[2] = {{w.tiles.data(), nullptr, type, n_rows, n_cols},
                                     {w.tiles.data() + shape.bytes, &scale, type, 16, n_cols}};
    PrepareTarget target = {nullptr, 1.0f, {}, {}};
    target.wanted[kHalves] = true;
    target.x.halves = halves.data() + (16 - (uintptr_t)halves.data() % 16) % 16 / 2;
    target.x.half_multipliers = multipliers.data();
    Queue queue = {nullptr, n_multiprocessors, true};
    cudaStreamCreateWithFlags(&queue.stream, cudaStreamNonBlocking);
    Partials sums = {out.data(), (int64_t)out.size(), 0, 0, 0};
    prepare_rows(queue, stored_rows(tokens.data()), n, n_cols, false, 0, {{target}, 1});
    hopper_matmul(queue, weights, 2, target.x, n, &sums);
    cudaStreamDestroy(queue.stream);
    *n_splits = sums.n_splits;
    double largest = 0;
    for (int i = 0; i < n; i++) {
        double error = 0, size = 0;
        for (int64_t row = 0; row < columns; row++) {
            const int64_t at = row < n_rows ? row : shape.row_tiles * kTileRows + row - n_rows;
            double expected = 0;
            for (int c = 0; c < n_cols; c++)
                expected += (double)w.values[(size_t)(at * w.width + c)] * tokens[(size_t)(i * n_cols + c)];
            if (row >= n_rows) expected *= scale;
            const double difference = partial_sum(sums, i, (int)row) - expected;
            error += difference * difference;
            size += expected * expected;
        }
        const double relative = sqrt(error / size);
        if (!(relative <= largest)) largest = relative; /* a NaN as well */
    }
    return largest;
}

/* ---- Wrong uses ----------------------------------------------------------------------------------------------- */

namespace {

enum Misuse {
    kRight,
    kWrongPhase,       /* waits for the phase before */
    kEarlyRelease,     /* gives a stage back while it is multiplied by */
    kWrongDistance,    /* groups of eight tokens are said to be 512 bytes apart */
    kEarlyDecode,      /* writes the fragments of products that are under way */
    kEarlyRead,        /* reads sums before they have been waited for */
    kNoBegin,          /* products without products_begin */
    kTooFewBytes,      /* expects half of what comes */
    kTooManyBytes,     /* expects twice as much */
    kMisaligned,       /* a stage at a multiple of 512 */
    kNoWait,           /* ends with products under way */
    kTwoArrivals,      /* arrives twice where once is expected */
    kDifferentOperands /* the warps of a warpgroup multiply by different stages */
};

constexpr int kTestStages = 2, kTestTokens = 64, kTestStageBytes = kTestTokens * kSwizzledRowBytes, kTestColumns = 256;

float test_weight(int row, int column) { return (float)((row * 7 + column * 3) % 11 - 5); }

/* out (64 tokens, 64 rows): a warpgroup multiplies, a fifth warp loads. */
void misuse_kernel(TensorMap tokens, Misuse wrong, float *out) {
    KernelOrder launch_order;
    char *memory = shared_memory<char>();
    memory += (kSwizzledGroupBytes - shared_address(memory) % kSwizzledGroupBytes) % kSwizzledGroupBytes;
    if (wrong == kMisaligned) memory += 512;
    Barrier *full = (Barrier *)(memory + kTestStages * kTestStageBytes), *empty = full + kTestStages;
    const int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;
    if (threadIdx.x == 0) {
        for (int s = 0; s < kTestStages; s++) {
            barrier_init(full + s, 1);
            barrier_init(empty + s, 4);
        }
        publish_barriers();
    }
    __syncthreads();
    constexpr int n_stages = kTestColumns / kStageColumns;
    if (warp == 4) {
        for (int k = 0; k < n_stages && lane == 0; k++) {
            const int s = k % kTestStages;
            barrier_wait(empty + s, (uint32_t)(k / kTestStages & 1) ^ 1);
            barrier_expect(full + s, wrong == kTooFewBytes    ? kTestStageBytes / 2
                                     : wrong == kTooManyBytes ? kTestStageBytes * 2
                                                              : kTestStageBytes);
            if (wrong == kTwoArrivals) barrier_arrive(full + s);
            copy_box(memory + s * kTestStageBytes, tokens, k * kStageColumns, 0, full + s);
        }
        return;
    }
    float sums[kTestTokens / 2] = {0};
    uint32_t a[2][4][4];
    for (int k = 0; k < n_stages; k++) {
        const int s = k % kTestStages;
        uint32_t(&mine)[4][4] = a[wrong == kEarlyDecode ? 0 : k % 2];
        for (int step = 0; step < 4; step++)
            for (int w = 0; w < 4; w++) {
                const int row = warp * 16 + lane / 4 + w % 2 * 8;
                const int column = k * kStageColumns + step * 16 + lane % 4 * 2 + w / 2 * 8;
                mine[step][w] = make_pair(test_weight(row, column), test_weight(row, column + 1));
            }
        barrier_wait(full + s, (uint32_t)(k / kTestStages & 1) ^ (wrong == kWrongPhase ? 1 : 0));
        if (wrong != kNoBegin) products_begin();
        uint64_t b = operand(memory + (wrong == kDifferentOperands && warp == 1 ? 0 : s) * kTestStageBytes);
        if (wrong == kWrongDistance) b ^= (uint64_t)(1024 >> 4 ^ 512 >> 4) << 32;
        for (int step = 0; step < 4; step++) warpgroup_multiply(sums, mine[step], b + 2 * (uint64_t)step);
        products_commit();
        if (wrong == kEarlyRelease && lane == 0) barrier_arrive(empty + s);
        products_wait<1>();
        if (wrong != kEarlyRelease && k > 0 && lane == 0) barrier_arrive(empty + (k - 1) % kTestStages);
    }
    if (wrong != kEarlyRead && wrong != kNoWait) products_wait<0>();
    for (int i = 0; i < kTestTokens / 2; i++)
        out[(i / 4 * 8 + lane % 4 * 2 + i % 2) * 64 + warp * 16 + lane / 4 + i % 4 / 2 * 8] = sums[i];
    if (wrong == kEarlyRead) products_wait<0>();
}

} // namespace

/* How many of the results are wrong. A use that a GPU would not survive ends the program. */
EXPORTED int emulation_hopper_misuse(int wrong) {
    alignas(16) static uint16_t x[kTestTokens][kTestColumns];
    std::vector<float> out(kTestTokens * 64, NAN);
    for (int i = 0; i < kTestTokens; i++)
        for (int c = 0; c < kTestColumns; c++) x[i][c] = float_to_half((float)((i * 5 + c) % 13 - 6));
    TensorMap map;
    if (!map_tensor(&map, &x[0][0], kTestTokens, kTestColumns, kTestTokens)) return -1;
    cudaStream_t stream = nullptr;
    cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    launch(misuse_kernel, dim3(1), dim3(160), kTestStages * kTestStageBytes + 2048, stream, map, (Misuse)wrong,
           out.data());
    cudaStreamDestroy(stream);
    int n_wrong = 0;
    for (int i = 0; i < kTestTokens; i++)
        for (int row = 0; row < 64; row++) {
            float expected = 0;
            for (int c = 0; c < kTestColumns; c++) expected += test_weight(row, c) * half_to_float(x[i][c]);
            n_wrong += !(out[(size_t)(i * 64 + row)] == expected);
        }
    return n_wrong;
}
