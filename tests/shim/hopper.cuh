// The twin of kernels_cu/hopper.cuh for CPUs. What the GPU does behind the threads' backs is done as late as it may be:
// a box is copied when a wait for its barrier passes, a product is carried out when it is waited for. Till then what
// they write is NaN, and what a product reads is held to what it was when the product was issued.
#pragma once
#include <ptx.cuh>

struct Barrier {
    unsigned long long state;  // which of shim::barriers it is
};

namespace shim {

constexpr unsigned MAX_BARRIERS = 256, MAX_TRANSFERS = 1024, MAX_PRODUCTS = 128, MAX_SUMS = 16, MAX_COLUMNS = 256;
constexpr unsigned long long MADE = 0x0ba221e2ull << 32, TENSOR_MAP = 0x70616d726f736e74ull;
constexpr long long MAX_BYTES = (1 << 20) - 1;  // that a barrier may wait for (PTX ISA, "Tracking asynchronous ...")

// A barrier's current phase, in terms of the PTX ISA: pending count, tx-count.
struct Phase {
    unsigned arrivals, pending;
    long long bytes;
    unsigned number;
    unsigned maker, made_at;
    bool usable;  // barriers_made has been called
    char text[2][120];
};

// A copy under way. `map` is what tests/shim/__init__.py:tensor_map makes.
struct Map {
    unsigned long long kind, address, dims[5], strides[4], box[5];
    unsigned long long rows() const { return box[1] * box[2] * box[3] * box[4]; }
};
struct Transfer {
    Phase* phase;
    unsigned char* shared;
    const Map* map;  // null: so many bytes as they lie in memory
    long long at[5];
    const void* global;
    long long count;
    long long bytes() const { return map ? 2 * map->box[0] * map->rows() : count; }
};

static Phase barriers[MAX_BARRIERS];
static Transfer transfers[MAX_TRANSFERS];
static unsigned barrier_count, transfer_count;

// A warp's 16 rows of a d that products are under way for; in the registers of its lanes is NaN meanwhile.
struct Sum {
    float* d[WARP_LANES];
    unsigned under_way, columns;
    float rows[16][MAX_COLUMNS];
};
struct Product {
    float* d[WARP_LANES];
    const unsigned* a[WARP_LANES];
    unsigned a_then[WARP_LANES][4];
    unsigned long long a_shared, b;  // descriptors; that of a is 0 if it lies in registers
    unsigned short a_shared_then[16][MAX_COLUMNS], b_then[16][MAX_COLUMNS];
    Sum* sum;
    unsigned columns, group;
    bool depth_in_rows, add;
};
struct WarpProducts {
    Product queue[MAX_PRODUCTS];  // a ring: the products started, without those finished
    unsigned started, finished;
    Sum sums[MAX_SUMS];
};
struct LaneProducts {
    unsigned issued, groups;
    bool begun;
};
static WarpProducts products[MAX_THREADS / WARP_LANES];
static LaneProducts lane_products[MAX_THREADS];

// Where in the dynamic shared memory: what is read by address alone lies there.
inline unsigned offset_of(const char* name, const void* shared) {
    const size_t offset = static_cast<const unsigned char*>(shared) - dynamic;
    if (offset >= dynamic_size) fail(name, "an address outside the dynamic shared memory");
    return static_cast<unsigned>(offset);
}

inline Phase& phase_of(const char* name, const Barrier& barrier) {
    if (barrier.state < MADE || barrier.state - MADE >= barrier_count)
        fail(name, "there is no barrier: made by nobody");
    Phase& phase = barriers[barrier.state - MADE];
    if (!phase.usable) fail(name, "a barrier without barriers_made after barrier_make");
    if (phase.maker != index() && phase.made_at == synchronizations)
        fail(name, "a barrier without a __syncthreads since another thread made it");
    return phase;
}

// Zeros outside the tensor; 16 bytes at column c of row r lie at column c ^ r % 8.
inline void carry_out(const Transfer& transfer) {
    if (!transfer.map) {
        memcpy(transfer.shared, transfer.global, transfer.count);
        return;
    }
    const Map& map = *transfer.map;
    for (unsigned long long row = 0; row < map.rows(); row++) {
        bool inside = true;
        unsigned long long address = map.address, left = row;
        for (unsigned i = 1; i < 5; left /= map.box[i++]) {
            const long long y = transfer.at[i] + left % map.box[i];
            inside &= y >= 0 && y < (long long)map.dims[i];
            address += y * map.strides[i - 1];
        }
        const bf16* from = reinterpret_cast<const bf16*>(address);
        for (unsigned c = 0; c < 8; c++) {
            bf16* to = reinterpret_cast<bf16*>(transfer.shared + row * 128 + (c ^ row % 8) * 16);
            for (unsigned i = 0; i < 8; i++) {
                const long long x = transfer.at[0] + 8 * c + i;
                to[i].bits = inside && x >= 0 && x < (long long)map.dims[0] ? from[x].bits : 0;
            }
        }
    }
}

// Ends the phase if all arrivals, and all bytes with what is under way, are there.
inline bool end_phase(Phase& phase) {
    long long coming = 0;
    for (unsigned i = 0; i < transfer_count; i++)
        if (transfers[i].phase == &phase) coming += transfers[i].bytes();
    if (phase.pending || phase.bytes != coming) return false;
    unsigned kept = 0;
    for (unsigned i = 0; i < transfer_count; i++) {
        if (transfers[i].phase == &phase)
            carry_out(transfers[i]);
        else
            transfers[kept++] = transfers[i];
    }
    transfer_count = kept;
    phase.number++;
    phase.pending = phase.arrivals;
    phase.bytes = 0;
    return true;
}

struct Passed : Condition {
    Phase& phase;
    unsigned parity;
    Passed(Phase& phase, unsigned parity) : phase(phase), parity(parity) {}
    bool holds() override { return phase.number % 2 != parity || end_phase(phase); }
    const char* tell() override {
        long long missing = phase.bytes;
        for (unsigned i = 0; i < transfer_count; i++)
            if (transfers[i].phase == &phase) missing -= transfers[i].bytes();
        snprintf(
            phase.text[parity], sizeof phase.text[parity],
            "barrier_wait(barrier %u, parity %u): its phase %u lacks %u arrivals, %lld bytes",
            static_cast<unsigned>(&phase - barriers), parity, phase.number, phase.pending, missing);
        return phase.text[parity];
    }
};

inline void arrive(const char* name, Barrier& barrier, long long bytes) {
    Phase& phase = phase_of(name, barrier);
    // The phase has all arrivals; bytes may be there or not: the GPU takes it for one of the next phase, or errs.
    if (!phase.pending) fail(name, "more arrivals than the barrier was made for");
    phase.bytes += bytes;
    if (phase.bytes > MAX_BYTES) fail(name, "more bytes than a barrier can count");
    if (--phase.pending || phase.bytes) return;
    for (unsigned i = 0; i < transfer_count; i++)
        if (transfers[i].phase == &phase) return;
    end_phase(phase);
    give_way();  // who waited may at once do what this thread must be ready for
}

constexpr unsigned long long SWIZZLE_128 = 1ull << 62;

// b's element (depth k, column n), read as the GPU finds it from the descriptor alone; a's rows are such columns. PTX
// ISA, "Strides" and "Shared memory matrix layout": eight rows of 128 bytes lie together, `stride` from the next eight;
// 64 columns of depth in rows lie `leading` from the next 64. The swizzle is applied to the address that comes out.
inline void read_factor(
    const char* name, unsigned long long at_, bool depth_in_rows, unsigned columns,
    unsigned short (&b)[16][MAX_COLUMNS]) {
    const unsigned start = at_ % (1 << 14) * 16, leading = (at_ >> 16) % (1 << 14) * 16;
    const unsigned stride = (at_ >> 32) % (1 << 14) * 16;
    constexpr unsigned WORD = 8;  // elements in 16 bytes
    const unsigned rows = depth_in_rows ? 16 : columns, words = depth_in_rows ? columns / WORD : 2;
    for (unsigned row = 0; row < rows; row++) {
        for (unsigned word = 0; word < words; word++) {
            unsigned at = start + row / 8 * stride + row % 8 * 128 + word / 8 * leading + word % 8 * 16;
            at ^= (at >> 7) % 8 << 4;
            if (at + 16 > dynamic_size) fail(name, "a factor lies outside the dynamic shared memory");
            for (unsigned i = 0; i < transfer_count; i++)
                if (dynamic + at - transfers[i].shared < transfers[i].bytes() && dynamic + at >= transfers[i].shared)
                    fail(name, "a factor is a box that no wait for its barrier has passed for");
            unsigned short x[WORD];
            memcpy(x, dynamic + at, sizeof x);
            for (unsigned i = 0; i < WORD; i++) {
                if (depth_in_rows)
                    b[row][word * WORD + i] = x[i];
                else
                    b[word * WORD + i][row] = x[i];
            }
        }
    }
}

// The row and the column, in the warp's 16 rows, of a lane's register i of those for eight columns.
inline unsigned row_of(unsigned lane, unsigned i) { return lane / 4 + i / 2 * 8; }
inline unsigned column_of(unsigned lane, unsigned i) { return lane % 4 * 2 + i % 2; }

// By the first lane that goes on after all have issued the product.
inline void start(WarpProducts& warp) {
    const char* name = "product_64x16";
    Product& p = warp.queue[warp.started++ % MAX_PRODUCTS];
    if (p.b >> 62 != SWIZZLE_128 >> 62 || (p.a_shared && p.a_shared >> 62 != SWIZZLE_128 >> 62))
        fail(name, "a factor is no descriptor with a swizzle of 128 bytes: not from factor");
    const unsigned start = p.b % (1 << 14) * 16;
    // Otherwise the descriptor needs a base offset, which factor does not give.
    if (start / 128 % 8) fail(name, "b begins at a row that is no multiple of eight");
    if (start % 128 % (p.depth_in_rows ? 128 : 32)) fail(name, "b begins amid a row's 16 columns of depth, or its 64");
    if (p.depth_in_rows && p.columns > 64 && !((p.b >> 16) % (1 << 14))) fail(name, "factor was not told `aside`");
    read_factor(name, p.b, p.depth_in_rows, p.columns, p.b_then);
    if (p.a_shared) read_factor(name, p.a_shared, false, 16, p.a_shared_then);
    p.sum = nullptr;
    for (Sum& sum : warp.sums)
        if (sum.under_way && sum.d[0] == p.d[0]) p.sum = &sum;
    if (p.sum && p.sum->columns != p.columns) fail(name, "products of two shapes are under way for one d");
    if (!p.sum) {
        for (Sum& sum : warp.sums)
            if (!sum.under_way) p.sum = &sum;
        if (!p.sum) fail(name, "too many d under way");
        memcpy(p.sum->d, p.d, sizeof p.d);
        p.sum->columns = p.columns;
        for (unsigned l = 0; l < WARP_LANES; l++) {
            for (unsigned i = 0; i < p.columns / 2; i++)
                p.sum->rows[row_of(l, i % 4)][i / 4 * 8 + column_of(l, i % 4)] = p.d[l][i];
            memset(p.d[l], 0xff, p.columns / 2 * sizeof(float));
        }
    }
    p.sum->under_way++;
}

template <unsigned columns>
__attribute__((noinline)) void multiply(float (&sum)[16][MAX_COLUMNS], const float (&a)[16][16], const Product& p) {
    float b[16][columns];
    for (unsigned k = 0; k < 16; k++)
        for (unsigned n = 0; n < columns; n++) b[k][n] = bits<float>(static_cast<unsigned>(p.b_then[k][n]) << 16);
    for (unsigned m = 0; m < 16; m++) {
        float row[columns];
        for (unsigned n = 0; n < columns; n++) row[n] = p.add ? sum[m][n] : 0.0f;
        for (unsigned k = 0; k < 16; k++) {
            const float x = a[m][k];
            for (unsigned n = 0; n < columns; n++) row[n] += x * b[k][n];
        }
        memcpy(sum[m], row, sizeof row);
    }
}

// By the first lane that goes on after all have come to the wait.
inline void finish(WarpProducts& warp) {
    const char* name = "products_wait";
    static unsigned short now[16][MAX_COLUMNS];
    const Product& p = warp.queue[warp.finished++ % MAX_PRODUCTS];
    float a[16][16];
    for (unsigned l = 0; l < WARP_LANES; l++) {
        if (!p.a_shared && memcmp(p.a_then[l], p.a[l], sizeof p.a_then[l]))
            fail(name, "a was written, or left its scope, while a product was under way");
        for (unsigned i = 0; i < p.columns / 2; i++)
            if (bits<unsigned>(p.d[l][i]) != 0xffffffff) fail(name, "d was written while a product was under way");
        for (unsigned i = 0; i < 8; i++)
            a[l / 4 + i / 2 % 2 * 8][l % 4 * 2 + i % 2 + i / 4 * 8] = of_pair(p.a_then[l][i / 2], i % 2);
    }
    if (p.a_shared) {
        read_factor(name, p.a_shared, false, 16, now);
        for (unsigned k = 0; k < 16; k++) {
            if (memcmp(now[k], p.a_shared_then[k], 16 * sizeof now[k][0]))
                fail(name, "a was written while a product was under way");
            for (unsigned m = 0; m < 16; m++) a[m][k] = bits<float>(static_cast<unsigned>(now[k][m]) << 16);
        }
    }
    read_factor(name, p.b, p.depth_in_rows, p.columns, now);
    for (unsigned k = 0; k < 16; k++)
        if (memcmp(now[k], p.b_then[k], p.columns * sizeof now[k][0]))
            fail(name, "b was written while a product was under way");
    if (p.columns == 64)
        multiply<64>(p.sum->rows, a, p);
    else if (p.columns == 128)
        multiply<128>(p.sum->rows, a, p);
    else
        multiply<256>(p.sum->rows, a, p);
    if (--p.sum->under_way) return;
    for (unsigned l = 0; l < WARP_LANES; l++)
        for (unsigned i = 0; i < p.columns / 2; i++)
            p.d[l][i] = p.sum->rows[row_of(l, i % 4)][i / 4 * 8 + column_of(l, i % 4)];
}

inline LaneProducts& lane_of_warpgroup(const char* name) {
    if (index() / 128 * 128 + 128 > threads) fail(name, "the block ends within this warpgroup of four warps");
    return lane_products[index()];
}

static void start_block() {
    barrier_count = transfer_count = 0;
    memset(lane_products, 0, sizeof lane_products);
    for (unsigned w = 0; w < (threads + WARP_LANES - 1) / WARP_LANES; w++) {
        products[w].started = products[w].finished = 0;
        for (Sum& sum : products[w].sums) sum.under_way = 0;
    }
}

static void end_block() {
    if (transfer_count) return report(": %u copies that nobody waited for", transfer_count);
    for (unsigned w = 0; w < (threads + WARP_LANES - 1) / WARP_LANES; w++) {
        const unsigned left = products[w].started - products[w].finished;
        if (left) return report(": product_64x16: warp %u never waited for %u products", w, left);
        if (products[w].started != products[w / 4 * 4].started)
            return report(": product_64x16: warps %u and %u of a warpgroup issued different numbers", w / 4 * 4, w);
    }
}

static const bool registered = (at_start = start_block, at_end = end_block, true);

}  // namespace shim

__device__ __forceinline__ unsigned shared_address(const void* pointer) {
    return shim::offset_of("shared_address", pointer);
}

__device__ __forceinline__ void barrier_make(Barrier& barrier, int arrivals) {
    const char* name = "barrier_make";
    using namespace shim;
    if (arrivals < 1 || arrivals > MAX_BYTES) fail(name, "a number of arrivals that is not 1 to 2^20 - 1");
    if (barrier.state >= MADE && barrier.state - MADE < barrier_count) fail(name, "a barrier that is there already");
    if (barrier_count == MAX_BARRIERS) fail(name, "too many barriers");
    const unsigned count = static_cast<unsigned>(arrivals);
    barriers[barrier_count] = {count, count, 0, 0, index(), synchronizations, false, {}};
    barrier.state = MADE + barrier_count++;
}

__device__ __forceinline__ void barriers_made() {
    for (unsigned i = 0; i < shim::barrier_count; i++)
        shim::barriers[i].usable |= shim::barriers[i].maker == shim::index();
}

__device__ __forceinline__ void barrier_arrive(Barrier& barrier) { shim::arrive("barrier_arrive", barrier, 0); }

__device__ __forceinline__ void barrier_arrive_expecting(Barrier& barrier, int bytes) {
    shim::arrive("barrier_arrive_expecting", barrier, bytes);
}

__device__ __forceinline__ void barrier_wait(Barrier& barrier, unsigned parity) {
    const char* name = "barrier_wait";
    if (parity > 1) shim::fail(name, "a parity that is neither 0 nor 1");
    shim::Passed passed(shim::phase_of(name, barrier), parity);
    if (!passed.holds()) shim::wait_for(passed, name);
    asm volatile("" ::: "memory");
}

namespace shim {

inline void start_copy(
    const char* name, void* shared, const unsigned long long* map_, const long long (&at)[5], Barrier& barrier) {
    const Map* map = reinterpret_cast<const Map*>(map_);
    Phase& phase = phase_of(name, barrier);
    if (map->kind != TENSOR_MAP) fail(name, "no tensor map there");
    if (transfer_count == MAX_TRANSFERS) fail(name, "too many copies under way");
    const Transfer transfer = {
        &phase, static_cast<unsigned char*>(shared), map, {at[0], at[1], at[2], at[3], at[4]}, nullptr, 0};
    const unsigned offset = offset_of(name, shared);
    if (offset % 1024) fail(name, "a box that does not begin at a multiple of 1,024 bytes");
    if (offset + transfer.bytes() > dynamic_size) fail(name, "the box ends outside the dynamic shared memory");
    memset(shared, 0xff, transfer.bytes());  // until waited for, neither the old nor the new may be read
    transfers[transfer_count++] = transfer;
}

}  // namespace shim

__device__ __forceinline__ void copy_box(
    void* shared, const unsigned long long* map, int x, int y, int z, Barrier& barrier) {
    shim::start_copy("copy_box", shared, map, {x, y, z, 0, 0}, barrier);
}

__device__ __forceinline__ void copy_bytes(void* shared, const void* global, int bytes, Barrier& barrier) {
    const char* name = "copy_bytes";
    using namespace shim;
    Phase& phase = phase_of(name, barrier);
    const auto address = [](const void* p) { return reinterpret_cast<unsigned long long>(p); };
    if (bytes <= 0 || bytes % 16 || address(shared) % 16 || address(global) % 16)
        fail(name, "not in multiples of 16 bytes");
    if (transfer_count == MAX_TRANSFERS) fail(name, "too many copies under way");
    memset(shared, 0xff, bytes);
    transfers[transfer_count++] = {&phase, static_cast<unsigned char*>(shared), nullptr, {}, global, bytes};
}

// Blocks run one after the other here: there are no clusters, or each is one.
#define __cluster_dims__(x, y, z)
__device__ __forceinline__ unsigned block_in_cluster() { shim::fail("block_in_cluster", "no clusters here"); }
__device__ __forceinline__ void cluster_meet() { shim::fail("cluster_meet", "no clusters here"); }
__device__ __forceinline__ void barrier_arrive_in(unsigned, Barrier&) {
    shim::fail("barrier_arrive_in", "no clusters here");
}
__device__ __forceinline__ void copy_spread_to_all(
    int blocks, void* shared, const unsigned long long* map, int x, int row, Barrier& barrier) {
    const char* name = "copy_spread_to_all";
    if (blocks != 1) shim::fail(name, "no clusters here");
    if (row % 32) shim::fail(name, "a row that is no multiple of 32");
    shim::start_copy(name, shared, map, {x, 0, 0, 0, row / 32}, barrier);
}

// A CPU has registers enough.
template <int registers>
__device__ __forceinline__ void give_registers_back() {}
template <int registers>
__device__ __forceinline__ void take_registers() {}

__device__ __forceinline__ unsigned long long factor(const void* shared, int aside = 0) {
    constexpr unsigned long long EIGHT_ROWS = 1024 / 16;
    const unsigned long long start = (shared_address(shared) & 0x3ffff) / 16, beside = aside / 16;
    if (shared_address(shared) % 16 || aside % 16 || aside < 0) shim::fail("factor", "not in multiples of 16 bytes");
    return shim::SWIZZLE_128 | EIGHT_ROWS << 32 | beside << 16 | start;
}

__device__ __forceinline__ unsigned long long behind(unsigned long long factor, int bytes) {
    if (bytes % 16) shim::fail("behind", "not in multiples of 16 bytes");
    return (factor & 0xffffffff00000000ull) | (static_cast<unsigned>(factor) + bytes / 16);
}

namespace shim {

// a: a lane's four registers, or null where the warpgroup's a lies in shared memory.
template <bool DEPTH_IN_ROWS, int N>
void issue(float (&d)[N][4], const unsigned* a, unsigned long long a_shared, unsigned long long b, bool add) {
    static_assert(N == 8 || N == 16 || N == 32, "64, 128 or 256 columns");
    const char* name = "product_64x16";
    LaneProducts& mine = lane_of_warpgroup(name);
    const unsigned number = index() / WARP_LANES;
    WarpProducts& warp = products[number];
    if (!mine.begun) fail(name, "no products_begin before a group's first product");
    if (mine.issued - warp.finished >= MAX_PRODUCTS) fail(name, "too many products under way");
    Product& p = warp.queue[mine.issued++ % MAX_PRODUCTS];
    p.b = b, p.add = add, p.depth_in_rows = DEPTH_IN_ROWS, p.columns = 8 * N, p.group = mine.groups;
    p.a_shared = a_shared ? a_shared + number % 4 * 2 * ((a_shared >> 32) % (1 << 14)) : 0;  // the warp's 16 rows
    p.d[lane()] = &d[0][0], p.a[lane()] = a;
    if (a) memcpy(p.a_then[lane()], a, sizeof p.a_then[0]);
    const unsigned same[] = {static_cast<unsigned>(b),           static_cast<unsigned>(b >> 32),
                             static_cast<unsigned>(a_shared),    static_cast<unsigned>(a_shared >> 32),
                             unsigned(add) << 1 | DEPTH_IN_ROWS, N};
    const Slot* lanes = meet(name, 0xffffffffu, same, sizeof same);
    if (memcmp(&lanes[0], same, sizeof same)) fail(name, "the lanes of a warp ask for different products");
    if (warp.started != mine.issued) start(warp);
}

}  // namespace shim

template <bool DEPTH_IN_ROWS, int N>
__device__ __forceinline__ void product_64x16(
    float (&d)[N][4], const unsigned (&a)[4], unsigned long long b, bool add) {
    shim::issue<DEPTH_IN_ROWS>(d, a, 0, b, add);
}

template <bool DEPTH_IN_ROWS, int N>
__device__ __forceinline__ void product_64x16(float (&d)[N][4], unsigned long long a, unsigned long long b, bool add) {
    shim::issue<DEPTH_IN_ROWS>(d, nullptr, a, b, add);
}

__device__ __forceinline__ void products_begin() {
    shim::lane_of_warpgroup("products_begin").begun = true;
    shim::meet("products_begin", 0xffffffffu, nullptr, 0);
}

__device__ __forceinline__ void products_commit() {
    shim::LaneProducts& mine = shim::lane_of_warpgroup("products_commit");
    mine.groups++;
    mine.begun = false;
    shim::meet("products_commit", 0xffffffffu, nullptr, 0);
}

template <int groups>
__device__ __forceinline__ void products_wait() {
    const shim::LaneProducts& mine = shim::lane_of_warpgroup("products_wait");
    shim::WarpProducts& warp = shim::products[shim::index() / shim::WARP_LANES];
    shim::meet("products_wait", 0xffffffffu, nullptr, 0);
    while (warp.finished != warp.started && warp.queue[warp.finished % shim::MAX_PRODUCTS].group + groups < mine.groups)
        shim::finish(warp);
    asm volatile("" ::: "memory");
}

template <int N>
__device__ __forceinline__ void products_done(unsigned (&)[N][4]) {}

template <int N>
__device__ __forceinline__ void products_done(float (&d)[N][4]) {
    const unsigned l = shim::lane();
    for (const shim::Sum& sum : shim::products[shim::index() / shim::WARP_LANES].sums)
        if (sum.under_way && sum.d[l] == &d[0][0]) shim::fail("products_done", "products for d are under way");
}
