// One pass of routing by agreement with a state V that is given: s_j = Σ_i c_ij û_ij with c = softmax_j(û · V).
//
// The gradient, with e_j = û_j · g_s,j and δ_j = c_j (e_j − Σ_k c_k e_k), is
//
//   g_V,j = Σ_i δ_ij û_ij;   g_û = c g_s + δ V
//
// Both come from one emitting pass, unless the state is large: the emitting pass does not split the batch among
// threads, so partial sums of a large state would leave it with too few blocks, and a reducing pass comes before it.

#include "couplings.h"
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

Status routing_step_with_logits(const Capsules& c, const void* state, const void* logits, void* s) {
    return for_accumulation(c.dtype, [&]<class A>() {
        const Operands<A> o(c, best_layout<A, CoupledSum<A>>(c));
        Buffer<A> V(o.state_size()), sum(o.state_size());
        o.pack(static_cast<const A*>(state), V.get());
        const Couplings<A> couplings{V.get(), static_cast<const A*>(logits), c.N, o.J, false};
        CoupledPasses<A>::reduce(o, CoupledSum<A>{couplings, nullptr, o.D}, sum.get());
        o.unpack(sum.get(), static_cast<A*>(s));
    });
}

Status routing_step_with_logits_backward(const Capsules& c, const void* state, const void* logits, const void* g_s_,
                                         void* g_u, void* g_weight, void* g_state, void* g_logits) {
    return for_accumulation(c.dtype, [&]<class A>() {
        const Operands<A> o(c, best_layout<A, CoupledSum<A>, CoupledGradient<A>>(c));
        const int64_t size = o.state_size();
        Buffer<A> V(size), g_s(size), g_V(g_state ? size : 0);
        o.pack(static_cast<const A*>(state), V.get());
        o.pack(static_cast<const A*>(g_s_), g_s.get());
        const Couplings<A> couplings{V.get(), static_cast<const A*>(logits), c.N, o.J, false};
        const bool emits = g_u || g_weight || g_logits, one_pass = g_state && emits && size <= most_with_gradients;
        if (g_state && !one_pass) CoupledPasses<A>::reduce(o, CoupledSum<A>{couplings, g_s.get(), o.D}, g_V.get());
        if (emits) {
            // Masked pairs have no gradient.
            if (g_logits) fill(static_cast<A*>(g_logits), c.B * c.N * o.J, A(0));
            const CoupledGradient<A> policy{couplings, g_s.get(), static_cast<A*>(g_logits), size, 1,
                                            false,     false,     one_pass ? size : 0};
            CoupledPasses<A>::emit(o, policy, {g_u, g_weight}, g_V.get());
        }
        if (g_state) o.unpack(g_V.get(), static_cast<A*>(g_state));
    });
}

}  // namespace capsops::cpu::CAPSOPS_ISA
