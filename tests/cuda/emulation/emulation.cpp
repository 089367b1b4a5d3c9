/* Fibers, barriers and asynchronous copies behind the emulated cuda_runtime.h. */
#include "cuda_runtime.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <set>
#include <stdio.h>
#include <string>
#include <utility>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulation {

thread_local dim3 thread_index, block_index, block_size, grid_size;
thread_local int lane;
thread_local void *shared;

struct Copy {
    void *to;
    const void *from;
    size_t bytes, n_read; /* zeros follow what is read */
};

struct Warp {
    const char *what = nullptr; /* the operation that lanes are gathering for */
    void *operands[32];
    int n_arrived = 0;
    unsigned long generation = 0;
};

constexpr size_t kStackBytes = 128 << 10;

struct Access {
    size_t offset, bytes;
};

struct Thread {
#if defined(__x86_64__)
    void *stack_pointer = nullptr;
#else
    ucontext_t context;
#endif
    char *stack = nullptr;
    dim3 index;
    int number = 0;
    bool done = false, begun = false;
    /* What it waits for: a change of *generation. */
    const unsigned long *generation = nullptr;
    unsigned long waiting_for = 0;
    std::vector<std::vector<Copy>> groups; /* committed asynchronous copies, oldest first */
    std::vector<Copy> open;                /* not yet committed */
    std::vector<Access> accesses;          /* since the warp last met, for the report */
};

struct Scheduler {
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    std::vector<int> order;
    int n_at_barrier = 0;
    unsigned long barrier_generation = 0;
    Thread *current = nullptr;
    const std::function<void()> *kernel = nullptr;
    struct Tally *tally = nullptr; /* of the running kernel, where a report is wanted */
    size_t shared_bytes = 0;
#if defined(__x86_64__)
    void *stack_pointer = nullptr;
#else
    ucontext_t context;
#endif
    ~Scheduler() {
        for (Thread &t : threads) free(t.stack);
    }
};

static thread_local Scheduler scheduler;

void fail(const char *what) {
    fprintf(stderr, "CUDA emulation: %s, in block (%u, %u, %u)\n", what, block_index.x, block_index.y, block_index.z);
    abort();
}

/* ---- Report --------------------------------------------------------------------------------------------------- */

struct Tally {
    long launches = 0, blocks = 0, threads = 0, shared_bytes = 0, reads = 0, passes = 0;
};

struct Report {
    const char *path = getenv("DGEMMA_EMULATION_REPORT");
    std::mutex lock;
    std::map<std::string, Tally> kernels;
    ~Report() {
        FILE *file = path != nullptr ? fopen(path, "w") : nullptr;
        if (file == nullptr) return;
        for (const auto &[name, t] : kernels)
            fprintf(file, "%s\t%ld\t%ld\t%ld\t%ld\t%ld\t%ld\n", name.c_str(), t.launches, t.blocks, t.threads,
                    t.shared_bytes, t.reads, t.passes);
        fclose(file);
    }
};

static Report report;

void note_access(const void *from, size_t bytes) {
    if (scheduler.tally == nullptr || (const char *)from < (const char *)shared ||
        (const char *)from >= (const char *)shared + scheduler.shared_bytes)
        return;
    scheduler.current->accesses.push_back({(size_t)((const char *)from - (const char *)shared), bytes});
}

/* Counts what the lanes of a warp have read since it last met: reads in the same order are one instruction. It is
 * served for as many lanes at a time as make up 128 bytes, in as many passes as a bank has different words to give. */
static void count_reads(Thread *lanes) {
    size_t n = lanes[0].accesses.size();
    for (int l = 0; l < 32; l++)
        if (lanes[l].accesses.size() != n) n = 0; /* the lanes went different ways */
    for (size_t i = 0; i < n; i++) {
        size_t bytes = lanes[0].accesses[i].bytes;
        int at_once = (int)(128 / (bytes < 4 ? 4 : bytes));
        for (int first = 0; first < 32; first += at_once) {
            std::set<size_t> words[32];
            for (int l = first; l < first + at_once; l++)
                for (size_t b = 0; b < bytes; b += 4) {
                    size_t word = (lanes[l].accesses[i].offset + b) / 4;
                    words[word % 32].insert(word);
                }
            size_t passes = 0;
            for (const auto &bank : words) passes = std::max(passes, bank.size());
            scheduler.tally->reads++;
            scheduler.tally->passes += (long)passes;
        }
    }
    for (int l = 0; l < 32; l++) lanes[l].accesses.clear();
}

/* ---- Fibers --------------------------------------------------------------------------------------------------- */

#if defined(__x86_64__)
/* Saves the callee's registers on the current stack, stores the stack pointer, and continues on another stack. */
extern "C" void emulation_switch(void **save, void *load);
asm(R"(
.text
.globl emulation_switch
emulation_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");
#endif

static void back_to_scheduler() {
    Thread *t = scheduler.current;
#if defined(__x86_64__)
    emulation_switch(&t->stack_pointer, scheduler.stack_pointer);
#else
    swapcontext(&t->context, &scheduler.context);
#endif
}

static void body() {
    (*scheduler.kernel)();
    if (!scheduler.current->begun) fail("a kernel does not begin with a KernelOrder");
    scheduler.current->done = true;
    back_to_scheduler();
    fail("a finished thread was resumed");
}

static void prepare(Thread &t) {
    if (t.stack == nullptr) {
        t.stack = (char *)aligned_alloc(64, kStackBytes);
        if (t.stack == nullptr) fail("no memory for the stack of a thread");
    }
    t.done = t.begun = false;
    t.generation = nullptr;
    t.groups.clear();
    t.open.clear();
    t.accesses.clear();
#if defined(__x86_64__)
    void **top = (void **)(t.stack + kStackBytes - 64);
    *--top = nullptr;      /* keeps the stack aligned as after a call */
    *--top = (void *)body; /* where the first switch returns to */
    for (int i = 0; i < 6; i++) *--top = nullptr;
    t.stack_pointer = top;
#else
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = t.stack;
    t.context.uc_stack.ss_size = kStackBytes;
    makecontext(&t.context, body, 0);
#endif
}

static void resume(Thread &t) {
    scheduler.current = &t;
    thread_index = t.index;
    lane = t.number % 32;
#if defined(__x86_64__)
    emulation_switch(&scheduler.stack_pointer, t.stack_pointer);
#else
    swapcontext(&scheduler.context, &t.context);
#endif
}

int thread_number() { return scheduler.current->number; }
int block_threads() { return (int)scheduler.threads.size(); }
size_t shared_bytes() { return scheduler.shared_bytes; }

void wait_for_change(const unsigned long *generation) {
    Thread *t = scheduler.current;
    t->generation = generation;
    t->waiting_for = *generation;
    back_to_scheduler();
    t->generation = nullptr;
}

/* ---- Scheduling ----------------------------------------------------------------------------------------------- */

static void choose_order(int n) {
    const char *wanted = getenv("DGEMMA_EMULATION_ORDER");
    scheduler.order.resize((size_t)n);
    for (int i = 0; i < n; i++) scheduler.order[(size_t)i] = i;
    if (wanted == nullptr || strcmp(wanted, "forward") == 0) return;
    if (strcmp(wanted, "backward") == 0) {
        for (int i = 0; i < n; i++) scheduler.order[(size_t)i] = n - 1 - i;
        return;
    }
    unsigned long long state = strtoull(wanted, nullptr, 10) * 2 + 1;
    for (int i = n - 1; i > 0; i--) {
        state = state * 6364136223846793005ull + 1442695040888963407ull;
        std::swap(scheduler.order[(size_t)i], scheduler.order[(size_t)((state >> 33) % (unsigned)(i + 1))]);
    }
}

static void run_block(int n_threads) {
    for (Thread &t : scheduler.threads) prepare(t);
    for (Warp &w : scheduler.warps) w.n_arrived = 0;
    scheduler.n_at_barrier = 0;
    hopper_begin_block();
    int n_left = n_threads;
    while (n_left > 0) {
        bool moved = false;
        for (int i : scheduler.order) {
            Thread &t = scheduler.threads[(size_t)i];
            if (t.done || (t.generation != nullptr && *t.generation == t.waiting_for)) continue;
            resume(t);
            moved = true;
            if (t.done) n_left--;
        }
        if (!moved) fail("threads wait for each other: a barrier or warp operation that not all reach");
    }
    hopper_end_block();
}

void run_grid(const char *signature, dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()> &kernel) {
    int n_threads = (int)(block.x * block.y * block.z);
    if (n_threads == 0 || n_threads > 1024 || n_threads % 32 != 0) fail("a block of an odd number of threads");
    if (shared_bytes > (size_t)(capability() == 90 ? 227 : 99) * 1024)
        fail("more shared memory than a block can have on every architecture");
    if (scheduler.kernel != nullptr) fail("a kernel launched another");
    if (report.path != nullptr) {
        std::lock_guard<std::mutex> guard(report.lock);
        Tally &t = report.kernels[signature];
        t.launches++;
        t.blocks += (long)grid.x * grid.y * grid.z;
        t.threads = std::max(t.threads, (long)n_threads);
        t.shared_bytes = std::max(t.shared_bytes, (long)shared_bytes);
        scheduler.tally = &t;
    }
    scheduler.shared_bytes = shared_bytes;
    for (size_t i = (size_t)n_threads; i < scheduler.threads.size(); i++) free(scheduler.threads[i].stack);
    scheduler.threads.resize((size_t)n_threads);
    scheduler.warps.assign((size_t)n_threads / 32, Warp());
    scheduler.kernel = &kernel;
    for (int i = 0; i < n_threads; i++) {
        Thread &t = scheduler.threads[(size_t)i];
        t.number = i;
        t.index = dim3((unsigned)i % block.x, (unsigned)i / block.x % block.y, (unsigned)i / block.x / block.y);
    }
    choose_order(n_threads);
    grid_size = grid;
    block_size = block;
    for (unsigned z = 0; z < grid.z; z++)
        for (unsigned y = 0; y < grid.y; y++)
            for (unsigned x = 0; x < grid.x; x++) {
                block_index = dim3(x, y, z);
                shared = aligned_alloc(128, (shared_bytes + 255) / 128 * 128);
                memset(shared, 0xff, shared_bytes); /* NaN as a float, −1 as an integer */
                run_block(n_threads);
                free(shared);
            }
    shared = nullptr;
    scheduler.kernel = nullptr;
}

void synchronize_block() {
    for (Thread &t : scheduler.threads)
        if (t.done) fail("__syncthreads after some threads have ended");
    if (++scheduler.n_at_barrier == (int)scheduler.threads.size()) {
        scheduler.n_at_barrier = 0;
        scheduler.barrier_generation++;
        if (scheduler.tally != nullptr)
            for (size_t i = 0; i < scheduler.threads.size(); i += 32) count_reads(&scheduler.threads[i]);
        return;
    }
    wait_for_change(&scheduler.barrier_generation);
}

void warp_operation(const char *what, void *operands, void (*compute)(void *const *)) {
    Warp &w = scheduler.warps[(size_t)scheduler.current->number / 32];
    if (w.n_arrived == 0) w.what = what;
    if (w.what != what && strcmp(w.what, what) != 0) fail("lanes of a warp are at different operations");
    w.operands[scheduler.current->number % 32] = operands;
    if (++w.n_arrived < 32) {
        wait_for_change(&w.generation);
        return;
    }
    w.n_arrived = 0;
    w.generation++;
    if (scheduler.tally != nullptr) count_reads(&scheduler.threads[(size_t)scheduler.current->number / 32 * 32]);
    compute(w.operands);
}

void vote(void *const *all) {
    unsigned bits = 0;
    for (int i = 0; i < 32; i++) bits |= (unsigned)(((Vote *)all[i])->predicate != 0) << i;
    for (int i = 0; i < 32; i++) ((Vote *)all[i])->result = bits;
}

void note_begin() { scheduler.current->begun = true; }

void match(void *const *all) {
    for (int i = 0; i < 32; i++) {
        auto *mine = (Match *)all[i];
        mine->result = 0;
        for (int j = 0; j < 32; j++) mine->result |= (unsigned)(((Match *)all[j])->value == mine->value) << j;
    }
}

void nothing(void *const *) {}

/* ---- Asynchronous copies -------------------------------------------------------------------------------------- */

void copy_later(void *to, const void *from, size_t bytes, size_t n_read) {
    if ((uintptr_t)to % bytes != 0 || (uintptr_t)from % bytes != 0) fail("an asynchronous copy is not aligned");
    scheduler.current->open.push_back({to, from, bytes, n_read});
}

void commit_copies() {
    scheduler.current->groups.push_back(std::move(scheduler.current->open));
    scheduler.current->open.clear();
}

void wait_copies(int groups_left) {
    auto &groups = scheduler.current->groups;
    while ((int)groups.size() > groups_left) {
        for (const Copy &c : groups.front()) {
            if (c.n_read > 0) memcpy(c.to, c.from, c.n_read);
            memset((char *)c.to + c.n_read, 0, c.bytes - c.n_read);
        }
        groups.erase(groups.begin());
    }
}

bool has_fp4_mma() {
    const char *wanted = getenv("DGEMMA_EMULATION_FP4");
    return wanted != nullptr && strcmp(wanted, "1") == 0;
}

} // namespace emulation
