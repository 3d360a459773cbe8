// The coupling policies: how the votes of one input capsule become its contribution to the output
// capsules, and how the gradient of that contribution becomes the gradient of the votes.
//
// A policy sees one input capsule of one batch item at a time, so the streaming loops never hold more
// than one capsule's votes. Two kinds of policy exist:
//
//   reducing   accumulate(b, votes, sum, scratch)           adds one capsule's term to sum [J, D]
//   emitting   emit(b, votes, g_votes, g_params, scratch)   writes g_votes [J, D] and adds to g_params
//
// Votes, sums and gradients are [J, D] in the accumulation type A. scratch holds scratch_size() numbers.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define CAPSOPS_HOST_DEVICE __host__ __device__
#else
#define CAPSOPS_HOST_DEVICE
#endif

namespace capsops {

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

// ‖s‖ without overflow or underflow of the squares.
template <class A> CAPSOPS_HOST_DEVICE inline A length(const A* s, int64_t dim) {
    A largest = 0;
    for (int64_t d = 0; d < dim; ++d) {
        const A magnitude = std::fabs(s[d]);
        // Written so that a NaN among the numbers is kept.
        if (!(magnitude <= largest)) largest = magnitude;
    }
    if (!(largest > A(0)) || std::isinf(largest)) return largest;
    A sum = 0;
    for (int64_t d = 0; d < dim; ++d) {
        const A ratio = s[d] / largest;
        sum += ratio * ratio;
    }
    return largest * std::sqrt(sum);
}

template <class A, class Factors>
CAPSOPS_HOST_DEVICE inline void squash_vector(const A* s, A* v, int64_t dim, Factors factors) {
    const A scale = factors(length(s, dim)).scale;
    for (int64_t d = 0; d < dim; ++d) v[d] = scale * s[d];
}

template <class A, class Factors>
CAPSOPS_HOST_DEVICE inline void squash_vector_backward(const A* g_v, const A* s, A* g_s, int64_t dim, Factors factors) {
    const A n = length(s, dim);
    const SquashFactors<A> f = factors(n);
    const A divisor = n == A(0) ? A(1) : n;
    A along = 0;
    for (int64_t d = 0; d < dim; ++d) along += (s[d] / divisor) * g_v[d];
    for (int64_t d = 0; d < dim; ++d) g_s[d] = f.scale * g_v[d] + f.radial * along * (s[d] / divisor);
}

// ---- attention (CardioCaps, eq. 4) ---------------------------------------------------------------

// z_kd = Σ_j A_kj û_jd + a_k;  c = softmax over k, for every d by itself.
template <class A> struct Attention {
    const A* weight;  // [J, J]
    const A* bias;    // [J], or null
    int64_t J, D;

    // c [J, D] and one row of D numbers.
    int64_t scratch_size() const { return (J + 1) * D; }

    CAPSOPS_HOST_DEVICE void couplings(const A* votes, A* c, A* row) const {
        for (int64_t k = 0; k < J; ++k) {
            A* z = c + k * D;
            const A a = bias ? bias[k] : A(0);
            for (int64_t d = 0; d < D; ++d) z[d] = a;
            for (int64_t j = 0; j < J; ++j) {
                const A w = weight[k * J + j];
                for (int64_t d = 0; d < D; ++d) z[d] += w * votes[j * D + d];
            }
        }
        for (int64_t d = 0; d < D; ++d) row[d] = c[d];
        for (int64_t k = 1; k < J; ++k)
            for (int64_t d = 0; d < D; ++d) row[d] = c[k * D + d] > row[d] ? c[k * D + d] : row[d];
        for (int64_t k = 0; k < J; ++k)
            for (int64_t d = 0; d < D; ++d) c[k * D + d] = std::exp(c[k * D + d] - row[d]);
        for (int64_t d = 0; d < D; ++d) row[d] = A(0);
        for (int64_t k = 0; k < J; ++k)
            for (int64_t d = 0; d < D; ++d) row[d] += c[k * D + d];
        for (int64_t d = 0; d < D; ++d) row[d] = A(1) / row[d];
        for (int64_t k = 0; k < J; ++k)
            for (int64_t d = 0; d < D; ++d) c[k * D + d] *= row[d];
    }

    CAPSOPS_HOST_DEVICE void accumulate(int64_t, const A* votes, A* s, A* scratch) const {
        couplings(votes, scratch, scratch + J * D);
        for (int64_t jd = 0; jd < J * D; ++jd) s[jd] += scratch[jd] * votes[jd];
    }
};

// q_j = g_s,j û_j;  dz_j = c_j (q_j − Σ_k c_k q_k);  g_û,j = c_j g_s,j + Σ_k A_kj dz_k;
// g_A,kj = Σ dz_k û_j;  g_a,k = Σ dz_k.
template <class A> struct AttentionGradient {
    Attention<A> attention;
    const A* g_s;  // [B, J, D]

    int64_t param_count() const { return attention.J * (attention.J + 1); }  // g_A [J, J], g_a [J]
    int64_t scratch_size() const { return attention.scratch_size(); }

    CAPSOPS_HOST_DEVICE void emit(int64_t b, const A* votes, A* g_votes, A* g_params, A* scratch) const {
        const int64_t J = attention.J, D = attention.D;
        const A* g = g_s + b * J * D;
        A* c = scratch;
        A* mean = scratch + J * D;
        attention.couplings(votes, c, mean);
        for (int64_t d = 0; d < D; ++d) mean[d] = A(0);
        for (int64_t j = 0; j < J; ++j)
            for (int64_t d = 0; d < D; ++d) mean[d] += c[j * D + d] * (g[j * D + d] * votes[j * D + d]);
        for (int64_t j = 0; j < J; ++j) {
            for (int64_t d = 0; d < D; ++d) {
                const int64_t jd = j * D + d;
                g_votes[jd] = c[jd] * g[jd];
                c[jd] *= g[jd] * votes[jd] - mean[d];  // dz from here on
            }
        }
        const A* dz = c;
        for (int64_t k = 0; k < J; ++k) {
            for (int64_t j = 0; j < J; ++j) {
                const A w = attention.weight[k * J + j];
                A dot = 0;
                for (int64_t d = 0; d < D; ++d) {
                    g_votes[j * D + d] += w * dz[k * D + d];
                    dot += dz[k * D + d] * votes[j * D + d];
                }
                g_params[k * J + j] += dot;
            }
            A sum = 0;
            for (int64_t d = 0; d < D; ++d) sum += dz[k * D + d];
            g_params[J * J + k] += sum;
        }
    }
};

// ---- dynamic routing (Sabour et al. 2017, procedure 1) ---------------------------------------------

// The logits need no tensor: b_ij = û_ij · V_j, where V is the sum of the output capsules of the iterations so
// far. leaky adds one logit that is always 0 and whose share is dropped.
template <class A> struct Dynamic {
    const A* V;  // [B, J, D]; null: the first iteration, where all couplings are equal
    int64_t J, D;
    bool leaky;

    int64_t scratch_size() const { return J; }

    CAPSOPS_HOST_DEVICE void couplings(int64_t b, const A* votes, A* c) const {
        if (!V) {
            for (int64_t j = 0; j < J; ++j) c[j] = A(1) / static_cast<A>(leaky ? J + 1 : J);
            return;
        }
        A largest = leaky ? A(0) : -INFINITY;
        for (int64_t j = 0; j < J; ++j) {
            A logit = 0;
            for (int64_t d = 0; d < D; ++d) logit += votes[j * D + d] * V[(b * J + j) * D + d];
            c[j] = logit;
            largest = logit > largest ? logit : largest;
        }
        A sum = leaky ? std::exp(-largest) : A(0);
        for (int64_t j = 0; j < J; ++j) sum += c[j] = std::exp(c[j] - largest);
        const A inverse = A(1) / sum;
        for (int64_t j = 0; j < J; ++j) c[j] *= inverse;
    }

    CAPSOPS_HOST_DEVICE void accumulate(int64_t b, const A* votes, A* s, A* scratch) const {
        couplings(b, votes, scratch);
        for (int64_t j = 0; j < J; ++j)
            for (int64_t d = 0; d < D; ++d) s[j * D + d] += scratch[j] * votes[j * D + d];
    }
};

// One iteration seen from behind: e_j = û_j · g_s,j;  δ_j = c_j (e_j − Σ_k c_k e_k).
template <class A> struct DynamicAdjoint {
    Dynamic<A> dynamic;
    const A* g_s;  // [B, J, D]

    int64_t scratch_size() const { return 2 * dynamic.J; }

    // c and δ, both [J].
    CAPSOPS_HOST_DEVICE void couplings(int64_t b, const A* votes, A* c, A* delta) const {
        const int64_t J = dynamic.J, D = dynamic.D;
        dynamic.couplings(b, votes, c);
        A mean = 0;
        for (int64_t j = 0; j < J; ++j) {
            A e = 0;
            for (int64_t d = 0; d < D; ++d) e += votes[j * D + d] * g_s[(b * J + j) * D + d];
            delta[j] = e;
            mean += c[j] * e;
        }
        for (int64_t j = 0; j < J; ++j) delta[j] = c[j] * (delta[j] - mean);
    }

    // H_j = Σ_i δ_ij û_ij, the gradient of V_j.
    CAPSOPS_HOST_DEVICE void accumulate(int64_t b, const A* votes, A* H, A* scratch) const {
        const int64_t J = dynamic.J, D = dynamic.D;
        A* delta = scratch + J;
        couplings(b, votes, scratch, delta);
        for (int64_t j = 0; j < J; ++j)
            for (int64_t d = 0; d < D; ++d) H[j * D + d] += delta[j] * votes[j * D + d];
    }
};

// g_û = Σ_t (c^t g_s^t + δ^t V^t) over all iterations; with detached logits only c^R g_s^R is left.
template <class A> struct DynamicGradient {
    const A* V;    // [iterations, B, J, D]; V[0] = 0
    const A* g_s;  // [iterations, B, J, D]
    int64_t B, J, D;
    int iterations;
    bool leaky, detach;

    int64_t param_count() const { return 0; }
    int64_t scratch_size() const { return 2 * J; }

    CAPSOPS_HOST_DEVICE void emit(int64_t b, const A* votes, A* g_votes, A*, A* scratch) const {
        A* c = scratch;
        A* delta = scratch + J;
        for (int64_t jd = 0; jd < J * D; ++jd) g_votes[jd] = A(0);
        for (int t = detach ? iterations - 1 : 0; t < iterations; ++t) {
            const int64_t offset = t * B * J * D;
            const Dynamic<A> dynamic{t == 0 ? nullptr : V + offset, J, D, leaky};
            const bool through_logits = t > 0 && !detach;
            if (through_logits) {
                DynamicAdjoint<A>{dynamic, g_s + offset}.couplings(b, votes, c, delta);
            } else {
                dynamic.couplings(b, votes, c);
            }
            for (int64_t j = 0; j < J; ++j) {
                const int64_t item = offset + (b * J + j) * D;
                for (int64_t d = 0; d < D; ++d) g_votes[j * D + d] += c[j] * g_s[item + d];
                if (!through_logits) continue;
                for (int64_t d = 0; d < D; ++d) g_votes[j * D + d] += delta[j] * V[item + d];
            }
        }
    }
};

}  // namespace capsops
