// The sums of a gradient's columns, which are a bias gradient: out = sum_n(x), += with accumulate. Two kernels: sums of
// some rows each, and theirs; of these, other kernels bring their own.
//
// variants: GRAD_FP32
#include <common.cuh>

// Each block takes 256 columns (a warp's width of packs) and `rows` rows, which its 8 warps share out.
constexpr int WARPS = 8;

extern "C" __global__ void column_sums_of_blocks(
    float* __restrict__ partial,  // (blocks,C)
    const bf16* __restrict__ x,   // (N,C)
    int rows, int blocks, int N, int C) {
    __shared__ Pack sums[WARPS][WARP];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int column = (blockIdx.x * WARP + lane) * PACK;
    const int end = min((blockIdx.y + 1) * rows, N);
    Pack sum = {};
    if (column < C)
        for (int n = blockIdx.y * rows + warp; n < end; n += WARPS) {
            const Pack p = load(x + static_cast<size_t>(n) * C + column);
            for (int i = 0; i < PACK; i++) sum.x[i] += p.x[i];
        }
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp == 0 && column < C) {
        for (int w = 1; w < WARPS; w++)
            for (int i = 0; i < PACK; i++) sum.x[i] += sums[w][lane].x[i];
        store(partial + static_cast<size_t>(blockIdx.y) * C + column, sum);
    }
}

extern "C" __global__ void column_sums_add(
    grad_t* __restrict__ out,           // (C)
    const float* __restrict__ partial,  // (blocks,C)
    int accumulate, int blocks, int C) {
    add_column_sums(out, partial, accumulate, blocks, C, C);
}
