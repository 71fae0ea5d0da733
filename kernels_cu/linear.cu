// The gradients of a linear layer's weight and bias, of one product dout^T inp, whose inp has a one behind each row:
// they are its first C columns and the next; =, += with accumulate.
//
// variants: GRAD_FP32
#include <common.cuh>

extern "C" __global__ void linear_share_out(
    grad_t* __restrict__ dweight,        // (OC,C)
    grad_t* __restrict__ dbias,          // (OC)
    const grad_t* __restrict__ product,  // (OC,width)
    int accumulate, int OC, int C, int width) {
    const int packs = C / PACK, i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= OC * packs) return;
    const int row = i / packs, c = i % packs * PACK;
    const grad_t* const from = product + static_cast<size_t>(row) * width;
    grad_t* const to = dweight + static_cast<size_t>(row) * C + c;
    Pack sum = load(from + c);
    if (accumulate) {
        const Pack before = load(to);
        for (int k = 0; k < PACK; k++) sum.x[k] += before.x[k];
    }
    store(to, sum);
    if (c == 0) narrow(dbias[row], widen(from[C]) + (accumulate ? widen(dbias[row]) : 0.0f));
}
