// Routing by agreement with initial logits, b_ij = û_ij · V_j + logits_ij in every iteration, and with weights of the
// input capsules. The passes are those of dynamic.cpp, but for the first iteration, whose couplings are not equal here.
// The gradient of the logits is Σ_t δ^t.

#include "couplings.h"

namespace capsops::cpu::CAPSOPS_ISA {

template <class A> void CoupledPasses<A>::reduce(const Operands<A>& o, const CoupledSum<A>& policy, A* out) {
    CAPSOPS_ISA::reduce(o, policy, out);
}
template <class A>
void CoupledPasses<A>::emit(const Operands<A>& o, const CoupledGradient<A>& policy, const CapsuleGradients& gradients,
                            A* params) {
    CAPSOPS_ISA::emit(o, policy, gradients, params);
}
template struct CoupledPasses<float>;
template struct CoupledPasses<double>;

Status dynamic_routing_with_logits(const Capsules& c, const void* logits, const void* input_weight, const void* bias,
                                   int64_t iterations, bool leaky, SquashKind kind, void* v, void* s) {
    return for_accumulation(c.dtype, [&]<class A>() {
        route_in_blocks(c, iterations, static_cast<A*>(v), static_cast<A*>(s), [&](const Block& block, A* v, A* s) {
            const Operands<A> o(block.c, best_layout<A, CoupledSum<A>>(block.c));
            Couplings<A> couplings{nullptr,
                                   block.of_pairs(static_cast<const A*>(logits)),
                                   block.of_capsules(static_cast<const A*>(input_weight)),
                                   c.N,
                                   c.J,
                                   leaky};
            route(o, static_cast<const A*>(bias), iterations, kind, v, s, [&](int64_t, const A* V, A* sum) {
                couplings.V = V;
                CoupledPasses<A>::reduce(o, CoupledSum<A>{couplings, nullptr, o.D}, sum);
            });
        });
    });
}

Status dynamic_routing_with_logits_backward(const Capsules& c, const void* logits, const void* input_weight,
                                            int64_t iterations, bool leaky, bool detach, SquashKind kind, const void* s,
                                            const void* g_v, void* g_u, void* g_weight, void* g_logits,
                                            void* g_input_weight, void* g_bias) {
    return for_accumulation(c.dtype, [&]<class A>() {
        const auto run = [&](const Block& block, const A* s, const A* g_v, const CapsuleGradients& gradients,
                             A* g_bias) {
            const Operands<A> o(block.c, best_layout<A, CoupledSum<A>, CoupledGradient<A>>(block.c));
            Couplings<A> couplings{nullptr,
                                   block.of_pairs(static_cast<const A*>(logits)),
                                   block.of_capsules(static_cast<const A*>(input_weight)),
                                   c.N,
                                   c.J,
                                   leaky};
            const RouteGradients<A> route(o, iterations, s, g_v, detach, kind,
                                          [&](int64_t, const A* V, const A* g_s, const A*, A* H) {
                                              couplings.V = V;
                                              CoupledPasses<A>::reduce(o, CoupledSum<A>{couplings, g_s, o.D}, H);
                                          });
            const CoupledGradients all{gradients, block.of_pairs(static_cast<A*>(g_logits)),
                                       block.of_capsules(static_cast<A*>(g_input_weight))};
            coupled_route_backward(o, couplings, route, all, g_bias);
        };
        route_in_blocks_backward(c, iterations, static_cast<const A*>(s), static_cast<const A*>(g_v), {g_u, g_weight},
                                 static_cast<A*>(g_bias), run);
    });
}

}  // namespace capsops::cpu::CAPSOPS_ISA
