// Whether a step's update may happen, and how much of its gradient: see the numpy twin, engine/ops/numpy/guard.py.
//
// clip = max_norm / norm where norm > max_norm, else 1
// skip = 1 where the loss or the norm is NaN or infinite, or its z-score exceeds its limit, else 0
#include <common.cuh>

constexpr int WINDOW = 128;  // behind its values, a window holds how many it has seen

// Puts value into the window and gives its z-score: the whole block of WINDOW threads, one for each value in it.
__device__ double score(double* window, double value) {
    if (!isfinite(value)) return nan("");  // the same in all threads
    const long long seen = static_cast<long long>(window[WINDOW]);
    __syncthreads();  // before one thread changes what all have read
    if (threadIdx.x == 0) {
        window[seen % WINDOW] = value;
        window[WINDOW] = static_cast<double>(seen + 1);
    }
    __syncthreads();
    const double mine = window[threadIdx.x];
    const double mean = block_sum(mine) / WINDOW;
    const double deviation = sqrt(block_sum((mine - mean) * (mine - mean)) / WINDOW);
    if (seen < WINDOW) return nan("");
    return deviation > 0.0 ? (value - mean) / deviation : 0.0;
}

extern "C" __global__ void __launch_bounds__(WINDOW) guard_decide(
    double* __restrict__ clip,                // ()
    double* __restrict__ skip,                // ()
    double* __restrict__ norm,                // ()
    double* __restrict__ loss_z,              // ()
    double* __restrict__ norm_z,              // ()
    double* __restrict__ loss_window,         // (129)
    double* __restrict__ norm_window,         // (129)
    const double* __restrict__ loss,          // ()
    const double* __restrict__ norm_squared,  // ()
    double max_norm, double max_loss_z, double max_norm_z) {
    const double x = sqrt(*norm_squared);
    const double loss_score = score(loss_window, *loss), norm_score = score(norm_window, x);
    if (threadIdx.x == 0) {
        const bool finite = isfinite(*loss) && isfinite(x);
        *clip = x > max_norm ? max_norm / x : 1.0;
        *skip = !finite || loss_score > max_loss_z || norm_score > max_norm_z;
        *norm = x;
        *loss_z = loss_score;
        *norm_z = norm_score;
    }
}
