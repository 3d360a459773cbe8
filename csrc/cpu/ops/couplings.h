// The passes of routing by agreement whose logits have a part that is given, as policies: b_ij = û_ij · V_j +
// logits_ij.
#pragma once

#include <limits>

#include "../../math/softmax.h"
#include "../engine/stream.h"

namespace capsops::cpu::CAPSOPS_ISA {

// c = softmax_j(û · V + logits). A logit of −∞ removes its pair: c = 0, also where all logits of an input capsule are
// −∞. +∞ and NaN make all couplings of their input capsule NaN. The logits are read with the pairs in the lanes, in
// either layout.
template <class A> struct Couplings {
    const A* V;       // a state; null: all its numbers are 0
    const A* logits;  // [B, N, J]
    int64_t N, J;
    bool leaky;

    // Calls each(j, r, x) with the number x [·, J] of item r and output capsule j, in numbers [B, N, J].
    template <class X, class Each> void for_each(const Tile<A>& t, X* numbers, Each each) const {
        for (int r = 0; r < t.count; ++r) {
            if (!t.has(r)) continue;
            X* own = numbers + (t.b[r] * N + t.i[r]) * J;
            for (int64_t j = 0; j < J; ++j) each(j, r, own[j]);
        }
    }

    void couplings(const Tile<A>& t, Lanes<A>* c /* [J] */) const {
        constexpr A removed = -std::numeric_limits<A>::infinity(), lowest = std::numeric_limits<A>::lowest();
        if (V)
            agreements_with(t, V, c);
        else
            for (int64_t j = 0; j < J; ++j) c[j] = A(0);
        // x − x is 0, or NaN if x is +∞.
        for_each(t, logits,
                 [&](int64_t j, int r, A x) { c[j].v[r] = x == removed ? lowest : c[j].v[r] + x + (x - x); });
        softmax(c, J, leaky);
        for_each(t, logits, [&](int64_t j, int r, A x) {
            if (x == removed) c[j].v[r] = 0;
        });
    }

    // c, and δ_j = c_j (e_j − Σ_k c_k e_k) with e = û · g_s: the gradient of the logits.
    void couplings(const Tile<A>& t, const A* g_s, Lanes<A>* c, Lanes<A>* delta) const {
        couplings(t, c);
        agreements_with(t, g_s, delta);
        softmax_backward(c, delta, J);
    }
};

// reduce: Σ_i c_ij û_ij; or, if g_s is not null, Σ_i δ_ij û_ij.
template <class A> struct CoupledSum {
    static constexpr bool takes_registers = false;
    Couplings<A> couplings;
    const A* g_s;  // a state, or null
    int64_t D;

    int64_t row_size() const { return couplings.J * D; }
    int64_t scratch_size() const { return 2 * couplings.J * Lanes<A>::count; }

    void accumulate(Tile<A>& t, A* sum, A* scratch) const {
        Lanes<A>* c = reinterpret_cast<Lanes<A>*>(scratch);
        Lanes<A>* delta = c + couplings.J;
        if (!g_s) {
            couplings.couplings(t, c);
            return add_coupled(t, c, sum);
        }
        couplings.couplings(t, g_s, c, delta);
        add_coupled(t, delta, sum);
    }
};

// emit: g_û = Σ_t (c^t g_s^t + δ^t V^t) and g_logits = Σ_t δ^t over iterations; or, if detach, only the last c g_s.
template <class A> struct CoupledGradient {
    static constexpr bool needs_votes = true, takes_registers = false;
    Couplings<A> first;  // V is [iterations, a state]
    const A* g_s;        // [iterations, a state]
    A* g_logits;         // [B, N, J], zeros to which it adds; or null
    int64_t size;        // of a state
    int64_t iterations;
    bool zero_first;  // whether V of the first of them is 0
    bool detach;
    int64_t adjoint_size;  // of a state if params are to be Σ_t H^t, H^t = Σ_i δ^t_ij û_ij; else 0

    static constexpr int64_t term_size = sizeof(Term<A>) / sizeof(A);

    int64_t param_count() const { return adjoint_size; }
    int64_t scratch_size() const { return 2 * iterations * (first.J * Lanes<A>::count + term_size); }

    void emit(Tile<A>& t, A* params, A* scratch) const {
        const int64_t J = first.J;
        Lanes<A>* c = reinterpret_cast<Lanes<A>*>(scratch);
        Term<A>* const terms = reinterpret_cast<Term<A>*>(c + 2 * iterations * J);
        int64_t count = 0;
        for (int64_t iteration = detach ? iterations - 1 : 0; iteration < iterations; ++iteration, c += 2 * J) {
            const bool zero = zero_first && iteration == 0;
            const A* g = g_s + iteration * size;
            Couplings<A> couplings = first;
            couplings.V = zero ? nullptr : first.V + iteration * size;
            terms[count++] = {c, g};
            if (detach) {
                couplings.couplings(t, c);
                break;
            }
            Lanes<A>* delta = c + J;
            couplings.couplings(t, g, c, delta);
            if (g_logits) couplings.for_each(t, g_logits, [&](int64_t j, int r, A& to) { to += delta[j].v[r]; });
            if (adjoint_size) add_coupled(t, delta, params);
            if (!zero) terms[count++] = {delta, couplings.V};
        }
        combine(t, terms, count);
    }
};

// The loops with these policies. They are compiled in dynamic_with_logits.cpp alone, because they take long to compile.
template <class A> struct CoupledPasses {
    static void reduce(const Operands<A>& o, const CoupledSum<A>& policy, A* out);
    static void emit(const Operands<A>& o, const CoupledGradient<A>& policy, const CapsuleGradients& gradients,
                     A* params);
};
extern template struct CoupledPasses<float>;
extern template struct CoupledPasses<double>;

}  // namespace capsops::cpu::CAPSOPS_ISA
