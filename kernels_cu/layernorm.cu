// Layer normalisation over channels (Ba et al. 2016, arXiv 1607.06450, section 3).
//
// forward   mean = sum_c(inp) / C      rstd = 1 / sqrt(sum_c((inp - mean)^2) / C + EPS)
//           out  = (inp - mean) * rstd * weight + bias
//
// backward  with xhat = (inp - mean) * rstd and g = dout * weight
//           dinp    += rstd * (g - sum_c(g) / C - xhat * sum_c(g * xhat) / C)
//           dweight += sum_n(dout * xhat)      dbias += sum_n(dout)      dinp_sum += sum_n(dinp)
//
// variants: GRAD_FP32; PACKS = 1, 2
#include <common.cuh>

constexpr float EPS = 1e-5f;

// A warp for each row, which it reads three times: from memory once, then from the cache next to it.
extern "C" __global__ void layernorm_forward(
    bf16* __restrict__ out,           // (N,C)
    float* __restrict__ mean,         // (N)
    float* __restrict__ rstd,         // (N)
    const bf16* __restrict__ inp,     // (N,C)
    const bf16* __restrict__ weight,  // (C)
    const bf16* __restrict__ bias,    // (C)
    int N, int C) {
    const int lane = threadIdx.x % WARP;
    const int n = (blockIdx.x * blockDim.x + threadIdx.x) / WARP;
    if (n >= N) return;  // the whole warp: no block barrier follows
    const bf16* x = inp + static_cast<size_t>(n) * C;
    bf16* y = out + static_cast<size_t>(n) * C;

    float sum = 0.0f;
    for (int c = lane * PACK; c < C; c += WARP * PACK) {
        const Pack p = load(x + c);
        for (int i = 0; i < PACK; i++) sum += p.x[i];
    }
    const float m = warp_sum(sum) / C;

    float squares = 0.0f;
    for (int c = lane * PACK; c < C; c += WARP * PACK) {
        const Pack p = load(x + c);
        for (int i = 0; i < PACK; i++) squares += (p.x[i] - m) * (p.x[i] - m);
    }
    const float r = 1.0f / sqrtf(warp_sum(squares) / C + EPS);

    for (int c = lane * PACK; c < C; c += WARP * PACK) {
        Pack p = load(x + c);
        const Pack w = load(weight + c), b = load(bias + c);
        for (int i = 0; i < PACK; i++) p.x[i] = (p.x[i] - m) * r * w.x[i] + b.x[i];
        store(y + c, p);
    }
    if (lane == 0) {
        mean[n] = m;
        rstd[n] = r;
    }
}

// Packs of a row that a thread takes; thread t takes t, t + blockDim, ...
#ifndef PACKS
#define PACKS 1
#endif
constexpr int MAX_THREADS = PACKS == 1 ? 768 : 512;  // what the registers of a multiprocessor allow

// Each block takes `rows` rows, one after the other, with a thread for each pack of channels: so the sums over rows
// stay in registers, and go to partial once.
extern "C" __global__ void __launch_bounds__(MAX_THREADS) layernorm_backward(
    bf16* __restrict__ dinp,          // (N,C)
    float* __restrict__ partial,      // (blocks,3,C)
    const bf16* __restrict__ dout,    // (N,C)
    const bf16* __restrict__ inp,     // (N,C)
    const bf16* __restrict__ weight,  // (C)
    const float* __restrict__ mean,   // (N)
    const float* __restrict__ rstd,   // (N)
    int rows, int blocks, int N, int C) {
    Pack w[PACKS], dweight[PACKS], dbias[PACKS], dsum[PACKS];
    for (int k = 0; k < PACKS; k++) {
        const int c = (threadIdx.x + k * blockDim.x) * PACK;
        dweight[k] = dbias[k] = dsum[k] = Pack{};
        w[k] = c < C ? load(weight + c) : Pack{};
    }
    const int end = min((blockIdx.x + 1) * rows, N);
    for (int n = blockIdx.x * rows; n < end; n++) {
        const size_t row = static_cast<size_t>(n) * C;
        const float m = mean[n], r = rstd[n];
        Pack xhat[PACKS], g[PACKS];
        uint4 before[PACKS];  // of dinp, as it lies in memory: on its way while the block adds up its sums
        float g_sum = 0.0f, g_xhat_sum = 0.0f;
        for (int k = 0; k < PACKS; k++) {
            const int c = (threadIdx.x + k * blockDim.x) * PACK;
            const Pack dy = c < C ? load(dout + row + c) : Pack{}, x = c < C ? load(inp + row + c) : Pack{};
            if (c < C) before[k] = *reinterpret_cast<const uint4*>(dinp + row + c);
            for (int i = 0; i < PACK; i++) {
                xhat[k].x[i] = (x.x[i] - m) * r;
                g[k].x[i] = dy.x[i] * w[k].x[i];
                g_sum += g[k].x[i];
                g_xhat_sum += g[k].x[i] * xhat[k].x[i];
                dweight[k].x[i] += dy.x[i] * xhat[k].x[i];
                dbias[k].x[i] += dy.x[i];
            }
        }
        g_sum = block_sum(g_sum) / C;
        g_xhat_sum = block_sum(g_xhat_sum) / C;
        for (int k = 0; k < PACKS; k++) {
            const int c = (threadIdx.x + k * blockDim.x) * PACK;
            if (c >= C) continue;
            Pack dx = load(reinterpret_cast<const bf16*>(&before[k]));
            for (int i = 0; i < PACK; i++) dx.x[i] += r * (g[k].x[i] - g_sum - xhat[k].x[i] * g_xhat_sum);
            store(dinp + row + c, dx);
            dx = load(dinp + row + c);  // as rounded: what everyone else sees
            for (int i = 0; i < PACK; i++) dsum[k].x[i] += dx.x[i];
        }
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

// What the blocks have left in partial, added up: blockIdx.y tells of which gradient. dinp_sum may be null.
extern "C" __global__ void layernorm_backward_sums(
    grad_t* __restrict__ dweight,       // (C)
    grad_t* __restrict__ dbias,         // (C)
    grad_t* __restrict__ dinp_sum,      // (C) or null
    const float* __restrict__ partial,  // (blocks,3,C)
    int blocks, int C) {
    grad_t* const out = blockIdx.y == 0 ? dweight : blockIdx.y == 1 ? dbias : dinp_sum;
    if (out) add_column_sums(out, partial + blockIdx.y * C, blocks, 3 * C, C);
}
