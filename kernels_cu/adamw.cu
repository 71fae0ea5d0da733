// AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2) on flat buffers.
//
// g = clip * grads
// m = beta1 * m + (1 - beta1) * g           v = beta2 * v + (1 - beta2) * g^2
// params = (1 - lr * weight_decay) * params - step_size * m / (sqrt(v) + epsilon)
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
    Pack& params, Pack& m, Pack& v, const Pack& grads, float clip, const double* schedule, float beta1, float beta2,
    bool decays) {
    const float epsilon = static_cast<float>(schedule[EPSILON]);
    const float step_size = static_cast<float>(schedule[STEP_SIZE]);
    const float keep = decays ? static_cast<float>(schedule[KEEP]) : 1.0f;
    for (int i = 0; i < PACK; i++) {
        const float g = clip * grads.x[i];
        m.x[i] = beta1 * m.x[i] + (1.0f - beta1) * g;
        v.x[i] = beta2 * v.x[i] + (1.0f - beta2) * g * g;
        params.x[i] = keep * params.x[i] - step_size * (m.x[i] / (sqrtf(v.x[i]) + epsilon));
    }
}

// fp32 of a parameter and its remainder, 16 bits each, and back: see engine/ops/numpy/rounding.py.
__device__ __forceinline__ float join(unsigned rounded, unsigned remainder) {
    return __uint_as_float((rounded - (remainder >> 15)) << 16 | remainder);
}

__device__ __forceinline__ unsigned rounded_half_up(float x) {
    return x == x ? (__float_as_uint(x) + 0x8000u) >> 16 : 0x7fffu;
}

__device__ __forceinline__ Pack load_joined(const bf16* params, const unsigned short* remainder) {
    const uint4 p = *reinterpret_cast<const uint4*>(params), r = *reinterpret_cast<const uint4*>(remainder);
    const unsigned rounded[4] = {p.x, p.y, p.z, p.w}, remainders[4] = {r.x, r.y, r.z, r.w};
    Pack pack;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        pack.x[2 * i] = join(rounded[i] & 0xffffu, remainders[i] & 0xffffu);
        pack.x[2 * i + 1] = join(rounded[i] >> 16, remainders[i] >> 16);
    }
    return pack;
}

__device__ __forceinline__ void store_split(bf16* params, unsigned short* remainder, const Pack& pack) {
    unsigned rounded[4], remainders[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float low = pack.x[2 * i], high = pack.x[2 * i + 1];
        rounded[i] = rounded_half_up(low) | rounded_half_up(high) << 16;
        remainders[i] = (__float_as_uint(low) & 0xffffu) | __float_as_uint(high) << 16;
    }
    *reinterpret_cast<uint4*>(params) = make_uint4(rounded[0], rounded[1], rounded[2], rounded[3]);
    *reinterpret_cast<uint4*>(remainder) = make_uint4(remainders[0], remainders[1], remainders[2], remainders[3]);
}

// The guard has decided on clip and skip, and no host has seen them. Weight decay applies to the first `decayed`
// elements.
extern "C" __global__ void adamw_update(
    bf16* __restrict__ params,               // (n)
    unsigned short* __restrict__ remainder,  // (n)
    float* __restrict__ m,                   // (n)
    float* __restrict__ v,                   // (n)
    const grad_t* __restrict__ grads,        // (n)
    const double* __restrict__ clip,         // ()
    const double* __restrict__ skip,         // ()
    const double* __restrict__ schedule,     // (4)
    long long n, long long decayed, float beta1, float beta2) {
    const long long i = (static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x) * PACK;
    if (i >= n || *skip != 0.0) return;
    Pack x = load_joined(params + i, remainder + i), mi = load(m + i), vi = load(v + i);
    update(x, mi, vi, load(grads + i), static_cast<float>(*clip), schedule, beta1, beta2, i < decayed);
    store(m + i, mi);
    store(v + i, vi);
    store_split(params + i, remainder + i, x);
}

// x rounded to one of its two neighbours in bf16, the nearer one more often, so that on average nothing is lost.
// random: 16 random bits. NaN and infinity stay what they are.
__device__ __forceinline__ float round_stochastically(float x, unsigned random) {
    const unsigned bits = __float_as_uint(x);
    const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
    return finite ? __uint_as_float((bits + random) & 0xffff0000u) : x;
}

// Random bits are keyed by (seed, t) and counted by (index, stream): `first` is the index of the first
// element, in its stream.
extern "C" __global__ void adamw_update_without_remainder(
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
