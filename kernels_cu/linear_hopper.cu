// Forward multiplies of linear layers, for Hopper: out = inp weight^T + bias, or pre = that and out = gelu(pre);
// inp (M,K), weight (N,K), bias (N), all else (M,N).
//
// Behind the products, stores and GELU would take a third of their time again. So while the tensor cores are at a tile,
// the threads finish the one before it: its sums, rounded to bf16, take half as many registers as those that are being
// made. GELU sees what is rounded, as a pass of its own would.
//
// target: sm_90a alone
// variants: CLUSTER = 1, 2
#include <gelu.cuh>
#include <warpgroup.cuh>

#ifndef CLUSTER
#define CLUSTER 2
#endif

// A cluster of CLUSTER blocks takes as many times 128 rows of the result and the same 256 columns, for which each block
// fetches a share of the weight for all. A block has three warpgroups: one thread of the first fills a ring of stages,
// the others have 64 rows each. Blocks stay, and take one tile after the other.
constexpr int GROUPS = 2;  // warpgroups that multiply
constexpr int THREADS = (1 + GROUPS) * GROUP;
constexpr int COLUMNS = 256;  // of a tile
constexpr int DEPTH = 64;     // of a stage
constexpr int STAGES = 4;
constexpr int BOXES = COLUMNS / 64;            // of the weight, behind those of inp
constexpr int STAGE = (GROUPS + BOXES) * BOX;  // elements
constexpr int PRODUCTS = DEPTH / 16;           // of a stage
constexpr int FEW = 40, MANY = 232;            // registers of a thread that fills, and of one that multiplies
static_assert((FEW + GROUPS * MANY) * GROUP <= 65536, "of a multiprocessor");

// The weight's rows lie in a stage in such an order that a thread has, of each of its two rows, eight columns side by
// side of each 32. It finishes eight by eight, one behind every second product of the next tile's first stages. (A warp
// that has issued a product waits until that is nearly done to issue the next.)
constexpr int EIGHTS = 2 * COLUMNS / 32;
constexpr int FINISHING = 2 * EIGHTS / PRODUCTS;  // stages

// All threads of the cluster. At the end too: no block may end while another can still reach its memory.
__device__ __forceinline__ void meet() {
    __syncthreads();
    if (CLUSTER > 1) cluster_meet();
}

// A stage is full when its bytes are there, and empty when all warps of the cluster that multiply have left it.
struct Stages {
    Barrier full[STAGES], empty[STAGES];

    __device__ __forceinline__ void make() {
        if (threadIdx.x == 0) {
            for (int i = 0; i < STAGES; i++) {
                barrier_make(full[i], 1);
                barrier_make(empty[i], CLUSTER * GROUPS * GROUP / WARP);
            }
            barriers_made();
        }
        meet();
    }
    // The thread that fills: what it fills the stage of a step with, so many bytes, is to arrive there.
    __device__ __forceinline__ Barrier& expect(unsigned step, int bytes) {
        if (step >= STAGES) barrier_wait(empty[step % STAGES], step / STAGES - 1 & 1);
        barrier_arrive_expecting(full[step % STAGES], bytes);
        return full[step % STAGES];
    }
    __device__ __forceinline__ void wait_full(unsigned step) { barrier_wait(full[step % STAGES], step / STAGES & 1); }
    // A warp, of which no thread has read anything but by products.
    __device__ __forceinline__ void leave(unsigned step) {
        const int lane = threadIdx.x % WARP;
        if (CLUSTER > 1) {
            if (lane < CLUSTER) barrier_arrive_in(lane, empty[step % STAGES]);
        } else if (lane == 0) {
            barrier_arrive(empty[step % STAGES]);
        }
    }
};

template <bool HAS_GELU>
__device__ __forceinline__ void forward(
    bf16* out, bf16* pre, const unsigned long long* inp, const unsigned long long* weight, const bf16* bias, int M,
    int N, int K) {
    DYNAMIC_SHARED(bf16, shared);
    bf16* const biases = shared + STAGES * STAGE;  // of two tiles
    __shared__ Stages stages;

    const int group = warpgroup(), block = CLUSTER > 1 ? block_in_cluster() : 0;
    const int columns = (N - 1) / COLUMNS + 1, tiles = ((M - 1) / (CLUSTER * GROUPS * ROWS) + 1) * columns;
    const int begin = blockIdx.x / CLUSTER, clusters = gridDim.x / CLUSTER, chunks = K / DEPTH;
    const auto row_of = [&](int tile) { return (tile / columns * CLUSTER + block) * GROUPS * ROWS; };
    const auto column_of = [&](int tile) { return tile % columns * COLUMNS; };
    stages.make();

    unsigned step = 0, number = 0;
    if (group == 0) {
        give_registers_back<FEW>();
        for (int tile = begin; threadIdx.x == 0 && tile < tiles; tile += clusters, number++) {
            const int m = row_of(tile), n = column_of(tile);
            for (int chunk = 0; chunk < chunks; chunk++, step++) {
                const int k = chunk * DEPTH, of_bias = chunk == 0 ? min(COLUMNS, N - n) : 0;
                bf16* const stage = shared + step % STAGES * STAGE;
                Barrier& there = stages.expect(step, (STAGE + of_bias) * sizeof(bf16));
                if (of_bias) copy_bytes(biases + number % 2 * COLUMNS, bias + n, of_bias * sizeof(bf16), there);
                for (int i = 0; i < GROUPS; i++) copy_box(stage + i * BOX, inp, k, m + i * ROWS, 0, there);
#pragma unroll 1  // few registers
                for (int i = block * BOXES / CLUSTER; i < (block + 1) * BOXES / CLUSTER; i++)
                    copy_spread_to_all(CLUSTER, stage + (GROUPS + i) * BOX, weight, k, n + i * 64, there);
            }
        }
    } else {
        take_registers<MANY>();
        // A thread has parts of a row of the tile, and of the row 8 below.
        const int lane = threadIdx.x % WARP;
        const int row = row_in_group() + (group - 1) * ROWS;
        const unsigned long long a = factor(shared + (group - 1) * BOX), b = factor(shared + GROUPS * BOX);
        float sum[COLUMNS / 8][4];
        // Of the tile before: its sums, pairs of a row and of the row 8 below; where the thread's first eight columns
        // are, and of both rows how many there are from there on.
        unsigned rounded[COLUMNS / 8][2];
        size_t place = 0;
        int width[2] = {0, 0};

        const auto finish = [&](int i) {
            const int lower = i % 2, column = i / 2 * 32;
            const size_t at = place + static_cast<size_t>(lower * 8) * N + column;
            const bool is_there = column < width[lower];
            const unsigned (*pairs)[2] = rounded + column / 8;
            uint4 eight = make_uint4(pairs[0][lower], pairs[1][lower], pairs[2][lower], pairs[3][lower]);
            if (HAS_GELU) {
                if (is_there) *reinterpret_cast<uint4*>(pre + at) = eight;
                Pack x = load(reinterpret_cast<const bf16*>(&eight));
#pragma unroll
                for (float& y : x.x) y = gelu(y, tanh_fast(tanh_argument(y)));
                store(reinterpret_cast<bf16*>(&eight), x);
            }
            if (is_there) *reinterpret_cast<uint4*>(out + at) = eight;
        };
        // A tile's stage: its products begin, and meanwhile some of the tile before is finished. The products of the
        // stage before have ended.
        const auto advance = [&](int chunk) {
            const int now = step % STAGES * STAGE * sizeof(bf16);
            stages.wait_full(step);
            products_begin();
#pragma unroll
            for (int k = 0; k < PRODUCTS; k++) {
                product_64x16<false>(sum, behind(a, now + k * 16 * 2), behind(b, now + k * 16 * 2), k > 0 || chunk > 0);
                if (chunk < FINISHING && k % 2 == 1) finish((chunk * PRODUCTS + k) / 2);
            }
            products_commit();
            products_wait<1>();
            if (chunk > 0) stages.leave(step - 1);
            step++;
        };

        for (int tile = begin; tile < tiles; tile += clusters, number++) {
#pragma unroll
            for (int chunk = 0; chunk < FINISHING; chunk++) advance(chunk);
            for (int chunk = FINISHING; chunk < chunks; chunk++) advance(FINISHING);
            const int m = row_of(tile) + row, n = column_of(tile) + lane % 4 * PACK;
            place = static_cast<size_t>(m) * N + n;
            for (int lower = 0; lower < 2; lower++) width[lower] = m + 8 * lower < M ? N - n : 0;
            products_wait<0>();
            products_done(sum);
            stages.leave(step - 1);
            const bf16* const its_bias = biases + number % 2 * COLUMNS + lane % 4 * PACK;
#pragma unroll
            for (int n = 0; n < COLUMNS / 8; n++) {
                const Pack eight = load(its_bias + n / 4 * 32);
                const float low = eight.x[n % 4 * 2], high = eight.x[n % 4 * 2 + 1];
#pragma unroll
                for (int i = 0; i < 2; i++) rounded[n][i] = pack_bf16(sum[n][2 * i] + low, sum[n][2 * i + 1] + high);
            }
        }
#pragma unroll
        for (int i = 0; i < EIGHTS; i++) finish(i);
    }
    meet();
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1) linear_hopper_forward(
    bf16* __restrict__ out,                         // (M,N)
    const unsigned long long* __restrict__ inp,     // (16)
    const unsigned long long* __restrict__ weight,  // (16)
    const bf16* __restrict__ bias,                  // (N)
    int M, int N, int K) {
    forward<false>(out, nullptr, inp, weight, bias, M, N, K);
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1) linear_hopper_gelu(
    bf16* __restrict__ out,                         // (M,N)
    bf16* __restrict__ pre,                         // (M,N)
    const unsigned long long* __restrict__ inp,     // (16)
    const unsigned long long* __restrict__ weight,  // (16)
    const bf16* __restrict__ bias,                  // (N)
    int M, int N, int K) {
    forward<true>(out, pre, inp, weight, bias, M, N, K);
}
