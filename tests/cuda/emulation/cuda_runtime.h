/* The part of the CUDA runtime and of CUDA C++ that native/cuda uses, emulated on the CPU.
 *
 * Compiled in place of NVIDIA's header, it lets an ordinary C++ compiler build the kernels exactly as they are written.
 * Every thread of a block is a fiber; blocks run one after another. What is checked that a GPU would not tell:
 *   - shared memory is poisoned before every block, and both kinds of memory can be watched by AddressSanitizer;
 *   - an asynchronous copy takes place when it is waited for, not before;
 *   - threads are resumed in the order of DGEMMA_EMULATION_ORDER ("forward", "backward", or a number: shuffled by it),
 * so that a missing barrier shows as a result that depends on the order;
 *   - a barrier or a warp operation that some threads never reach ends the program with a message.
 * With DGEMMA_EMULATION_REPORT a file of that name gets, at exit, a line for each kernel: launches, blocks, the largest
 * block of threads and of shared memory, and how many reads of shared memory a warp made (each of up to 128 bytes that
 * a conflict-free layout serves in one pass) and in how many passes over the banks. */
#ifndef DGEMMA_EMULATED_CUDA_RUNTIME_H
#define DGEMMA_EMULATED_CUDA_RUNTIME_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

/* ---- Emulator ------------------------------------------------------------------------------------------------- */

namespace emulation {

struct Thread; /* a fiber */

/* Coordinates of the running thread, and its block's shared memory. */
extern thread_local dim3 thread_index, block_index, block_size, grid_size;
extern thread_local int lane;
extern thread_local void *shared;

/* `signature` names the launched kernel's parameters in reports. */
void run_grid(const char *signature, dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()> &kernel);

/* Waits for all threads of the block. */
void synchronize_block();

/* Waits for all 32 lanes of the warp, each of which brings `operands`; the last one to come calls
 * `compute(operands of all lanes)`. `what` names the operation: lanes that bring different ones are an error. */
void warp_operation(const char *what, void *operands, void (*compute)(void *const *all_operands));

/* A read of shared memory, for the report on bank conflicts; reads of other memory are left out. */
void note_access(const void *from, size_t bytes);

/* Notes that the running thread has waited for the kernel before its own; one that ends without is an error. */
void note_begin();

/* DGEMMA_EMULATION_CAPABILITIES: the current device's compute capability times ten (default 80). */
int capability();

/* For what stands beside emulation.cpp (hopper.cpp). Ends the program with a message. */
[[noreturn]] void fail(const char *what);
/* Waits until *generation changes. */
void wait_for_change(const unsigned long *generation);
/* Number of the running thread in its block, of the block's threads, and bytes of its shared memory. */
int thread_number();
int block_threads();
size_t shared_bytes();
/* Forgets, or checks, what a block has left (hopper.cpp). */
void hopper_begin_block();
void hopper_end_block();

/* DGEMMA_EMULATION_FP4: whether the device is one of those that multiply FP4. */
bool has_fp4_mma();

/* Of `bytes` only the first `n_read` are read; zeros follow them. */
void copy_later(void *shared_memory, const void *global_memory, size_t bytes, size_t n_read);
inline void copy_later(void *shared_memory, const void *global_memory, size_t bytes) {
    copy_later(shared_memory, global_memory, bytes, global_memory != nullptr ? bytes : 0);
}
void commit_copies();
void wait_copies(int groups_left);

} // namespace emulation

#define threadIdx (emulation::thread_index)
#define blockIdx (emulation::block_index)
#define blockDim (emulation::block_size)
#define gridDim (emulation::grid_size)

static inline void __syncthreads() { emulation::synchronize_block(); }

/* ---- Warp operations ------------------------------------------------------------------------------------------ */

namespace emulation {
template <class T> struct Exchange {
    T value, result;
    int source;
};
template <class T> void exchange(void *const *all) {
    for (int i = 0; i < 32; i++) {
        auto *mine = (Exchange<T> *)all[i];
        mine->result = ((Exchange<T> *)all[mine->source & 31])->value;
    }
}
struct Vote {
    int predicate;
    unsigned result;
};
void vote(void *const *all);
struct Match {
    int value;
    unsigned result;
};
void match(void *const *all);
void nothing(void *const *all);
} // namespace emulation

template <class T> T __shfl_sync(unsigned, T value, int source) {
    emulation::Exchange<T> e = {value, value, source};
    emulation::warp_operation("shuffle", &e, emulation::exchange<T>);
    return e.result;
}
template <class T> T __shfl_xor_sync(unsigned mask, T value, int bits) {
    return __shfl_sync(mask, value, emulation::lane ^ bits);
}
template <class T> T __shfl_up_sync(unsigned mask, T value, int distance) {
    int source = emulation::lane - distance;
    return __shfl_sync(mask, value, source < 0 ? emulation::lane : source);
}
static inline unsigned __ballot_sync(unsigned, int predicate) {
    emulation::Vote v = {predicate, 0};
    emulation::warp_operation("ballot", &v, emulation::vote);
    return v.result;
}
static inline unsigned __match_any_sync(unsigned, int value) {
    emulation::Match m = {value, 0};
    emulation::warp_operation("match", &m, emulation::match);
    return m.result;
}
static inline void __syncwarp(unsigned = 0xffffffff) {
    int none = 0;
    emulation::warp_operation("syncwarp", &none, emulation::nothing);
}

/* ---- Arithmetic ----------------------------------------------------------------------------------------------- */

static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __float_as_int(float x) {
    int i;
    memcpy(&i, &x, 4);
    return i;
}
static inline float __int_as_float(int i) {
    float x;
    memcpy(&x, &i, 4);
    return x;
}
static inline unsigned __float_as_uint(float x) {
    unsigned i;
    memcpy(&i, &x, 4);
    return i;
}
static inline float __uint_as_float(unsigned i) {
    float x;
    memcpy(&x, &i, 4);
    return x;
}
#define __expf expf
static inline float __fdividef(float x, float y) { return x / y; }
static inline int __float2int_rn(float x) { return (int)rintf(x); }
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
template <class T> static inline T min(T a, T b) { return b < a ? b : a; }
template <class T> static inline T max(T a, T b) { return a < b ? b : a; }

/* Selector nibble i picks the byte for position i: 0 … 3 from `a`, 4 … 7 from `b`. */
static inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    uint64_t bytes = (uint64_t)b << 32 | a;
    unsigned result = 0;
    for (int i = 0; i < 4; i++) {
        unsigned nibble = selector >> (4 * i) & 15;
        unsigned byte = bytes >> (8 * (nibble & 7)) & 0xff;
        if (nibble & 8) byte = byte & 0x80 ? 0xff : 0; /* the sign of the byte, repeated */
        result |= byte << (8 * i);
    }
    return result;
}

/* ---- Runtime -------------------------------------------------------------------------------------------------- */

typedef enum cudaError {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInsufficientDriver = 35,
    cudaErrorNoDevice = 100,
    cudaErrorInvalidDevice = 101,
    cudaErrorInvalidResourceHandle = 400,
    cudaErrorLaunchFailure = 719,
    cudaErrorStreamCaptureUnsupported = 900,
    cudaErrorStreamCaptureInvalidated = 901,
    cudaErrorGraphExecUpdateFailure = 910,
} cudaError_t;
typedef struct emulated_stream *cudaStream_t;
typedef struct emulated_event *cudaEvent_t;
typedef struct emulated_graph *cudaGraph_t;
typedef struct emulated_graph_exec *cudaGraphExec_t;
typedef enum cudaMemcpyKind {
    cudaMemcpyHostToDevice = 1,
    cudaMemcpyDeviceToHost = 2,
    cudaMemcpyDeviceToDevice = 3
} cudaMemcpyKind;
typedef struct {
    char bytes[16];
} cudaUUID_t;
struct cudaDeviceProp {
    char name[256];
    cudaUUID_t uuid;
    int major, minor, multiProcessorCount;
    size_t sharedMemPerBlockOptin, totalGlobalMem;
};
struct cudaGraphExecUpdateResultInfo {
    int result;
};
enum { cudaStreamNonBlocking = 1, cudaHostAllocDefault = 0, cudaEventDisableTiming = 2 };
typedef enum cudaStreamCaptureMode { cudaStreamCaptureModeRelaxed = 2 } cudaStreamCaptureMode;
typedef enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 } cudaFuncAttribute;

/* The runtime's functions (runtime.cpp). Each of them can be made to fail; see emulation_fail_at there. */
cudaError_t cudaMalloc(void **memory, size_t bytes);
cudaError_t cudaFree(void *memory);
cudaError_t cudaHostAlloc(void **memory, size_t bytes, unsigned flags);
cudaError_t cudaFreeHost(void *memory);
cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total_bytes);
cudaError_t cudaGetDeviceCount(int *count);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *properties, int device);
cudaError_t cudaDriverGetVersion(int *version);
cudaError_t cudaRuntimeGetVersion(int *version);
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
const char *cudaGetErrorString(cudaError_t error);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDevice(int *device);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags);
cudaError_t cudaEventDestroy(cudaEvent_t event);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream);
cudaError_t cudaEventSynchronize(cudaEvent_t event);
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream);
cudaError_t cudaMemcpyPeerAsync(void *to, int to_device, const void *from, int from_device, size_t bytes,
                                cudaStream_t stream);
cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width,
                              size_t height, cudaMemcpyKind kind, cudaStream_t stream);
cudaError_t cudaMemsetAsync(void *memory, int value, size_t bytes, cudaStream_t stream);
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode);
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph);
cudaError_t cudaGraphDestroy(cudaGraph_t graph);
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long flags);
cudaError_t cudaGraphExecUpdate(cudaGraphExec_t exec, cudaGraph_t graph, cudaGraphExecUpdateResultInfo *info);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec);
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream);

namespace emulation {
/* Runs a kernel, or captures it where its stream is being captured. `function` tells kernels apart. */
void launch_kernel(cudaStream_t stream, void *function, const char *signature, dim3 grid, dim3 block,
                   size_t shared_bytes, std::function<void()> kernel);
} // namespace emulation

template <class Kernel> cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) { return cudaSuccess; }

#endif
