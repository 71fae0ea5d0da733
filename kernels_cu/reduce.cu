// The sum of what ranks or lanes have of the same elements, in fp32 and in a fixed order, rounded once.
//
// out = slices[0] + ... + slices[W - 1], or += that: eight slices at a time as a binary tree of neighbours, these sums
// one after another.
//
// variants: GRAD_FP32
#include <common.cuh>

constexpr int GROUP = 8;  // slices that a thread reads at once, so that it does not wait for each

extern "C" __global__ void reduce_sum_slices(
    grad_t* __restrict__ out,           // (n)
    const grad_t* __restrict__ slices,  // (W,n)
    int W, int add, long long n) {
    const long long i = (static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x) * PACK;
    if (i >= n) return;
    Pack sum = add ? load(out + i) : Pack{};
    for (int first = 0; first < W; first += GROUP) {
        Pack group[GROUP];
#pragma unroll
        for (int k = 0; k < GROUP; k++) group[k] = first + k < W ? load(slices + (first + k) * n + i) : Pack{};
#pragma unroll
        for (int step = 1; step < GROUP; step *= 2)
#pragma unroll
            for (int k = 0; k < GROUP; k += 2 * step)
                for (int j = 0; j < PACK; j++) group[k].x[j] += group[k + step].x[j];
        for (int j = 0; j < PACK; j++) sum.x[j] += group[0].x[j];
    }
    store(out + i, sum);
}
