// GELU, the tanh form that GPT-2 uses (Hendrycks and Gimpel 2016, arXiv 1606.08415, section 2), and its slope. Both
// take t = tanh(tanh_argument(x)), by whichever tanh.
//
// u(x)     = sqrt(2 / pi) * (x + 0.044715 * x^3)
// gelu(x)  = x / 2 * (1 + tanh(u))
// gelu'(x) = (1 + tanh(u)) / 2 + x / 2 * (1 - tanh(u)^2) * u'(x)
#pragma once
#include <common.cuh>

constexpr float SCALE = 0.7978845608028654f;  // sqrt(2 / pi)
constexpr float CUBIC = 0.044715f * SCALE;

__device__ __forceinline__ float tanh_argument(float x) { return x * (SCALE + CUBIC * (x * x)); }

__device__ __forceinline__ float gelu(float x, float t) { return 0.5f * x + 0.5f * x * t; }

__device__ __forceinline__ float gelu_slope(float x, float t) {
    const float half = x * (0.5f * SCALE + 1.5f * CUBIC * (x * x));  // x / 2 * u'(x)
    return 0.5f + 0.5f * t + half * (1.0f - t * t);
}
