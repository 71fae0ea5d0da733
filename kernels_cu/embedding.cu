// Token and position embedding.
//
// forward   out[b,t] = wte[inp[b,t]] + wpe[t]
// backward  dwte[v] += sum of dout[b,t] where inp[b,t] == v
//           dwpe[t]  = sum_b(dout[b,t]), zero beyond T; += with accumulate
//
// The same token occurs at many positions. They are brought together, in ascending order, so that their gradients are
// added in a fixed order: counting with integer atomics gives each position a place, and whatever order those of one
// token come in, ranking them among their like makes the order one. Then at most CHUNK positions are added up by a
// block; what further blocks have of the same token goes through `partial`.
//
// variants: GRAD_FP32
#include <common.cuh>

extern "C" __global__ void embedding_forward(
    bf16* __restrict__ out,        // (B,T,C)
    const int* __restrict__ inp,   // (B,T)
    const bf16* __restrict__ wte,  // (Vp,C)
    const bf16* __restrict__ wpe,  // (maxT,C)
    int B, int T, int C, int Vp, int maxT) {
    const long long packs = static_cast<long long>(B) * T * C / PACK;
    const long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= packs) return;
    const long long n = i * PACK / C;
    const int c = i * PACK % C, t = n % T;
    Pack x = load(wte + static_cast<size_t>(inp[n]) * C + c);
    const Pack p = load(wpe + static_cast<size_t>(t) * C + c);
    for (int k = 0; k < PACK; k++) x.x[k] += p.x[k];
    store(out + i * PACK, x);
}

// count[v] (zero before) = how often v occurs; arrival[n] = how many of the same token have come before n, in whatever
// order they come.
extern "C" __global__ void embedding_count(
    int* __restrict__ arrival,    // (N)
    int* __restrict__ count,      // (Vp)
    const int* __restrict__ inp,  // (N)
    int N, int Vp) {
    const int n = blockIdx.x * blockDim.x + threadIdx.x;
    if (n < N) arrival[n] = atomicAdd(&count[inp[n]], 1);
}

constexpr int THREADS = 1024;

// start[v] = the sum of count[0] to count[v - 1]: a thread for each v. Each block adds up for itself what lies before
// its own tokens, which takes less time than waiting for others to do so.
extern "C" __global__ void __launch_bounds__(THREADS) embedding_starts(
    int* __restrict__ start,        // (Vp)
    const int* __restrict__ count,  // (Vp)
    int Vp) {
    __shared__ int warps[WARP];
    const int v = blockIdx.x * THREADS + threadIdx.x;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    int before = 0;
#pragma unroll 8
    for (int u = threadIdx.x, block = blockIdx.x; block > 0; block--, u += THREADS) before += count[u];
    before = block_sum(before);
    const int own = v < Vp ? count[v] : 0;
    int through = own;  // the sum of this lane's count and of those below it
#pragma unroll
    for (int offset = 1; offset < WARP; offset *= 2) {
        const int below = __shfl_up_sync(ALL_LANES, through, offset);
        if (lane >= offset) through += below;
    }
    if (lane == WARP - 1) warps[warp] = through;
    __syncthreads();
    before += warp_sum(lane < warp ? warps[lane] : 0);
    if (v < Vp) start[v] = before + through - own;
}

// unsorted = the positions by token, in any order among those of one token.
extern "C" __global__ void embedding_gather(
    int* __restrict__ unsorted,       // (N)
    const int* __restrict__ arrival,  // (N)
    const int* __restrict__ start,    // (Vp)
    const int* __restrict__ inp,      // (N)
    int N, int Vp) {
    const int n = blockIdx.x * blockDim.x + threadIdx.x;
    if (n < N) unsorted[start[inp[n]] + arrival[n]] = n;
}

// sorted = the positions by token, ascending among those of one token: a position's place is the number of smaller
// ones.
extern "C" __global__ void embedding_rank(
    int* __restrict__ sorted,          // (N)
    const int* __restrict__ unsorted,  // (N)
    const int* __restrict__ start,     // (Vp)
    const int* __restrict__ count,     // (Vp)
    const int* __restrict__ inp,       // (N)
    int N, int Vp) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= N) return;
    const int n = unsorted[i], v = inp[n];
    const int* like = unsorted + start[v];
    int rank = 0;
    for (int k = 0; k < count[v]; k++) rank += like[k] < n;
    sorted[start[v] + rank] = n;
}

constexpr int CHUNK = 64;

// Of the chunks of tokens with more than one chunk, at most two begin within CHUNK neighbours of `sorted`: the last one
// of a token, and the first one of the next. They take these two rows of partial.
__device__ __forceinline__ int partial_row(int i, bool first) { return i / CHUNK * 2 + first; }

// A block for each position of `sorted`; it has work if a chunk begins there.
extern "C" __global__ void embedding_backward_wte(
    grad_t* __restrict__ dwte,       // (Vp,C)
    float* __restrict__ partial,     // (rows,C)
    const bf16* __restrict__ dout,   // (N,C)
    const int* __restrict__ sorted,  // (N)
    const int* __restrict__ start,   // (Vp)
    const int* __restrict__ count,   // (Vp)
    const int* __restrict__ inp,     // (N)
    int N, int C, int Vp, int rows) {
    const int i = blockIdx.x, v = inp[sorted[i]], within = i - start[v];
    if (within % CHUNK) return;
    const int members = min(CHUNK, count[v] - within);
    const bool alone = count[v] <= CHUNK;  // no other chunk has the same token
    for (int c = threadIdx.x * PACK; c < C; c += blockDim.x * PACK) {
        grad_t* const out = dwte + static_cast<size_t>(v) * C + c;
        const Pack before = alone ? load(out) : Pack{};  // on its way while the rest is added up
        Pack sum = {};
        for (int k = 0; k < members; k++) {
            const Pack p = load(dout + static_cast<size_t>(sorted[i + k]) * C + c);
            for (int j = 0; j < PACK; j++) sum.x[j] += p.x[j];
        }
        if (!alone) {
            store(partial + static_cast<size_t>(partial_row(i, within == 0)) * C + c, sum);
            continue;
        }
        for (int j = 0; j < PACK; j++) sum.x[j] += before.x[j];
        store(out, sum);
    }
}

// The tokens of several chunks: a block for each CHUNK neighbours of `sorted`, among which at most one of them begins.
// It goes on to the first of the next neighbours.
extern "C" __global__ void embedding_backward_wte_chunks(
    grad_t* __restrict__ dwte,          // (Vp,C)
    const float* __restrict__ partial,  // (rows,C)
    const int* __restrict__ sorted,     // (N)
    const int* __restrict__ start,      // (Vp)
    const int* __restrict__ count,      // (Vp)
    const int* __restrict__ inp,        // (N)
    int N, int C, int Vp, int rows) {
    const int next = (blockIdx.x + 1) * CHUNK;
    if (next >= N) return;
    const int v = inp[sorted[next]], i = start[v];
    if (i < next - CHUNK || i == next || count[v] <= CHUNK) return;
    for (int c = threadIdx.x * PACK; c < C; c += blockDim.x * PACK) {
        grad_t* const out = dwte + static_cast<size_t>(v) * C + c;
        const Pack before = load(out);
        Pack sum = {};
        for (int k = 0; k < count[v]; k += CHUNK) {
            const Pack p = load(partial + static_cast<size_t>(partial_row(i + k, k == 0)) * C + c);
            for (int j = 0; j < PACK; j++) sum.x[j] += p.x[j];
        }
        for (int j = 0; j < PACK; j++) sum.x[j] += before.x[j];
        store(out, sum);
    }
}

// A thread for each pack of dwpe, with accumulate of its first T rows.
extern "C" __global__ void embedding_backward_wpe(
    grad_t* __restrict__ dwpe,      // (maxT,C)
    const bf16* __restrict__ dout,  // (B,T,C)
    int accumulate, int B, int T, int C, int maxT) {
    const long long i = (static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x) * PACK;
    const long long row = static_cast<long long>(T) * C;
    if (i >= (accumulate ? row : static_cast<long long>(maxT) * C)) return;
    const Pack before = accumulate ? load(dwpe + i) : Pack{};
    Pack sum = {};
    if (i < row)
        for (int b = 0; b < B; b++) {
            const Pack p = load(dout + b * row + i);
            for (int k = 0; k < PACK; k++) sum.x[k] += p.x[k];
        }
    for (int k = 0; k < PACK; k++) sum.x[k] += before.x[k];
    store(dwpe + i, sum);
}
