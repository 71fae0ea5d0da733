// attention.cu for Hopper: the same mathematics and the same two kernels backward, with the products of a warpgroup and
// with the tensor memory accelerator (after FlashAttention-3, Shah et al. 2024, arXiv 2407.08608). That over queries
// comes first here, and leaves D.
//
// A block has some warpgroups of 64 rows each, and one more, of which one warp keeps a ring of stages in shared memory
// filled with what the others go through; they share it, each at its own pace. All that a product makes stays in
// registers: of a product's result, rounded to bf16, the next product's left factor is made in place.
//
// target: sm_90a alone
// variants: HS = 64, 128
#include <attention.cuh>
#include <hopper.cuh>

// Of each kernel: warpgroups of a block, but the one that fills the stages; blocks that a multiprocessor has room for
// at a time; registers of each of those warpgroups' threads.
#if HS == 64
constexpr int FORWARD_GROUPS = 2, FORWARD_BLOCKS = 2, FORWARD_REGISTERS = 104;
constexpr int KV_GROUPS = 1, KV_BLOCKS = 2, KV_REGISTERS = 224;
constexpr int Q_GROUPS = 1, Q_BLOCKS = 3, Q_REGISTERS = 128;
#else
constexpr int FORWARD_GROUPS = 2, FORWARD_BLOCKS = 1, FORWARD_REGISTERS = 232;
constexpr int KV_GROUPS = 2, KV_BLOCKS = 1, KV_REGISTERS = 232;
constexpr int Q_GROUPS = 2, Q_BLOCKS = 1, Q_REGISTERS = 232;
#endif
constexpr int STAGES = 3;

constexpr int GROUP = 128;       // threads
constexpr int ROWS = 64;         // of a warpgroup, of a box, and of a stage
constexpr int BOX = ROWS * 64;   // elements: it has 64 columns
constexpr int HEAD = ROWS * HS;  // elements of 64 rows of a head: boxes, side by side
constexpr int HEAD_BYTES = HEAD * 2;
constexpr int PACKS = HS / PACK;  // of a row; fewer than lanes, which share out a warp's rows

constexpr int FORWARD_THREADS = (FORWARD_GROUPS + 1) * GROUP, KV_THREADS = (KV_GROUPS + 1) * GROUP,
              Q_THREADS = (Q_GROUPS + 1) * GROUP;

// Of the warpgroup that fills the stages. What it gives back is all that the others can take: more, and they wait for
// ever.
constexpr int KEPT_REGISTERS = 32;
__device__ constexpr bool are_there(int groups, int blocks, int registers) {
    return groups * registers + KEPT_REGISTERS <= 65536 / (blocks * (groups + 1) * GROUP) / 8 * 8 * (groups + 1);
}
static_assert(are_there(FORWARD_GROUPS, FORWARD_BLOCKS, FORWARD_REGISTERS), "forward");
static_assert(are_there(KV_GROUPS, KV_BLOCKS, KV_REGISTERS), "backward_kv");
static_assert(are_there(Q_GROUPS, Q_BLOCKS, Q_REGISTERS), "backward_q");
// The first warpgroup leaves out the last steps, those of the queries after its own, and the filling warp waits for it
// in those before that many stages.
static_assert(STAGES >= FORWARD_GROUPS && STAGES >= Q_GROUPS, "or a stage is waited for that nobody leaves");

// One thread: 64 rows of a head, zeros for rows from T on, whose bytes arrive at the barrier.
__device__ __forceinline__ void load_rows(
    bf16* rows, const unsigned long long* map, int column, int first, Barrier& barrier) {
#pragma unroll
    for (int i = 0; i < HS; i += 64) copy_box(rows + i * ROWS, map, column + i, first, blockIdx.z, barrier);
}

// Where 8 columns of a row are, in 64 rows of a head.
__device__ __forceinline__ int place(int row, int column) {
    return column / 64 * BOX + row * 64 + (column % 64 / 8 ^ row % 8) * 8;
}

// Which warpgroup the thread is of: the same register for a whole warp, for addresses that all of it shares.
__device__ __forceinline__ int warpgroup() { return __shfl_sync(ALL_LANES, threadIdx.x / GROUP, 0); }

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

// A warp's tile * scale to its 16 of the 64 rows from `first` on, by way of its own rows of shared memory. Returns, of
// the columns that this lane has stored, the sums over the rows that it has, rounded as they are in memory.
__device__ __forceinline__ Pack
store_tile(bf16* head, size_t pitch, int first, int T, bf16* rows, const Tile<HS>& tile, float scale0, float scale1) {
    const int lane = threadIdx.x % WARP, mine = threadIdx.x / WARP % 4 * 16;
    __syncwarp();  // the other lanes may still read what lay there
#pragma unroll
    for (int n = 0; n < HS / 8; n++) {
        const int row = mine + tile_row(), column = 2 * (lane % 4);
        *reinterpret_cast<unsigned*>(rows + place(row, 8 * n) + column) =
            pack_bf16(tile.x[n][0] * scale0, tile.x[n][1] * scale0);
        *reinterpret_cast<unsigned*>(rows + place(row + 8, 8 * n) + column) =
            pack_bf16(tile.x[n][2] * scale1, tile.x[n][3] * scale1);
    }
    __syncwarp();
    Pack sum = {};
#pragma unroll
    for (int i = lane; i < 16 * PACKS; i += WARP) {
        const int row = mine + i / PACKS, column = i % PACKS * PACK;
        if (first + row < T) {
            const bf16* const pack = rows + place(row, column);
            const Pack p = load(pack);
#pragma unroll
            for (int j = 0; j < PACK; j++) sum.x[j] += p.x[j];
            *reinterpret_cast<uint4*>(head + (first + row) * pitch + column) = *reinterpret_cast<const uint4*>(pack);
        }
    }
    return sum;
}

// Where the warps of a warpgroup put the sums of the columns of the 16 rows that each has of some tiles.
template <int TILES>
struct ColumnSums {
    __align__(16) float x[GROUP / WARP][TILES][HS];
    Barrier complete;

    // The thread that makes the ring, before it does.
    __device__ __forceinline__ void make() { barrier_make(complete, GROUP); }
    // A warp, of what store_tile returned.
    __device__ __forceinline__ void put(int tile, Pack sum) {
        const int lane = threadIdx.x % WARP;
#pragma unroll
        for (int offset = PACKS; offset < WARP; offset *= 2)  // the lanes that have the same columns of other rows
#pragma unroll
            for (int i = 0; i < PACK; i++) sum.x[i] += __shfl_xor_sync(ALL_LANES, sum.x[i], offset);
        if (lane < PACKS) store(x[threadIdx.x / WARP % 4][tile] + lane * PACK, sum);
    }
    // The warpgroup, once: the sums over its 64 rows. `out`: the first tile's columns, those of the next C behind.
    __device__ __forceinline__ void store_sums(float* out, int C) {
        barrier_arrive(complete);  // every thread: each has the others' writes before it then
        barrier_wait(complete, 0);
#pragma unroll
        for (int i = threadIdx.x % GROUP; i < TILES * HS; i += GROUP) {
            float sum = 0.0f;
#pragma unroll
            for (int warp = 0; warp < GROUP / WARP; warp++) sum += x[warp][i / HS][i % HS];
            out[i / HS * C + i % HS] = sum;
        }
    }
};

// The ring of stages. The filling warp waits until a stage is empty, the others until it is full.
struct Ring {
    Barrier full[STAGES], empty[STAGES];

    // All threads: for so many threads that fill, and that leave, and a barrier besides for what each warpgroup has for
    // itself.
    __device__ __forceinline__ void make(int fillers, int leavers, Barrier& own) {
        if (threadIdx.x == 0) {
            for (int i = 0; i < STAGES; i++) {
                barrier_make(full[i], fillers);
                barrier_make(empty[i], leavers);
            }
            barrier_make(own, 1);
            barriers_made();
        }
        __syncthreads();
    }
    __device__ __forceinline__ void wait_empty(int step) {
        if (step >= STAGES) barrier_wait(empty[step % STAGES], step / STAGES - 1 & 1);
    }
    __device__ __forceinline__ void wait_full(int step) { barrier_wait(full[step % STAGES], step / STAGES & 1); }
    // A thread is through with a stage.
    __device__ __forceinline__ void leave(int step) { barrier_arrive(empty[step % STAGES]); }
    // A warp is.
    __device__ __forceinline__ void leave_together(int step) {
        __syncwarp();
        if (threadIdx.x % WARP == 0) leave(step);
    }
};

// Of forward: exponentials are relative to the maximum of a row's scores so far, or to one that it exceeds by no more
// than so many powers of two: a warp seldom has to shrink what it has added up then, and fp32 holds far larger sums.
constexpr float SLACK = 8.0f;

// The filling thread: keys and values of a head up to `end`, stage by stage.
__device__ __forceinline__ void load_keys(
    Ring& ring, bf16* k, bf16* v, const unsigned long long* qkv, int C, int column, int end) {
    for (int step = 0; step * ROWS < end; step++) {
        const int stage = step % STAGES;
        ring.wait_empty(step);
        barrier_arrive_expecting(ring.full[stage], 2 * HEAD_BYTES);
        load_rows(k + stage * HEAD, qkv, C + column, step * ROWS, ring.full[stage]);
        load_rows(v + stage * HEAD, qkv, 2 * C + column, step * ROWS, ring.full[stage]);
    }
}

// A block takes 64 queries a warpgroup of a head: blocks (ceil(T / rows), NH, B), those with the most keys first.
extern "C" __global__ void __launch_bounds__(FORWARD_THREADS, FORWARD_BLOCKS) attention_hopper_forward(
    bf16* __restrict__ out,                      // (B,T,NH,HS)
    float* __restrict__ lse,                     // (B,NH,T)
    const unsigned long long* __restrict__ qkv,  // (16)
    int B, int T, int NH) {
    DYNAMIC_SHARED(bf16, shared);
    bf16* const q = shared;
    bf16* const k = q + FORWARD_GROUPS * HEAD;  // the stages' keys,
    bf16* const v = k + STAGES * HEAD;          // and values
    __shared__ Ring ring;
    __shared__ Barrier queries;

    const int group = warpgroup(), C = NH * HS, column = blockIdx.y * HS;
    const int block = (gridDim.x - 1 - blockIdx.x) * FORWARD_GROUPS * ROWS;  // its first query
    const int end = min(block + FORWARD_GROUPS * ROWS, T);
    ring.make(1, FORWARD_GROUPS * GROUP / WARP, queries);

    if (group == FORWARD_GROUPS) {
        keep_registers<KEPT_REGISTERS>();
        if (threadIdx.x % GROUP) return;
        barrier_arrive_expecting(queries, FORWARD_GROUPS * HEAD_BYTES);
        for (int i = 0; i < FORWARD_GROUPS; i++) load_rows(q + i * HEAD, qkv, column, block + i * ROWS, queries);
        load_keys(ring, k, v, qkv, C, column, end);
        return;
    }
    take_registers<FORWARD_REGISTERS>();

    const int first = block + group * ROWS;  // the warpgroup's first query
    bf16* const mine = q + group * HEAD;
    const unsigned long long q_factor = head_factor(mine), k_factor = head_factor(k), v_factor = head_factor(v);
    barrier_wait(queries, 0);
    const float scale = LOG2E * rsqrtf(static_cast<float>(HS));  // of scores, whose exponentials have base 2
    Tile<HS> o;
    float top0 = -INF, top1 = -INF, total0 = 0.0f, total1 = 0.0f;
    // Where all its queries lie beyond T a warpgroup goes along: a stage is empty when every warp has left it.
    for (int step = 0; step * ROWS <= first && step * ROWS < end; step++) {
        const int now = step % STAGES * HEAD_BYTES;
        Tile<ROWS> s;
        ring.wait_full(step);
        products_begin();
        multiply_transposed(s, q_factor, behind(k_factor, now));
        products_commit();
        products_wait<0>();
        products_done(s.x);

        if (step * ROWS == first) {
#pragma unroll
            for (int n = 0; n < ROWS / 8; n++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int key = tile_column(n) + i, query = threadIdx.x / WARP % 4 * 16 + tile_row();
                    if (key > query) s.x[n][i] = -INF;
                    if (key > query + 8) s.x[n][i + 2] = -INF;
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
    store_tile(
        out + static_cast<size_t>(blockIdx.z) * T * C + column, C, first, T, mine, o, 1.0f / total0, 1.0f / total1);
    if (threadIdx.x % 4 == 0) {
        float* const statistics = lse + (static_cast<size_t>(blockIdx.z) * NH + blockIdx.y) * T;
        const int row = first + threadIdx.x / WARP % 4 * 16 + tile_row();
        if (row < T) statistics[row] = top0 * scale / LOG2E + logf(total0);
        if (row + 8 < T) statistics[row + 8] = top1 * scale / LOG2E + logf(total1);
    }
}

// Where the sums of the 64 rows from `first` on go.
__device__ __forceinline__ float* row_of_partial(float* partial, int blocks, int first, int C) {
    return partial + (static_cast<size_t>(blockIdx.z) * blocks + first / ROWS) * 3 * C;
}

// The gradients of 64 keys and values a warpgroup of a head: blocks (ceil(T / rows), NH, B), those with the most
// queries first. Scores are transposed here: rows are keys, columns queries.
extern "C" __global__ void __launch_bounds__(KV_THREADS, KV_BLOCKS) attention_hopper_backward_kv(
    bf16* __restrict__ dqkv,                      // (B,T,3,NH,HS)
    float* __restrict__ partial,                  // (B,blocks,3,NH,HS)
    const unsigned long long* __restrict__ dout,  // (16)
    const unsigned long long* __restrict__ qkv,   // (16)
    const float* __restrict__ lse,                // (B,NH,T)
    const float* __restrict__ D,                  // (B,NH,T)
    int blocks, int B, int T, int NH) {
    DYNAMIC_SHARED(bf16, shared);
    bf16* const k = shared;
    bf16* const v = k + KV_GROUPS * HEAD;
    bf16* const q = v + KV_GROUPS * HEAD;  // the stages' queries,
    bf16* const dy = q + STAGES * HEAD;    // and the gradients of their outputs
    __shared__ Ring ring;
    __shared__ Barrier keys;
    __shared__ __align__(8) float query_lse[STAGES][ROWS], query_D[STAGES][ROWS];  // lse in base 2
    __shared__ ColumnSums<2> sums[KV_GROUPS];

    const int group = warpgroup(), C = NH * HS, column = blockIdx.y * HS;
    const int block = blockIdx.x * KV_GROUPS * ROWS;  // its first key
    const size_t head = (static_cast<size_t>(blockIdx.z) * NH + blockIdx.y) * T;
    if (threadIdx.x == 0)
        for (int i = 0; i < KV_GROUPS; i++) sums[i].make();
    ring.make(WARP, KV_GROUPS * GROUP, keys);

    if (group == KV_GROUPS) {
        keep_registers<KEPT_REGISTERS>();
        const int lane = threadIdx.x % GROUP;
        if (lane >= WARP) return;
        if (lane == 0) {
            barrier_arrive_expecting(keys, 2 * KV_GROUPS * HEAD_BYTES);
            for (int i = 0; i < KV_GROUPS; i++) {
                load_rows(k + i * HEAD, qkv, C + column, block + i * ROWS, keys);
                load_rows(v + i * HEAD, qkv, 2 * C + column, block + i * ROWS, keys);
            }
        }
        for (int step = 0; block + step * ROWS < T; step++) {
            const int stage = step % STAGES, start = block + step * ROWS;
            ring.wait_empty(step);
            for (int i = lane; i < ROWS; i += WARP) {
                const size_t at = head + start + i;
                // P is 1 beyond the last query, and the rows of dout that it is multiplied by are zero.
                query_lse[stage][i] = start + i < T ? lse[at] * LOG2E : 0.0f;
                query_D[stage][i] = start + i < T ? D[at] : 0.0f;
            }
            // Each lane arrives for what it has written.
            if (lane == 0) {
                barrier_arrive_expecting(ring.full[stage], 2 * HEAD_BYTES);
                load_rows(q + stage * HEAD, qkv, column, start, ring.full[stage]);
                load_rows(dy + stage * HEAD, dout, column, start, ring.full[stage]);
            } else {
                barrier_arrive(ring.full[stage]);
            }
        }
        return;
    }
    take_registers<KV_REGISTERS>();

    const int first = block + group * ROWS;  // the warpgroup's first key
    bf16 *const my_k = k + group * HEAD, *const my_v = v + group * HEAD;
    const unsigned long long k_factor = head_factor(my_k), v_factor = head_factor(my_v);
    const unsigned long long q_factor = head_factor(q), dy_factor = head_factor(dy);
    barrier_wait(keys, 0);
    const float scale = rsqrtf(static_cast<float>(HS));
    Tile<HS> dk, dv;
    for (int step = 0; block + step * ROWS < T; step++) {
        const int stage = step % STAGES, now = stage * HEAD_BYTES;
        ring.wait_full(step);
        if (step >= group) {  // else the queries come before all keys
            Tile<ROWS> p, ds;
            products_begin();
            multiply_transposed(p, k_factor, behind(q_factor, now));
            products_commit();
            products_begin();
            multiply_transposed(ds, v_factor, behind(dy_factor, now));
            products_commit();
            products_wait<1>();
            products_done(p.x);
#pragma unroll
            for (int n = 0; n < ROWS / 8; n++) {
                const float2 both = *reinterpret_cast<const float2*>(query_lse[stage] + tile_column(n));
#pragma unroll
                for (int i = 0; i < 4; i++)
                    p.x[n][i] = exp2_fast(p.x[n][i] * (scale * LOG2E) - (i % 2 ? both.y : both.x));
            }
            if (step == group) {
#pragma unroll
                for (int n = 0; n < ROWS / 8; n++)
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        const int query = tile_column(n) + i, key = threadIdx.x / WARP % 4 * 16 + tile_row();
                        if (key > query) p.x[n][i] = 0.0f;
                        if (key + 8 > query) p.x[n][i + 2] = 0.0f;
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
                const float2 both = *reinterpret_cast<const float2*>(query_D[stage] + tile_column(n));
#pragma unroll
                for (int i = 0; i < 4; i++) ds.x[n][i] = p.x[n][i] * (ds.x[n][i] - (i % 2 ? both.y : both.x));
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
        }
        ring.leave(step);  // each thread: it has read lse and D
    }
    const size_t pitch = 3 * static_cast<size_t>(C);
    bf16* const dhead = dqkv + blockIdx.z * T * pitch + column;
    sums[group].put(0, store_tile(dhead + C, pitch, first, T, my_k, dk, scale, scale));
    sums[group].put(1, store_tile(dhead + 2 * C, pitch, first, T, my_v, dv, 1.0f, 1.0f));
    if (first < T) sums[group].store_sums(row_of_partial(partial, blocks, first, C) + C + column, C);
}

// D = sum_hs(dout * out) of a row, by the four lanes that share it in a tile; dout lies in shared memory.
__device__ __forceinline__ float row_dot(const bf16* dy, int row, const bf16* out) {
    float sum = 0.0f;
#pragma unroll
    for (int c = threadIdx.x % 4 * PACK; c < HS; c += 4 * PACK) {
        const Pack p = load(dy + place(row, c)), q = load(out + c);
#pragma unroll
        for (int i = 0; i < PACK; i++) sum += p.x[i] * q.x[i];
    }
    return row_sum(sum);
}

// The gradients of 64 queries a warpgroup of a head, and their D: blocks (ceil(T / rows), NH, B), those with the most
// keys first.
extern "C" __global__ void __launch_bounds__(Q_THREADS, Q_BLOCKS) attention_hopper_backward_q(
    bf16* __restrict__ dqkv,                      // (B,T,3,NH,HS)
    float* __restrict__ partial,                  // (B,blocks,3,NH,HS)
    float* __restrict__ D,                        // (B,NH,T)
    const unsigned long long* __restrict__ dout,  // (16)
    const unsigned long long* __restrict__ qkv,   // (16)
    const bf16* __restrict__ out,                 // (B,T,NH,HS)
    const float* __restrict__ lse,                // (B,NH,T)
    int blocks, int B, int T, int NH) {
    DYNAMIC_SHARED(bf16, shared);
    bf16* const q = shared;
    bf16* const dy = q + Q_GROUPS * HEAD;
    bf16* const k = dy + Q_GROUPS * HEAD;  // the stages' keys,
    bf16* const v = k + STAGES * HEAD;     // and values
    __shared__ Ring ring;
    __shared__ Barrier queries;
    __shared__ ColumnSums<1> sums[Q_GROUPS];

    const int group = warpgroup(), C = NH * HS, column = blockIdx.y * HS;
    const int block = (gridDim.x - 1 - blockIdx.x) * Q_GROUPS * ROWS;  // its first query
    const int end = min(block + Q_GROUPS * ROWS, T);
    if (threadIdx.x == 0)
        for (int i = 0; i < Q_GROUPS; i++) sums[i].make();
    ring.make(1, Q_GROUPS * GROUP / WARP, queries);

    if (group == Q_GROUPS) {
        keep_registers<KEPT_REGISTERS>();
        if (threadIdx.x % GROUP) return;
        barrier_arrive_expecting(queries, 2 * Q_GROUPS * HEAD_BYTES);
        for (int i = 0; i < Q_GROUPS; i++) {
            load_rows(q + i * HEAD, qkv, column, block + i * ROWS, queries);
            load_rows(dy + i * HEAD, dout, column, block + i * ROWS, queries);
        }
        load_keys(ring, k, v, qkv, C, column, end);
        return;
    }
    take_registers<Q_REGISTERS>();

    const int first = block + group * ROWS;  // the warpgroup's first query
    bf16 *const my_q = q + group * HEAD, *const my_dy = dy + group * HEAD;
    const size_t head = (static_cast<size_t>(blockIdx.z) * NH + blockIdx.y) * T;
    const int row = threadIdx.x / WARP % 4 * 16 + tile_row(), row0 = first + row, row1 = row0 + 8;
    const float lse0 = row0 < T ? lse[head + row0] * LOG2E : INF, lse1 = row1 < T ? lse[head + row1] * LOG2E : INF;
    barrier_wait(queries, 0);
    // Of rows beyond T, where dout is zero, any row of out will do.
    const bf16* const head_out = out + static_cast<size_t>(blockIdx.z) * T * C + column;
    const float D0 = row_dot(my_dy, row, head_out + static_cast<size_t>(min(row0, T - 1)) * C);
    const float D1 = row_dot(my_dy, row + 8, head_out + static_cast<size_t>(min(row1, T - 1)) * C);
    if (threadIdx.x % 4 == 0) {
        if (row0 < T) D[head + row0] = D0;
        if (row1 < T) D[head + row1] = D1;
    }
    const unsigned long long q_factor = head_factor(my_q), dy_factor = head_factor(my_dy);
    const unsigned long long k_factor = head_factor(k), v_factor = head_factor(v);
    const float scale = rsqrtf(static_cast<float>(HS));
    Tile<HS> dq;
    for (int step = 0; step * ROWS <= first && step * ROWS < end; step++) {
        const int now = step % STAGES * HEAD_BYTES;
        Tile<ROWS> p, ds;
        ring.wait_full(step);
        products_begin();
        multiply_transposed(p, q_factor, behind(k_factor, now));
        products_commit();
        products_begin();
        multiply_transposed(ds, dy_factor, behind(v_factor, now));
        products_commit();
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
#pragma unroll
            for (int n = 0; n < ROWS / 8; n++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int key = step * ROWS + tile_column(n) + i;
                    if (key > row0) p.x[n][i] = 0.0f;
                    if (key > row1) p.x[n][i + 2] = 0.0f;
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
    sums[group].put(0, store_tile(dqkv + blockIdx.z * T * pitch + column, pitch, first, T, my_q, dq, scale, scale));
    if (first < T) sums[group].store_sums(row_of_partial(partial, blocks, first, C) + column, C);
}
