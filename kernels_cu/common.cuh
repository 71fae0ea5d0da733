// What all kernels share: bf16 in memory, fp32 in registers, 16-byte accesses, sums in a fixed order.
#pragma once
#include <ptx.cuh>

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;
#define INF __int_as_float(0x7f800000)
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;
constexpr int PACK = 8;  // elements that a thread takes at a time: 16 bytes of bf16

// Gradients of parameters: bf16, or fp32 as an option.
#ifdef GRAD_FP32
using grad_t = float;
#else
using grad_t = bf16;
#endif

// Dynamic shared memory, by a macro because the CPU gets it from elsewhere. Aligned as the boxes of hopper.cuh must be.
#ifndef DYNAMIC_SHARED
#define DYNAMIC_SHARED(type, name) extern __shared__ __align__(1024) type name[]
#endif

__device__ __forceinline__ float widen(bf16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ void narrow(bf16& out, float x) {
    out.bits = static_cast<unsigned short>(pack_bf16(x, 0.0f));
}
__device__ __forceinline__ void narrow(float& out, float x) { out = x; }

struct Pack {
    float x[PACK];
};

__device__ __forceinline__ Pack load(const bf16* p) {
    const uint4 raw = *reinterpret_cast<const uint4*>(p);
    const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
    Pack pack;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        pack.x[2 * i] = __uint_as_float(words[i] << 16);
        pack.x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
    return pack;
}

__device__ __forceinline__ Pack load(const float* p) {
    const float4 a = reinterpret_cast<const float4*>(p)[0], b = reinterpret_cast<const float4*>(p)[1];
    return {{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
}

__device__ __forceinline__ void store(bf16* p, const Pack& pack) {
    const float* x = pack.x;
    *reinterpret_cast<uint4*>(p) =
        make_uint4(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]), pack_bf16(x[6], x[7]));
}

__device__ __forceinline__ void store(float* p, const Pack& pack) {
    const float* x = pack.x;
    reinterpret_cast<float4*>(p)[0] = make_float4(x[0], x[1], x[2], x[3]);
    reinterpret_cast<float4*>(p)[1] = make_float4(x[4], x[5], x[6], x[7]);
}

// The sum, or the maximum, over a warp: every lane gets it, with the same bits.
template <typename T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(ALL_LANES, x, offset);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, offset));
    return x;
}

// The sum, or the maximum, over a block of whole warps: every thread gets it. Ends with all threads past their reads.
template <typename T>
__device__ __forceinline__ T block_sum(T x) {
    __shared__ T partial[WARP];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    x = warp_sum(x);
    if (lane == 0) partial[warp] = x;
    __syncthreads();
    x = warp_sum(lane < blockDim.x / WARP ? partial[lane] : T(0));
    __syncthreads();
    return x;
}

__device__ __forceinline__ float block_max(float x) {
    __shared__ float partial[WARP];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    x = warp_max(x);
    if (lane == 0) partial[warp] = x;
    __syncthreads();
    x = warp_max(lane < blockDim.x / WARP ? partial[lane] : -INF);
    __syncthreads();
    return x;
}
