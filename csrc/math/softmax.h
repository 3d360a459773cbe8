// Softmax over the output capsules and its gradient, for the host and for GPUs.
//
// X is the type of one number, or of one number of several problems side by side: float, double, or a vector of lanes.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "../host_device.h"

namespace capsops {
// Internal linkage: each instruction set has its own copy, so that the linker cannot mix them.
namespace {

// 2^x. x is clamped so that the reciprocal of the result is a normal number. GPUs have an instruction for it.
CAPSOPS_HOST_DEVICE CAPSOPS_ALWAYS_INLINE float exponential_2(float x) {
    x = x > 115.0f ? 115.0f : x;
#if defined(__CUDA_ARCH__)
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
    return power;
#else
    return std::exp2(x);
#endif
}

// e^x, clamped as exponential_2. On GPUs with a relative error of about (2 + |x|) · 1e-7.
CAPSOPS_HOST_DEVICE CAPSOPS_ALWAYS_INLINE float exponential(float x) {
#if defined(__CUDA_ARCH__)
    return exponential_2(x * 1.44269504f);
#else
    return std::exp(x > 80.0f ? 80.0f : x);
#endif
}
CAPSOPS_HOST_DEVICE CAPSOPS_ALWAYS_INLINE double exponential(double x) {
    return std::exp(x > 700.0 ? 700.0 : x);
}

// 1 / x of a normal number.
CAPSOPS_HOST_DEVICE CAPSOPS_ALWAYS_INLINE float reciprocal(float x) {
#if defined(__CUDA_ARCH__)
    float inverse;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(x));
    return inverse;
#else
    return 1.0f / x;
#endif
}
CAPSOPS_HOST_DEVICE CAPSOPS_ALWAYS_INLINE double reciprocal(double x) {
    return 1.0 / x;
}

// The maximum; b if a is NaN.
CAPSOPS_HOST_DEVICE CAPSOPS_ALWAYS_INLINE float max(float a, float b) {
    return a > b ? a : b;
}
CAPSOPS_HOST_DEVICE CAPSOPS_ALWAYS_INLINE double max(double a, double b) {
    return a > b ? a : b;
}

// In place: z_j becomes c_j = softmax_j(z). leaky adds one logit that is always 0 and has no output capsule. Row: any
// type with numbers z[j].
template <class Row> CAPSOPS_HOST_DEVICE CAPSOPS_ALWAYS_INLINE void softmax(Row z, int64_t J, bool leaky) {
    using X = std::remove_cvref_t<decltype(z[0])>;
    if (J == 2 && !leaky) {
        // One exponential instead of two: c_0 = 1/(1 + e^(z_1 − z_0)).
        const X e = exponential(z[1] - z[0]);
        z[0] = reciprocal(X(1) + e);
        z[1] = e * z[0];
        return;
    }
    X largest = leaky ? max(z[0], X(0)) : z[0];
    for (int64_t j = 1; j < J; ++j) largest = max(z[j], largest);
    X sum = leaky ? exponential(-largest) : X(0);
    for (int64_t j = 0; j < J; ++j) {
        z[j] = exponential(z[j] - largest);
        sum += z[j];
    }
    const X inverse = reciprocal(sum);
    for (int64_t j = 0; j < J; ++j) z[j] *= inverse;
}

// In place: e, the gradient of the couplings c, becomes the gradient of the logits, δ_j = c_j (e_j − Σ_k c_k e_k).
template <class Couplings, class Row>
CAPSOPS_HOST_DEVICE CAPSOPS_ALWAYS_INLINE void softmax_backward(Couplings c, Row e, int64_t J) {
    std::remove_cvref_t<decltype(e[0])> mean = c[0] * e[0];
    for (int64_t j = 1; j < J; ++j) mean += c[j] * e[j];
    for (int64_t j = 0; j < J; ++j) e[j] = c[j] * (e[j] - mean);
}

// The coupling in the first iteration of routing by agreement, where all logits are 0.
template <class A> CAPSOPS_HOST_DEVICE inline A equal_coupling(int64_t J, bool leaky) {
    return A(1) / static_cast<A>(leaky ? J + 1 : J);
}

}  // namespace
}  // namespace capsops
