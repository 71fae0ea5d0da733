// Softmax, cross-entropy and its gradient, over logits whose last Vp - V columns are padding.
//
// losses  = log(sum_v(exp(logits))) - logits[target]
// dlogits = (exp(logits) / sum_v(exp(logits)) - [v == target]) * dloss      0 in the padding
//
// variants: HOLD_ROW
#include <common.cuh>

constexpr int THREADS = 1024;

// Some logits in base 2; the padding among them, from V on, is -inf.
__device__ __forceinline__ Pack load_logits(const bf16* x, int v, int V) {
    Pack p = load(x + v);
#pragma unroll
    for (int i = 0; i < PACK; i++) p.x[i] *= LOG2E;
    if (v + PACK > V)
#pragma unroll
        for (int i = 0; i < PACK; i++)
            if (v + i >= V) p.x[i] = -INF;
    return p;
}

// The maximum of a row's V logits in base 2, and the sum of 2^(logit - maximum): one reading of the row.
__device__ __forceinline__ void softmax_parts(float& top, float& total, const bf16* x, int V) {
    float my_top = -INF, my_total = 0.0f;
    for (int v = threadIdx.x * PACK; v < V; v += THREADS * PACK) {
        const Pack p = load_logits(x, v, V);
        float higher = my_top;
#pragma unroll
        for (int i = 0; i < PACK; i++) higher = fmaxf(higher, p.x[i]);
        if (higher > my_top) my_total *= exp2_fast(my_top - higher);
        my_top = higher;
#pragma unroll
        for (int i = 0; i < PACK; i++) my_total += exp2_fast(p.x[i] - my_top);
    }
    top = block_max(my_top);
    // A thread without logits has the maximum -inf, whose power is 0, and nothing to add.
    total = block_sum(my_total * exp2_fast(my_top - top));
}

// Each block takes a row.
extern "C" __global__ void __launch_bounds__(THREADS) classifier_forward(
    float* __restrict__ losses,       // (N)
    const bf16* __restrict__ logits,  // (N,Vp)
    const int* __restrict__ targets,  // (N)
    int N, int V, int Vp) {
    const bf16* x = logits + static_cast<size_t>(blockIdx.x) * Vp;
    float top, total;
    softmax_parts(top, total, x, V);
    if (threadIdx.x == 0) losses[blockIdx.x] = logf(total) + top / LOG2E - widen(x[targets[blockIdx.x]]);
}

// With HOLD_ROW a block keeps its row in shared memory, so that memory is read once; otherwise it reads the row twice.
#ifdef HOLD_ROW
constexpr int BLOCKS = 2;  // on a multiprocessor: one's copies under way while the other computes
#else
constexpr int BLOCKS = 1;
#endif

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) classifier_forward_backward(
    float* __restrict__ losses,       // (N)
    bf16* __restrict__ logits,        // (N,Vp)
    const int* __restrict__ targets,  // (N)
    int N, int V, int Vp, float dloss) {
    bf16* x = logits + static_cast<size_t>(blockIdx.x) * Vp;
    const int target = targets[blockIdx.x];
    const float target_logit = widen(x[target]);
#ifdef HOLD_ROW
    DYNAMIC_SHARED(bf16, held);  // (Vp); each thread reads what it copied itself, which takes no barrier
    for (int v = threadIdx.x * PACK; v < Vp; v += THREADS * PACK) copy_async(held + v, x + v, true);
    copy_async_commit();
    copy_async_wait<0>();
#else
    const bf16* held = x;
#endif
    float top, total;
    // Its barriers stand between all reads of the target's logit and the writes.
    softmax_parts(top, total, held, V);
    if (threadIdx.x == 0) losses[blockIdx.x] = logf(total) + top / LOG2E - target_logit;
    const float scale = dloss / total;
    for (int v = threadIdx.x * PACK; v < Vp; v += THREADS * PACK) {
        Pack p = load_logits(held, v, V);
#pragma unroll
        for (int i = 0; i < PACK; i++) p.x[i] = exp2_fast(p.x[i] - top) * scale;
        if (target / PACK == v / PACK)
#pragma unroll
            for (int i = 0; i < PACK; i++)
                if (v + i == target) p.x[i] -= dloss;
        store(x + v, p);
    }
}

// mean += share * the mean of losses, in one block
extern "C" __global__ void __launch_bounds__(THREADS) classifier_add_mean(
    double* __restrict__ mean,         // ()
    const float* __restrict__ losses,  // (N)
    int N, double share) {
    double sum = 0.0;
    for (int n = threadIdx.x; n < N; n += THREADS) sum += losses[n];
    sum = block_sum(sum);
    if (threadIdx.x == 0) *mean += share * (sum / N);
}
