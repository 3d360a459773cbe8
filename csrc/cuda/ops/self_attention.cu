// Self-attention routing (Mazzia et al. 2021, Efficient-CapsNet, eq. 5 to 7), in two passes over u and W in each
// direction; the steps are those of csrc/cpu/ops/self_attention.cpp.

#include "../engine/rows.cuh"
#include "agreement.h"

namespace capsops::cuda {
Status self_attention_routing(const Capsules& c, const void* prior, double scale, void* v, void* total, void* s) {
    return for_accumulation(c.dtype, [&]<class A>() {
        const int64_t rows = c.B * c.J, size = rows * c.D;
        Workspace w(c.context);
        A* scaled = w.take<A>(size);
        CAPSOPS_TRY(sum_votes(c, 1, w, total));
        CAPSOPS_TRY(launch_over(size, multiply<A>, c.context, static_cast<const A*>(total), static_cast<A>(scale),
                                scaled, size));
        CAPSOPS_TRY(sum_agreeing(c, scaled, prior, false, w, s));
        return launch_over_rows(rows, c.D, squash_rows<A>, c.context, static_cast<const A*>(s), static_cast<A*>(v),
                                rows, c.D, SquashKind::efficient);
    });
}

Status self_attention_routing_backward(const Capsules& c, const void* prior, double scale, const void* total,
                                       const void* s, const void* g_v, void* g_u, void* g_weight, void* g_prior) {
    return for_accumulation(c.dtype, [&]<class A>() {
        const int64_t rows = c.B * c.J, size = rows * c.D;
        Workspace w(c.context);
        A* x = w.take<A>(size);
        A* g_s = w.take<A>(size);
        A* H = w.take<A>(size);
        CAPSOPS_TRY(
            launch_over(size, multiply<A>, c.context, static_cast<const A*>(total), static_cast<A>(scale), x, size));
        CAPSOPS_TRY(launch_over_rows(rows, c.D, squash_rows_backward<A>, c.context, static_cast<const A*>(g_v),
                                     static_cast<const A*>(s), g_s, rows, c.D, SquashKind::efficient));
        CAPSOPS_TRY(sum_adjoint(c, x, g_s, false, w, H));
        CAPSOPS_TRY(
            launch_over(size, multiply<A>, c.context, static_cast<const A*>(H), static_cast<A>(scale), H, size));
        const AgreementTerms terms{.x = x,
                                   .g = g_s,
                                   .iterations = 1,
                                   .equal_first = false,
                                   .leaky = false,
                                   .detach = false,
                                   .prior = prior,
                                   .rest = H,
                                   .g_prior = g_prior};
        return emit_agreement(c, terms, {g_u, g_weight}, w);
    });
}

}  // namespace capsops::cuda
