// The bias gradient of a linear layer: dbias += sum_n(dout). (The matrix multiplies are cublasLt's.)
//
// variants: GRAD_FP32
#include <common.cuh>

// Each block takes 256 columns (a warp's width of packs) and `rows` rows, which its 8 warps share out.
constexpr int WARPS = 8;

extern "C" __global__ void linear_column_sums(
    float* __restrict__ partial,    // (blocks,OC)
    const bf16* __restrict__ dout,  // (N,OC)
    int rows, int blocks, int N, int OC) {
    __shared__ Pack sums[WARPS][WARP];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int column = (blockIdx.x * WARP + lane) * PACK;
    const int end = min((blockIdx.y + 1) * rows, N);
    Pack sum = {};
    if (column < OC)
        for (int n = blockIdx.y * rows + warp; n < end; n += WARPS) {
            const Pack p = load(dout + static_cast<size_t>(n) * OC + column);
            for (int i = 0; i < PACK; i++) sum.x[i] += p.x[i];
        }
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp == 0 && column < OC) {
        for (int w = 1; w < WARPS; w++)
            for (int i = 0; i < PACK; i++) sum.x[i] += sums[w][lane].x[i];
        store(partial + static_cast<size_t>(blockIdx.y) * OC + column, sum);
    }
}

extern "C" __global__ void linear_add_column_sums(
    grad_t* __restrict__ dbias,         // (OC)
    const float* __restrict__ partial,  // (blocks,OC)
    int blocks, int OC) {
    add_column_sums(dbias, partial, blocks, OC, OC);
}
