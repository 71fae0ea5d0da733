// The twin of kernels_cu/ptx.cuh for CPUs: the same functions, with what they mean written out.
#pragma once

struct bf16 {
    unsigned short bits;
};

namespace shim {

inline unsigned round_bf16(float x) {
    const unsigned u = bits<unsigned>(x);
    if (x != x) return 0x7fff;  // the NaN that the instruction gives
    return (u + 0x7fff + (u >> 16 & 1)) >> 16;
}

// Element i of a pair.
inline float of_pair(unsigned pair, unsigned i) { return bits<float>(i ? pair & 0xffff0000u : pair << 16); }

// The rows that the lanes name are read as each of them arrives: others' writes need a barrier before.
inline const Slot* meet_rows(const char* name, const void* row) {
    check_aligned(name, row);
    return meet(name, 0xffffffffu, row, 16);
}

}  // namespace shim

__device__ __forceinline__ unsigned pack_bf16(float lo, float hi) {
    return shim::round_bf16(hi) << 16 | shim::round_bf16(lo);
}

__device__ __forceinline__ float exp2_fast(float x) {
    constexpr float SMALLEST = 0x1p-126f;
    const float y = exp2f(x);
    return y < SMALLEST ? 0.0f : y;
}

__device__ __forceinline__ float log2_fast(float x) { return log2f(x); }

__device__ __forceinline__ float tanh_fast(float x) { return tanhf(x); }

__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    const unsigned mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
    const shim::Slot* lanes = shim::meet("mma_16x8x16", 0xffffffffu, mine, sizeof mine);
    const unsigned g = shim::lane() / 4, t = shim::lane() % 4;
    for (int k = 0; k < 16; k++) {  // in this order; products of two bf16 are exact
        const int holder = k % 8 / 2, half = k / 8;
        float left[2], right[2];
        for (int i = 0; i < 2; i++) {
            left[i] = shim::of_pair(lanes[4 * g + holder].words[2 * half + i], k % 2);         // (g + 8i, k)
            right[i] = shim::of_pair(lanes[4 * (2 * t + i) + holder].words[4 + half], k % 2);  // (k, 2t + i)
        }
        for (int i = 0; i < 4; i++) d[i] += left[i / 2] * right[i % 2];
    }
}

__device__ __forceinline__ void load_matrices(unsigned (&r)[4], const void* row) {
    const shim::Slot* rows = shim::meet_rows("load_matrices", row);
    const unsigned l = shim::lane();
    for (int i = 0; i < 4; i++) r[i] = rows[8 * i + l / 4].words[l % 4];
}

__device__ __forceinline__ void load_matrices_transposed(unsigned (&r)[4], const void* row) {
    const shim::Slot* rows = shim::meet_rows("load_matrices_transposed", row);
    const unsigned l = shim::lane(), column = l / 4;
    for (int i = 0; i < 4; i++) {
        const shim::Slot* pair = &rows[8 * i + 2 * (l % 4)];
        const unsigned shift = column % 2 * 16;
        r[i] = (pair[0].words[column / 2] >> shift & 0xffff) | pair[1].words[column / 2] >> shift << 16;
    }
}

__device__ __forceinline__ void copy_async(void* shared, const void* global, bool valid) {
    shim::queue_copy(shared, valid ? global : nullptr);
}

__device__ __forceinline__ void copy_async_commit() { shim::current->groups++; }

template <int groups>
__device__ __forceinline__ void copy_async_wait() {
    shim::finish_copies(groups);
}
