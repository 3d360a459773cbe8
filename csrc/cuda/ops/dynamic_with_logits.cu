// Routing by agreement with initial logits and weights of the input capsules, as csrc/cpu/ops/dynamic_with_logits.cpp.

#include "couplings.h"
#include "iterations.cuh"

namespace capsops::cuda {

Status dynamic_routing_with_logits(const Capsules& c, const void* logits, const void* input_weight, const void* bias,
                                   int64_t iterations, bool leaky, SquashKind kind, void* v, void* s) {
    return for_accumulation(c.dtype, [&]<class A>() {
        Workspace w(c.context);
        return route<A>(c, bias, iterations, kind, v, s, w, [&](int64_t, const A* V, A* sum) {
            return sum_coupled(c, {logits, input_weight, leaky}, V, w, sum);
        });
    });
}

Status dynamic_routing_with_logits_backward(const Capsules& c, const void* logits, const void* input_weight,
                                            int64_t iterations, bool leaky, bool detach, SquashKind kind, const void* s,
                                            const void* g_v, void* g_u, void* g_weight, void* g_logits,
                                            void* g_input_weight, void* g_bias) {
    return for_accumulation(c.dtype, [&]<class A>() {
        const CoupledTerms given{logits, input_weight, leaky};
        Workspace w(c.context);
        return route_backward<A>(
            c, iterations, detach, kind, static_cast<const A*>(s), static_cast<const A*>(g_v), static_cast<A*>(g_bias),
            0, w, [&](int64_t, const A* V, const A* g_s, A* H) { return sum_coupled_adjoint(c, given, V, g_s, w, H); },
            [&](int64_t begin, int64_t end, bool more, const A* V, const A* g_s) {
                const CoupledGradientTerms terms{given, V, g_s, end - begin, begin == 0, detach, more};
                return emit_coupled(c, terms, {{g_u, g_weight}, g_logits, g_input_weight}, w);
            });
    });
}

}  // namespace capsops::cuda
