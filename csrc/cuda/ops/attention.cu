// Attention routing (CardioCaps, eq. 4): v = squash(Σ_i c_i · û_i), where c is the softmax over the output capsules of
// a 1×1 convolution of the votes. One pass over u and W; only s [B, J, D] is saved.
//
// The gradient takes one pass that recomputes votes and couplings, and writes g_u and g_W. The gradients of the
// convolution's parameters are summed in each thread, then in each block, then over the blocks.

#include "attention.cuh"

namespace capsops::cuda {
Status attention_routing(const Capsules& c, const void* attn_weight, const void* attn_bias, const void* input_weight,
                         SquashKind kind, void* v, void* s) {
    return for_storage_and_width(c, [&]<class T, int width>() {
        using A = Accumulation<T>;
        Workspace w(c.context);
        const Attention<A, width> policy{static_cast<const A*>(attn_weight), static_cast<const A*>(attn_bias)};
        const Weighed<A, Attention<A, width>> weighed{policy, static_cast<const A*>(input_weight)};
        A* const sums = static_cast<A*>(s);
        CAPSOPS_TRY((input_weight ? reduce<width, T>(c, weighed, 2 * width, w, sums)
                                  : reduce<width, T>(c, policy, 2 * width, w, sums)));
        return launch_over_rows(c.B * c.J, c.D, squash_rows<A>, c.context, static_cast<const A*>(s), static_cast<A*>(v),
                                c.B * c.J, c.D, kind);
    });
}

namespace {

// Where the gradients go, each or null.
struct AttentionGradients {
    CapsuleGradients capsules;
    void *attn_weight, *attn_bias;  // [J, J] and [J]
    void* input_weight;             // [B, N]
};

// From g_s, the gradient of s.
template <class T, int width, bool weighed, class A = Accumulation<T>>
Status emit_attention(const Capsules& c, const Attention<A, width>& attention, const A* input_weight, const A* g_s,
                      const AttentionGradients& gradients, Workspace& w) {
    const int64_t JJ = c.J * c.J;
    A *const g_weight = static_cast<A*>(gradients.attn_weight), *const g_bias = static_cast<A*>(gradients.attn_bias);
    const bool wants_params = g_weight || g_bias;
    const int64_t param_count = wants_params ? JJ + c.J : 0;
    using Policy = AttentionGradient<A, width, weighed>;
    const int64_t params_at = at_least(2 * width, emit_numbers<width>(c, Policy::items));
    Policy policy{attention,
                  g_s,
                  wants_params,
                  static_cast<int>(c.J),
                  static_cast<int>(params_at),
                  input_weight,
                  static_cast<A*>(gradients.input_weight)};
    const auto add = [&]<class X>(const X* params, int64_t blocks) {
        if (g_weight) CAPSOPS_TRY(add_rows(params, blocks, param_count, JJ, g_weight, false, c.context));
        if (g_bias) CAPSOPS_TRY(add_rows(params + JJ, blocks, param_count, c.J, g_bias, false, c.context));
        return finish_weight_gradient(c, blocks, policy.g_input_weight);
    };
    return emit<width, T>(c, policy, params_at + (wants_params ? c.J + 1 : 0), gradients.capsules, param_count, w,
                          false, add);
}

}  // namespace

Status attention_routing_backward(const Capsules& c, const void* attn_weight, const void* attn_bias,
                                  const void* input_weight, SquashKind kind, const void* s, const void* g_v, void* g_u,
                                  void* g_weight, void* g_attn_weight, void* g_attn_bias, void* g_input_weight) {
    return for_storage_and_width(c, [&]<class T, int width>() {
        using A = Accumulation<T>;
        const int64_t rows = c.B * c.J;
        Workspace w(c.context);
        A* g_s = w.take<A>(rows * c.D);
        CAPSOPS_TRY(launch_over_rows(rows, c.D, squash_rows_backward<A>, c.context, static_cast<const A*>(g_v),
                                     static_cast<const A*>(s), g_s, rows, c.D, kind));
        const Attention<A, width> attention{static_cast<const A*>(attn_weight), static_cast<const A*>(attn_bias)};
        const A* const weights = static_cast<const A*>(input_weight);
        const AttentionGradients gradients{{g_u, g_weight}, g_attn_weight, g_attn_bias, g_input_weight};
        return weights ? emit_attention<T, width, true>(c, attention, weights, g_s, gradients, w)
                       : emit_attention<T, width, false>(c, attention, weights, g_s, gradients, w);
    });
}

}  // namespace capsops::cuda
