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
        const Operands<A> o(c, best_layout<A, CoupledSum<A>>(c));
        route(o, static_cast<const A*>(bias), iterations, kind, static_cast<A*>(v), static_cast<A*>(s),
              [&](int64_t, const A* V, A* sum) {
                  const Couplings<A> couplings{
                      V, static_cast<const A*>(logits), static_cast<const A*>(input_weight), c.N, o.J, leaky};
                  CoupledPasses<A>::reduce(o, CoupledSum<A>{couplings, nullptr, o.D}, sum);
              });
    });
}

Status dynamic_routing_with_logits_backward(const Capsules& c, const void* logits, const void* input_weight,
                                            int64_t iterations, bool leaky, bool detach, SquashKind kind, const void* s,
                                            const void* g_v, void* g_u, void* g_weight, void* g_logits,
                                            void* g_input_weight, void* g_bias) {
    return for_accumulation(c.dtype, [&]<class A>() {
        const Operands<A> o(c, best_layout<A, CoupledSum<A>, CoupledGradient<A>>(c));
        Couplings<A> couplings{nullptr, static_cast<const A*>(logits), static_cast<const A*>(input_weight), c.N, o.J,
                               leaky};
        const RouteGradients<A> route(o, iterations, static_cast<const A*>(s), static_cast<const A*>(g_v), detach, kind,
                                      [&](int64_t, const A* V, const A* g_s, const A*, A* H) {
                                          couplings.V = V;
                                          CoupledPasses<A>::reduce(o, CoupledSum<A>{couplings, g_s, o.D}, H);
                                      });
        coupled_route_backward(o, couplings, route, {{g_u, g_weight}, g_logits, g_input_weight}, g_bias);
    });
}

}  // namespace capsops::cpu::CAPSOPS_ISA
