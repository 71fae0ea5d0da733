// What the kernels of attention share: tiles of accumulators, spread over a warp.
#pragma once
#include <common.cuh>

#ifndef HS
#define HS 64
#endif

// Of a tile of accumulators, which has 16 rows of a warp, lane l has rows l / 4 and l / 4 + 8, and in x[n] the columns
// 8 n + 2 (l % 4) and the next: x[n][0], x[n][1] of the first row, x[n][2], x[n][3] of the second.
template <int COLUMNS>
struct Tile {
    float x[COLUMNS / 8][4];

    __device__ __forceinline__ Tile() : x{} {}
};

__device__ __forceinline__ int tile_row() { return threadIdx.x % WARP / 4; }
__device__ __forceinline__ int tile_column(int n) { return 8 * n + 2 * (threadIdx.x % 4); }

// Columns 16 k to 16 k + 15 of a tile, rounded to bf16, as the left factor of a product.
template <int COLUMNS>
__device__ __forceinline__ void as_factor(unsigned (&a)[4], const Tile<COLUMNS>& tile, int k) {
    const float (&left)[4] = tile.x[2 * k], (&right)[4] = tile.x[2 * k + 1];
    a[0] = pack_bf16(left[0], left[1]);
    a[1] = pack_bf16(left[2], left[3]);
    a[2] = pack_bf16(right[0], right[1]);
    a[3] = pack_bf16(right[2], right[3]);
}

// The sum, or the maximum, over the four lanes that share a tile's row.
__device__ __forceinline__ float row_sum(float x) {
    x += __shfl_xor_sync(ALL_LANES, x, 1);
    return x + __shfl_xor_sync(ALL_LANES, x, 2);
}
__device__ __forceinline__ float row_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 1));
    return fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 2));
}
