/* The emulated devices and their memory.
 *
 * Environment: DGEMMA_EMULATION_DEVICES, their number (default 1); DGEMMA_EMULATION_MEMORY, bytes of each, separated by
 * commas, of which the last holds for all that follow (default 4 GiB); DGEMMA_EMULATION_USED, bytes of each that other
 * programs hold; DGEMMA_EMULATION_CAPABILITIES, such as "80,75"; DGEMMA_EMULATION_DRIVER, the CUDA version that the
 * driver supports (default 13000); DGEMMA_EMULATION_LOST_AT, a kernel that no device survives,
 * as a part of its parameters' types;
 * CUDA_VISIBLE_DEVICES, numbers alone.
 *
 * With several devices memory of a device can be touched only while that device works, or a copy that names it: a
 * kernel that is given another device's address ends the program with a message, and so does the host. */
#include "devices.h"

#include <map>
#include <signal.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>
#include <vector>

namespace emulation {

struct Allocation {
    size_t bytes;
    int device;
    bool has_pages; /* of its own: they can be protected */
};

struct Usage {
    size_t allocated, peak;
    std::atomic<bool> lost; /* as after an illegal access: every call fails from then on */
};

static std::mutex lock;
static std::recursive_mutex working;
static std::map<char *, Allocation> device_memory;
static std::map<char *, size_t> pinned_memory;
static Usage usage[MOST_DEVICES];
static std::atomic<long> n_calls, fail_at{-1};
static std::atomic<int> fail_with{cudaSuccess};
static thread_local cudaError_t last_error = cudaSuccess;
static thread_local int current = 0;
std::atomic<bool> idle; /* memory begins as zeros then */

/* ---- Failures ------------------------------------------------------------------------------------------------- */

cudaError_t error(cudaError_t e) {
    if (e != cudaSuccess) last_error = e;
    return e;
}

void lose(int device) { usage[device].lost = true; }

cudaError_t next_call(bool counted) {
    if (counted && ++n_calls == fail_at) {
        if (fail_with == cudaErrorLaunchFailure) usage[current].lost = true;
        return error((cudaError_t)fail_with.load());
    }
    return usage[current].lost ? error(cudaErrorLaunchFailure) : cudaSuccess;
}

/* ---- What there is -------------------------------------------------------------------------------------------- */

/* The number at `index` of a list in the environment; its last one where it is shorter. */
static long long from_list(const char *name, int index, long long fallback) {
    const char *text = getenv(name);
    if (text == nullptr || *text == '\0') return fallback;
    for (; index > 0; index--) {
        const char *comma = strchr(text, ',');
        if (comma == nullptr) break;
        text = comma + 1;
    }
    return strtoll(text, nullptr, 10);
}

static int all_devices() {
    const long long n = from_list("DGEMMA_EMULATION_DEVICES", 0, 1);
    return n < MOST_DEVICES ? (int)n : MOST_DEVICES;
}

static std::vector<int> visible_devices() {
    std::vector<int> found;
    const char *text = getenv("CUDA_VISIBLE_DEVICES");
    if (text == nullptr) {
        for (int i = 0; i < all_devices(); i++) found.push_back(i);
        return found;
    }
    while (*text >= '0' && *text <= '9') { /* the first that is no device ends the list */
        char *end;
        const long device = strtol(text, &end, 10);
        if (device >= all_devices()) break;
        found.push_back((int)device);
        text = *end == ',' ? end + 1 : end;
    }
    return found;
}

int current_device() { return current; }
int device_count() { return (int)visible_devices().size(); }
bool separates() { return all_devices() > 1; }
int visible_device(int number) {
    const std::vector<int> visible = visible_devices();
    return number >= 0 && (size_t)number < visible.size() ? visible[(size_t)number] : -1;
}

static size_t memory_size(int device) { return (size_t)from_list("DGEMMA_EMULATION_MEMORY", device, 4ll << 30); }

static size_t free_size(int device) {
    const size_t used = usage[device].allocated + (size_t)from_list("DGEMMA_EMULATION_USED", device, 0);
    return memory_size(device) > used ? memory_size(device) - used : 0;
}

/* ---- Which memory may be touched ------------------------------------------------------------------------------ */

static void protect(int device, int how) {
    std::lock_guard<std::mutex> guard(lock);
    for (const auto &entry : device_memory)
        if (entry.second.device == device && entry.second.has_pages) mprotect(entry.first, entry.second.bytes, how);
}

static void on_fault(int, siginfo_t *info, void *) {
    const char *address = (const char *)info->si_addr;
    for (const auto &entry : device_memory)
        if (address >= entry.first && address < entry.first + entry.second.bytes) {
            char text[128];
            const int length = snprintf(text, sizeof text, "emulation: memory of device %d is touched by another\n",
                                        entry.second.device);
            if (write(2, text, (size_t)length) < 0) abort();
        }
    signal(SIGSEGV, SIG_DFL); /* and once more */
}

Access::Access(int device, int other) : opened{device, other}, separated(separates()) {
    if (!separated) return;
    working.lock();
    static const bool watching = [] {
        struct sigaction action = {};
        action.sa_sigaction = on_fault;
        action.sa_flags = SA_SIGINFO;
        return sigaction(SIGSEGV, &action, nullptr) == 0;
    }();
    (void)watching;
    for (int each : opened) protect(each, PROT_READ | PROT_WRITE);
}

Access::~Access() {
    if (!separated) return;
    for (int each : opened) protect(each, PROT_NONE);
    working.unlock();
}

bool is_pinned(const void *memory, size_t bytes) {
    std::lock_guard<std::mutex> guard(lock);
    auto found = pinned_memory.upper_bound((char *)memory);
    if (found == pinned_memory.begin()) return false;
    --found;
    return (const char *)memory + bytes <= found->first + found->second;
}

long n_allocations() {
    std::lock_guard<std::mutex> guard(lock);
    return (long)device_memory.size() + (long)pinned_memory.size();
}

/* Pages of its own, or from the heap, where AddressSanitizer watches. */
static char *make(size_t bytes, bool has_pages) {
    if (!has_pages) return (char *)aligned_alloc(256, (bytes + 255) / 256 * 256);
    void *made = mmap(nullptr, bytes > 0 ? bytes : 1, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return made != MAP_FAILED ? (char *)made : nullptr;
}

} // namespace emulation

using namespace emulation;

/* ---- The runtime's functions ---------------------------------------------------------------------------------- */

cudaError_t cudaMalloc(void **memory, size_t bytes) {
    *memory = nullptr;
    CALL();
    std::unique_lock<std::mutex> guard(lock);
    if (bytes > free_size(current)) return error(cudaErrorMemoryAllocation);
    const bool has_pages = separates();
    char *made = make(bytes, has_pages);
    if (made == nullptr) return error(cudaErrorMemoryAllocation);
    if (!idle)
        memset(made, 0xff, bytes);
    else if (bytes < STAGING_BYTES) /* what is larger only passes weights on, and takes time */
        memset(made, 0, bytes);
    if (has_pages) mprotect(made, bytes, PROT_NONE);
    device_memory[made] = {bytes, current, has_pages};
    Usage &own = usage[current];
    own.allocated += bytes;
    if (own.allocated > own.peak) own.peak = own.allocated;
    *memory = made;
    return cudaSuccess;
}

/* What frees something does so even where it is made to fail: there is nothing else that a caller could do. */
cudaError_t cudaFree(void *memory) {
    if (memory == nullptr) return cudaSuccess;
    {
        std::lock_guard<std::mutex> guard(lock);
        auto found = device_memory.find((char *)memory);
        if (found == device_memory.end()) return error(cudaErrorInvalidValue);
        usage[found->second.device].allocated -= found->second.bytes;
        if (found->second.has_pages)
            munmap(memory, found->second.bytes);
        else
            free(memory);
        device_memory.erase(found);
    }
    CALL();
    return cudaSuccess;
}

cudaError_t cudaHostAlloc(void **memory, size_t bytes, unsigned) {
    *memory = nullptr;
    CALL();
    void *made = malloc(bytes);
    if (made == nullptr) return error(cudaErrorMemoryAllocation);
    std::lock_guard<std::mutex> guard(lock);
    pinned_memory[(char *)made] = bytes;
    *memory = made;
    return cudaSuccess;
}

cudaError_t cudaFreeHost(void *memory) {
    if (memory == nullptr) return cudaSuccess;
    {
        std::lock_guard<std::mutex> guard(lock);
        if (pinned_memory.erase((char *)memory) == 0) return error(cudaErrorInvalidValue);
    }
    free(memory);
    CALL();
    return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total_bytes) {
    CALL();
    std::lock_guard<std::mutex> guard(lock);
    *total_bytes = memory_size(current);
    *free_bytes = free_size(current);
    return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int *version) {
    CALL();
    *version = (int)from_list("DGEMMA_EMULATION_DRIVER", 0, 13000);
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
    *count = device_count();
    return *count > 0 ? cudaSuccess : error(cudaErrorNoDevice);
}

static int capability_of(int device) { return (int)from_list("DGEMMA_EMULATION_CAPABILITIES", device, 80); }

int emulation::capability() { return capability_of(visible_device(current)); }

cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int number) {
    CALL();
    const int device = visible_device(number);
    if (device < 0) return error(cudaErrorInvalidDevice);
    const int capability = capability_of(device);
    *p = cudaDeviceProp();
    if (separates())
        snprintf(p->name, sizeof p->name, "emulated GPU %c", 'A' + device);
    else
        snprintf(p->name, sizeof p->name, "emulated GPU");
    p->uuid.bytes[15] = (char)(0xa0 + device);
    p->major = capability / 10;
    p->minor = capability % 10;
    p->multiProcessorCount = 4;
    p->sharedMemPerBlockOptin = (size_t)(capability == 90 ? 227 : 99) * 1024;
    p->totalGlobalMem = memory_size(device);
    return cudaSuccess;
}

/* Counted where it changes something: it stands before every operation. */
cudaError_t cudaSetDevice(int number) {
    const int device = visible_device(number);
    if (device < 0) return error(cudaErrorInvalidDevice);
    const bool changes = device != current;
    current = device;
    return next_call(changes);
}

cudaError_t cudaGetDevice(int *number) {
    int found = 0;
    while (visible_device(found) != current && found < MOST_DEVICES) found++;
    *number = found;
    return cudaSuccess;
}

cudaError_t cudaGetLastError() {
    cudaError_t e = usage[current].lost ? cudaErrorLaunchFailure : last_error;
    last_error = cudaSuccess;
    return e;
}

cudaError_t cudaPeekAtLastError() { return usage[current].lost ? cudaErrorLaunchFailure : last_error; }

const char *cudaGetErrorString(cudaError_t e) {
    switch (e) {
    case cudaSuccess:
        return "no error";
    case cudaErrorMemoryAllocation:
        return "out of memory";
    case cudaErrorNoDevice:
        return "no CUDA-capable device is detected";
    case cudaErrorInvalidDevice:
        return "invalid device ordinal";
    case cudaErrorInvalidResourceHandle:
        return "invalid resource handle";
    case cudaErrorInsufficientDriver:
        return "CUDA driver version is insufficient for CUDA runtime version";
    case cudaErrorLaunchFailure:
        return "unspecified launch failure";
    default:
        return "invalid argument";
    }
}

/* ---- For tests ------------------------------------------------------------------------------------------------ */

#define EXPORTED extern "C" __attribute__((visibility("default")))

/* Makes the n-th call from now on fail: with 2, that call alone (out of memory); with 719, it and all later ones of the
 * same device (which is lost); with 900, that call alone (cannot be captured). n = 0 heals everything. */
EXPORTED void emulation_fail_at(long n, int with) {
    fail_at = -1;
    n_calls = 0;
    for (Usage &device : usage) device.lost = false;
    last_error = cudaSuccess;
    current = visible_device(0) > 0 ? visible_device(0) : 0;
    fail_with = with;
    if (n > 0) fail_at = n;
}

/* From now on every call of a device fails. */
EXPORTED void emulation_lose(int device) { lose(device); }

/* Kernels do nothing from now on, and are still counted, but for the one that settles a canvas, since the host goes by
 * what it says: for tests of what the host does. */
EXPORTED void emulation_idle(int on) { idle = on != 0; }

EXPORTED long emulation_calls() { return n_calls; }
/* Bytes in use of one device, or with −1 of all. */
EXPORTED size_t emulation_allocated(int device) {
    std::lock_guard<std::mutex> guard(lock);
    size_t sum = 0;
    for (int i = 0; i < MOST_DEVICES; i++)
        if (device < 0 || i == device) sum += usage[i].allocated;
    return sum;
}
/* The most that were in use of the first device since the last call of this function. */
EXPORTED size_t emulation_peak() {
    std::lock_guard<std::mutex> guard(lock);
    const size_t most = usage[0].peak;
    usage[0].peak = usage[0].allocated;
    return most;
}
/* A kernel of device `by` reads memory of device `of`. */
EXPORTED void emulation_touch(int of, int by) {
    void *memory = nullptr;
    cudaStream_t stream = nullptr;
    cudaSetDevice(of);
    cudaMalloc(&memory, 4096);
    cudaSetDevice(by);
    cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    launch_kernel(stream, nullptr, "touch", dim3(1), dim3(32), 0, [=] {
        note_begin();
        *(volatile char *)memory = 1;
    });
    cudaStreamDestroy(stream);
    cudaFree(memory);
}
