// Attention routing (CardioCaps, eq. 4): v = squash(Σ_i c_i · û_i), where c is the softmax over the output capsules of
// a 1×1 convolution of the votes. One pass over u and W; only s [B, J, D] is saved.
//
// The gradient takes one pass that recomputes votes and couplings, and writes g_u and g_W. The gradients of the
// convolution's parameters are summed in each thread, then in each block, then over the blocks.

#include "attention.cuh"

namespace capsops::cuda {
Status attention_routing(const Capsules& c, const void* attn_weight, const void* attn_bias, SquashKind kind, void* v,
                         void* s) {
    return for_storage_and_width(c, [&]<class T, int width>() {
        using A = Accumulation<T>;
        Workspace w(c.context);
        const Attention<A, width> policy{static_cast<const A*>(attn_weight), static_cast<const A*>(attn_bias)};
        CAPSOPS_TRY((reduce<width, T>(c, policy, 2 * width, w, static_cast<A*>(s))));
        return launch_over_rows(c.B * c.J, c.D, squash_rows<A>, c.context, static_cast<const A*>(s), static_cast<A*>(v),
                                c.B * c.J, c.D, kind);
    });
}

Status attention_routing_backward(const Capsules& c, const void* attn_weight, const void* attn_bias, SquashKind kind,
                                  const void* s, const void* g_v, void* g_u, void* g_weight, void* g_attn_weight,
                                  void* g_attn_bias) {
    return for_storage_and_width(c, [&]<class T, int width>() {
        using A = Accumulation<T>;
        const int64_t rows = c.B * c.J, JJ = c.J * c.J;
        Workspace w(c.context);
        A* g_s = w.take<A>(rows * c.D);
        CAPSOPS_TRY(launch_over_rows(rows, c.D, squash_rows_backward<A>, c.context, static_cast<const A*>(g_v),
                                     static_cast<const A*>(s), g_s, rows, c.D, kind));
        const bool wants_params = g_attn_weight || g_attn_bias;
        const int64_t param_count = wants_params ? JJ + c.J : 0;
        const int64_t params_at = at_least(2 * width, emit_numbers<width>(c, AttentionGradient<A, width>::items));
        AttentionGradient<A, width> policy{{static_cast<const A*>(attn_weight), static_cast<const A*>(attn_bias)},
                                           g_s,
                                           wants_params,
                                           static_cast<int>(c.J),
                                           static_cast<int>(params_at)};
        const auto add = [&]<class X>(const X* params, int64_t blocks) {
            if (g_attn_weight)
                CAPSOPS_TRY(
                    add_rows(params, blocks, param_count, JJ, static_cast<A*>(g_attn_weight), false, c.context));
            if (g_attn_bias)
                CAPSOPS_TRY(
                    add_rows(params + JJ, blocks, param_count, c.J, static_cast<A*>(g_attn_bias), false, c.context));
            return Status::ok;
        };
        return emit<width, T>(c, policy, params_at + (wants_params ? c.J + 1 : 0), {g_u, g_weight}, param_count, w,
                              false, add);
    });
}

}  // namespace capsops::cuda
