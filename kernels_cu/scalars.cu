// A sum of few numbers in float64, by one block, in a fixed order: out = sum(parts) / divisor.
#include <common.cuh>

extern "C" __global__ void scalars_total(
    double* __restrict__ out,          // ()
    const double* __restrict__ parts,  // (n)
    int n, double divisor) {
    double sum = 0.0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) sum += parts[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) *out = sum / divisor;
}
