// squash and its vector-Jacobian product, for the host and for GPUs. A routing may also take layer normalisation in its
// place, or nothing.
#pragma once

#include <cmath>
#include <cstdint>

#include "../host_device.h"
#include "../operators.h"
#include "../sizes.h"
#include "lanes.h"

namespace capsops {
// Internal linkage: each instruction set has its own copy, so that the linker cannot mix them.
namespace {

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

// Whichever is the larger; NaN if one of them is.
template <class A> CAPSOPS_HOST_DEVICE inline A larger(A a, A b) {
    return b > a || b != b ? b : a;
}

// Σ_d term(d) over a lane's components, as a Kahan sum over blocks of a few terms: a float loses many small numbers
// that are added to it one by one. Up to one block this is the plain sum.
template <class A, class Lanes, class Term>
CAPSOPS_HOST_DEVICE inline A kahan_sum(int64_t dim, const Lanes& lanes, Term term) {
    const int64_t block = 16 * lanes.step;
    A sum = 0, compensation = 0;
    for (int64_t begin = lanes.first; begin < dim; begin += block) {
        A part = 0;
        const int64_t end = at_most(begin + block, dim);
        for (int64_t d = begin; d < end; d += lanes.step) part += term(d);
        part -= compensation;
        const A next = sum + part;
        compensation = (next - sum) - part;
        sum = next;
    }
    return sum;
}

// The norm of s, as n = ‖s · shrink‖. shrink is 1, or a small power of 2 if ‖s‖ might overflow.
template <class A> struct Length {
    A n, shrink;
};

// The factors for s · shrink: v = f (s · shrink), g_s = shrink (f g_v + radial (ŝ·g_v) ŝ). By either formula, a vector
// whose norm had to be shrunk is squashed to length 1, to the last digit.
template <class A> CAPSOPS_HOST_DEVICE inline SquashFactors<A> squash_factors(Length<A> l, SquashKind kind) {
    if (l.shrink < A(1)) return {A(1) / l.n, A(-1) / l.n};
    return kind == SquashKind::sabour ? squash_sabour(l.n) : squash_efficient(l.n);
}

// The largest |s_d|; NaN if one is.
template <class A, class Row, class Lanes>
CAPSOPS_HOST_DEVICE inline A largest_component(const Row& s, int64_t dim, const Lanes& lanes) {
    A largest = 0;
    for (int64_t d = lanes.first; d < dim; d += lanes.step) largest = larger<A>(largest, std::fabs(s[d]));
    return lanes.largest(largest);
}

// 1, or a small power of 2 for a row whose norm might overflow: that of many components above `huge` may, that of the
// shrunk ones cannot.
template <class A> CAPSOPS_HOST_DEVICE inline A shrink_for(A largest) {
    constexpr A huge = sizeof(A) == 4 ? A(0x1p60) : A(0x1p500);
    constexpr A small = sizeof(A) == 4 ? A(0x1p-56) : A(0x1p-496);
    return largest > huge ? small : A(1);
}

// ‖s‖ without overflow or underflow, of the squares or of the norm itself. Row: any type with components s[d].
template <class A, class Row, class Lanes>
CAPSOPS_HOST_DEVICE inline Length<A> length(const Row& s, int64_t dim, const Lanes& lanes) {
    const A largest = largest_component<A>(s, dim, lanes);
    const bool is_length = !(largest > A(0)) || std::isinf(largest);
    // All lanes of a warp call sum() together, so there is no return before it.
    const A unit = is_length ? A(1) : largest;
    const A ratio = std::sqrt(lanes.sum(kahan_sum<A>(dim, lanes, [&](int64_t d) {
        const A x = s[d] / unit;
        return x * x;
    })));
    if (is_length) return {largest, A(1)};
    const A shrink = shrink_for(largest);
    return {largest * shrink * ratio, shrink};
}

// Layer normalisation without parameters: v = inverse (s · shrink − mean), with the ε of torch.nn.LayerNorm.
template <class A> struct Spread {
    A mean, inverse, shrink;  // inverse: 1 / √(variance + ε); mean and variance are those of s · shrink
};

template <class A, class Row, class Lanes>
CAPSOPS_HOST_DEVICE inline Spread<A> spread(const Row& s, int64_t dim, const Lanes& lanes) {
    // A normal number, which takes the place of ε where s had to be shrunk.
    constexpr A least = sizeof(A) == 4 ? A(0x1p-100) : A(0x1p-1000);
    const A shrink = shrink_for(largest_component<A>(s, dim, lanes)), inverse_dim = A(1) / static_cast<A>(dim);
    const A mean = lanes.sum(kahan_sum<A>(dim, lanes, [&](int64_t d) { return s[d] * shrink; })) * inverse_dim;
    const A variance = lanes.sum(kahan_sum<A>(dim, lanes, [&](int64_t d) {
        const A x = s[d] * shrink - mean;
        return x * x;
    })) * inverse_dim;
    return {mean, A(1) / std::sqrt(variance + (shrink < A(1) ? least : A(1e-5))), shrink};
}

template <class A, class Row, class Out, class Lanes>
CAPSOPS_HOST_DEVICE inline void layer_norm(const Row& s, Out v, int64_t dim, const Lanes& lanes) {
    const Spread<A> x = spread<A>(s, dim, lanes);
    for (int64_t d = lanes.first; d < dim; d += lanes.step) v[d] = x.inverse * (s[d] * x.shrink - x.mean);
}

// g_s = inverse shrink (g_v − mean(g_v) − v mean(g_v v)).
template <class A, class Gradient, class Row, class Out, class Lanes>
CAPSOPS_HOST_DEVICE inline void layer_norm_backward(const Gradient& g_v, const Row& s, Out g_s, int64_t dim,
                                                    const Lanes& lanes) {
    const Spread<A> x = spread<A>(s, dim, lanes);
    const auto v = [&](int64_t d) { return x.inverse * (s[d] * x.shrink - x.mean); };
    const A inverse_dim = A(1) / static_cast<A>(dim);
    const A mean = lanes.sum(kahan_sum<A>(dim, lanes, [&](int64_t d) { return A(g_v[d]); })) * inverse_dim;
    const A along = lanes.sum(kahan_sum<A>(dim, lanes, [&](int64_t d) { return g_v[d] * v(d); })) * inverse_dim;
    for (int64_t d = lanes.first; d < dim; d += lanes.step)
        g_s[d] = x.inverse * x.shrink * (g_v[d] - mean - along * v(d));
}

// v = squash(s) and its vector-Jacobian product, in the accumulation type A. All lanes of a row take the same branch.
template <class A, class Row, class Out, class Lanes = OneLane>
CAPSOPS_HOST_DEVICE inline void squash_vector(const Row& s, Out v, int64_t dim, SquashKind kind,
                                              const Lanes& lanes = {}) {
    if (kind == SquashKind::layer_norm) return layer_norm<A>(s, v, dim, lanes);
    if (kind == SquashKind::none) {
        for (int64_t d = lanes.first; d < dim; d += lanes.step) v[d] = s[d];
        return;
    }
    const Length<A> l = length<A>(s, dim, lanes);
    const A scale = squash_factors(l, kind).scale;
    for (int64_t d = lanes.first; d < dim; d += lanes.step) v[d] = scale * (s[d] * l.shrink);
}

template <class A, class Gradient, class Row, class Out, class Lanes = OneLane>
CAPSOPS_HOST_DEVICE inline void squash_vector_backward(const Gradient& g_v, const Row& s, Out g_s, int64_t dim,
                                                       SquashKind kind, const Lanes& lanes = {}) {
    if (kind == SquashKind::layer_norm) return layer_norm_backward<A>(g_v, s, g_s, dim, lanes);
    if (kind == SquashKind::none) {
        for (int64_t d = lanes.first; d < dim; d += lanes.step) g_s[d] = g_v[d];
        return;
    }
    const Length<A> l = length<A>(s, dim, lanes);
    const SquashFactors<A> f = squash_factors(l, kind);
    const A divisor = l.n == A(0) ? A(1) : l.n;
    const A along =
        lanes.sum(kahan_sum<A>(dim, lanes, [&](int64_t d) { return (s[d] * l.shrink / divisor) * g_v[d]; }));
    for (int64_t d = lanes.first; d < dim; d += lanes.step)
        g_s[d] = (f.scale * g_v[d] + f.radial * along * (s[d] * l.shrink / divisor)) * l.shrink;
}

}  // namespace
}  // namespace capsops
