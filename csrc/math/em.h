// The M-step and the E-step of EM routing (Hinton et al. 2018, procedure 1) for one output capsule, and their
// gradients. Like all of csrc/math for the host and for GPUs, though EM routing has no CUDA kernel yet.
#pragma once

#include <cmath>
#include <cstdint>

#include "../host_device.h"
#include "softmax.h"

namespace capsops {
// Internal linkage: each instruction set has its own copy, so that the linker cannot mix them.
namespace {

// The Gaussian of one output capsule after one iteration. H: components of a vote.
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
// mean.
template <class A>
CAPSOPS_HOST_DEVICE inline bool m_step(Gaussian<A>& g, A mass, const A* first, const A* second, const A* shift,
                                       int64_t H, A epsilon, A beta_u, A beta_a, A inverse_temperature) {
    const A inverse = A(1) / (mass + epsilon);
    A logarithms = 0;
    bool precise = true;
    for (int64_t h = 0; h < H; ++h) {
        const A moved = (first[h] - epsilon * shift[h]) * inverse;
        g.mean[h] = shift[h] + moved;
        g.rounding_error[h] = (shift[h] - g.mean[h]) + moved;
        const A squares = max(A(0), second[h] - moved * (A(2) * first[h] - moved * mass));
        g.variance[h] = squares * inverse + epsilon;
        precise = precise && moved * moved <= A(4) * g.variance[h];
        logarithms += std::log(g.variance[h]);
    }
    g.mass = mass;
    g.logit = inverse_temperature * (beta_a - mass * (static_cast<A>(H) * beta_u + logarithms / 2));
    return precise;
}

// The gradient of the M-step. The weight w of one input capsule has the gradient
//     e = constant + Σ_h (linear_h x + quadratic_h x²)    with x = û − mean.
// Overwrites g_variance.
template <class A>
CAPSOPS_HOST_DEVICE inline void m_step_backward(const Gaussian<A>& g, const A* g_mean, A* g_variance, A g_logit,
                                                int64_t H, A epsilon, A beta_u, A inverse_temperature, A* constant,
                                                A* linear, A* quadratic, A* g_beta_u, A* g_beta_a) {
    const A inverse = A(1) / (g.mass + epsilon);
    const A g_cost = -inverse_temperature * g_logit;
    A logarithms = 0, g_mass = 0;
    for (int64_t h = 0; h < H; ++h) {
        logarithms += std::log(g.variance[h]);
        g_variance[h] += g_cost * g.mass / (A(2) * g.variance[h]);
        quadratic[h] = g_variance[h] * inverse;
        // Σ w (û − μ)² depends on μ, because ε makes the weights sum to a little less than 1.
        const A slope = (g_mean[h] - A(2) * quadratic[h] * epsilon * g.mean[h]) * inverse;
        linear[h] = slope - A(2) * quadratic[h] * g.rounding_error[h];
        g_mass -= quadratic[h] * (g.variance[h] - epsilon - g.rounding_error[h] * g.rounding_error[h]) +
                  slope * g.rounding_error[h];
    }
    *constant = g_mass + g_cost * (static_cast<A>(H) * beta_u + logarithms / 2);
    *g_beta_u += g_cost * static_cast<A>(H) * g.mass;
    *g_beta_a += inverse_temperature * g_logit;
}

// The E-step: the logit of a vote is constant + Σ_h quadratic_h x² with x = û − mean. Returns the constant.
template <class A> CAPSOPS_HOST_DEVICE inline A e_step(const Gaussian<A>& g, int64_t H, A* quadratic) {
    // log(sigmoid(logit)) without overflow.
    A constant = (g.logit < A(0) ? g.logit : A(0)) - std::log1p(std::exp(-std::fabs(g.logit)));
    for (int64_t h = 0; h < H; ++h) {
        quadratic[h] = A(-0.5) / g.variance[h];
        constant -= std::log(g.variance[h]) / 2;
    }
    return constant;
}

// The gradient of the E-step, from sums over the input capsules of δ (1, x, x²), where δ is the gradient of the logits.
// Writes the gradients of the mean and the variance, and returns the gradient of the activation's logit.
template <class A>
CAPSOPS_HOST_DEVICE inline A e_step_backward(const Gaussian<A>& g, A mass, const A* first, const A* second, int64_t H,
                                             A* g_mean, A* g_variance) {
    for (int64_t h = 0; h < H; ++h) {
        const A inverse = A(1) / g.variance[h];
        g_mean[h] = first[h] * inverse;
        g_variance[h] = (second[h] * inverse - mass) * inverse / 2;
    }
    return mass / (A(1) + std::exp(g.logit));
}

}  // namespace
}  // namespace capsops
