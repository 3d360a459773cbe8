// The passes of routing by agreement (Sabour et al. 2017, procedure 1), as policies. The logits b_ij = û_ij · V_j are
// not stored; V is the sum of the output capsules of all earlier iterations.
#pragma once

#include "../../math/softmax.h"
#include "../engine/stream.h"

namespace capsops::cpu::CAPSOPS_ISA {

template <class A> struct Dynamic {
    const A* V;  // [B, J, D]
    bool leaky;

    void couplings(const Tile<A>& t, Lanes<A>* c /* [J] */) const {
        agreements_with(t, V, c);
        softmax(c, t.J, leaky);
    }

    // For votes in registers: couplings in the lanes of their agreements, where the other output capsule is `rows`
    // lanes away.
    template <int rows, int E>
    CAPSOPS_INLINE Lanes<A> couplings(const Votes<A, rows, E>& votes, const int64_t* b) const {
        const Lanes<A> logits = agreements_with(votes, V, b);
        Lanes<A> c[2] = {logits, flipped<rows>(logits)};
        softmax(c, 2, leaky);
        return c[0];
    }
};

// reduce: Σ_i c_ij û_ij.
template <class A> struct DynamicSum {
    static constexpr bool takes_registers = true;
    Dynamic<A> dynamic;
    int64_t J, D;

    int64_t row_size() const { return J * D; }
    int64_t scratch_size() const { return J * Lanes<A>::count; }

    void accumulate(Tile<A>& t, A* sum, A* scratch) const {
        Lanes<A>* c = reinterpret_cast<Lanes<A>*>(scratch);
        dynamic.couplings(t, c);
        add_coupled(t, c, sum);
    }

    template <int rows, int E>
    CAPSOPS_INLINE void accumulate(const Votes<A, rows, E>& votes, const int64_t* b, A* sum) const {
        add_coupled(votes, dynamic.couplings(votes, b), b, sum);
    }
};

// The gradient of one iteration: e_j = û_j · g_s,j;  δ_j = c_j (e_j − Σ_k c_k e_k).
template <class A> struct DynamicAdjoint {
    Dynamic<A> dynamic;
    const A* g_s;  // [B, J, D]

    void couplings(const Tile<A>& t, Lanes<A>* c, Lanes<A>* delta) const {
        dynamic.couplings(t, c);
        agreements_with(t, g_s, delta);
        softmax_backward(c, delta, t.J);
    }

    template <int rows, int E>
    CAPSOPS_INLINE void couplings(const Votes<A, rows, E>& votes, const int64_t* b, Lanes<A>* c,
                                  Lanes<A>* delta) const {
        const Lanes<A> own = dynamic.couplings(votes, b), e = agreements_with(votes, g_s, b);
        const Lanes<A> both[2] = {own, flipped<rows>(own)};
        Lanes<A> gradient[2] = {e, flipped<rows>(e)};
        softmax_backward(both, gradient, 2);
        *c = own, *delta = gradient[0];
    }
};

// reduce: H_j = Σ_i δ_ij û_ij, the gradient of V.
template <class A> struct AdjointSum {
    static constexpr bool takes_registers = true;
    DynamicAdjoint<A> adjoint;
    int64_t J, D;

    int64_t row_size() const { return J * D; }
    int64_t scratch_size() const { return 2 * J * Lanes<A>::count; }

    void accumulate(Tile<A>& t, A* H, A* scratch) const {
        Lanes<A>* c = reinterpret_cast<Lanes<A>*>(scratch);
        adjoint.couplings(t, c, c + J);
        add_coupled(t, c + J, H);
    }

    template <int rows, int E>
    CAPSOPS_INLINE void accumulate(const Votes<A, rows, E>& votes, const int64_t* b, A* H) const {
        Lanes<A> c, delta;
        adjoint.couplings(votes, b, &c, &delta);
        add_coupled(votes, delta, b, H);
    }
};

// emit: g_û = Σ_t (c^t g_s^t + δ^t V^t) over iterations, or, if detach, only the last c g_s.
template <class A> struct DynamicGradient {
    static constexpr bool needs_votes = true, takes_registers = true;
    const A* V;    // [iterations, B, J, D]
    const A* g_s;  // [iterations, B, J, D]
    int64_t size;  // of one iteration
    int64_t J;
    int64_t iterations;
    bool equal_first;  // whether the couplings of the first of them are equal
    bool leaky, detach;
    int64_t adjoint_size;  // of a state if params are to be Σ_t H^t too, else 0

    static constexpr int64_t term_size = sizeof(Term<A>) / sizeof(A);

    int64_t param_count() const { return adjoint_size; }
    int64_t scratch_size() const { return 2 * iterations * (J * Lanes<A>::count + term_size); }

    void emit(Tile<A>& t, A* params, A* scratch) const {
        Lanes<A>* coupling = reinterpret_cast<Lanes<A>*>(scratch);
        Term<A>* const terms = reinterpret_cast<Term<A>*>(coupling + 2 * iterations * J);
        int64_t count = 0;
        const auto add = [&](const A* state) {
            terms[count++] = {coupling, state};
            coupling += J;
        };
        for (int64_t iteration = detach ? iterations - 1 : 0; iteration < iterations; ++iteration) {
            const A* g = g_s + iteration * size;
            const A* v = V + iteration * size;
            const Dynamic<A> dynamic{v, leaky};
            if (iteration == 0 && equal_first) {
                for (int64_t j = 0; j < J; ++j) coupling[j] = equal_coupling<A>(J, leaky);
            } else if (detach) {
                dynamic.couplings(t, coupling);
            } else {
                DynamicAdjoint<A>{dynamic, g}.couplings(t, coupling + J, coupling);
                if (adjoint_size) add_coupled(t, coupling, params);
                add(v);
            }
            add(g);
        }
        combine(t, terms, count);
    }

    struct Totals {
        A* adjoint;
    };
    Totals totals(A* params) const { return {params}; }
    void add(Totals, A*) const {}

    template <int rows, int E>
    CAPSOPS_INLINE void emit(Votes<A, rows, E>& votes, const int64_t* b, Totals totals) const {
        constexpr int n = Lanes<A>::count;
        const auto at = [&](const A* x, int64_t t, int r, int v)
                            __attribute__((always_inline)) { return load(x + t * size + (b[r] * 2 * E + v) * n); };
        const int64_t last = iterations - 1;
        if (detach || (last == 0 && equal_first)) {
            const Lanes<A> c = last || !equal_first ? Dynamic<A>{V + last * size, leaky}.couplings(votes, b)
                                                    : Lanes<A>(equal_coupling<A>(2, leaky));
            for_each_vector(votes, c, [&](int r, int v, Lanes<A> a) __attribute__((always_inline)) {
                votes.of[r][v] = a * at(g_s, last, r, v);
            });
            return;
        }
        Votes<A, rows, E> sum;
        if (equal_first)
            for_each_vector(votes, Lanes<A>(equal_coupling<A>(2, leaky)),
                            [&](int r, int v, Lanes<A> a)
                                __attribute__((always_inline)) { sum.of[r][v] = a * at(g_s, 0, r, v); });
        for (int64_t t = equal_first; t <= last; ++t) {
            Lanes<A> c, delta;
            DynamicAdjoint<A>{{V + t * size, leaky}, g_s + t * size}.couplings(votes, b, &c, &delta);
            if (adjoint_size) add_coupled(votes, delta, b, totals.adjoint);
            for_each_vector(votes, c, [&](int r, int v, Lanes<A> a) __attribute__((always_inline)) {
                sum.of[r][v] += a * at(g_s, t, r, v);
            });
            for_each_vector(votes, delta, [&](int r, int v, Lanes<A> a) __attribute__((always_inline)) {
                sum.of[r][v] += a * at(V, t, r, v);
            });
        }
        votes = sum;
    }
};

// The loops with these policies. They are compiled in dynamic.cpp alone, because they take long to compile.
template <class A> struct DynamicPasses {
    static void reduce(const Operands<A>& o, const DynamicSum<A>& policy, A* out);
    static void reduce(const Operands<A>& o, const AdjointSum<A>& policy, A* out);
    static void emit(const Operands<A>& o, const DynamicGradient<A>& policy, const CapsuleGradients& gradients,
                     A* params);
};
extern template struct DynamicPasses<float>;
extern template struct DynamicPasses<double>;

}  // namespace capsops::cpu::CAPSOPS_ISA
