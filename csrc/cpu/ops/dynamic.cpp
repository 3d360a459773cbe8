// Routing by agreement (Sabour et al. 2017, procedure 1), with one pass over u and W for each iteration. Between passes
// only V is kept, the sum of the output capsules so far; the logits are recomputed from it. s of every iteration is
// saved, [iterations, B, J, D].
//
// The gradient with detached logits is one emitting pass with the couplings of the last iteration. The full gradient
// has a reducing pass for each t = R … 2, which computes H^t = Σ_i δ^t_ij û_ij, the gradient of V^t. As V^t is the sum
// of all earlier v, g_v^{t−1} = Σ_{τ≥t} H^τ. Then one emitting pass over all iterations computes
//
//   g_û = Σ_t (c^t g_s^t + δ^t V^t).

#include "dynamic.h"
#include "iterations.h"

namespace capsops::cpu::CAPSOPS_ISA {

template <class A> void DynamicPasses<A>::reduce(const Operands<A>& o, const DynamicSum<A>& policy, A* out) {
    CAPSOPS_ISA::reduce(o, policy, out);
}
template <class A> void DynamicPasses<A>::reduce(const Operands<A>& o, const AdjointSum<A>& policy, A* out) {
    CAPSOPS_ISA::reduce(o, policy, out);
}
template <class A>
void DynamicPasses<A>::emit(const Operands<A>& o, const DynamicGradient<A>& policy, const CapsuleGradients& gradients,
                            A* params) {
    CAPSOPS_ISA::emit(o, policy, gradients, params);
}
template struct DynamicPasses<float>;
template struct DynamicPasses<double>;

namespace {

template <class A>
void route_block(const Capsules& c, const A* bias, int64_t iterations, bool leaky, SquashKind kind, A* v, A* s) {
    const Operands<A> o(c, best_layout<A, DynamicSum<A>>(c));
    route(o, bias, iterations, kind, v, s, [&](int64_t, const A* V, A* sum) {
        if (V) return DynamicPasses<A>::reduce(o, DynamicSum<A>{{V, leaky}, o.J, o.D}, sum);
        contract(o, sum);
        const A equal = equal_coupling<A>(o.J, leaky);
        for (int64_t x = 0; x < o.state_size(); ++x) sum[x] *= equal;
    });
}

template <class A>
void route_block_backward(const Capsules& c, int64_t iterations, bool leaky, bool detach, SquashKind kind, const A* s,
                          const A* g_v, const CapsuleGradients& gradients, A* g_bias) {
    const Operands<A> o(c, best_layout<A, AdjointSum<A>, DynamicGradient<A>>(c));
    const RouteGradients<A> route(o, iterations, s, g_v, detach, kind,
                                  [&](int64_t, const A* V, const A* g_s, const A*, A* H) {
                                      const DynamicAdjoint<A> adjoint{{V, leaky}, g_s};
                                      DynamicPasses<A>::reduce(o, AdjointSum<A>{adjoint, o.J, o.D}, H);
                                  });
    if (g_bias) route.sum_over_batch(g_bias);
    if (!gradients.u && !gradients.weight) return;
    const DynamicGradient<A> policy{route.V.get(), route.g_s.get(), o.state_size(), o.J, iterations,
                                    true,          leaky,           detach,         0};
    DynamicPasses<A>::emit(o, policy, gradients, nullptr);
}

}  // namespace

Status dynamic_routing(const Capsules& c, const void* bias, int64_t iterations, bool leaky, SquashKind kind, void* v,
                       void* s) {
    return for_accumulation(c.dtype, [&]<class A>() {
        route_in_blocks(c, iterations, static_cast<A*>(v), static_cast<A*>(s), [&](const Block& block, A* v, A* s) {
            route_block(block.c, static_cast<const A*>(bias), iterations, leaky, kind, v, s);
        });
    });
}

Status dynamic_routing_backward(const Capsules& c, int64_t iterations, bool leaky, bool detach, SquashKind kind,
                                const void* s, const void* g_v, void* g_u, void* g_weight, void* g_bias) {
    return for_accumulation(c.dtype, [&]<class A>() {
        route_in_blocks_backward(
            c, iterations, static_cast<const A*>(s), static_cast<const A*>(g_v), {g_u, g_weight},
            static_cast<A*>(g_bias),
            [&](const Block& block, const A* s, const A* g_v, const CapsuleGradients& gradients, A* g_bias) {
                route_block_backward(block.c, iterations, leaky, detach, kind, s, g_v, gradients, g_bias);
            });
    });
}

}  // namespace capsops::cpu::CAPSOPS_ISA
