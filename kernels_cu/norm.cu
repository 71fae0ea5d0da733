// Sums of squares of slices of a flat buffer, each in two stages of fixed order: a sum for each block, then theirs.
// What a slice gives depends on its elements alone, not on where it lies nor on other slices.
//
// variants: GRAD_FP32
#include <common.cuh>

constexpr int THREADS = 256;
constexpr int GROUP = 4;  // packs that a thread asks for at a time, so that it waits for memory once

// A row of blocks for each slice. Those that have nothing of it leave 0.
extern "C" __global__ void __launch_bounds__(THREADS) norm_squared(
    double* __restrict__ partial,          // (S,blocks)
    const grad_t* __restrict__ grads,      // (n)
    const long long* __restrict__ slices,  // (S,2)
    int fewest, int most_blocks, int blocks, int S, long long n) {
    const long long begin = slices[2 * blockIdx.y], end = slices[2 * blockIdx.y + 1];
    const long long packs = (end - begin) / PACK;
    const long long per_block = max(static_cast<long long>(fewest), (packs + most_blocks - 1) / most_blocks);
    const long long first = blockIdx.x * per_block, last = min(first + per_block, packs);
    double sum = 0.0;
    for (long long i = first + threadIdx.x; i < last; i += GROUP * THREADS) {
        Pack group[GROUP];
#pragma unroll
        for (int k = 0; k < GROUP; k++) {
            const long long at = i + k * THREADS;
            group[k] = at < last ? load(grads + begin + at * PACK) : Pack{};
        }
#pragma unroll
        for (const Pack& p : group) {
            float squares = 0.0f;
            for (float x : p.x) squares += x * x;
            sum += squares;
        }
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) partial[static_cast<size_t>(blockIdx.y) * blocks + blockIdx.x] = sum;
}

// A block for each slice.
extern "C" __global__ void __launch_bounds__(THREADS) norm_sums(
    double* __restrict__ out,            // (S)
    const double* __restrict__ partial,  // (S,blocks)
    int blocks, int S) {
    double sum = 0.0;
    for (int i = threadIdx.x; i < blocks; i += blockDim.x) sum += partial[static_cast<size_t>(blockIdx.x) * blocks + i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) out[blockIdx.x] = sum;
}
