// The sums of a gradient's columns, which are a bias gradient: out = sum_n(x), += with accumulate. Two kernels: sums of
// some rows each, and theirs; of these, other kernels bring their own.
//
// variants: GRAD_FP32
#include <common.cuh>

// Each block takes 256 columns (a warp's width of packs) and `rows` rows, which its 8 warps share out.
constexpr int WARPS = 8;
constexpr int AT_ONCE = 8;  // rows that a warp asks for before it waits for the first

extern "C" __global__ void column_sums_of_blocks(
    float* __restrict__ partial,  // (blocks,C)
    const bf16* __restrict__ x,   // (N,C)
    int rows, int blocks, int N, int C) {
    __shared__ Pack sums[WARPS][WARP];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int column = (blockIdx.x * WARP + lane) * PACK;
    const int end = min((blockIdx.y + 1) * rows, N);
    Pack sum = {};
    if (column < C)
        for (int n = blockIdx.y * rows + warp; n < end; n += AT_ONCE * WARPS) {
            uint4 raw[AT_ONCE];  // as they lie in memory
#pragma unroll
            for (int k = 0; k < AT_ONCE; k++) {
                const int row = n + k * WARPS;
                raw[k] =
                    row < end ? *reinterpret_cast<const uint4*>(x + static_cast<size_t>(row) * C + column) : uint4{};
            }
#pragma unroll
            for (const uint4& each : raw) {
                const Pack p = load(reinterpret_cast<const bf16*>(&each));
                for (int i = 0; i < PACK; i++) sum.x[i] += p.x[i];
            }
        }
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp == 0 && column < C) {
        for (int w = 1; w < WARPS; w++)
            for (int i = 0; i < PACK; i++) sum.x[i] += sums[w][lane].x[i];
        store(partial + static_cast<size_t>(blockIdx.y) * C + column, sum);
    }
}

// out (columns) = the sums of the columns of x (rows, columns), whose rows lie `stride` apart; += with accumulate.
struct Sum {
    grad_t* out;
    const float* x;
    long long rows, stride, columns, first_block;  // of those that make this sum
};

// Blocks of (32, 32) threads, which take 32 columns each. Every warp adds up some of the rows, then the warps' sums are
// added in order.
extern "C" __global__ void column_sums_add(
    const long long* __restrict__ sums,  // (6count)
    int accumulate, int count) {
    __shared__ float partial[WARP][WARP + 1];
    const Sum *sum = reinterpret_cast<const Sum*>(sums), *const last = sum + count - 1;
    while (sum < last && blockIdx.x >= sum[1].first_block) sum++;
    const int column = (blockIdx.x - static_cast<int>(sum->first_block)) * WARP + threadIdx.x;
    const int rows = static_cast<int>(sum->rows), columns = static_cast<int>(sum->columns);
    const float* const x = sum->x + column;
    float of_warp = 0.0f;
    if (column < columns)
        for (int row = threadIdx.y; row < rows; row += WARP) of_warp += x[row * sum->stride];
    partial[threadIdx.y][threadIdx.x] = of_warp;
    __syncthreads();
    if (threadIdx.y == 0 && column < columns) {
        float total = 0.0f;
        for (int warp = 0; warp < WARP; warp++) total += partial[warp][threadIdx.x];
        grad_t& out = sum->out[column];
        narrow(out, (accumulate ? widen(out) : 0.0f) + total);
    }
}
