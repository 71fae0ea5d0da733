// What the kernels for Hopper share: a warpgroup of four warps, and the 64 rows of its products.
#pragma once
#include <common.cuh>
#include <hopper.cuh>

constexpr int GROUP = 128;      // threads
constexpr int ROWS = 64;        // of a warpgroup, and of a box
constexpr int BOX = ROWS * 64;  // elements: it has 64 columns

// Which warpgroup the thread is of: the same register for a whole warp, for addresses that all of it shares.
__device__ __forceinline__ int warpgroup() { return __shfl_sync(ALL_LANES, threadIdx.x / GROUP, 0); }

// The first of the two rows of a warpgroup's 64 that the thread has a part of; the other one is 8 below.
__device__ __forceinline__ int row_in_group() {
    return threadIdx.x / WARP % (GROUP / WARP) * 16 + threadIdx.x % WARP / 4;
}
