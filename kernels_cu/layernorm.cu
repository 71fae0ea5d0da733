// Layer normalisation over channels (Ba et al. 2016, arXiv 1607.06450, section 3).
//
// forward   mean = sum_c(inp) / C      rstd = 1 / sqrt(sum_c((inp - mean)^2) / C + EPS)
//           out  = (inp - mean) * rstd * weight + bias, and if its rows are longer, a one and zeros behind each
//
// backward  with xhat = (inp - mean) * rstd and g = dout * weight
//           dinp    += rstd * (g - sum_c(g) / C - xhat * sum_c(g * xhat) / C)
//           dweight  = sum_n(dout * xhat)      dbias  = sum_n(dout)      dinp_sum  = sum_n(dinp);
//           += with accumulate
//
// variants: GRAD_FP32; PACKS = 1, 2; ROW_PACKS = 1, 3, 8; WIDE
#include <common.cuh>

constexpr float EPS = 1e-5f;

// Packs of a row that a thread of forward takes; thread t takes t, t + ROW_THREADS, ...
#ifndef ROW_PACKS
#define ROW_PACKS 1
#endif

#ifdef WIDE
constexpr int ROW_THREADS = 256;
__device__ __forceinline__ float row_sum(float x) { return block_sum(x); }
#else
constexpr int ROW_THREADS = WARP;
__device__ __forceinline__ float row_sum(float x) { return warp_sum(x); }
#endif

// A warp for each row, or a block for a wide one, which keeps it in registers: all of it is asked for at once.
extern "C" __global__ void __launch_bounds__(256) layernorm_forward(
    bf16* __restrict__ out,           // (N,width)
    float* __restrict__ mean,         // (N)
    float* __restrict__ rstd,         // (N)
    const bf16* __restrict__ inp,     // (N,C)
    const bf16* __restrict__ weight,  // (C)
    const bf16* __restrict__ bias,    // (C)
    int N, int C, int width) {
    const int thread = threadIdx.x % ROW_THREADS;
    const int n = (blockIdx.x * blockDim.x + threadIdx.x) / ROW_THREADS;
    if (n >= N) return;  // all threads of the row: no other meets them
    const size_t row = static_cast<size_t>(n) * C;
    uint4 x[ROW_PACKS];  // as they lie in memory
#pragma unroll
    for (int k = 0; k < ROW_PACKS; k++) {
        const int c = (thread + k * ROW_THREADS) * PACK;
        x[k] = c < C ? *reinterpret_cast<const uint4*>(inp + row + c) : uint4{};
    }

    float sum = 0.0f;
#pragma unroll
    for (const uint4& raw : x) {
        const Pack p = load(reinterpret_cast<const bf16*>(&raw));
        for (int i = 0; i < PACK; i++) sum += p.x[i];
    }
    const float m = row_sum(sum) / C;

    float squares = 0.0f;
#pragma unroll
    for (int k = 0; k < ROW_PACKS; k++) {
        if ((thread + k * ROW_THREADS) * PACK >= C) continue;
        const Pack p = load(reinterpret_cast<const bf16*>(&x[k]));
        for (int i = 0; i < PACK; i++) squares += (p.x[i] - m) * (p.x[i] - m);
    }
    const float r = 1.0f / sqrtf(row_sum(squares) / C + EPS);

#pragma unroll
    for (int k = 0; k < ROW_PACKS; k++) {
        const int c = (thread + k * ROW_THREADS) * PACK;
        if (c >= C) continue;
        Pack p = load(reinterpret_cast<const bf16*>(&x[k]));
        const Pack w = load(weight + c), b = load(bias + c);
        for (int i = 0; i < PACK; i++) p.x[i] = (p.x[i] - m) * r * w.x[i] + b.x[i];
        store(out + static_cast<size_t>(n) * width + c, p);
    }
    for (int c = C + thread * PACK; c < width; c += ROW_THREADS * PACK)
        store(out + static_cast<size_t>(n) * width + c, Pack{c == C ? 1.0f : 0.0f});
    if (thread == 0) {
        mean[n] = m;
        rstd[n] = r;
    }
}

// Packs of a row that a thread takes; thread t takes t, t + blockDim, ...
#ifndef PACKS
#define PACKS 1
#endif
constexpr int MAX_THREADS = PACKS == 1 ? 768 : 512;  // what the registers of a multiprocessor allow

constexpr int STAGES = 2;  // rows of which a block keeps what it reads

// This thread's packs of a row of dout, inp and dinp on their way to shared memory, where `stage` has (3,C). Of no row
// nothing, which counts as a group of copies too.
__device__ __forceinline__ void copy_row(
    bf16* stage, const bf16* dout, const bf16* inp, const bf16* dinp, int n, int end, int C) {
    const size_t row = static_cast<size_t>(n) * C;
    for (int k = 0; k < PACKS; k++) {
        const int c = (threadIdx.x + k * blockDim.x) * PACK;
        if (n >= end || c >= C) continue;
        copy_async(stage + c, dout + row + c, true);
        copy_async(stage + C + c, inp + row + c, true);
        copy_async(stage + 2 * C + c, dinp + row + c, true);
    }
    copy_async_commit();
}

// block_sum of two numbers, and with one barrier: the caller gives another `partial` the next time.
__device__ __forceinline__ void block_sums(float& x, float& y, float2 (&partial)[WARP]) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    x = warp_sum(x), y = warp_sum(y);
    if (lane == 0) partial[warp] = make_float2(x, y);
    __syncthreads();
    const float2 mine = lane < blockDim.x / WARP ? partial[lane] : make_float2(0.0f, 0.0f);
    x = warp_sum(mine.x), y = warp_sum(mine.y);
}

// Each block takes `rows` rows, one after the other, with a thread for each pack of channels: so the sums over rows
// stay in registers, and go to partial once. While it computes a row, the next two are on their way: each thread reads
// what it copied itself, which takes no barrier.
extern "C" __global__ void __launch_bounds__(MAX_THREADS) layernorm_backward(
    bf16* __restrict__ dinp,          // (N,C)
    float* __restrict__ partial,      // (blocks,3,C)
    const bf16* __restrict__ dout,    // (N,C)
    const bf16* __restrict__ inp,     // (N,C)
    const bf16* __restrict__ weight,  // (C)
    const float* __restrict__ mean,   // (N)
    const float* __restrict__ rstd,   // (N)
    int rows, int blocks, int N, int C) {
    DYNAMIC_SHARED(bf16, stages);  // (STAGES,3,C)
    __shared__ float2 sums[2][WARP];
    const int first = blockIdx.x * rows, end = min(first + rows, N);
    for (int k = 0; k < STAGES; k++) copy_row(stages + k * 3 * C, dout, inp, dinp, first + k, end, C);
    Pack w[PACKS], dweight[PACKS], dbias[PACKS], dsum[PACKS];
    for (int k = 0; k < PACKS; k++) {
        const int c = (threadIdx.x + k * blockDim.x) * PACK;
        dweight[k] = dbias[k] = dsum[k] = Pack{};
        w[k] = c < C ? load(weight + c) : Pack{};
    }
    float m = mean[first], r = rstd[first];
    for (int n = first; n < end; n++) {
        const int next = min(n + 1, end - 1);
        const float next_m = mean[next], next_r = rstd[next];
        bf16* const stage = stages + (n - first) % STAGES * 3 * C;
        copy_async_wait<STAGES - 1>();
        Pack xhat[PACKS], g[PACKS];
        uint4 before[PACKS];  // of dinp, as it lies in memory
        float g_sum = 0.0f, g_xhat_sum = 0.0f;
        for (int k = 0; k < PACKS; k++) {
            const int c = (threadIdx.x + k * blockDim.x) * PACK;
            const Pack dy = c < C ? load(stage + c) : Pack{}, x = c < C ? load(stage + C + c) : Pack{};
            if (c < C) before[k] = *reinterpret_cast<const uint4*>(stage + 2 * C + c);
            for (int i = 0; i < PACK; i++) {
                xhat[k].x[i] = (x.x[i] - m) * r;
                g[k].x[i] = dy.x[i] * w[k].x[i];
                g_sum += g[k].x[i];
                g_xhat_sum += g[k].x[i] * xhat[k].x[i];
                dweight[k].x[i] += dy.x[i] * xhat[k].x[i];
                dbias[k].x[i] += dy.x[i];
            }
        }
        copy_row(stage, dout, inp, dinp, n + STAGES, end, C);
        block_sums(g_sum, g_xhat_sum, sums[(n - first) % 2]);
        g_sum /= C, g_xhat_sum /= C;
        for (int k = 0; k < PACKS; k++) {
            const int c = (threadIdx.x + k * blockDim.x) * PACK;
            if (c >= C) continue;
            const size_t at = static_cast<size_t>(n) * C + c;
            Pack dx = load(reinterpret_cast<const bf16*>(&before[k]));
            for (int i = 0; i < PACK; i++) dx.x[i] += r * (g[k].x[i] - g_sum - xhat[k].x[i] * g_xhat_sum);
            store(dinp + at, dx);
            dx = load(dinp + at);  // as rounded: what everyone else sees
            for (int i = 0; i < PACK; i++) dsum[k].x[i] += dx.x[i];
        }
        m = next_m, r = next_r;
    }
    for (int k = 0; k < PACKS; k++) {
        const int c = (threadIdx.x + k * blockDim.x) * PACK;
        if (c >= C) continue;
        float* mine = partial + static_cast<size_t>(blockIdx.x) * 3 * C + c;
        store(mine, dweight[k]);
        store(mine + C, dbias[k]);
        store(mine + 2 * C, dsum[k]);
    }
}

// What the blocks have left in partial, added up: blockIdx.y tells of which gradient. A block of (32, 32) threads takes
// 32 columns; every warp adds up those of some blocks, then the warps' sums are added in order. dinp_sum may be null.
extern "C" __global__ void layernorm_backward_sums(
    grad_t* __restrict__ dweight,       // (C)
    grad_t* __restrict__ dbias,         // (C)
    grad_t* __restrict__ dinp_sum,      // (C) or null
    const float* __restrict__ partial,  // (blocks,3,C)
    int accumulate, int blocks, int C) {
    grad_t* const out = blockIdx.y == 0 ? dweight : blockIdx.y == 1 ? dbias : dinp_sum;
    if (!out) return;
    __shared__ float sums[WARP][WARP + 1];
    const int column = blockIdx.x * WARP + threadIdx.x;
    float sum = 0.0f;
    if (column < C)
        for (int block = threadIdx.y; block < blocks; block += WARP)
            sum += partial[(static_cast<size_t>(block) * 3 + blockIdx.y) * C + column];
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && column < C) {
        float total = 0.0f;
        for (int warp = 0; warp < WARP; warp++) total += sums[warp][threadIdx.x];
        narrow(out[column], (accumulate ? widen(out[column]) : 0.0f) + total);
    }
}
