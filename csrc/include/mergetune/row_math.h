// The mathematics of one row of logits, shared by the CPU and the CUDA kernels of every op.
//
// All functions are in a namespace with the name of the compiled variant. The CPU sources are compiled several times
// with different instruction sets. If the variants of an inline function had one name, the linker could keep the
// AVX-512 variant for a machine without AVX-512.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define MT_HD __host__ __device__ __forceinline__
#else
#define MT_HD inline __attribute__((always_inline))
#endif

#ifndef MT_VARIANT
#error "define MT_VARIANT: the name of the instruction set that this file is compiled for"
#endif

namespace mergetune {
namespace MT_VARIANT {

// The weights of one path point: its place on the straight path from an anchor (alpha = 0) to w (alpha = 1).
template <class T>
struct PathWeights {
    T anchor;  // 1 - alpha, rounded once from double
    T tuned;   // alpha

    MT_HD explicit PathWeights(double alpha) : anchor(T(1.0 - alpha)), tuned(T(alpha)) {}

    // x.(w_k + alpha (w - w_k)) from the two products. Written as a weighted sum and not as
    // a + alpha (x - a), so that both ends of the path are exact.
    MT_HD T operator()(T anchor_dot, T tuned_dot) const { return anchor * anchor_dot + tuned * tuned_dot; }
};

// exp(x) for x <= 0, within 1.2 ulp; 0 below -87.7, where the result would be subnormal; 1 at 0; NaN stays NaN.
// Branch-free and free of library calls, so that a loop over it becomes vector code.
MT_HD float exp_nonpositive(float x) {
    constexpr float log2_e = 1.44269504088896341f;
    constexpr float ln2_high = 0.693359375f;      // few bits: n * ln2_high is exact even without FMA
    constexpr float ln2_low = -2.12194440e-4f;
    constexpr float smallest = -88.0296919f;      // -127 ln(2): gives n = -127, whose power below is 0
    constexpr float rounder = 12582912.0f + 127;  // 1.5 * 2^23 + 127: adding it leaves n + 127 in the low bits

    const float clamped = smallest > x ? smallest : x;
    const float shifted = clamped * log2_e + rounder;
    const float n = shifted - rounder;
    const float r = (clamped - n * ln2_high) - n * ln2_low;

    // Minimax fit of (exp(r) - 1 - r) / r^2 on |r| <= ln(2)/2: exp is within 3.1e-9 before rounding.
    float p = 1.38144647521e-3f;
    p = p * r + 8.36878062223e-3f;
    p = p * r + 4.16683942592e-2f;
    p = p * r + 1.66665201055e-1f;
    p = p * r + 4.99999934123e-1f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;

    // 2^n from its exponent bits. Unsigned, so that what a NaN leaves there is shifted out instead of overflowing.
    std::uint32_t bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    bits <<= 23;
    float power;
    std::memcpy(&power, &bits, sizeof power);
    return p * power;
}

MT_HD double exp_nonpositive(double x) { return std::exp(x); }

}  // namespace MT_VARIANT
}  // namespace mergetune
