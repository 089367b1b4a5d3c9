/* What this GPU can do: a large copy, a large read, and loops of matrix instructions on registers. Prints JSON. */
#include <cuda_runtime.h>
#include <stdint.h>
#include <stdio.h>

#define CHECK(call)                                                                                                    \
    do {                                                                                                               \
        cudaError_t e_ = (call);                                                                                       \
        if (e_ != cudaSuccess) {                                                                                       \
            fprintf(stderr, "%s: %s\n", #call, cudaGetErrorString(e_));                                                \
            return 1;                                                                                                  \
        }                                                                                                              \
    } while (0)

__global__ void read_kernel(const uint4 *from, size_t n, uint32_t *out) {
    uint32_t sum = 0;
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) {
        uint4 v = from[i];
        sum += v.x ^ v.y ^ v.z ^ v.w;
    }
    if (sum == 0x12345678) *out = sum; /* hardly ever, but the loads cannot be left out */
}

/* Independent accumulators of a warp. They start from different values: of equal ones the compiler computes one. */
constexpr int kChains = 8;
constexpr int kRounds = 4096;

__global__ void int8_kernel(int *out) {
    int c[kChains][4];
    for (int i = 0; i < kChains; i++)
        for (int j = 0; j < 4; j++) c[i][j] = (int)threadIdx.x * i + j;
    uint32_t a = threadIdx.x * 0x01010101u, b = 0x01020304u;
#pragma unroll 16
    for (int r = 0; r < kRounds; r++)
#pragma unroll
        for (int i = 0; i < kChains; i++)
            asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%4,%4,%4}, {%5,%5}, "
                         "{%0,%1,%2,%3};\n"
                         : "+r"(c[i][0]), "+r"(c[i][1]), "+r"(c[i][2]), "+r"(c[i][3])
                         : "r"(a), "r"(b));
    int sum = 0;
    for (int i = 0; i < kChains; i++) sum += c[i][0] + c[i][1] + c[i][2] + c[i][3];
    out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

__global__ void bf16_kernel(float *out) {
    float c[kChains][4];
    for (int i = 0; i < kChains; i++)
        for (int j = 0; j < 4; j++) c[i][j] = (float)((int)threadIdx.x * i + j);
    uint32_t a = 0x3f803f80u + threadIdx.x, b = 0x3f803f80u;
#pragma unroll 16
    for (int r = 0; r < kRounds; r++)
#pragma unroll
        for (int i = 0; i < kChains; i++)
            asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%4,%4,%4}, {%5,%5}, "
                         "{%0,%1,%2,%3};\n"
                         : "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])
                         : "r"(a), "r"(b));
    float sum = 0;
    for (int i = 0; i < kChains; i++) sum += c[i][0] + c[i][1] + c[i][2] + c[i][3];
    out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

/* Seconds of one of `rounds` runs of `work`, the best of three times. */
template <class Work> static float best_seconds(int rounds, Work work) {
    cudaEvent_t begin, end;
    float best = 1e30f;
    cudaEventCreate(&begin);
    cudaEventCreate(&end);
    work();
    for (int t = 0; t < 3; t++) {
        float ms = 0;
        cudaEventRecord(begin);
        for (int i = 0; i < rounds; i++) work();
        cudaEventRecord(end);
        cudaEventSynchronize(end);
        cudaEventElapsedTime(&ms, begin, end);
        if (ms * 1e-3f / (float)rounds < best) best = ms * 1e-3f / (float)rounds;
    }
    return best;
}

int main() {
    cudaDeviceProp p;
    size_t free_bytes, total_bytes;
    char *a, *b;
    CHECK(cudaGetDeviceProperties(&p, 0));
    CHECK(cudaMemGetInfo(&free_bytes, &total_bytes));
    size_t bytes = free_bytes / 4 < ((size_t)4 << 30) ? free_bytes / 4 : (size_t)4 << 30;
    bytes &= ~(size_t)255;
    CHECK(cudaMalloc(&a, bytes));
    CHECK(cudaMalloc(&b, bytes));
    CHECK(cudaMemset(a, 0, bytes));
    CHECK(cudaMemset(b, 0, bytes));
    float copy = best_seconds(10, [&] { cudaMemcpyAsync(b, a, bytes, cudaMemcpyDeviceToDevice, 0); });
    float read = best_seconds(
        10, [&] { read_kernel<<<8 * p.multiProcessorCount, 512>>>((const uint4 *)a, bytes / 16, (uint32_t *)b); });
    const int blocks = 2 * p.multiProcessorCount, threads = 256;
    const double warps = (double)blocks * threads / 32, per_warp = (double)kRounds * kChains;
    float int8 = best_seconds(4, [&] { int8_kernel<<<blocks, threads>>>((int *)b); });
    float bf16 = best_seconds(4, [&] { bf16_kernel<<<blocks, threads>>>((float *)b); });
    CHECK(cudaDeviceSynchronize());
    CHECK(cudaGetLastError());
    printf("{\"name\": \"%s\", \"compute_capability\": \"%d.%d\", \"multiprocessors\": %d, \"memory_bytes\": %zu, "
           "\"l2_bytes\": %d, \"copy_gb_per_s\": %.1f, \"read_gb_per_s\": %.1f, \"int8_mma_top_per_s\": %.1f, "
           "\"bf16_mma_tflop_per_s\": %.1f}\n",
           p.name, p.major, p.minor, p.multiProcessorCount, total_bytes, p.l2CacheSize, 2.0 * bytes / copy * 1e-9,
           bytes / read * 1e-9, warps * per_warp * 2 * 16 * 8 * 32 / int8 * 1e-12,
           warps * per_warp * 2 * 16 * 8 * 16 / bf16 * 1e-12);
    return 0;
}
