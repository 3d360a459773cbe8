// The mathematics of the couplings: softmax over the output capsules and its gradient, the statistics of EM routing,
// squash. Compiled for the host and for GPUs; the streaming loops of both call these and nothing else.
//
// X is whatever holds one number of one problem, or of several side by side: float, double, or a vector of lanes.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "host_device.h"
#include "routing.h"
#include "sizes.h"

namespace capsops {
// One copy for every instruction set that includes this, so that none can be linked to another's.
namespace {

// e^x, with x kept below where the reciprocal of e^x would not be a normal number. On GPUs by the hardware's 2^x: a
// relative error of about (2 + |x|) · 1e-7, and x is at most 0 where a softmax asks.
CAPSOPS_HOST_DEVICE CAPSOPS_ALWAYS_INLINE float exponential(float x) {
    x = x > 80.0f ? 80.0f : x;
#if defined(__CUDA_ARCH__)
    return __expf(x);
#else
    return std::exp(x);
#endif
}
CAPSOPS_HOST_DEVICE CAPSOPS_ALWAYS_INLINE double exponential(double x) {
    return std::exp(x > 700.0 ? 700.0 : x);
}

CAPSOPS_HOST_DEVICE CAPSOPS_ALWAYS_INLINE float reciprocal(float x) {
#if defined(__CUDA_ARCH__)
    return __fdividef(1.0f, x);
#else
    return 1.0f / x;
#endif
}
CAPSOPS_HOST_DEVICE CAPSOPS_ALWAYS_INLINE double reciprocal(double x) {
    return 1.0 / x;
}

// The larger; b if a is not a number.
CAPSOPS_HOST_DEVICE CAPSOPS_ALWAYS_INLINE float larger(float a, float b) {
    return a > b ? a : b;
}
CAPSOPS_HOST_DEVICE CAPSOPS_ALWAYS_INLINE double larger(double a, double b) {
    return a > b ? a : b;
}

// ---- couplings over the output capsules ------------------------------------------------------------

// c_j = softmax over j of z_j, in place. leaky adds one logit that is always 0 and whose share is dropped. Row:
// whatever has numbers z[j].
template <class Row> CAPSOPS_HOST_DEVICE CAPSOPS_ALWAYS_INLINE void softmax(Row z, int64_t J, bool leaky) {
    using X = std::remove_cvref_t<decltype(z[0])>;
    if (J == 2 && !leaky) {
        // One exponential instead of two: c_0 = 1/(1 + e^(z_1 − z_0)).
        const X e = exponential(z[1] - z[0]);
        z[0] = reciprocal(X(1) + e);
        z[1] = e * z[0];
        return;
    }
    X largest = leaky ? larger(z[0], X(0)) : z[0];
    for (int64_t j = 1; j < J; ++j) largest = larger(z[j], largest);
    X sum = leaky ? exponential(-largest) : X(0);
    for (int64_t j = 0; j < J; ++j) {
        z[j] = exponential(z[j] - largest);
        sum += z[j];
    }
    const X inverse = reciprocal(sum);
    for (int64_t j = 0; j < J; ++j) z[j] *= inverse;
}

// The gradient of the logits, δ_j = c_j (e_j − Σ_k c_k e_k), in place of e, the gradient of the couplings.
template <class Couplings, class Row>
CAPSOPS_HOST_DEVICE CAPSOPS_ALWAYS_INLINE void softmax_backward(Couplings c, Row e, int64_t J) {
    std::remove_cvref_t<decltype(e[0])> mean = c[0] * e[0];
    for (int64_t j = 1; j < J; ++j) mean += c[j] * e[j];
    for (int64_t j = 0; j < J; ++j) e[j] = c[j] * (e[j] - mean);
}

// The coupling of the first iteration of routing by agreement, where all are equal.
template <class A> CAPSOPS_HOST_DEVICE inline A equal_coupling(int64_t J, bool leaky) {
    return A(1) / static_cast<A>(leaky ? J + 1 : J);
}

// ---- EM routing (Hinton et al. 2018, procedure 1) ----------------------------------------------------

// What iteration t knows of one output capsule. H components of a vote.
template <class A> struct Gaussian {
    A* mean;      // [H]
    A* rest;      // [H], what rounding took from the mean
    A* variance;  // [H]
    A mass;       // Σ_i w_i
    A logit;      // of the activation
};

// The M-step, from sums over the input capsules of w (1, x, x²) with x = û − shift: shifted, because Σ w û² − μ² loses
// its digits. Where a variance has collapsed to ε its gradient is so steep that the rounding of the mean shows: rest
// keeps what was lost. Sets everything in g. Returns whether the shift was close enough: where the mean
// moved by many standard deviations the variance has lost digits, and the sums should be taken again with the new mean.
template <class A>
CAPSOPS_HOST_DEVICE inline bool maximise(Gaussian<A>& g, A mass, const A* first, const A* second, const A* shift,
                                         int64_t H, A epsilon, A beta_u, A beta_a, A inverse_temperature) {
    const A inverse = A(1) / (mass + epsilon);
    A logarithms = 0;
    bool precise = true;
    for (int64_t h = 0; h < H; ++h) {
        const A moved = (first[h] - epsilon * shift[h]) * inverse;
        g.mean[h] = shift[h] + moved;
        g.rest[h] = (shift[h] - g.mean[h]) + moved;
        const A spread = larger(A(0), second[h] - moved * (A(2) * first[h] - moved * mass));
        g.variance[h] = spread * inverse + epsilon;
        precise = precise && moved * moved <= A(4) * g.variance[h];
        logarithms += std::log(g.variance[h]);
    }
    g.mass = mass;
    g.logit = inverse_temperature * (beta_a - mass * (static_cast<A>(H) * beta_u + logarithms / 2));
    return precise;
}

// The M-step backwards: w of one input capsule has the gradient
//     e = constant + Σ_h (linear_h x + quadratic_h x²)    with x = û − mean.
// g_variance changes.
template <class A>
CAPSOPS_HOST_DEVICE inline void maximise_backward(const Gaussian<A>& g, const A* g_mean, A* g_variance, A g_logit,
                                                  int64_t H, A epsilon, A beta_u, A inverse_temperature, A* constant,
                                                  A* linear, A* quadratic, A* g_beta_u, A* g_beta_a) {
    const A inverse = A(1) / (g.mass + epsilon);
    const A g_cost = -inverse_temperature * g_logit;
    A logarithms = 0, g_mass = 0;
    for (int64_t h = 0; h < H; ++h) {
        logarithms += std::log(g.variance[h]);
        g_variance[h] += g_cost * g.mass / (A(2) * g.variance[h]);
        quadratic[h] = g_variance[h] * inverse;
        // Σ w (û − μ)² changes with μ because the weights sum to a little less than 1.
        const A slope = (g_mean[h] - A(2) * quadratic[h] * epsilon * g.mean[h]) * inverse;
        linear[h] = slope - A(2) * quadratic[h] * g.rest[h];
        g_mass -= quadratic[h] * (g.variance[h] - epsilon - g.rest[h] * g.rest[h]) + slope * g.rest[h];
    }
    *constant = g_mass + g_cost * (static_cast<A>(H) * beta_u + logarithms / 2);
    *g_beta_u += g_cost * static_cast<A>(H) * g.mass;
    *g_beta_a += inverse_temperature * g_logit;
}

// The E-step: the logit of a vote is constant + Σ_h quadratic_h x², x = û − mean. Returns the constant.
template <class A> CAPSOPS_HOST_DEVICE inline A expect(const Gaussian<A>& g, int64_t H, A* quadratic) {
    // ln of the logistic function, without overflow.
    A constant = (g.logit < A(0) ? g.logit : A(0)) - std::log1p(std::exp(-std::fabs(g.logit)));
    for (int64_t h = 0; h < H; ++h) {
        quadratic[h] = A(-0.5) / g.variance[h];
        constant -= std::log(g.variance[h]) / 2;
    }
    return constant;
}

// The E-step backwards, from sums over the input capsules of δ (1, x, x²), δ the gradient of the logits. Writes the
// gradients of the mean and the variance and returns that of the activation's logit.
template <class A>
CAPSOPS_HOST_DEVICE inline A expect_backward(const Gaussian<A>& g, A mass, const A* first, const A* second, int64_t H,
                                             A* g_mean, A* g_variance) {
    for (int64_t h = 0; h < H; ++h) {
        const A inverse = A(1) / g.variance[h];
        g_mean[h] = first[h] * inverse;
        g_variance[h] = (second[h] * inverse - mass) * inverse / 2;
    }
    return mass / (A(1) + std::exp(g.logit));
}

// ---- squash --------------------------------------------------------------------------------------

// The factors of v = f(n) s and of its vector-Jacobian product g_s = f g_v + radial (ŝ·g_v) ŝ, with n = ‖s‖
// and ŝ = s/n. Both are finite for every finite n; at n = 0 they are the limits.
template <class A> struct SquashFactors {
    A scale, radial;
};

// Sabour et al. 2017, eq. 1: f = n/(1+n²), and n f' = f (1−n²)/(1+n²). Dividing through by n keeps n² from
// overflowing.
template <class A> CAPSOPS_HOST_DEVICE inline SquashFactors<A> squash_sabour(A n) {
    const A inverse = A(1) / n;
    const A scale = A(1) / (inverse + n);
    const A ratio = n > A(1) ? (inverse - n) / (inverse + n) : (A(1) - n * n) / (A(1) + n * n);
    return {scale, scale * ratio};
}

// Mazzia et al. 2021 (Efficient-CapsNet), eq. 4: f = (1 − e^{−n})/n, and n f' = e^{−n} − f.
template <class A> CAPSOPS_HOST_DEVICE inline SquashFactors<A> squash_efficient(A n) {
    if (n < A(1e-3)) {
        // Series: the closed form of n f' loses its digits to cancellation here.
        const A scale = A(1) - n * (A(0.5) - n * (A(1) / 6 - n * (A(1) / 24)));
        return {scale, -n * (A(0.5) - n * (A(1) / 3 - n * (A(1) / 8)))};
    }
    const A scale = -std::expm1(-n) / n;
    return {scale, std::exp(-n) - scale};
}

// Σ_d term(d). A float that many small numbers are added to one by one loses them; so blocks of a few terms are added
// up, with what rounding takes from the total kept beside it (Kahan). Up to one block this is the plain sum.
template <class A, class Term> CAPSOPS_HOST_DEVICE inline A long_sum(int64_t count, Term term) {
    constexpr int64_t block = 16;
    A sum = 0, excess = 0;
    for (int64_t begin = 0; begin < count; begin += block) {
        A part = 0;
        const int64_t end = at_most(begin + block, count);
        for (int64_t d = begin; d < end; ++d) part += term(d);
        part -= excess;
        const A next = sum + part;
        excess = (next - sum) - part;
        sum = next;
    }
    return sum;
}

// ‖s‖ as n, the length of s · shrink. shrink is 1, or a small power of 2 where ‖s‖ might overflow.
template <class A> struct Length {
    A n, shrink;
};

// The factors for s · shrink in place of s: v = f (s · shrink), g_s = shrink (f g_v + radial (ŝ·g_v) ŝ). So long a
// vector is squashed to length 1, to the last digit, by either formula.
template <class A> CAPSOPS_HOST_DEVICE inline SquashFactors<A> squash_factors(Length<A> l, SquashKind kind) {
    if (l.shrink < A(1)) return {A(1) / l.n, A(-1) / l.n};
    return kind == SquashKind::sabour ? squash_sabour(l.n) : squash_efficient(l.n);
}

// ‖s‖ without overflow or underflow of the squares, or of the length itself. Row: whatever has components s[d].
template <class A, class Row> CAPSOPS_HOST_DEVICE inline Length<A> length(const Row& s, int64_t dim) {
    // Beyond `huge` the length of as many components as fit into memory may overflow; shrunk, it cannot.
    constexpr A huge = sizeof(A) == 4 ? A(0x1p60) : A(0x1p500);
    constexpr A small = sizeof(A) == 4 ? A(0x1p-56) : A(0x1p-496);
    A largest = 0;
    for (int64_t d = 0; d < dim; ++d) {
        const A magnitude = std::fabs(s[d]);
        // A NaN is kept: no number is greater.
        if (magnitude > largest || magnitude != magnitude) largest = magnitude;
    }
    if (!(largest > A(0)) || std::isinf(largest)) return {largest, A(1)};
    const A ratio = std::sqrt(long_sum<A>(dim, [&](int64_t d) {
        const A x = s[d] / largest;
        return x * x;
    }));
    const A shrink = largest > huge ? small : A(1);
    return {largest * shrink * ratio, shrink};
}

// v = squash(s) and its vector-Jacobian product, in the accumulation type A.
template <class A, class Row, class Out>
CAPSOPS_HOST_DEVICE inline void squash_vector(const Row& s, Out v, int64_t dim, SquashKind kind) {
    const Length<A> l = length<A>(s, dim);
    const A scale = squash_factors(l, kind).scale;
    for (int64_t d = 0; d < dim; ++d) v[d] = scale * (s[d] * l.shrink);
}

template <class A, class Gradient, class Row, class Out>
CAPSOPS_HOST_DEVICE inline void squash_vector_backward(const Gradient& g_v, const Row& s, Out g_s, int64_t dim,
                                                       SquashKind kind) {
    const Length<A> l = length<A>(s, dim);
    const SquashFactors<A> f = squash_factors(l, kind);
    const A divisor = l.n == A(0) ? A(1) : l.n;
    const A along = long_sum<A>(dim, [&](int64_t d) { return (s[d] * l.shrink / divisor) * g_v[d]; });
    for (int64_t d = 0; d < dim; ++d)
        g_s[d] = (f.scale * g_v[d] + f.radial * along * (s[d] * l.shrink / divisor)) * l.shrink;
}

}  // namespace
}  // namespace capsops
