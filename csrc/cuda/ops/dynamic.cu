// Routing by agreement (Sabour et al. 2017, procedure 1); the steps are those of csrc/cpu/ops/dynamic.cpp. One pass
// over u and W for each iteration.

#include "../../math/softmax.h"
#include "agreement.h"
#include "iterations.cuh"

namespace capsops::cuda {

Status dynamic_routing(const Capsules& c, const void* bias, int64_t iterations, bool leaky, SquashKind kind, void* v,
                       void* s) {
    return for_accumulation(c.dtype, [&]<class A>() {
        Workspace w(c.context);
        return route<A>(c, bias, iterations, kind, v, s, w, [&](int64_t t, const A* V, A* sum) {
            return t == 0 ? sum_votes(c, equal_coupling<double>(c.J, leaky), w, sum)
                          : sum_agreeing(c, V, nullptr, leaky, w, sum);
        });
    });
}

Status dynamic_routing_backward(const Capsules& c, int64_t iterations, bool leaky, bool detach, SquashKind kind,
                                const void* s, const void* g_v, void* g_u, void* g_weight, void* g_bias) {
    const CapsuleGradients gradients{g_u, g_weight};
    return for_accumulation(c.dtype, [&]<class A>() {
        Workspace w(c.context);
        return route_backward<A>(
            c, iterations, detach, kind, static_cast<const A*>(s), static_cast<const A*>(g_v), static_cast<A*>(g_bias),
            0, w, [&](int64_t, const A* V, const A* g_s, A* H) { return sum_adjoint(c, V, g_s, leaky, w, H); },
            [&](int64_t begin, int64_t end, bool more, const A* V, const A* g_s) {
                if (!gradients.u && !gradients.weight) return Status::ok;
                const AgreementTerms terms{.x = V,
                                           .g = g_s,
                                           .iterations = end - begin,
                                           .equal_first = begin == 0,
                                           .leaky = leaky,
                                           .detach = detach,
                                           .more = more};
                return emit_agreement(c, terms, gradients, w);
            });
    });
}

}  // namespace capsops::cuda
