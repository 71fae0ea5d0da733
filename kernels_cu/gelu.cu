// GELU and the gradient through it: see gelu.cuh.
#include <gelu.cuh>

extern "C" __global__ void gelu_forward(
    bf16* __restrict__ out,        // (n)
    const bf16* __restrict__ inp,  // (n)
    long long n) {
    const long long i = (static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x) * PACK;
    if (i >= n) return;
    Pack p = load(inp + i);
    for (float& x : p.x) x = gelu(x, tanhf(tanh_argument(x)));
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
    for (int k = 0; k < PACK; k++) d.x[k] *= gelu_slope(p.x[k], tanhf(tanh_argument(p.x[k])));
    store(dinp + i, d);
}
