// attention.cu for Hopper: the same mathematics and the same two kernels backward, with the products of a warpgroup and
// with the tensor memory accelerator (after FlashAttention-3, Shah et al. 2024, arXiv 2407.08608). That over queries
// comes first here, and leaves D, and lse in base 2.
//
// A block has one warpgroup, or two, of 64 rows each. What they go through comes by a ring of stages in shared memory:
// where there are two, it is fetched once for both, which saves energy, and with it time. One thread keeps it filled.
// All that a product makes stays in registers: of a product's result, rounded to bf16, the next product's left factor
// is made in place. A warpgroup waits for all that it starts: several on a multiprocessor fill each other's gaps, the
// better, the more there are.
//
// target: sm_90a alone
// variants: HS = 64, 128
#include <attention.cuh>
#include <warpgroup.cuh>

// Warpgroups of a block, and of each kernel the blocks that a multiprocessor has registers and memory for.
#if HS == 64
constexpr int FORWARD_GROUPS = 1, FORWARD_BLOCKS = 5, Q_BLOCKS = 2, KV_BLOCKS = 3;
#else
constexpr int FORWARD_GROUPS = 2, FORWARD_BLOCKS = 2, Q_BLOCKS = 1, KV_BLOCKS = 2;
#endif
constexpr int Q_GROUPS = 2;
constexpr int FORWARD_STAGES = 2, Q_STAGES = 4, KV_STAGES = 2;

constexpr int HEAD = ROWS * HS;  // elements of 64 rows of a head, as many as a stage has: boxes, side by side
constexpr int HEAD_BYTES = HEAD * 2;
constexpr int PACKS = HS / PACK;  // of a row; fewer than lanes, which share out a warp's rows

// One thread: 64 rows of a head, zeros for rows from T on, whose bytes arrive at the barrier.
__device__ __forceinline__ void load_rows(
    bf16* rows, const unsigned long long* map, int column, int first, int b, Barrier& barrier) {
#pragma unroll
    for (int i = 0; i < HS; i += 64) copy_box(rows + i * ROWS, map, column + i, first, b, barrier);
}

// What a block is for: a head, and of its rows a block's share. Blocks start in the order of their numbers: head by
// head, those with the longest way to go first, so that long and short ones run side by side, and read the same keys,
// or queries. But of the last `tail` heads the longest of all come first, for the last blocks to end should be short.
struct Task {
    int head, b, column, share;  // share: 0 has the longest way to go

    __device__ __forceinline__ Task(int B, int NH, int shares, int tail) {
        const int before = (B * NH - tail) * shares, block = blockIdx.x;  // all of them, if tail is 0
        head = block < before ? block / shares : B * NH - tail + (block - before) % tail;
        share = block < before ? block % shares : (block - before) / tail;
        b = head / NH;
        column = head % NH * HS;
    }
};

// Where 8 columns of a row are, in 64 rows of a head.
__device__ __forceinline__ int place(int row, int column) {
    return column / 64 * BOX + row * 64 + (column % 64 / 8 ^ row % 8) * 8;
}

// 64 rows of a head, as a factor of either kind.
__device__ __forceinline__ unsigned long long head_factor(const bf16* rows) { return factor(rows, BOX * 2); }

// tile = a b^T: each 64 rows in shared memory. Under way until products_wait, as what follows. (a would be in registers
// for good, but ptxas 13.0 then gives them away in the middle of a loop: seen in the machine code, and in the
// gradients.)
__device__ __forceinline__ void multiply_transposed(Tile<ROWS>& tile, unsigned long long a, unsigned long long b) {
#pragma unroll
    for (int k = 0; k < HS / 16; k++) {
        const int bytes = (k / 4 * BOX + k % 4 * 16) * 2;
        product_64x16<false>(tile.x, behind(a, bytes), behind(b, bytes), k > 0);
    }
}

// A tile, rounded to bf16, as the left factor of add_product.
__device__ __forceinline__ void as_factors(unsigned (&a)[ROWS / 16][4], const Tile<ROWS>& tile) {
#pragma unroll
    for (int k = 0; k < ROWS / 16; k++) as_factor(a[k], tile, k);
}

// tile += a b: b 64 rows in shared memory.
__device__ __forceinline__ void add_product(Tile<HS>& tile, const unsigned (&a)[ROWS / 16][4], unsigned long long b) {
#pragma unroll
    for (int k = 0; k < ROWS / 16; k++) product_64x16<true>(tile.x, a[k], behind(b, k * 16 * 64 * 2), true);
}

// A warp's tile * scale to its 16 of the 64 rows from `first` on, by way of its own rows of shared memory.
__device__ __forceinline__ void store_tile(
    bf16* head, size_t pitch, int first, int T, bf16* rows, const Tile<HS>& tile, float scale0, float scale1) {
    const int lane = threadIdx.x % WARP, mine = threadIdx.x / WARP % 4 * 16;
#pragma unroll
    for (int n = 0; n < HS / 8; n++) {
        const int row = mine + tile_row(), column = 2 * (lane % 4);
        *reinterpret_cast<unsigned*>(rows + place(row, 8 * n) + column) =
            pack_bf16(tile.x[n][0] * scale0, tile.x[n][1] * scale0);
        *reinterpret_cast<unsigned*>(rows + place(row + 8, 8 * n) + column) =
            pack_bf16(tile.x[n][2] * scale1, tile.x[n][3] * scale1);
    }
    __syncwarp();
#pragma unroll
    for (int i = lane; i < 16 * PACKS; i += WARP) {
        const int row = mine + i / PACKS, column = i % PACKS * PACK;
        if (first + row < T)
            *reinterpret_cast<uint4*>(head + (first + row) * pitch + column) =
                *reinterpret_cast<const uint4*>(rows + place(row, column));
    }
}

// The ring of stages, for what comes in steps, to so many warpgroups. A stage is full when its bytes are there, and
// empty when all have left it who use it. It is filled anew LAG steps after its use: so far others may be behind the
// warpgroup of the thread that fills.
template <int STAGES, int GROUPS>
struct Ring {
    static constexpr int LAG = STAGES / 2;
    // Forward and over queries the first warpgroup leaves out the last steps: those keys come after its queries.
    static_assert(STAGES - LAG >= GROUPS - 1, "or its thread does not fill stages for the others");
    Barrier full[STAGES], empty[STAGES];

    // All threads: for so many calls of leave in a step, and a barrier besides for what each warpgroup has for itself.
    __device__ __forceinline__ void make(int leavers, Barrier& own) {
        if (threadIdx.x == 0) {
            for (int i = 0; i < STAGES; i++) {
                barrier_make(full[i], 1);
                barrier_make(empty[i], leavers);
            }
            barrier_make(own, 1);
            barriers_made();
        }
        __syncthreads();
    }
    // The thread that fills: has fill(step, stage, full) called for the first of so many steps.
    template <typename Fill>
    __device__ __forceinline__ void begin(unsigned steps, Fill fill) {
        for (unsigned step = 0; step < min(STAGES, steps); step++) fill(step, step, full[step]);
    }
    // A warp, in each step: the thread that fills has it called for the stage of LAG steps before, once the others have
    // left that too.
    template <typename Fill>
    __device__ __forceinline__ void go_on(bool fills, unsigned step, unsigned steps, Fill fill) {
        const unsigned next = step - LAG + STAGES, stage = next % STAGES;
        if (fills && step >= LAG && next < steps) {
            barrier_wait(empty[stage], next / STAGES - 1 & 1);
            fill(next, stage, full[stage]);
        }
        __syncwarp();
    }
    __device__ __forceinline__ void wait_full(unsigned step) { barrier_wait(full[step % STAGES], step / STAGES & 1); }
    // A thread is through with a stage.
    __device__ __forceinline__ void leave(unsigned step) { barrier_arrive(empty[step % STAGES]); }
    // A warp is, of which no thread has read anything but by products.
    __device__ __forceinline__ void leave_together(unsigned step) {
        if (threadIdx.x % WARP == 0) leave(step);
    }
};

// A step's keys and values of a head.
struct FillKeys {
    bf16 *k, *v;
    const unsigned long long* qkv;
    int C, column, b;

    __device__ __forceinline__ void operator()(unsigned step, unsigned stage, Barrier& full) const {
        barrier_arrive_expecting(full, 2 * HEAD_BYTES);
        load_rows(k + stage * HEAD, qkv, C + column, step * ROWS, b, full);
        load_rows(v + stage * HEAD, qkv, 2 * C + column, step * ROWS, b, full);
    }
};

// Of forward: exponentials are relative to the maximum of a row's scores so far, or to one that it exceeds by no more
// than so many powers of two: a warp seldom has to shrink what it has added up then, and fp32 holds far larger sums.
constexpr float SLACK = 8.0f;

// A block takes 64 queries a warpgroup of a head: ceil(T / rows) B NH blocks.
extern "C" __global__ void __launch_bounds__(FORWARD_GROUPS* GROUP, FORWARD_BLOCKS) attention_hopper_forward(
    bf16* __restrict__ out,                      // (B,T,NH,HS)
    float* __restrict__ lse,                     // (B,NH,T)
    const unsigned long long* __restrict__ qkv,  // (16)
    int tail, int B, int T, int NH) {
    DYNAMIC_SHARED(bf16, shared);
    bf16* const q = shared;
    bf16* const k = q + FORWARD_GROUPS * HEAD;  // the stages' keys,
    bf16* const v = k + FORWARD_STAGES * HEAD;  // and values
    __shared__ Ring<FORWARD_STAGES, FORWARD_GROUPS> ring;
    __shared__ Barrier queries;

    const int shares = (T - 1) / (FORWARD_GROUPS * ROWS) + 1;
    const Task task(B, NH, shares, tail);
    const int group = FORWARD_GROUPS > 1 ? warpgroup() : 0, C = NH * HS, column = task.column, b = task.b;
    const int block = (shares - 1 - task.share) * FORWARD_GROUPS * ROWS;  // its first query
    const int end = min(block + FORWARD_GROUPS * ROWS, T), all_steps = (end - 1) / ROWS + 1;
    const FillKeys fill = {k, v, qkv, C, column, b};
    const bool fills = threadIdx.x == 0;
    ring.make(FORWARD_GROUPS * GROUP / WARP, queries);
    if (fills) {
        barrier_arrive_expecting(queries, FORWARD_GROUPS * HEAD_BYTES);
        for (int i = 0; i < FORWARD_GROUPS; i++) load_rows(q + i * HEAD, qkv, column, block + i * ROWS, b, queries);
        ring.begin(all_steps, fill);
    }

    const int first = block + group * ROWS;  // the warpgroup's first query
    bf16* const mine = q + group * HEAD;
    const unsigned long long q_factor = head_factor(mine), k_factor = head_factor(k), v_factor = head_factor(v);
    barrier_wait(queries, 0);
    const float scale = LOG2E * rsqrtf(static_cast<float>(HS));  // of scores, whose exponentials have base 2
    Tile<HS> o;
    float top0 = -INF, top1 = -INF, total0 = 0.0f, total1 = 0.0f;
    // Where all its queries lie beyond T a warpgroup goes along: every warp must leave a stage.
    const int last = min(first, end - 1) / ROWS;
    for (int step = 0; step <= last; step++) {
        const int now = step % FORWARD_STAGES * HEAD_BYTES;
        Tile<ROWS> s;
        ring.wait_full(step);
        products_begin();
        multiply_transposed(s, q_factor, behind(k_factor, now));
        products_commit();
        ring.go_on(fills, step, all_steps, fill);
        products_wait<0>();
        products_done(s.x);

        if (step * ROWS == first) {
            const int seen = row_in_group() - tile_column(0);  // of its columns, the last one that the first row sees
#pragma unroll
            for (int n = 0; n < ROWS / 8; n++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    if (8 * n + i > seen) s.x[n][i] = -INF;
                    if (8 * n + i > seen + 8) s.x[n][i + 2] = -INF;
                }
        }
        float higher0 = top0, higher1 = top1;
#pragma unroll
        for (int n = 0; n < ROWS / 8; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                higher0 = fmaxf(higher0, s.x[n][i]);
                higher1 = fmaxf(higher1, s.x[n][i + 2]);
            }
        higher0 = row_max(higher0);  // finite: every query sees key 0, which is in the first step
        higher1 = row_max(higher1);
        if (__any_sync(ALL_LANES, fmaxf(higher0 - top0, higher1 - top1) * scale > SLACK)) {
            const float shrink0 = exp2_fast((top0 - higher0) * scale), shrink1 = exp2_fast((top1 - higher1) * scale);
            top0 = higher0;
            top1 = higher1;
            total0 *= shrink0;
            total1 *= shrink1;
#pragma unroll
            for (int n = 0; n < HS / 8; n++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    o.x[n][i] *= shrink0;
                    o.x[n][i + 2] *= shrink1;
                }
        }
        const float offset0 = top0 * scale, offset1 = top1 * scale;
#pragma unroll
        for (int n = 0; n < ROWS / 8; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                total0 += s.x[n][i] = exp2_fast(s.x[n][i] * scale - offset0);
                total1 += s.x[n][i + 2] = exp2_fast(s.x[n][i + 2] * scale - offset1);
            }
        unsigned p[ROWS / 16][4];
        as_factors(p, s);
        products_begin();
        add_product(o, p, behind(v_factor, now));
        products_commit();
        products_wait<0>();
        products_done(o.x);
        products_done(p);
        ring.leave_together(step);
    }
    total0 = row_sum(total0);
    total1 = row_sum(total1);
    store_tile(out + static_cast<size_t>(b) * T * C + column, C, first, T, mine, o, 1.0f / total0, 1.0f / total1);
    if (threadIdx.x % 4 == 0) {
        float* const statistics = lse + static_cast<size_t>(task.head) * T;
        const int row = first + row_in_group();
        if (row < T) statistics[row] = (top0 * scale + log2_fast(total0)) * LN2;
        if (row + 8 < T) statistics[row + 8] = (top1 * scale + log2_fast(total1)) * LN2;
    }
}

// A row of a head, shared out among the four lanes that have it in a tile.
struct Row {
    Pack x[PACKS / 4];

    __device__ __forceinline__ explicit Row(const bf16* row) {
#pragma unroll
        for (int i = 0; i < PACKS / 4; i++) x[i] = load(row + (4 * i + threadIdx.x % 4) * PACK);
    }
    // sum_hs(x * y), y a row of 64 in shared memory.
    __device__ __forceinline__ float dot(const bf16* rows, int row) const {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < PACKS / 4; i++) {
            const Pack y = load(rows + place(row, (4 * i + threadIdx.x % 4) * PACK));
#pragma unroll
            for (int j = 0; j < PACK; j++) sum += x[i].x[j] * y.x[j];
        }
        return row_sum(sum);
    }
};

// The gradients of 64 queries a warpgroup of a head, and what backward over keys has to know of them: ceil(T / rows) B
// NH blocks.
extern "C" __global__ void __launch_bounds__(Q_GROUPS* GROUP, Q_BLOCKS) attention_hopper_backward_q(
    bf16* __restrict__ dqkv,                      // (B,T,3,NH,HS)
    float* __restrict__ statistics,               // (B,NH,blocks,2,64): lse, in base 2, and D
    const unsigned long long* __restrict__ dout,  // (16)
    const unsigned long long* __restrict__ qkv,   // (16)
    const bf16* __restrict__ out,                 // (B,T,NH,HS)
    const float* __restrict__ lse,                // (B,NH,T)
    int blocks, int tail, int B, int T, int NH) {
    DYNAMIC_SHARED(bf16, shared);
    bf16* const q = shared;
    bf16* const dy = q + Q_GROUPS * HEAD;
    bf16* const k = dy + Q_GROUPS * HEAD;  // the stages' keys,
    bf16* const v = k + Q_STAGES * HEAD;   // and values
    __shared__ Ring<Q_STAGES, Q_GROUPS> ring;
    __shared__ Barrier queries;

    const int shares = (T - 1) / (Q_GROUPS * ROWS) + 1;
    const Task task(B, NH, shares, tail);
    const int group = warpgroup(), C = NH * HS, column = task.column, b = task.b;
    const int block = (shares - 1 - task.share) * Q_GROUPS * ROWS;  // its first query
    const int end = min(block + Q_GROUPS * ROWS, T), all_steps = (end - 1) / ROWS + 1;
    const FillKeys fill = {k, v, qkv, C, column, b};
    const bool fills = threadIdx.x == 0;
    ring.make(Q_GROUPS * GROUP / WARP, queries);
    if (fills) {
        barrier_arrive_expecting(queries, Q_GROUPS * 2 * HEAD_BYTES);
        for (int i = 0; i < Q_GROUPS; i++) {
            load_rows(q + i * HEAD, qkv, column, block + i * ROWS, b, queries);
            load_rows(dy + i * HEAD, dout, column, block + i * ROWS, b, queries);
        }
        ring.begin(all_steps, fill);
    }

    const int first = block + group * ROWS;  // the warpgroup's first query
    bf16 *const my_q = q + group * HEAD, *const my_dy = dy + group * HEAD;
    const int row = row_in_group(), row0 = first + row, row1 = row0 + 8;
    const size_t head = task.head;
    const float* const head_lse = lse + head * T;
    const bf16* const head_out = out + static_cast<size_t>(b) * T * C + column;
    // Of rows beyond T P is zero; as dout is, any row of out will do.
    const float lse0 = row0 < T ? head_lse[row0] * LOG2E : INF, lse1 = row1 < T ? head_lse[row1] * LOG2E : INF;
    const Row out0(head_out + static_cast<size_t>(min(row0, T - 1)) * C);
    const Row out1(head_out + static_cast<size_t>(min(row1, T - 1)) * C);
    barrier_wait(queries, 0);
    const float D0 = out0.dot(my_dy, row), D1 = out1.dot(my_dy, row + 8);
    if (threadIdx.x % 4 == 0 && first < T) {
        float* const mine = statistics + (head * blocks + first / ROWS) * 2 * ROWS + row;
        mine[0] = lse0;
        mine[8] = lse1;
        mine[ROWS] = D0;
        mine[ROWS + 8] = D1;
    }
    const unsigned long long q_factor = head_factor(my_q), dy_factor = head_factor(my_dy);
    const unsigned long long k_factor = head_factor(k), v_factor = head_factor(v);
    const float scale = rsqrtf(static_cast<float>(HS));
    Tile<HS> dq;
    // Where all its queries lie beyond T a warpgroup goes along: every warp must leave a stage.
    const int last = min(first, end - 1) / ROWS;
    for (int step = 0; step <= last; step++) {
        const int now = step % Q_STAGES * HEAD_BYTES;
        Tile<ROWS> p, ds;
        ring.wait_full(step);
        products_begin();
        multiply_transposed(p, q_factor, behind(k_factor, now));
        products_commit();
        products_begin();
        multiply_transposed(ds, dy_factor, behind(v_factor, now));
        products_commit();
        ring.go_on(fills, step, all_steps, fill);
        products_wait<1>();
        products_done(p.x);
#pragma unroll
        for (int n = 0; n < ROWS / 8; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                p.x[n][i] = exp2_fast(p.x[n][i] * (scale * LOG2E) - lse0);
                p.x[n][i + 2] = exp2_fast(p.x[n][i + 2] * (scale * LOG2E) - lse1);
            }
        if (step * ROWS == first) {
            const int seen = row - tile_column(0);
#pragma unroll
            for (int n = 0; n < ROWS / 8; n++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    if (8 * n + i > seen) p.x[n][i] = 0.0f;
                    if (8 * n + i > seen + 8) p.x[n][i + 2] = 0.0f;
                }
        }
        products_wait<0>();
        products_done(ds.x);
        unsigned left_ds[ROWS / 16][4];
#pragma unroll
        for (int n = 0; n < ROWS / 8; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                ds.x[n][i] = p.x[n][i] * (ds.x[n][i] - D0);
                ds.x[n][i + 2] = p.x[n][i + 2] * (ds.x[n][i + 2] - D1);
            }
        as_factors(left_ds, ds);
        products_begin();
        add_product(dq, left_ds, behind(k_factor, now));
        products_commit();
        products_wait<0>();
        products_done(dq.x);
        products_done(left_ds);
        ring.leave_together(step);
    }
    const size_t pitch = 3 * static_cast<size_t>(C);
    store_tile(dqkv + b * T * pitch + column, pitch, first, T, my_q, dq, scale, scale);
}

// The gradients of 64 keys and values of a head: ceil(T / 64) B NH blocks. Scores are transposed here: rows are keys,
// columns queries.
extern "C" __global__ void __launch_bounds__(GROUP, KV_BLOCKS) attention_hopper_backward_kv(
    bf16* __restrict__ dqkv,                      // (B,T,3,NH,HS)
    const unsigned long long* __restrict__ dout,  // (16)
    const unsigned long long* __restrict__ qkv,   // (16)
    const float* __restrict__ statistics,         // (B,NH,blocks,2,64), of backward over queries
    int blocks, int tail, int B, int T, int NH) {
    DYNAMIC_SHARED(bf16, shared);
    bf16* const k = shared;
    bf16* const v = k + HEAD;
    bf16* const q = v + HEAD;               // the stages' queries,
    bf16* const dy = q + KV_STAGES * HEAD;  // and the gradients of their outputs
    __shared__ Ring<KV_STAGES, 1> ring;
    __shared__ Barrier keys;
    __shared__ __align__(16) float queries[KV_STAGES][2][ROWS];  // their statistics

    const Task task(B, NH, blocks, tail);
    const int C = NH * HS, column = task.column, b = task.b, block = task.share;
    const int first = block * ROWS, steps = blocks - block;
    const float* const of_head = statistics + static_cast<size_t>(task.head) * blocks * 2 * ROWS;
    const auto fill = [&](unsigned step, unsigned stage, Barrier& full) {
        constexpr int BYTES = sizeof queries[0];
        const int start = first + step * ROWS;
        barrier_arrive_expecting(full, 2 * HEAD_BYTES + BYTES);
        load_rows(q + stage * HEAD, qkv, column, start, b, full);
        load_rows(dy + stage * HEAD, dout, column, start, b, full);
        copy_bytes(queries[stage], of_head + 2 * start, BYTES, full);
    };
    const bool fills = threadIdx.x == 0;
    ring.make(GROUP, keys);
    if (fills) {
        barrier_arrive_expecting(keys, 2 * HEAD_BYTES);
        load_rows(k, qkv, C + column, first, b, keys);
        load_rows(v, qkv, 2 * C + column, first, b, keys);
        ring.begin(steps, fill);
    }

    const unsigned long long k_factor = head_factor(k), v_factor = head_factor(v);
    const unsigned long long q_factor = head_factor(q), dy_factor = head_factor(dy);
    const float scale = rsqrtf(static_cast<float>(HS));
    barrier_wait(keys, 0);
    Tile<HS> dk, dv;
    for (int step = 0; step < steps; step++) {
        const int stage = step % KV_STAGES, now = stage * HEAD_BYTES;
        Tile<ROWS> p, ds;
        ring.wait_full(step);
        products_begin();
        multiply_transposed(p, k_factor, behind(q_factor, now));
        products_commit();
        products_begin();
        multiply_transposed(ds, v_factor, behind(dy_factor, now));
        products_commit();
        ring.go_on(fills, step, steps, fill);
        products_wait<1>();
        products_done(p.x);
#pragma unroll
        for (int n = 0; n < ROWS / 8; n++) {
            const float2 lse = *reinterpret_cast<const float2*>(queries[stage][0] + tile_column(n));
#pragma unroll
            for (int i = 0; i < 4; i++) p.x[n][i] = exp2_fast(p.x[n][i] * (scale * LOG2E) - (i % 2 ? lse.y : lse.x));
        }
        if (step == 0) {
            const int seen = row_in_group() - tile_column(0);  // of its columns, the first one that sees the first row
#pragma unroll
            for (int n = 0; n < ROWS / 8; n++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    if (8 * n + i < seen) p.x[n][i] = 0.0f;
                    if (8 * n + i < seen + 8) p.x[n][i + 2] = 0.0f;
                }
        }
        unsigned left_p[ROWS / 16][4];
        as_factors(left_p, p);
        products_begin();
        add_product(dv, left_p, behind(dy_factor, now));
        products_commit();
        products_wait<1>();
        products_done(ds.x);
#pragma unroll
        for (int n = 0; n < ROWS / 8; n++) {
            const float2 D = *reinterpret_cast<const float2*>(queries[stage][1] + tile_column(n));
#pragma unroll
            for (int i = 0; i < 4; i++) ds.x[n][i] = p.x[n][i] * (ds.x[n][i] - (i % 2 ? D.y : D.x));
        }
        unsigned left_ds[ROWS / 16][4];
        as_factors(left_ds, ds);
        products_begin();
        add_product(dk, left_ds, behind(q_factor, now));
        products_commit();
        products_wait<0>();
        products_done(dv.x);
        products_done(left_p);
        products_done(dk.x);
        products_done(left_ds);
        ring.leave(step);  // each thread: it has read lse and D
    }
    const size_t pitch = 3 * static_cast<size_t>(C);
    bf16* const dhead = dqkv + b * T * pitch + column;
    store_tile(dhead + C, pitch, first, T, k, dk, scale, scale);
    store_tile(dhead + 2 * C, pitch, first, T, v, dv, 1.0f, 1.0f);
}
