// The M-step and the E-step of EM routing (Hinton et al. 2018, procedure 1) for one output capsule, and their
// gradients, for the host and for GPUs.
//
// H: components of a vote. Lanes: who computes (lanes.h); each lane has some of the H components, and all lanes call
// the functions together and get the same scalars.
#pragma once

#include <cmath>
#include <cstdint>

#include "../host_device.h"
#include "lanes.h"
#include "softmax.h"

namespace capsops {
// Internal linkage: each instruction set has its own copy, so that the linker cannot mix them.
namespace {

// The Gaussian of one output capsule after one iteration.
template <class A> struct Gaussian {
    A* mean;            // [H]
    A* rounding_error;  // [H], the exact mean minus `mean`
    A* variance;        // [H]
    A mass;             // Σ_i w_i
    A logit;            // of the activation
};

// The M-step, from sums over the input capsules of w (1, x, x²) with x = û − shift. The shift avoids the cancellation
// in Σ w û² − μ². Where a variance has collapsed to ε, its gradient is so steep that the rounding of the mean matters;
// so g keeps the rounding error. Sets everything in g. Returns whether the shift was close enough: if the mean moved by
// more than two standard deviations, the variance has lost digits, and the sums should be taken again with the new
// mean. The shift may be the mean in g. Shift: any type with numbers shift[h].
template <class A, class Shift, class Lanes = OneLane>
CAPSOPS_HOST_DEVICE inline bool m_step(Gaussian<A>& g, A mass, const A* first, const A* second, Shift shift, int64_t H,
                                       A epsilon, A beta_u, A beta_a, A inverse_temperature, const Lanes& lanes = {}) {
    const A inverse = A(1) / (mass + epsilon);
    A logarithms = 0;
    bool precise = true;
    for (int64_t h = lanes.first; h < H; h += lanes.step) {
        const A before = shift[h], moved = (first[h] - epsilon * before) * inverse, mean = before + moved;
        g.mean[h] = mean;
        g.rounding_error[h] = (before - mean) + moved;
        const A squares = max(A(0), second[h] - moved * (A(2) * first[h] - moved * mass));
        g.variance[h] = squares * inverse + epsilon;
        precise = precise && moved * moved <= A(4) * g.variance[h];
        logarithms += std::log(g.variance[h]);
    }
    g.mass = mass;
    g.logit = inverse_temperature * (beta_a - mass * (static_cast<A>(H) * beta_u + lanes.sum(logarithms) / 2));
    return lanes.largest(precise ? A(0) : A(1)) == A(0);
}

// The gradient of the M-step. The weight w of one input capsule has the gradient
//     e = constant + Σ_h (linear_h x + quadratic_h x²)    with x = û − mean.
// Returns the constant and what the cost parameters get. Overwrites g_variance.
template <class A> struct MStepGradient {
    A constant, g_beta_u, g_beta_a;
};
template <class A, class Lanes = OneLane>
CAPSOPS_HOST_DEVICE inline MStepGradient<A> m_step_backward(const Gaussian<A>& g, const A* g_mean, A* g_variance,
                                                            A g_logit, int64_t H, A epsilon, A beta_u,
                                                            A inverse_temperature, A* linear, A* quadratic,
                                                            const Lanes& lanes = {}) {
    const A inverse = A(1) / (g.mass + epsilon);
    const A g_cost = -inverse_temperature * g_logit;
    A logarithms = 0, g_mass = 0;
    for (int64_t h = lanes.first; h < H; h += lanes.step) {
        logarithms += std::log(g.variance[h]);
        g_variance[h] += g_cost * g.mass / (A(2) * g.variance[h]);
        quadratic[h] = g_variance[h] * inverse;
        // Σ w (û − μ)² depends on μ, because ε makes the weights sum to a little less than 1.
        const A slope = (g_mean[h] - A(2) * quadratic[h] * epsilon * g.mean[h]) * inverse;
        linear[h] = slope - A(2) * quadratic[h] * g.rounding_error[h];
        g_mass -= quadratic[h] * (g.variance[h] - epsilon - g.rounding_error[h] * g.rounding_error[h]) +
                  slope * g.rounding_error[h];
    }
    const A cost = static_cast<A>(H) * beta_u + lanes.sum(logarithms) / 2;
    return {lanes.sum(g_mass) + g_cost * cost, g_cost * static_cast<A>(H) * g.mass, inverse_temperature * g_logit};
}

// The E-step: the logit of a vote is constant + Σ_h quadratic_h x² with x = û − mean.
template <class A> CAPSOPS_HOST_DEVICE inline A e_step_quadratic(A variance) {
    return A(-0.5) / variance;
}
template <class A, class Lanes = OneLane>
CAPSOPS_HOST_DEVICE inline A e_step_constant(const Gaussian<A>& g, int64_t H, const Lanes& lanes = {}) {
    A logarithms = 0;
    for (int64_t h = lanes.first; h < H; h += lanes.step) logarithms += std::log(g.variance[h]);
    // log(sigmoid(logit)) without overflow.
    const A activation = (g.logit < A(0) ? g.logit : A(0)) - std::log1p(std::exp(-std::fabs(g.logit)));
    return activation - lanes.sum(logarithms) / 2;
}

// The gradient of the E-step, from sums over the input capsules of δ (1, x, x²), where δ is the gradient of the logits.
// Writes the gradients of the mean and the variance, and returns the gradient of the activation's logit.
template <class A, class Lanes = OneLane>
CAPSOPS_HOST_DEVICE inline A e_step_backward(const Gaussian<A>& g, A mass, const A* first, const A* second, int64_t H,
                                             A* g_mean, A* g_variance, const Lanes& lanes = {}) {
    for (int64_t h = lanes.first; h < H; h += lanes.step) {
        const A inverse = A(1) / g.variance[h];
        g_mean[h] = first[h] * inverse;
        g_variance[h] = (second[h] * inverse - mass) * inverse / 2;
    }
    return mass / (A(1) + std::exp(g.logit));
}

}  // namespace
}  // namespace capsops
