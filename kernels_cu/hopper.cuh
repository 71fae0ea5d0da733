// The instructions of Hopper (sm_90a) that CUDA C has no name for: barriers that count bytes, copies of tiles by the
// tensor memory accelerator, and products of a warpgroup of four warps. As ptx.cuh, it has a twin in the tests.
#pragma once

// In shared memory, a barrier that threads arrive at, and bytes. It is passed once the arrivals it was made for and all
// expected bytes are there; then it starts anew. A waiter says which passing it means by its parity: 0, 1, 0, ...
// (PTX ISA, "mbarrier")
struct Barrier {
    unsigned long long state;
};

__device__ __forceinline__ void barrier_make(Barrier& barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(arrivals) : "memory");
}

// After barriers were made by one thread, before a __syncthreads that lets others, and copies, use them.
__device__ __forceinline__ void barriers_made() {
    asm volatile("fence.mbarrier_init.release.cluster;\n\tfence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(Barrier& barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory");
}

// Arrives, and has the barrier wait for so many bytes more.
__device__ __forceinline__ void barrier_arrive_expecting(Barrier& barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void barrier_wait(Barrier& barrier, unsigned parity) {
    asm volatile(
        "{\n\t.reg .pred passed;\n"
        "again: mbarrier.try_wait.parity.shared::cta.b64 passed, [%0], %1;\n\t"
        "@!passed bra again;\n\t}" ::"r"(shared_address(&barrier)),
        "r"(parity)
        : "memory");
}

// One thread: a box of a three-dimensional tensor, whose first element has these coordinates (innermost first), to
// shared memory, zeros for what lies outside the tensor. Its bytes arrive at the barrier. `map` is what
// engine/device/tensor_map.py makes, in global memory; the rows of the box, 128 bytes, are swizzled: the 16 bytes
// at column c of row r lie at column c ^ r % 8. Boxes in shared memory begin at multiples of 1,024 bytes.
__device__ __forceinline__ void copy_box(
    void* shared, const unsigned long long* map, int x, int y, int z, Barrier& barrier) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::
            "r"(shared_address(shared)),
        "l"(map), "r"(x), "r"(y), "r"(z), "r"(shared_address(&barrier))
        : "memory");
}

// One thread: so many bytes, a multiple of 16, as the addresses are. They arrive at the barrier.
__device__ __forceinline__ void copy_bytes(void* shared, const void* global, int bytes, Barrier& barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(shared)),
                 "l"(global), "r"(bytes), "r"(shared_address(&barrier))
                 : "memory");
}

// Blocks of a cluster run at the same time, and can reach each other's shared memory. (PTX ISA, "Cluster")
__device__ __forceinline__ unsigned block_in_cluster() {
    unsigned number;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(number));
    return number;
}

// All threads of all blocks of the cluster wait for each other, as in __syncthreads.
__device__ __forceinline__ void cluster_meet() {
    asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
}

// barrier_arrive at the same barrier of a block of the cluster. (Its scope is left as it is: with a cluster's, each
// arrival costs a fence of the whole GPU's memory.)
__device__ __forceinline__ void barrier_arrive_in(unsigned block, Barrier& barrier) {
    asm volatile(
        "{\n\t.reg .b32 there;\n\t"
        "mapa.shared::cluster.u32 there, %0, %1;\n\t"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n\t}" ::"r"(shared_address(&barrier)),
        "r"(block)
        : "memory");
}

// As copy_box, a box of what engine/device/tensor_map.py's spread makes, its row `row` first, a multiple of 32; to the
// same place in the first `blocks` blocks of the cluster: in each, its bytes arrive at this barrier.
__device__ __forceinline__ void copy_spread_to_all(
    int blocks, void* shared, const unsigned long long* map, int x, int row, Barrier& barrier) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%2, 0, 0, 0, %3}], [%4], %5;" ::"r"(shared_address(shared)),
        "l"(map), "r"(x), "r"(row / 32), "r"(shared_address(&barrier)),
        "h"(static_cast<unsigned short>((1 << blocks) - 1))
        : "memory");
}

// All threads of a warpgroup: how many registers each has from here on. What some give back, others can take.
template <int registers>
__device__ __forceinline__ void give_registers_back() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}
template <int registers>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}

// Where a factor b of a warpgroup's product lies: boxes as copy_box makes them, 64 columns wide. (PTX ISA, "Matrix
// descriptor": addresses and offsets in 16 bytes; 8 rows of 128 bytes to the next 8; swizzle of 128 bytes.)
// `aside`: bytes from a box to the one that has the next 64 columns.
__device__ __forceinline__ unsigned long long factor(const void* shared, int aside = 0) {
    constexpr unsigned long long SWIZZLE_128 = 1ull << 62, EIGHT_ROWS = 1024 / 16;
    const unsigned long long start = (shared_address(shared) & 0x3ffff) / 16, beside = aside / 16;
    return SWIZZLE_128 | EIGHT_ROWS << 32 | beside << 16 | start;
}

// The factor that begins so many bytes behind: nothing but an addition, where factor would compute an address anew.
__device__ __forceinline__ unsigned long long behind(unsigned long long factor, int bytes) {
    return (factor & 0xffffffff00000000ull) | (static_cast<unsigned>(factor) + bytes / 16);
}

#define ROW4(d, n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define ROW16(d, n) ROW4(d, n), ROW4(d, n + 1), ROW4(d, n + 2), ROW4(d, n + 3)
#define ROW32(d, n) ROW16(d, n), ROW16(d, n + 4)

// d = a b, or d += a b if `add`, for a warpgroup's 64 rows, N columns and a depth of 16; warp w of it has rows 16 w to
// 16 w + 15, and its registers hold them as in mma_16x8x16: d[n] the columns 8 n to 8 n + 7. b lies in shared memory,
// as N rows of 16 columns, which are the depth, or, if DEPTH_IN_ROWS, as 16 rows of N columns. It is under way until
// products_wait: till then d and a must be left alone. (PTX ISA, "wgmma.mma_async")
template <bool DEPTH_IN_ROWS>
__device__ __forceinline__ void product_64x16(
    float (&d)[8][4], const unsigned (&a)[4], unsigned long long b, bool add) {
    asm volatile(
        "{\n\t.reg .pred add;\n\tsetp.ne.b32 add, %37, 0;\n\t"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
        "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, "
        "{%32,%33,%34,%35}, %36, add, 1, 1, %38;\n\t}"
        : ROW32(d, 0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)), "n"(DEPTH_IN_ROWS));
}

template <bool DEPTH_IN_ROWS>
__device__ __forceinline__ void product_64x16(
    float (&d)[16][4], const unsigned (&a)[4], unsigned long long b, bool add) {
    asm volatile(
        "{\n\t.reg .pred add;\n\tsetp.ne.b32 add, %69, 0;\n\t"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
        "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
        "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
        "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, "
        "{%64,%65,%66,%67}, %68, add, 1, 1, %70;\n\t}"
        : ROW32(d, 0), ROW32(d, 8)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)), "n"(DEPTH_IN_ROWS));
}

// The same with a in shared memory, as 64 rows of 16 columns.
template <bool DEPTH_IN_ROWS>
__device__ __forceinline__ void product_64x16(float (&d)[8][4], unsigned long long a, unsigned long long b, bool add) {
    asm volatile(
        "{\n\t.reg .pred add;\n\tsetp.ne.b32 add, %34, 0;\n\t"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
        "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, "
        "%32, %33, add, 1, 1, 0, %35;\n\t}"
        : ROW32(d, 0)
        : "l"(a), "l"(b), "r"(static_cast<int>(add)), "n"(DEPTH_IN_ROWS));
}

template <bool DEPTH_IN_ROWS>
__device__ __forceinline__ void product_64x16(float (&d)[32][4], unsigned long long a, unsigned long long b, bool add) {
    asm volatile(
        "{\n\t.reg .pred add;\n\tsetp.ne.b32 add, %130, 0;\n\t"
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
        "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
        "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
        "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,"
        "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,"
        "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,"
        "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,"
        "%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127}, "
        "%128, %129, add, 1, 1, 0, %131;\n\t}"
        : ROW32(d, 0), ROW32(d, 8), ROW32(d, 16), ROW32(d, 24)
        : "l"(a), "l"(b), "r"(static_cast<int>(add)), "n"(DEPTH_IN_ROWS));
}

// Before the first product after other instructions have written d or a.
__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Ends a group of products.
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most `groups` of the newest groups are under way.
template <int groups>
__device__ __forceinline__ void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(groups) : "memory");
}

// After products_wait, of each d, and each a in registers, that it waited for: keeps the compiler from reading d
// earlier, and from writing to the registers of a meanwhile.
template <int N>
__device__ __forceinline__ void products_done(unsigned (&a)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; n++) asm volatile("" : "+r"(a[n][0]), "+r"(a[n][1]), "+r"(a[n][2]), "+r"(a[n][3])::"memory");
}
template <int N>
__device__ __forceinline__ void products_done(float (&d)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; n++) asm volatile("" : ROW4(d, n)::"memory");
}

#undef ROW4
#undef ROW16
#undef ROW32
