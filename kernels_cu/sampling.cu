// Drawing the next token by inversion: the first one at which the cumulative probability exceeds the coin.
#include <common.cuh>

constexpr int THREADS = 256;

__device__ __forceinline__ double weight(bf16 logit, float top, double temperature) {
    return exp((static_cast<double>(widen(logit)) - top) / temperature);
}

// A block for each row; each thread has a stretch of neighbouring tokens. temperature 0: the first of the likeliest.
extern "C" __global__ void __launch_bounds__(THREADS) sampling_sample(
    int* __restrict__ out,            // (B)
    const bf16* __restrict__ logits,  // (B,Vp)
    const double* __restrict__ coin,  // (B)
    int B, int V, int Vp, double temperature) {
    __shared__ double sums[THREADS];
    __shared__ int found;
    const bf16* x = logits + static_cast<size_t>(blockIdx.x) * Vp;
    const int stretch = (V + THREADS - 1) / THREADS;
    const int begin = min(static_cast<int>(threadIdx.x) * stretch, V), end = min(begin + stretch, V);

    float my_top = -INF;
    for (int v = begin; v < end; v++) my_top = fmaxf(my_top, widen(x[v]));
    const float top = block_max(my_top);

    double sum = 0.0;  // at temperature 0: how many tokens have the top logit
    for (int v = begin; v < end; v++) sum += temperature == 0.0 ? widen(x[v]) == top : weight(x[v], top, temperature);
    sums[threadIdx.x] = sum;
    if (threadIdx.x == 0) found = V - 1;  // rounding can leave the last sum at or below the coin
    __syncthreads();
    if (threadIdx.x == 0)
        for (int i = 1; i < THREADS; i++) sums[i] += sums[i - 1];
    __syncthreads();

    const double threshold = temperature == 0.0 ? 0.0 : coin[blockIdx.x] * sums[THREADS - 1];
    double before = threadIdx.x > 0 ? sums[threadIdx.x - 1] : 0.0;
    if (before <= threshold && sums[threadIdx.x] > threshold) {  // in the stretch of just one thread
        for (int v = begin; v < end; v++) {
            before += temperature == 0.0 ? widen(x[v]) == top : weight(x[v], top, temperature);
            if (before > threshold) {
                found = v;
                break;
            }
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) out[blockIdx.x] = found;
}
