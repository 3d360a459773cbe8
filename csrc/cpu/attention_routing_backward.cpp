// The gradient of attention routing: one pass that recomputes every capsule's votes and couplings and writes g_u and
// g_W where they belong. The formulas are at AttentionGradient in coupling.h.

#include "stream.h"

namespace capsops::cpu {

Status attention_routing_backward(const Capsules& c, const void* attn_weight, const void* attn_bias, const void* s,
                                  const void* g_v, const CapsuleGradients& gradients, void* g_attn_weight,
                                  void* g_attn_bias) {
    return for_dtype(c.dtype, [&]<class T>() {
        using A = accumulation_t<T>;
        Buffer<A> g_s(c.B * c.J * c.D);
        squash_outputs_backward(static_cast<const A*>(g_v), static_cast<const A*>(s), g_s.get(), c.B * c.J, c.D);
        const AttentionGradient<A> policy{
            {static_cast<const A*>(attn_weight), static_cast<const A*>(attn_bias), c.J, c.D}, g_s.get()};
        Buffer<A> g_params(policy.param_count());
        emit<T>(c, policy, gradients, g_params.get());
        const A* g_weight = g_params.get();
        const A* g_bias = g_weight + c.J * c.J;
        if (g_attn_weight) std::copy(g_weight, g_bias, static_cast<A*>(g_attn_weight));
        if (g_attn_bias) std::copy(g_bias, g_bias + c.J, static_cast<A*>(g_attn_bias));
    });
}

}  // namespace capsops::cpu
