// GELU, the tanh form that GPT-2 uses (Hendrycks and Gimpel 2016, arXiv 1606.08415, section 2).
//
// u(x)     = sqrt(2 / pi) * (x + 0.044715 * x^3)
// gelu(x)  = x / 2 * (1 + tanh(u))
// gelu'(x) = (1 + tanh(u)) / 2 + x / 2 * (1 - tanh(u)^2) * u'(x)
#include <common.cuh>

constexpr float SCALE = 0.7978845608028654f;  // sqrt(2 / pi)
constexpr float CUBIC = 0.044715f;

__device__ __forceinline__ float tanh_u(float x) { return tanhf(SCALE * x * (1.0f + CUBIC * x * x)); }

extern "C" __global__ void gelu_forward(
    bf16* __restrict__ out,        // (n)
    const bf16* __restrict__ inp,  // (n)
    long long n) {
    const long long i = (static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x) * PACK;
    if (i >= n) return;
    Pack p = load(inp + i);
    for (float& x : p.x) x = 0.5f * x * (1.0f + tanh_u(x));
    store(out + i, p);
}

// dinp *= gelu'(inp)
extern "C" __global__ void gelu_backward(
    bf16* __restrict__ dinp,       // (n)
    const bf16* __restrict__ inp,  // (n)
    long long n) {
    const long long i = (static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x) * PACK;
    if (i >= n) return;
    Pack d = load(dinp + i);
    const Pack p = load(inp + i);
    for (int k = 0; k < PACK; k++) {
        const float x = p.x[k], t = tanh_u(x), du = SCALE * (1.0f + 3.0f * CUBIC * x * x);
        d.x[k] *= 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * du;
    }
    store(dinp + i, d);
}
