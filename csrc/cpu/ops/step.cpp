// One pass of routing by agreement with a state V that is given: s_j = Σ_i c_ij û_ij with c = softmax_j(û · V).
//
// The gradient, with e_j = û_j · g_s,j and δ_j = c_j (e_j − Σ_k c_k e_k), is
//
//   g_V,j = Σ_i δ_ij û_ij;   g_û = c g_s + δ V
//
// Both come from one emitting pass, unless the state is large: the emitting pass does not split the batch among
// threads, so partial sums of a large state would leave it with too few blocks, and a reducing pass comes before it.

#include <limits>

#include "dynamic.h"

namespace capsops::cpu::CAPSOPS_ISA {
namespace {

// The numbers of a state of which at least eight blocks may hold a partial sum each (Tasks in tasks.h).
constexpr int64_t most_with_gradients = int64_t{1} << 15;

}  // namespace

Status routing_step(const Capsules& c, const void* state, void* s) {
    return for_accumulation(c.dtype, [&]<class A>() {
        const Operands<A> o(c, best_layout<A, DynamicSum<A>>(c));
        Buffer<A> V(o.state_size()), sum(o.state_size());
        o.pack(static_cast<const A*>(state), V.get());
        DynamicPasses<A>::reduce(o, DynamicSum<A>{{V.get(), false}, o.J, o.D}, sum.get());
        o.unpack(sum.get(), static_cast<A*>(s));
    });
}

Status routing_step_backward(const Capsules& c, const void* state, const void* g_s_, void* g_u, void* g_weight,
                             void* g_state) {
    return for_accumulation(c.dtype, [&]<class A>() {
        const Operands<A> o(c, best_layout<A, AdjointSum<A>, DynamicGradient<A>>(c));
        const int64_t size = o.state_size();
        Buffer<A> V(size), g_s(size);
        o.pack(static_cast<const A*>(state), V.get());
        o.pack(static_cast<const A*>(g_s_), g_s.get());
        const bool emits = g_u || g_weight, one_pass = g_state && emits && size <= most_with_gradients;
        Buffer<A> g_V(g_state ? size : 0);
        if (g_state && !one_pass)
            DynamicPasses<A>::reduce(o, AdjointSum<A>{{{V.get(), false}, g_s.get()}, o.J, o.D}, g_V.get());
        if (emits) {
            const DynamicGradient<A> policy{V.get(), g_s.get(), size, o.J, 1, false, false, false, one_pass ? size : 0};
            DynamicPasses<A>::emit(o, policy, {g_u, g_weight}, g_V.get());
        }
        if (g_state) o.unpack(g_V.get(), static_cast<A*>(g_state));
    });
}

namespace {

// c = softmax_j(û · V + logits). A logit of −∞ removes its pair: c = 0, also where all logits of an input capsule are
// −∞. +∞ and NaN make all couplings of their input capsule NaN. The logits are read with the pairs in the lanes, in
// either layout.
template <class A> struct LogitCouplings {
    Dynamic<A> dynamic;
    const A* logits;  // [B, N, J]
    int64_t N, J;

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
        agreements_with(t, dynamic.V, c);
        // x − x is 0, or NaN if x is +∞.
        for_each(t, logits,
                 [&](int64_t j, int r, A x) { c[j].v[r] = x == removed ? lowest : c[j].v[r] + x + (x - x); });
        softmax(c, J, false);
        for_each(t, logits, [&](int64_t j, int r, A x) {
            if (x == removed) c[j].v[r] = 0;
        });
    }
};

// reduce: Σ_i c_ij û_ij; or, if g_s is not null, Σ_i δ_ij û_ij.
template <class A> struct LogitSum {
    static constexpr bool takes_registers = false;
    LogitCouplings<A> logits;
    const A* g_s;  // a state, or null
    int64_t D;

    int64_t row_size() const { return logits.J * D; }
    int64_t scratch_size() const { return 2 * logits.J * Lanes<A>::count; }

    void accumulate(Tile<A>& t, A* sum, A* scratch) const {
        Lanes<A>* c = reinterpret_cast<Lanes<A>*>(scratch);
        logits.couplings(t, c);
        if (!g_s) return add_coupled(t, c, sum);
        Lanes<A>* delta = c + logits.J;
        agreements_with(t, g_s, delta);
        softmax_backward(c, delta, logits.J);
        add_coupled(t, delta, sum);
    }
};

// emit: g_û = c g_s + δ V and g_logits = δ; params are Σ_i δ_ij û_ij if adjoint_size is that of a state.
template <class A> struct LogitGradient {
    static constexpr bool needs_votes = true, takes_registers = false;
    LogitCouplings<A> logits;
    const A* g_s;          // a state
    A* g_logits;           // [B, N, J], or null
    int64_t adjoint_size;  // or 0

    int64_t param_count() const { return adjoint_size; }
    int64_t scratch_size() const { return 2 * logits.J * Lanes<A>::count; }

    void emit(Tile<A>& t, A* params, A* scratch) const {
        Lanes<A>* c = reinterpret_cast<Lanes<A>*>(scratch);
        Lanes<A>* delta = c + logits.J;
        logits.couplings(t, c);
        agreements_with(t, g_s, delta);
        softmax_backward(c, delta, logits.J);
        if (g_logits) logits.for_each(t, g_logits, [&](int64_t j, int r, A& to) { to = delta[j].v[r]; });
        if (adjoint_size) add_coupled(t, delta, params);
        const Term<A> terms[] = {{c, g_s}, {delta, logits.dynamic.V}};
        combine(t, terms, 2);
    }
};

}  // namespace

Status routing_step_with_logits(const Capsules& c, const void* state, const void* logits, void* s) {
    return for_accumulation(c.dtype, [&]<class A>() {
        const Operands<A> o(c, best_layout<A, LogitSum<A>>(c));
        Buffer<A> V(o.state_size()), sum(o.state_size());
        o.pack(static_cast<const A*>(state), V.get());
        const LogitCouplings<A> couplings{{V.get(), false}, static_cast<const A*>(logits), c.N, o.J};
        reduce(o, LogitSum<A>{couplings, nullptr, o.D}, sum.get());
        o.unpack(sum.get(), static_cast<A*>(s));
    });
}

Status routing_step_with_logits_backward(const Capsules& c, const void* state, const void* logits, const void* g_s_,
                                         void* g_u, void* g_weight, void* g_state, void* g_logits) {
    return for_accumulation(c.dtype, [&]<class A>() {
        const Operands<A> o(c, best_layout<A, LogitSum<A>, LogitGradient<A>>(c));
        const int64_t size = o.state_size();
        Buffer<A> V(size), g_s(size), g_V(g_state ? size : 0);
        o.pack(static_cast<const A*>(state), V.get());
        o.pack(static_cast<const A*>(g_s_), g_s.get());
        const LogitCouplings<A> couplings{{V.get(), false}, static_cast<const A*>(logits), c.N, o.J};
        const bool emits = g_u || g_weight || g_logits, one_pass = g_state && emits && size <= most_with_gradients;
        if (g_state && !one_pass) reduce(o, LogitSum<A>{couplings, g_s.get(), o.D}, g_V.get());
        if (emits) {
            // Masked pairs have no gradient.
            if (g_logits) fill(static_cast<A*>(g_logits), c.B * c.N * o.J, A(0));
            const LogitGradient<A> policy{couplings, g_s.get(), static_cast<A*>(g_logits), one_pass ? size : 0};
            emit(o, policy, {g_u, g_weight}, g_V.get());
        }
        if (g_state) o.unpack(g_V.get(), static_cast<A*>(g_state));
    });
}

}  // namespace capsops::cpu::CAPSOPS_ISA
