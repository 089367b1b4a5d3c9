/* The CUDA runtime's host side, emulated: memory, streams, events, graphs, errors.
 *
 * A stream does its work at once, unless it is being captured. Environment: DGEMMA_EMULATION_MEMORY, bytes of the
 * device (default 4 GiB); DGEMMA_EMULATION_DEVICES, their number (default 1); DGEMMA_EMULATION_DRIVER, the CUDA version
 * that the driver supports (default 13000). The functions with C names at the end are for tests. */
#include "cuda_runtime.h"

#include <atomic>
#include <map>
#include <mutex>
#include <stdio.h>
#include <vector>

struct Node {
    void *function; /* of a kernel; NULL: a copy or memset */
    std::function<void()> run;
};

struct emulated_graph {
    std::vector<Node> nodes;
};
struct emulated_graph_exec {
    std::vector<Node> nodes;
};
struct emulated_stream {
    emulated_graph *captured = nullptr;
    bool invalidated = false;
};
struct emulated_event {
    int unused = 0;
};

constexpr size_t STAGING_BYTES = 32 << 20;

static std::mutex lock;
static std::map<void *, size_t> device_memory, pinned_memory;
static size_t allocated, peak;
static std::atomic<long> n_objects; /* streams, events and graphs alive */
static std::atomic<long> n_calls, fail_at{-1};
static std::atomic<int> fail_with{cudaSuccess};
static std::atomic<bool> idle; /* see emulation_idle; memory begins as zeros */
static std::atomic<bool> lost; /* as after an illegal access: every call fails from then on */
static std::atomic<long> n_captured, n_updated, n_launched; /* steps as graphs */
static thread_local cudaError_t last_error = cudaSuccess;

static cudaError_t error(cudaError_t e) {
    if (e != cudaSuccess) last_error = e;
    return e;
}

/* Counts a call of the runtime; what it must fail with. */
static cudaError_t next_call() {
    if (++n_calls == fail_at) {
        if (fail_with == cudaErrorLaunchFailure) lost = true;
        return error((cudaError_t)fail_with.load());
    }
    return lost ? error(cudaErrorLaunchFailure) : cudaSuccess;
}

#define CALL()                                                                                                         \
    do {                                                                                                               \
        cudaError_t failure_ = next_call();                                                                            \
        if (failure_ != cudaSuccess) return failure_;                                                                  \
    } while (0)

static long long from_environment(const char *name, long long fallback) {
    const char *value = getenv(name);
    return value != nullptr ? strtoll(value, nullptr, 10) : fallback;
}

static size_t memory_size() { return (size_t)from_environment("DGEMMA_EMULATION_MEMORY", 4ll << 30); }

/* ---- Memory --------------------------------------------------------------------------------------------------- */

cudaError_t cudaMalloc(void **memory, size_t bytes) {
    *memory = nullptr;
    CALL();
    std::lock_guard<std::mutex> guard(lock);
    if (bytes > memory_size() || allocated > memory_size() - bytes) return error(cudaErrorMemoryAllocation);
    void *made = aligned_alloc(256, (bytes + 255) / 256 * 256);
    if (made == nullptr) return error(cudaErrorMemoryAllocation);
    if (!idle)
        memset(made, 0xff, bytes);
    else if (bytes < STAGING_BYTES) /* what is larger only passes weights on, and takes time */
        memset(made, 0, bytes);
    device_memory[made] = bytes;
    allocated += bytes;
    if (allocated > peak) peak = allocated;
    *memory = made;
    return cudaSuccess;
}

/* What frees something does so even where it is made to fail: there is nothing else that a caller could do. */
cudaError_t cudaFree(void *memory) {
    if (memory == nullptr) return cudaSuccess;
    {
        std::lock_guard<std::mutex> guard(lock);
        auto found = device_memory.find(memory);
        if (found == device_memory.end()) return error(cudaErrorInvalidValue);
        allocated -= found->second;
        device_memory.erase(found);
    }
    free(memory);
    CALL();
    return cudaSuccess;
}

cudaError_t cudaHostAlloc(void **memory, size_t bytes, unsigned) {
    *memory = nullptr;
    CALL();
    void *made = malloc(bytes);
    if (made == nullptr) return error(cudaErrorMemoryAllocation);
    std::lock_guard<std::mutex> guard(lock);
    pinned_memory[made] = bytes;
    *memory = made;
    return cudaSuccess;
}

cudaError_t cudaFreeHost(void *memory) {
    if (memory == nullptr) return cudaSuccess;
    {
        std::lock_guard<std::mutex> guard(lock);
        if (pinned_memory.erase(memory) == 0) return error(cudaErrorInvalidValue);
    }
    free(memory);
    CALL();
    return cudaSuccess;
}

static bool is_pinned(const void *memory, size_t bytes) {
    std::lock_guard<std::mutex> guard(lock);
    auto found = pinned_memory.upper_bound((void *)memory);
    if (found == pinned_memory.begin()) return false;
    --found;
    return (const char *)memory + bytes <= (const char *)found->first + found->second;
}

cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total_bytes) {
    CALL();
    std::lock_guard<std::mutex> guard(lock);
    *total_bytes = memory_size();
    *free_bytes = memory_size() > allocated ? memory_size() - allocated : 0;
    return cudaSuccess;
}

/* ---- Device and errors ---------------------------------------------------------------------------------------- */

cudaError_t cudaDriverGetVersion(int *version) {
    CALL();
    *version = (int)from_environment("DGEMMA_EMULATION_DRIVER", 13000);
    return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int *version) {
    CALL();
    *version = 13000;
    return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int *count) {
    *count = 0;
    CALL();
    int driver = 0;
    cudaDriverGetVersion(&driver);
    if (driver < 13000) return error(cudaErrorInsufficientDriver);
    *count = (int)from_environment("DGEMMA_EMULATION_DEVICES", 1);
    return *count > 0 ? cudaSuccess : error(cudaErrorNoDevice);
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int) {
    CALL();
    *p = cudaDeviceProp();
    snprintf(p->name, sizeof p->name, "emulated GPU");
    p->major = 8;
    p->multiProcessorCount = 4;
    p->sharedMemPerBlockOptin = 99 * 1024;
    p->totalGlobalMem = memory_size();
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int) {
    CALL();
    return cudaSuccess;
}

cudaError_t cudaGetLastError() {
    cudaError_t e = lost ? cudaErrorLaunchFailure : last_error;
    last_error = cudaSuccess;
    return e;
}

cudaError_t cudaPeekAtLastError() { return lost ? cudaErrorLaunchFailure : last_error; }

const char *cudaGetErrorString(cudaError_t e) {
    switch (e) {
    case cudaSuccess:
        return "no error";
    case cudaErrorMemoryAllocation:
        return "out of memory";
    case cudaErrorNoDevice:
        return "no CUDA-capable device is detected";
    case cudaErrorInsufficientDriver:
        return "CUDA driver version is insufficient for CUDA runtime version";
    case cudaErrorLaunchFailure:
        return "unspecified launch failure";
    default:
        return "invalid argument";
    }
}

/* ---- Streams and events --------------------------------------------------------------------------------------- */

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned) {
    *stream = nullptr;
    CALL();
    *stream = new emulated_stream();
    n_objects++;
    return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    delete stream->captured;
    delete stream;
    n_objects--;
    CALL();
    return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    CALL();
    if (stream->captured == nullptr) return cudaSuccess;
    stream->invalidated = true;
    return error(cudaErrorStreamCaptureUnsupported);
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned) {
    *event = nullptr;
    CALL();
    *event = new emulated_event();
    n_objects++;
    return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
    delete event;
    n_objects--;
    CALL();
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) {
    CALL();
    return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t) {
    CALL();
    return cudaSuccess;
}

/* ---- Work ----------------------------------------------------------------------------------------------------- */

static void enqueue(cudaStream_t stream, void *function, std::function<void()> run) {
    if (stream->captured != nullptr)
        stream->captured->nodes.push_back({function, std::move(run)});
    else
        run();
}

void emulation::launch_kernel(cudaStream_t stream, void *function, const char *signature, dim3 grid, dim3 block,
                              size_t shared_bytes, std::function<void()> kernel) {
    if (next_call() != cudaSuccess) return;
    const bool decides = strstr(signature, "dg_cuda_canvas") != nullptr;
    enqueue(stream, function, [=] {
        if (!idle || decides) run_grid(signature, grid, block, shared_bytes, kernel);
    });
}

/* A captured copy is done again when its graph is launched, so the memory must still be there and be the driver's. */
static bool may_capture(cudaStream_t stream, const void *to, const void *from, size_t bytes, cudaMemcpyKind kind) {
    if (stream->captured == nullptr || kind == cudaMemcpyDeviceToDevice) return true;
    if (is_pinned(kind == cudaMemcpyHostToDevice ? from : to, bytes)) return true;
    stream->invalidated = true;
    return false;
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
    CALL();
    if (!may_capture(stream, to, from, bytes, kind)) return error(cudaErrorStreamCaptureUnsupported);
    enqueue(stream, nullptr, [=] { memcpy(to, from, bytes); });
    return cudaSuccess;
}

cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width,
                              size_t height, cudaMemcpyKind kind, cudaStream_t stream) {
    CALL();
    if (!may_capture(stream, to, from, width, kind)) return error(cudaErrorStreamCaptureUnsupported);
    enqueue(stream, nullptr, [=] {
        for (size_t i = 0; i < height; i++)
            memcpy((char *)to + i * to_pitch, (const char *)from + i * from_pitch, width);
    });
    return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void *memory, int value, size_t bytes, cudaStream_t stream) {
    CALL();
    enqueue(stream, nullptr, [=] { memset(memory, value, bytes); });
    return cudaSuccess;
}

/* ---- Graphs --------------------------------------------------------------------------------------------------- */

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
    CALL();
    if (stream->captured != nullptr) return error(cudaErrorInvalidValue);
    stream->captured = new emulated_graph();
    stream->invalidated = false;
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
    emulated_graph *captured = stream->captured;
    *graph = nullptr;
    stream->captured = nullptr;
    cudaError_t e = next_call();
    if (e == cudaSuccess && captured == nullptr) e = error(cudaErrorInvalidValue);
    if (e == cudaSuccess && stream->invalidated) e = error(cudaErrorStreamCaptureInvalidated);
    if (e != cudaSuccess) {
        delete captured;
        return e;
    }
    n_captured++;
    n_objects++;
    *graph = captured;
    return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    delete graph;
    n_objects--;
    CALL();
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long) {
    *exec = nullptr;
    CALL();
    *exec = new emulated_graph_exec{graph->nodes};
    n_objects++;
    return cudaSuccess;
}

/* Arguments and grids may change, the sequence of kernels may not. */
cudaError_t cudaGraphExecUpdate(cudaGraphExec_t exec, cudaGraph_t graph, cudaGraphExecUpdateResultInfo *) {
    CALL();
    bool same = exec->nodes.size() == graph->nodes.size();
    for (size_t i = 0; same && i < exec->nodes.size(); i++) same = exec->nodes[i].function == graph->nodes[i].function;
    if (!same) return error(cudaErrorGraphExecUpdateFailure);
    exec->nodes = graph->nodes;
    n_updated++;
    return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
    delete exec;
    n_objects--;
    CALL();
    return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t) {
    CALL();
    n_launched++;
    for (const Node &node : exec->nodes) node.run();
    return cudaSuccess;
}

/* ---- For tests ------------------------------------------------------------------------------------------------ */

#define EXPORTED extern "C" __attribute__((visibility("default")))

/* Makes the n-th call from now on fail: with 2, that call alone (out of memory); with 719, it and all later ones (a
 * lost device); with 900, that call alone (cannot be captured). n = 0 heals everything. */
EXPORTED void emulation_fail_at(long n, int with) {
    fail_at = -1;
    n_calls = 0;
    lost = false;
    last_error = cudaSuccess;
    fail_with = with;
    if (n > 0) fail_at = n;
}

/* Kernels do nothing from now on, and are still counted, but for the one that settles a canvas, since the host goes by
 * what it says: for tests of what the host does. */
EXPORTED void emulation_idle(int on) { idle = on != 0; }

EXPORTED long emulation_calls() { return n_calls; }
/* Device bytes in use, and the most that were since the last call of this function. */
EXPORTED size_t emulation_allocated() { return allocated; }
EXPORTED size_t emulation_peak() {
    std::lock_guard<std::mutex> guard(lock);
    size_t most = peak;
    peak = allocated;
    return most;
}
/* Everything that must be given back: allocations, streams, events, graphs. */
EXPORTED long emulation_alive() {
    std::lock_guard<std::mutex> guard(lock);
    return n_objects + (long)device_memory.size() + (long)pinned_memory.size();
}
EXPORTED long emulation_steps_captured() { return n_captured; }
EXPORTED long emulation_steps_updated() { return n_updated; }
EXPORTED long emulation_steps_launched() { return n_launched; }
