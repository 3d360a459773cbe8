// The passes of routing by agreement with logits b_ij = û_ij · V_j + logits_ij, part of which is given, and with a
// softmax over the output capsules or over the input capsules, as policies. Input capsules may have weights w_i, by
// which their couplings are multiplied: s_j = Σ_i w_i c_ij û_ij.
#pragma once

#include <limits>

#include "../../math/softmax.h"
#include "input_weights.h"
#include "iterations.h"

namespace capsops::cpu::CAPSOPS_ISA {

// The couplings of one iteration: c_ij = exp(b_ij) / Σ_k exp(b_ik), or, with log_sums, c_ij = exp(b_ij − log_sums_j).
//
// A logit of −∞ removes its pair: c = 0, even where that leaves an input or an output capsule without pairs. +∞ and NaN
// make all couplings of their sum NaN. The logits are read with the pairs in the lanes, in either layout.
template <class A> struct Couplings {
    const A* V;             // a state; null: all its numbers are 0
    const A* logits;        // [B, N, J]; null: all are 0
    const A* input_weight;  // [B, N]; null: all are 1
    int64_t N, J;
    bool leaky;  // over output capsules only
    // For the softmax over the input capsules, both as Operands::pack_scalars makes them: log Σ_i exp b_ij, and
    // Σ_i c_ij e_ij with e = w û · g_s, which is needed for δ only.
    const A* log_sums = nullptr;
    const A* means = nullptr;

    // Calls each(j, r, x) with the number x [·, J] of item r and output capsule j, in numbers [B, N, J].
    template <class X, class Each> void for_each(const Tile<A>& t, X* numbers, Each each) const {
        for (int r = 0; r < t.count; ++r) {
            if (!t.has(r)) continue;
            X* own = numbers + (t.b[r] * N + t.i[r]) * J;
            for (int64_t j = 0; j < J; ++j) each(j, r, own[j]);
        }
    }

    // b, with the lowest number in place of −∞ and for masked items. Returns whether there are such pairs, whose
    // couplings clear() then sets to 0.
    bool add_up(const Tile<A>& t, Lanes<A>* b /* [J] */) const {
        constexpr A lowest = std::numeric_limits<A>::lowest();
        if (V)
            agreements_with(t, V, b);
        else
            for (int64_t j = 0; j < J; ++j) b[j] = A(0);
        set_absent(t, b, lowest);
        bool some = t.absent != 0;
        if (!logits) return some;
        // x − x is 0, or NaN if x is +∞.
        for_each(t, logits, [&](int64_t j, int r, A x) {
            some |= x == removed;
            b[j].v[r] = x == removed ? lowest : b[j].v[r] + x + (x - x);
        });
        return some;
    }

    // Sets the couplings of removed pairs and of masked items to 0.
    void clear(const Tile<A>& t, Lanes<A>* c /* [J] */) const {
        if (logits)
            for_each(t, logits, [&](int64_t j, int r, A x) {
                if (x == removed) c[j].v[r] = 0;
            });
        set_absent(t, c, A(0));
    }

    // Multiplies x, numbers of the pairs, by the weights of their input capsules.
    void weigh(const Tile<A>& t, Lanes<A>* x /* [J] */) const { InputWeights<A>{input_weight, N}.weigh(t, x); }

    // Without the weights.
    void couplings(const Tile<A>& t, Lanes<A>* c /* [J] */) const {
        const bool some_removed = add_up(t, c);
        if (log_sums)
            for (int64_t j = 0; j < J; ++j) c[j] = exponential(c[j] - scalar(t, log_sums, j));
        else
            softmax(c, J, leaky);
        if (some_removed) clear(t, c);
    }

    void add_weight_gradient(const Tile<A>& t, const Lanes<A>* c, const Lanes<A>* e, A* to) const {
        InputWeights<A>{input_weight, N}.add_gradient(t, c, e, to);
    }

    // w c, and δ, the gradient of b: δ_ij = c_ij (e_ij − Σ_k c_ik e_ik), or c_ij (e_ij − means_j).
    void couplings(const Tile<A>& t, const A* g_s, Lanes<A>* c, Lanes<A>* delta, A* g_input_weight = nullptr) const {
        couplings(t, c);
        agreements_with(t, g_s, delta);
        if (g_input_weight) add_weight_gradient(t, c, delta, g_input_weight);
        weigh(t, delta);
        if (log_sums)
            for (int64_t j = 0; j < J; ++j) delta[j] = c[j] * (delta[j] - scalar(t, means, j));
        else
            softmax_backward(c, delta, J);
        weigh(t, c);
    }

  private:
    static constexpr A removed = -std::numeric_limits<A>::infinity();

    void set_absent(const Tile<A>& t, Lanes<A>* x /* [J] */, A value) const {
        for (int r = 0; t.absent && r < t.count; ++r)
            for (int64_t j = 0; j < J && !t.has(r); ++j) x[j].v[r] = value;
    }

    // Lane r: the number of item r and output capsule j.
    Lanes<A> scalar(const Tile<A>& t, const A* scalars, int64_t j) const {
        if (t.layout == Layout::items) return load(scalars + (t.row(0) * J + j) * Lanes<A>::count);
        Lanes<A> x = A(0);
        for (int r = 0; r < t.count; ++r) x.v[r] = scalars[t.b[r] * J + j];
        return x;
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
            couplings.weigh(t, c);
            return add_coupled(t, c, sum);
        }
        couplings.couplings(t, g_s, c, delta);
        add_coupled(t, delta, sum);
    }
};

// emit: g_û = Σ_t (w c^t g_s^t + δ^t V^t), g_logits = Σ_t δ^t and g_w = Σ_t Σ_j c^t e^t over iterations; or, if detach,
// only the terms with c of the last one.
template <class A> struct CoupledGradient {
    static constexpr bool needs_votes = true, takes_registers = false;
    Couplings<A> all;   // V is [iterations, a state], log_sums and means [iterations, scalars] or null
    const A* g_s;       // [iterations, a state]
    A* g_logits;        // [B, N, J], zeros to which it adds; or null
    A* g_input_weight;  // [B, N], the same
    int64_t state_size, scalars_size;
    int64_t iterations;
    bool zero_first;  // whether V of the first of them is 0
    bool detach;
    int64_t adjoint_size;  // of a state if params are to be Σ_t H^t, H^t = Σ_i δ^t_ij û_ij; else 0

    static constexpr int64_t term_size = sizeof(Term<A>) / sizeof(A);

    int64_t param_count() const { return adjoint_size; }
    int64_t scratch_size() const { return 2 * iterations * (all.J * Lanes<A>::count + term_size); }

    void emit(Tile<A>& t, A* params, A* scratch) const {
        const int64_t J = all.J;
        Lanes<A>* c = reinterpret_cast<Lanes<A>*>(scratch);
        Term<A>* const terms = reinterpret_cast<Term<A>*>(c + 2 * iterations * J);
        int64_t count = 0;
        for (int64_t iteration = detach ? iterations - 1 : 0; iteration < iterations; ++iteration, c += 2 * J) {
            const bool zero = zero_first && iteration == 0;
            const A* g = g_s + iteration * state_size;
            Couplings<A> couplings = all;
            couplings.V = zero ? nullptr : all.V + iteration * state_size;
            if (all.log_sums) couplings.log_sums += iteration * scalars_size;
            if (all.means) couplings.means += iteration * scalars_size;
            terms[count++] = {c, g};
            Lanes<A>* delta = c + J;
            if (detach) {
                couplings.couplings(t, c);
                if (g_input_weight) {
                    agreements_with(t, g, delta);
                    couplings.add_weight_gradient(t, c, delta, g_input_weight);
                }
                couplings.weigh(t, c);
                break;
            }
            couplings.couplings(t, g, c, delta, g_input_weight);
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

// Where the gradients of an operator with logits and weights of the input capsules go, each or null.
struct CoupledGradients {
    CapsuleGradients capsules;
    void* logits;        // [B, N, J]
    void* input_weight;  // [B, N]

    // Masked pairs have no gradient, and with detach the logits have none.
    template <class A> void clear(const Capsules& c) const {
        if (logits) fill(static_cast<A*>(logits), c.B * c.N * c.J, A(0));
        if (input_weight) fill(static_cast<A*>(input_weight), c.B * c.N, A(0));
    }
};

// The gradient of one pass.
template <class A>
inline void coupled_step_backward(const Operands<A>& o, const Couplings<A>& couplings, const A* g_s /* a state */,
                                  const CoupledGradients& gradients, void* g_state) {
    gradients.clear<A>(o.c);
    const bool emits = gradients.capsules.u || gradients.capsules.weight || gradients.logits || gradients.input_weight;
    step_backward(
        o, g_state, emits, [&](A* g_V) { CoupledPasses<A>::reduce(o, CoupledSum<A>{couplings, g_s, o.D}, g_V); },
        [&](int64_t adjoint_size, A* g_V) {
            const CoupledGradient<A> policy{couplings,
                                            g_s,
                                            static_cast<A*>(gradients.logits),
                                            static_cast<A*>(gradients.input_weight),
                                            o.state_size(),
                                            o.scalars_size(),
                                            1,
                                            false,
                                            false,
                                            adjoint_size};
            CoupledPasses<A>::emit(o, policy, gradients.capsules, g_V);
        });
}

// The gradient of all iterations, in which V, log_sums and means are those of each.
template <class A>
inline void coupled_route_backward(const Operands<A>& o, Couplings<A> couplings, const RouteGradients<A>& route,
                                   const CoupledGradients& gradients, void* g_bias) {
    if (g_bias) route.sum_over_batch(static_cast<A*>(g_bias));
    gradients.clear<A>(o.c);
    const CapsuleGradients& capsules = gradients.capsules;
    if (!capsules.u && !capsules.weight && (!gradients.logits || route.detach) && !gradients.input_weight) return;
    couplings.V = route.V.get();
    const CoupledGradient<A> policy{couplings,
                                    route.g_s.get(),
                                    static_cast<A*>(gradients.logits),
                                    static_cast<A*>(gradients.input_weight),
                                    o.state_size(),
                                    o.scalars_size(),
                                    route.iterations,
                                    true,
                                    route.detach,
                                    0};
    CoupledPasses<A>::emit(o, policy, capsules, nullptr);
}

}  // namespace capsops::cpu::CAPSOPS_ISA
