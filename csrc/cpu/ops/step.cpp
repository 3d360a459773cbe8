// One pass of routing by agreement with a state V that is given: s_j = Σ_i c_ij û_ij with c = softmax_j(û · V), or
// softmax_j(û · V + logits). Weights of the input capsules are explained in couplings.h.
//
// The gradient, with e_j = û_j · g_s,j and δ_j = c_j (e_j − Σ_k c_k e_k), is
//
//   g_V,j = Σ_i δ_ij û_ij;   g_û = c g_s + δ V;   g_logits = δ

#include "couplings.h"
#include "dynamic.h"

namespace capsops::cpu::CAPSOPS_ISA {

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
        step_backward(
            o, g_state, g_u || g_weight,
            [&](A* g_V) { DynamicPasses<A>::reduce(o, AdjointSum<A>{{{V.get(), false}, g_s.get()}, o.J, o.D}, g_V); },
            [&](int64_t adjoint_size, A* g_V) {
                const DynamicGradient<A> policy{V.get(), g_s.get(), size, o.J, 1, false, false, false, adjoint_size};
                DynamicPasses<A>::emit(o, policy, {g_u, g_weight}, g_V);
            });
    });
}

Status routing_step_with_logits(const Capsules& c, const void* state, const void* logits, const void* input_weight,
                                void* s) {
    return for_accumulation(c.dtype, [&]<class A>() {
        const Operands<A> o(c, best_layout<A, CoupledSum<A>>(c));
        Buffer<A> V(o.state_size()), sum(o.state_size());
        o.pack(static_cast<const A*>(state), V.get());
        const Couplings<A> couplings{
            V.get(), static_cast<const A*>(logits), static_cast<const A*>(input_weight), c.N, o.J, false};
        CoupledPasses<A>::reduce(o, CoupledSum<A>{couplings, nullptr, o.D}, sum.get());
        o.unpack(sum.get(), static_cast<A*>(s));
    });
}

Status routing_step_with_logits_backward(const Capsules& c, const void* state, const void* logits,
                                         const void* input_weight, const void* g_s_, void* g_u, void* g_weight,
                                         void* g_state, void* g_logits, void* g_input_weight) {
    return for_accumulation(c.dtype, [&]<class A>() {
        const Operands<A> o(c, best_layout<A, CoupledSum<A>, CoupledGradient<A>>(c));
        Buffer<A> V(o.state_size()), g_s(o.state_size());
        o.pack(static_cast<const A*>(state), V.get());
        o.pack(static_cast<const A*>(g_s_), g_s.get());
        const Couplings<A> couplings{
            V.get(), static_cast<const A*>(logits), static_cast<const A*>(input_weight), c.N, o.J, false};
        coupled_step_backward(o, couplings, g_s.get(), {{g_u, g_weight}, g_logits, g_input_weight}, g_state);
    });
}

}  // namespace capsops::cpu::CAPSOPS_ISA
