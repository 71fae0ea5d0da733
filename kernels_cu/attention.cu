// Causal self-attention (Vaswani et al. 2017, arXiv 1706.03762, section 3.2) that keeps no (T,T) matrix, after
// FlashAttention-2 (Dao 2023, arXiv 2307.08691, algorithms 1 and 2), with mma.sync.
//
// forward   S = q k^T / sqrt(HS), for keys at or before the query      lse = log(sum_k(exp(S)))
//           P = exp(S - lse)      out = P v
//
// backward  P again, from q, k and lse; then with D = sum_hs(dout * out)
//           dv = P^T dout     dP = dout v^T     dS = P * (dP - D)     dq = dS k / sqrt(HS)     dk = dS^T q / sqrt(HS)
//
// Backward is two kernels. One goes over the queries for the sake of some keys, the other over the keys for the sake of
// some queries: both compute S and dP, which is 7 products instead of 5, but every sum stays in the registers of one
// warp, in a fixed order, and there is neither an atomic nor a buffer in fp32.
//
// variants: HS = 16, 32, 64, 80, 96, 128
#include <attention.cuh>

constexpr int ROWS = 64;                       // queries (or keys) of a block, and keys of a step over keys
constexpr int QUERY_STEP = HS > 64 ? 32 : 64;  // queries of a step over queries: registers hold dk and dv besides
constexpr int WARPS = ROWS / 16;               // each has 16 of the block's rows
constexpr int THREADS = WARPS * WARP;
constexpr int STRIDE = HS + PACK;  // of a row in shared memory: so that 8 rows of 16 bytes lie in different banks
// tile += a b^T: a (16, HS) and b (COLUMNS, HS) lie in shared memory.
template <int COLUMNS>
__device__ __forceinline__ void add_product_transposed(Tile<COLUMNS>& tile, const bf16* a, const bf16* b) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int k = 0; k < HS; k += 16) {
        unsigned af[4];
        load_matrices(af, a + lane % 16 * STRIDE + k + lane / 16 * 8);
#pragma unroll
        for (int n = 0; n < COLUMNS; n += 16) {
            unsigned bf[4];
            load_matrices(bf, b + (n + lane / 16 * 8 + lane % 8) * STRIDE + k + lane / 8 % 2 * 8);
            mma_16x8x16(tile.x[n / 8], af, bf[0], bf[1]);
            mma_16x8x16(tile.x[n / 8 + 1], af, bf[2], bf[3]);
        }
    }
}

// tile += a b: a (16, DEPTH) is a tile of accumulators, rounded here to bf16, and b (DEPTH, HS) lies in shared memory.
template <int DEPTH>
__device__ __forceinline__ void add_product(Tile<HS>& tile, const Tile<DEPTH>& a, const bf16* b) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int k = 0; k < DEPTH; k += 16) {
        unsigned af[4];
        as_factor(af, a, k / 16);
#pragma unroll
        for (int n = 0; n < HS; n += 16) {
            unsigned bf[4];
            load_matrices_transposed(bf, b + (k + lane % 16) * STRIDE + n + lane / 16 * 8);
            mma_16x8x16(tile.x[n / 8], af, bf[0], bf[1]);
            mma_16x8x16(tile.x[n / 8 + 1], af, bf[2], bf[3]);
        }
    }
}

// COUNT rows of a head from memory, where they lie `pitch` apart, to shared memory; zeros for rows from T on.
template <int COUNT>
__device__ __forceinline__ void load_rows(bf16* rows, const bf16* head, size_t pitch, int first, int T) {
    constexpr int PACKS = HS / PACK;
    for (int i = threadIdx.x; i < COUNT * PACKS; i += THREADS) {
        const int row = i / PACKS, column = i % PACKS * PACK;
        const bool valid = first + row < T;
        copy_async(rows + row * STRIDE + column, head + (valid ? first + row : 0) * pitch + column, valid);
    }
}

// A warp's tile * scale to memory, by way of 16 rows of shared memory that are this warp's alone: 16 bytes at a time.
__device__ __forceinline__ void store_tile(
    bf16* head, size_t pitch, int first, int T, bf16* rows, const Tile<HS>& tile, float scale0, float scale1) {
    const int lane = threadIdx.x % WARP;
    __syncwarp();  // the other lanes may still read what lay there
#pragma unroll
    for (int n = 0; n < HS / 8; n++) {
        unsigned* const upper = reinterpret_cast<unsigned*>(rows + tile_row() * STRIDE + tile_column(n));
        unsigned* const lower = reinterpret_cast<unsigned*>(rows + (tile_row() + 8) * STRIDE + tile_column(n));
        *upper = pack_bf16(tile.x[n][0] * scale0, tile.x[n][1] * scale0);
        *lower = pack_bf16(tile.x[n][2] * scale1, tile.x[n][3] * scale1);
    }
    __syncwarp();
    constexpr int PACKS = HS / PACK;
    for (int i = lane; i < 16 * PACKS; i += WARP) {
        const int row = i / PACKS, column = i % PACKS * PACK;
        if (first + row < T)
            *reinterpret_cast<uint4*>(head + (first + row) * pitch + column) =
                *reinterpret_cast<const uint4*>(rows + row * STRIDE + column);
    }
}

// A block takes ROWS queries of a head: blocks (ceil(T / ROWS), NH, B), those with the most keys first.
extern "C" __global__ void __launch_bounds__(THREADS) attention_forward(
    bf16* __restrict__ out,        // (B,T,NH,HS)
    float* __restrict__ lse,       // (B,NH,T)
    const bf16* __restrict__ qkv,  // (B,T,3,NH,HS)
    int B, int T, int NH) {
    DYNAMIC_SHARED(bf16, shared);
    bf16* const q = shared;
    bf16* const k = q + ROWS * STRIDE;      // two steps' keys,
    bf16* const v = k + 2 * ROWS * STRIDE;  // and their values

    const int last = gridDim.x - 1 - blockIdx.x, first = last * ROWS, warp = threadIdx.x / WARP;
    const size_t C = static_cast<size_t>(NH) * HS, pitch = 3 * C;
    const bf16* const head = qkv + blockIdx.z * T * pitch + blockIdx.y * HS;
    const float scale = LOG2E * rsqrtf(static_cast<float>(HS));  // of scores, whose exponentials have base 2

    load_rows<ROWS>(q, head, pitch, first, T);
    load_rows<ROWS>(k, head + C, pitch, 0, T);
    load_rows<ROWS>(v, head + 2 * C, pitch, 0, T);
    copy_async_commit();

    Tile<HS> o;
    float top0 = -INF, top1 = -INF, total0 = 0.0f, total1 = 0.0f;
    for (int step = 0; step <= last; step++) {
        const int now = step % 2 * ROWS * STRIDE, next = ROWS * STRIDE - now;
        if (step < last) {
            load_rows<ROWS>(k + next, head + C, pitch, (step + 1) * ROWS, T);
            load_rows<ROWS>(v + next, head + 2 * C, pitch, (step + 1) * ROWS, T);
        }
        copy_async_commit();
        copy_async_wait<1>();
        __syncthreads();

        Tile<ROWS> s;
        add_product_transposed(s, q + warp * 16 * STRIDE, k + now);
        float higher0 = top0, higher1 = top1;
#pragma unroll
        for (int n = 0; n < ROWS / 8; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int key = tile_column(n) + i, query = warp * 16 + tile_row();
                const bool masked0 = step == last && key > query, masked1 = step == last && key > query + 8;
                s.x[n][i] = masked0 ? -INF : s.x[n][i] * scale;
                s.x[n][i + 2] = masked1 ? -INF : s.x[n][i + 2] * scale;
                higher0 = fmaxf(higher0, s.x[n][i]);
                higher1 = fmaxf(higher1, s.x[n][i + 2]);
            }
        higher0 = row_max(higher0);  // finite: every query sees key 0, which is in the first step
        higher1 = row_max(higher1);
        const float shrink0 = exp2f(top0 - higher0), shrink1 = exp2f(top1 - higher1);
        top0 = higher0;
        top1 = higher1;
        total0 *= shrink0;
        total1 *= shrink1;
#pragma unroll
        for (int n = 0; n < ROWS / 8; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                total0 += s.x[n][i] = exp2f(s.x[n][i] - top0);
                total1 += s.x[n][i + 2] = exp2f(s.x[n][i + 2] - top1);
            }
#pragma unroll
        for (int n = 0; n < HS / 8; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                o.x[n][i] *= shrink0;
                o.x[n][i + 2] *= shrink1;
            }
        add_product(o, s, v + now);
        __syncthreads();  // before the next step's copies overwrite what other warps still read
    }
    total0 = row_sum(total0);
    total1 = row_sum(total1);
    const int query = first + warp * 16;
    store_tile(
        out + blockIdx.z * T * C + blockIdx.y * HS, C, query, T, q + warp * 16 * STRIDE, o, 1.0f / total0,
        1.0f / total1);
    if (threadIdx.x % 4 == 0) {
        float* const mine = lse + (static_cast<size_t>(blockIdx.z) * NH + blockIdx.y) * T;
        const int row = query + tile_row();
        if (row < T) mine[row] = top0 / LOG2E + logf(total0);
        if (row + 8 < T) mine[row + 8] = top1 / LOG2E + logf(total1);
    }
}

// D = sum_hs(dout * out), a thread for each (b,t,h).
extern "C" __global__ void attention_backward_d(
    float* __restrict__ D,          // (B,NH,T)
    const bf16* __restrict__ dout,  // (B,T,NH,HS)
    const bf16* __restrict__ out,   // (B,T,NH,HS)
    int B, int T, int NH) {
    const long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= static_cast<long long>(B) * T * NH) return;
    const int h = i % NH, t = i / NH % T, b = i / NH / T;
    float sum = 0.0f;
#pragma unroll
    for (int c = 0; c < HS; c += PACK) {
        const Pack p = load(dout + i * HS + c), q = load(out + i * HS + c);
        for (int k = 0; k < PACK; k++) sum += p.x[k] * q.x[k];
    }
    D[(static_cast<size_t>(b) * NH + h) * T + t] = sum;
}

// P = exp(S - lse) from a tile of unscaled scores. lse in base 2.
__device__ __forceinline__ float probability(float score, float scale, float lse) { return exp2f(score * scale - lse); }

// The gradients of ROWS keys and values of a head: blocks (ceil(T / ROWS), NH, B), those with the most queries first.
// Scores are transposed here: rows are keys, columns queries.
extern "C" __global__ void __launch_bounds__(THREADS) attention_backward_kv(
    bf16* __restrict__ dqkv,        // (B,T,3,NH,HS)
    const bf16* __restrict__ dout,  // (B,T,NH,HS)
    const bf16* __restrict__ qkv,   // (B,T,3,NH,HS)
    const float* __restrict__ lse,  // (B,NH,T)
    const float* __restrict__ D,    // (B,NH,T)
    int B, int T, int NH) {
    DYNAMIC_SHARED(bf16, shared);
    bf16* const k = shared;
    bf16* const v = k + ROWS * STRIDE;
    bf16* const q = v + ROWS * STRIDE;             // two steps' queries,
    bf16* const dy = q + 2 * QUERY_STEP * STRIDE;  // and the gradients of their outputs
    __shared__ float query_lse[2][QUERY_STEP], query_D[2][QUERY_STEP];

    const int first = blockIdx.x * ROWS, warp = threadIdx.x / WARP;
    const size_t C = static_cast<size_t>(NH) * HS, pitch = 3 * C;
    const size_t qkv_head = blockIdx.z * T * pitch + blockIdx.y * HS;
    const bf16* const head = qkv + qkv_head;
    const bf16* const dout_head = dout + blockIdx.z * T * C + blockIdx.y * HS;
    const size_t statistics = (static_cast<size_t>(blockIdx.z) * NH + blockIdx.y) * T;
    const float scale = rsqrtf(static_cast<float>(HS));

    // Queries `start` and on, to buffer `half`. Beyond the last query lse is infinite, which makes P zero.
    const auto load_queries = [&](int start, int half) {
        load_rows<QUERY_STEP>(q + half * QUERY_STEP * STRIDE, head, pitch, start, T);
        load_rows<QUERY_STEP>(dy + half * QUERY_STEP * STRIDE, dout_head, C, start, T);
        if (threadIdx.x < QUERY_STEP) {
            const int query = start + threadIdx.x;
            query_lse[half][threadIdx.x] = query < T ? lse[statistics + query] * LOG2E : INF;
            query_D[half][threadIdx.x] = query < T ? D[statistics + query] : 0.0f;
        }
    };
    load_rows<ROWS>(k, head + C, pitch, first, T);
    load_rows<ROWS>(v, head + 2 * C, pitch, first, T);
    load_queries(first, 0);
    copy_async_commit();

    Tile<HS> dk, dv;
    for (int start = first, half = 0; start < T; start += QUERY_STEP, half ^= 1) {
        if (start + QUERY_STEP < T) load_queries(start + QUERY_STEP, half ^ 1);
        copy_async_commit();
        copy_async_wait<1>();
        __syncthreads();

        const bf16* const q_now = q + half * QUERY_STEP * STRIDE;
        const bf16* const dy_now = dy + half * QUERY_STEP * STRIDE;
        Tile<QUERY_STEP> p, ds;
        add_product_transposed(p, k + warp * 16 * STRIDE, q_now);
        add_product_transposed(ds, v + warp * 16 * STRIDE, dy_now);
#pragma unroll
        for (int n = 0; n < QUERY_STEP / 8; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int column = tile_column(n) + i, query = start + column, key = first + warp * 16 + tile_row();
                const float query_lse_now = query_lse[half][column], D_now = query_D[half][column];
                const float p0 = key > query ? 0.0f : probability(p.x[n][i], scale * LOG2E, query_lse_now);
                const float p1 = key + 8 > query ? 0.0f : probability(p.x[n][i + 2], scale * LOG2E, query_lse_now);
                p.x[n][i] = p0;
                p.x[n][i + 2] = p1;
                ds.x[n][i] = p0 * (ds.x[n][i] - D_now);
                ds.x[n][i + 2] = p1 * (ds.x[n][i + 2] - D_now);
            }
        add_product(dv, p, dy_now);
        add_product(dk, ds, q_now);
        __syncthreads();  // before the next step's copies overwrite what other warps still read
    }
    const int key = first + warp * 16;
    store_tile(dqkv + qkv_head + C, pitch, key, T, k + warp * 16 * STRIDE, dk, scale, scale);
    store_tile(dqkv + qkv_head + 2 * C, pitch, key, T, v + warp * 16 * STRIDE, dv, 1.0f, 1.0f);
}

// The gradients of ROWS queries of a head: blocks (ceil(T / ROWS), NH, B), those with the most keys first.
extern "C" __global__ void __launch_bounds__(THREADS) attention_backward_q(
    bf16* __restrict__ dqkv,        // (B,T,3,NH,HS)
    const bf16* __restrict__ dout,  // (B,T,NH,HS)
    const bf16* __restrict__ qkv,   // (B,T,3,NH,HS)
    const float* __restrict__ lse,  // (B,NH,T)
    const float* __restrict__ D,    // (B,NH,T)
    int B, int T, int NH) {
    DYNAMIC_SHARED(bf16, shared);
    bf16* const q = shared;
    bf16* const dy = q + ROWS * STRIDE;
    bf16* const k = dy + ROWS * STRIDE;     // two steps' keys,
    bf16* const v = k + 2 * ROWS * STRIDE;  // and their values

    const int last = gridDim.x - 1 - blockIdx.x, first = last * ROWS, warp = threadIdx.x / WARP;
    const size_t C = static_cast<size_t>(NH) * HS, pitch = 3 * C;
    const size_t qkv_head = blockIdx.z * T * pitch + blockIdx.y * HS;
    const bf16* const head = qkv + qkv_head;
    const float scale = rsqrtf(static_cast<float>(HS));

    load_rows<ROWS>(q, head, pitch, first, T);
    load_rows<ROWS>(dy, dout + blockIdx.z * T * C + blockIdx.y * HS, C, first, T);
    load_rows<ROWS>(k, head + C, pitch, 0, T);
    load_rows<ROWS>(v, head + 2 * C, pitch, 0, T);
    copy_async_commit();

    const size_t statistics = (static_cast<size_t>(blockIdx.z) * NH + blockIdx.y) * T;
    const int row0 = first + warp * 16 + tile_row(), row1 = row0 + 8;
    const float lse0 = row0 < T ? lse[statistics + row0] * LOG2E : INF, D0 = row0 < T ? D[statistics + row0] : 0.0f;
    const float lse1 = row1 < T ? lse[statistics + row1] * LOG2E : INF, D1 = row1 < T ? D[statistics + row1] : 0.0f;

    Tile<HS> dq;
    for (int step = 0; step <= last; step++) {
        const int now = step % 2 * ROWS * STRIDE, next = ROWS * STRIDE - now;
        if (step < last) {
            load_rows<ROWS>(k + next, head + C, pitch, (step + 1) * ROWS, T);
            load_rows<ROWS>(v + next, head + 2 * C, pitch, (step + 1) * ROWS, T);
        }
        copy_async_commit();
        copy_async_wait<1>();
        __syncthreads();

        Tile<ROWS> p, ds;
        add_product_transposed(p, q + warp * 16 * STRIDE, k + now);
        add_product_transposed(ds, dy + warp * 16 * STRIDE, v + now);
#pragma unroll
        for (int n = 0; n < ROWS / 8; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int key = step * ROWS + tile_column(n) + i;
                const float p0 = key > row0 ? 0.0f : probability(p.x[n][i], scale * LOG2E, lse0);
                const float p1 = key > row1 ? 0.0f : probability(p.x[n][i + 2], scale * LOG2E, lse1);
                ds.x[n][i] = p0 * (ds.x[n][i] - D0);
                ds.x[n][i + 2] = p1 * (ds.x[n][i + 2] - D1);
            }
        add_product(dq, ds, k + now);
        __syncthreads();  // before the next step's copies overwrite what other warps still read
    }
    const int query = first + warp * 16;
    store_tile(dqkv + qkv_head, pitch, query, T, q + warp * 16 * STRIDE, dq, scale, scale);
}
