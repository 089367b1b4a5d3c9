/* Barriers with phases, copies by tensor maps and products of a warpgroup, behind emulated_hopper.h. */
#include "cuda_runtime.h"

#include "quant/float.h"

#include <map>
#include <vector>

using Barrier = uint64_t;
constexpr int kSwizzledRowBytes = 128, kSwizzledGroupBytes = 1024;
static inline uint16_t float_to_half(float x) { return dg_f32_to_f16(x); }
#include "emulated_hopper.h"

namespace emulation {

/* ---- State of a block ----------------------------------------------------------------------------------------- */

struct BoxCopy {
    char *to;
    TensorMap map;
    int column, row;
    int64_t bytes() const { return (int64_t)map.box_rows * map.box_columns * 2; }
};

struct BarrierState {
    int arrivals = 0, left = 0; /* of a phase; until the end of this one */
    uint32_t phase = 0;
    int64_t expected = 0;        /* bytes */
    std::vector<BoxCopy> copies; /* under way */
    unsigned long events = 0;    /* whatever may end a phase */
};

struct Meeting {
    int n_arrived = 0;
    unsigned long generation = 0;
};

struct Product {
    float *d;
    int n_tokens;
    const uint32_t *a;
    uint64_t b;
};

struct ThreadProducts {
    std::vector<std::vector<Product>> groups; /* committed, oldest first */
    std::vector<Product> open;
    bool begun = false; /* products_begin since the last commit */
    size_t n_started = 0;
    int registers = 0; /* 0: as launched */
};

struct Hopper {
    std::map<Barrier *, BarrierState> barriers;
    std::map<int, Meeting> meetings;
    std::vector<ThreadProducts> threads;
    std::vector<std::vector<Product>> started; /* by warpgroup: what its first warp to come has multiplied by */
};

static thread_local Hopper hopper;

void hopper_begin_block() {
    hopper.barriers.clear();
    hopper.meetings.clear();
    hopper.threads.assign((size_t)block_threads(), ThreadProducts());
    hopper.started.assign((size_t)block_threads() / 128 + 1, {});
}

void hopper_end_block() {
    for (const auto &[address, b] : hopper.barriers)
        if (!b.copies.empty() || b.expected != 0) fail("a block ends with copies under way that nobody has waited for");
    int64_t registers = 0;
    for (const ThreadProducts &t : hopper.threads) {
        if (!t.groups.empty() || !t.open.empty()) fail("a thread ends with products that it has not waited for");
        registers += t.registers;
    }
    if (registers > 65536) fail("more registers are taken than a multiprocessor has");
}

static ThreadProducts &mine() { return hopper.threads[(size_t)thread_number()]; }

/* The window of shared memory begins at no multiple of what a swizzle wants: a kernel has to see to that itself. */
constexpr uint32_t kWindow = 16;

uint32_t shared_address(const void *p) {
    if ((const char *)p < (const char *)shared || (const char *)p >= (const char *)shared + shared_bytes())
        fail("an address is not in shared memory");
    return kWindow + (uint32_t)((const char *)p - (const char *)shared);
}

static char *at_address(uint32_t address) {
    if (address < kWindow || address - kWindow >= shared_bytes()) fail("an operand lies beyond shared memory");
    return (char *)shared + (address - kWindow);
}

/* 16-byte pieces of eight rows of 128 bytes are exchanged: bits 4 … 6 of an address by bits 7 … 9. */
static uint32_t swizzled(uint32_t address) { return address ^ (address >> 3 & 0x70); }

/* ---- Barriers ------------------------------------------------------------------------------------------------- */

static BarrierState &state_of(Barrier *b) {
    auto found = hopper.barriers.find(b);
    if (found == hopper.barriers.end()) fail("a barrier is used that has not been initialised");
    return found->second;
}

static void arrive_copy(const BoxCopy &c) {
    const uint32_t to = shared_address(c.to);
    for (int r = 0; r < c.map.box_rows; r++)
        for (int i = 0; i < c.map.box_columns; i += 8) {
            uint16_t piece[8] = {0};
            for (int e = 0; e < 8; e++) {
                const int64_t row = (int64_t)c.row + r, column = (int64_t)c.column + i + e;
                if (row >= 0 && row < c.map.n_rows && column >= 0 && column < c.map.n_columns)
                    memcpy(&piece[e], c.map.data + (row * c.map.n_columns + column) * 2, 2);
            }
            memcpy(at_address(swizzled(to + (uint32_t)(r * kSwizzledRowBytes + i * 2))), piece, sizeof piece);
        }
}

/* Ends the phase where nothing is left to wait for; with `all_arrive` copies under way come in. */
static void end_phase(BarrierState &b, bool all_arrive) {
    if (b.left > 0) return;
    int64_t bytes = 0;
    for (const BoxCopy &c : b.copies) bytes += c.bytes();
    if (bytes > b.expected) fail("more bytes arrive at a barrier than it expects");
    if (bytes < b.expected || (bytes > 0 && !all_arrive)) return;
    for (const BoxCopy &c : b.copies) arrive_copy(c);
    b.copies.clear();
    b.expected = 0;
    b.left = b.arrivals;
    b.phase ^= 1;
    b.events++;
}

void barrier_init(Barrier *b, int arrivals) {
    if ((uintptr_t)b % 8 != 0 || arrivals < 1) fail("a barrier is not aligned, or has no arrivals");
    shared_address(b);
    if (hopper.barriers.count(b) != 0) fail("a barrier is initialised twice");
    BarrierState &state = hopper.barriers[b];
    state.arrivals = state.left = arrivals;
}

void barrier_arrive(Barrier *address, uint32_t expected_bytes) {
    BarrierState &b = state_of(address);
    if (b.left == 0) fail("more arrivals at a barrier than its phase has");
    b.expected += expected_bytes;
    b.left--;
    b.events++;
    end_phase(b, false);
}

void barrier_wait(Barrier *address, uint32_t parity) {
    if (parity > 1) fail("a phase is 0 or 1");
    BarrierState &b = state_of(address);
    for (;;) {
        end_phase(b, true);
        if (b.phase != parity) return;
        wait_for_change(&b.events);
    }
}

void meet(int id, int n_threads) {
    if (id < 1 || id > 15 || n_threads % 32 != 0) fail("a named barrier out of range");
    Meeting &m = hopper.meetings[id];
    if (++m.n_arrived == n_threads) {
        m.n_arrived = 0;
        m.generation++;
        return;
    }
    wait_for_change(&m.generation);
}

/* ---- Copies --------------------------------------------------------------------------------------------------- */

void copy_box(void *to, const TensorMap &map, int column, int row, Barrier *barrier) {
    if (map.box_columns * 2 != kSwizzledRowBytes) fail("a box is not as wide as its swizzle");
    if (shared_address(to) % kSwizzledGroupBytes != 0) fail("a box is not aligned to its swizzle");
    BarrierState &b = state_of(barrier);
    const BoxCopy copy = {(char *)to, map, column, row};
    shared_address((char *)to + copy.bytes() - 1);
    memset(to, 0xff, (size_t)copy.bytes()); /* NaN until it has arrived */
    b.copies.push_back(copy);
    b.events++;
}

void prefetch(const void *global, uint32_t bytes) {
    if ((uintptr_t)global % 16 != 0 || bytes % 16 != 0) fail("a prefetch is not aligned");
}

/* ---- Products ------------------------------------------------------------------------------------------------- */

void set_registers(int n, bool more) {
    if (n % 8 != 0 || n < 24 || n > 256) fail("a number of registers that cannot be");
    if (more && n < 168) fail("registers that are taken are fewer than a thread of 384 has");
    mine().registers = n;
}

void products_begin() { mine().begun = true; }

void warpgroup_multiply(float *d, int n_tokens, const uint32_t *a, uint64_t b) {
    ThreadProducts &t = mine();
    if (!t.begun) fail("products begin without products_begin");
    if (b >> 62 != 1) fail("an operand is not swizzled by 128 bytes");
    auto &started = hopper.started[(size_t)thread_number() / 128];
    if (t.n_started == started.size())
        started.push_back({d, n_tokens, a, b});
    else if (started[t.n_started].b != b || started[t.n_started].n_tokens != n_tokens)
        fail("the warps of a warpgroup multiply by different operands");
    t.n_started++;
    t.open.push_back({d, n_tokens, a, b});
}

void products_commit() {
    ThreadProducts &t = mine();
    t.groups.push_back(std::move(t.open));
    t.open.clear();
    t.begun = false;
}

/* A warp's share: its 16 rows. Lane l of it has, with g = l / 4 and t = l % 4, the positions 2·t, 2·t + 1 (words 0 and
 * 1 of rows g and g + 8) and 2·t + 8, 2·t + 9 (words 2 and 3) of `a`. */
static void multiply(void *const *all) {
    const Product &first = *(const Product *)all[0];
    const int n = first.n_tokens;
    float a[16][16], b[16][256], c[256];
    for (int l = 0; l < 32; l++)
        for (int w = 0; w < 4; w++)
            for (int e = 0; e < 2; e++)
                a[l / 4 + w % 2 * 8][l % 4 * 2 + w / 2 * 8 + e] =
                    dg_f16_to_f32((uint16_t)(((const Product *)all[l])->a[w] >> 16 * e));
    const uint32_t start = (uint32_t)(first.b & 0x3fff) << 4, group = (uint32_t)(first.b >> 32 & 0x3fff) << 4;
    for (int token = 0; token < n; token++)
        for (int k = 0; k < 16; k++) {
            const uint32_t at =
                start + (uint32_t)(token / 8) * group + (uint32_t)(token % 8 * kSwizzledRowBytes + k * 2);
            uint16_t half;
            memcpy(&half, at_address(swizzled(at)), 2);
            b[k][token] = dg_f16_to_f32(half);
        }
    for (int r = 0; r < 16; r++) {
        memset(c, 0, sizeof c);
        for (int k = 0; k < 16; k++)
            for (int token = 0; token < n; token++) c[token] += a[r][k] * b[k][token];
        for (int token = 0; token < n; token++) {
            float *d = ((const Product *)all[r % 8 * 4 + token % 8 / 2])->d;
            d[token / 8 * 4 + r / 8 * 2 + token % 2] += c[token];
        }
    }
}

void products_wait(int groups_left) {
    ThreadProducts &t = mine();
    if (!t.open.empty()) fail("products are waited for that have not been committed");
    while ((int)t.groups.size() > groups_left) {
        for (Product &p : t.groups.front()) warp_operation("wgmma", &p, multiply);
        t.groups.erase(t.groups.begin());
    }
}

/* ---- Pairs of float16 ----------------------------------------------------------------------------------------- */

/* Double holds the product of two float16 and its sum with a third but for a last bit that does not matter. */
uint32_t fused_pair(uint32_t a, uint32_t b, uint32_t c, bool subtract) {
    uint32_t result = 0;
    for (int i = 0; i < 2; i++) {
        const double x = dg_f16_to_f32((uint16_t)(a >> 16 * i)), y = dg_f16_to_f32((uint16_t)(b >> 16 * i));
        const double z = dg_f16_to_f32((uint16_t)(c >> 16 * i));
        result |= (uint32_t)dg_f32_to_f16((float)(x * y + (subtract ? -z : z))) << 16 * i;
    }
    return result;
}

} // namespace emulation
