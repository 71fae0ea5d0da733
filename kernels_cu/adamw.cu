// AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2) on flat buffers.
//
// g = clip * grads
// m = beta1 * m + (1 - beta1) * g           v = beta2 * v + (1 - beta2) * g^2
// master = (1 - lr * weight_decay) * master - step_size * m / (sqrt(v) + epsilon)
// params = master, rounded
//
// with both bias corrections taken out of the fraction: step_size = lr * c / (1 - beta1^t), epsilon = eps * c,
// c = sqrt(1 - beta2^t). What depends on t or lr lies in memory (see Schedule in engine/ops/numpy/adamw.py), so that a
// launch is the same in every step, and a CUDA graph can replay it.
//
// variants: GRAD_FP32
#include <common.cuh>
#include <philox.cuh>

enum { T, EPSILON, STEP_SIZE, KEEP };  // of a schedule

__device__ __forceinline__ void update(
    Pack& master, Pack& m, Pack& v, const Pack& grads, float clip, const double* schedule, float beta1, float beta2,
    bool decays) {
    const float epsilon = static_cast<float>(schedule[EPSILON]);
    const float step_size = static_cast<float>(schedule[STEP_SIZE]);
    const float keep = decays ? static_cast<float>(schedule[KEEP]) : 1.0f;
    for (int i = 0; i < PACK; i++) {
        const float g = clip * grads.x[i];
        m.x[i] = beta1 * m.x[i] + (1.0f - beta1) * g;
        v.x[i] = beta2 * v.x[i] + (1.0f - beta2) * g * g;
        master.x[i] = keep * master.x[i] - step_size * (m.x[i] / (sqrtf(v.x[i]) + epsilon));
    }
}

// The guard has decided on clip and skip, and no host has seen them. Weight decay applies to the first `decayed`
// elements.
extern "C" __global__ void adamw_update(
    bf16* __restrict__ params,            // (n)
    float* __restrict__ master,           // (n)
    float* __restrict__ m,                // (n)
    float* __restrict__ v,                // (n)
    const grad_t* __restrict__ grads,     // (n)
    const double* __restrict__ clip,      // ()
    const double* __restrict__ skip,      // ()
    const double* __restrict__ schedule,  // (4)
    long long n, long long decayed, float beta1, float beta2) {
    const long long i = (static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x) * PACK;
    if (i >= n || *skip != 0.0) return;
    Pack x = load(master + i), mi = load(m + i), vi = load(v + i);
    update(x, mi, vi, load(grads + i), static_cast<float>(*clip), schedule, beta1, beta2, i < decayed);
    store(m + i, mi);
    store(v + i, vi);
    store(master + i, x);
    store(params + i, x);
}

// x rounded to one of its two neighbours in bf16, the nearer one more often, so that on average nothing is lost.
// random: 16 random bits. NaN and infinity stay what they are.
__device__ __forceinline__ float round_stochastically(float x, unsigned random) {
    const unsigned bits = __float_as_uint(x);
    const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
    return finite ? __uint_as_float((bits + random) & 0xffff0000u) : x;
}

// Without masters. Random bits are keyed by (seed, t) and counted by (index, stream): `first` is the index of the first
// element, in its stream.
extern "C" __global__ void adamw_update_without_master(
    bf16* __restrict__ params,            // (n)
    float* __restrict__ m,                // (n)
    float* __restrict__ v,                // (n)
    const grad_t* __restrict__ grads,     // (n)
    const double* __restrict__ clip,      // ()
    const double* __restrict__ skip,      // ()
    const double* __restrict__ schedule,  // (4)
    long long n, long long decayed, float beta1, float beta2, unsigned seed, unsigned stream, long long first) {
    const long long i = (static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x) * PACK;
    if (i >= n || *skip != 0.0) return;
    Pack x = load(params + i), mi = load(m + i), vi = load(v + i);
    update(x, mi, vi, load(grads + i), static_cast<float>(*clip), schedule, beta1, beta2, i < decayed);
    store(m + i, mi);
    store(v + i, vi);
    const unsigned long long index = (first + i) / PACK;
    const unsigned t = static_cast<unsigned>(schedule[T]);
    const Random random = philox(static_cast<unsigned>(index), static_cast<unsigned>(index >> 32), stream, 0, seed, t);
    for (int k = 0; k < PACK; k++) x.x[k] = round_stochastically(x.x[k], (random.x[k / 2] >> (k % 2 * 16)) & 0xffffu);
    store(params + i, x);
}
