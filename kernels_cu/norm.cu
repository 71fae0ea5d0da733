// The sum of squares of a flat buffer, in two stages of fixed order: a sum for each block, then scalars.cu's.
//
// variants: GRAD_FP32
#include <common.cuh>

extern "C" __global__ void norm_squared(
    double* __restrict__ partial,      // (blocks)
    const grad_t* __restrict__ grads,  // (n)
    int per_block, int blocks, long long n) {
    const long long start = static_cast<long long>(blockIdx.x) * per_block;
    const long long end = min(start + per_block, n);
    float sum = 0.0f;
    for (long long i = start + threadIdx.x * PACK; i < end; i += blockDim.x * PACK) {
        const Pack p = load(grads + i);
        for (float x : p.x) sum += x * x;
    }
    const double total = block_sum(static_cast<double>(sum));
    if (threadIdx.x == 0) partial[blockIdx.x] = total;
}
