// Self-attention routing (Mazzia et al. 2021, Efficient-CapsNet, eq. 5 to 7), in two passes over u and W in each
// direction; the steps are those of csrc/cpu/ops/self_attention.cpp.

#include "../engine/rows.cuh"
#include "agreement.h"
#include "self_attention.cuh"

namespace capsops::cuda {
namespace {

// out [B, J, D] = Σ_i w_i c_ij û_ij, with c as in sum_agreeing.
Status sum_weighed(const Capsules& c, const void* x, const void* prior, const void* input_weight, Workspace& w,
                   void* out) {
    return for_storage_and_width(c, [&]<class T, int width>() {
        using A = Accumulation<T>;
        using Policy = Agreement<A, width, false>;
        const Weighed<A, Policy> policy{{static_cast<const A*>(x), nullptr, static_cast<const A*>(prior), false},
                                        static_cast<const A*>(input_weight)};
        return reduce<width, T>(c, policy, 2 * policy.items, w, static_cast<A*>(out));
    });
}

// The gradients of u, W, prior and, if it is not null, g_input_weight [B, N]. terms: of a single iteration.
Status emit_weighed(const Capsules& c, const AgreementTerms& terms, const void* input_weight,
                    const CapsuleGradients& gradients, void* g_input_weight, Workspace& w) {
    return for_storage_and_width(c, [&]<class T, int width>() {
        using A = Accumulation<T>;
        WeighedAgreementGradient<A, width> policy{.x = static_cast<const A*>(terms.x),
                                                  .g = static_cast<const A*>(terms.g),
                                                  .rest = static_cast<const A*>(terms.rest),
                                                  .prior = static_cast<const A*>(terms.prior),
                                                  .input_weight = static_cast<const A*>(input_weight),
                                                  .of_prior = {.to = static_cast<A*>(terms.g_prior)},
                                                  .g_input_weight = static_cast<A*>(g_input_weight)};
        return emit<width, T>(c, policy, 2 * policy.items, gradients, 0, w, false, [&](const auto*, int64_t blocks) {
            CAPSOPS_TRY(finish_weight_gradient(c, blocks, policy.g_input_weight));
            return policy.of_prior.finish(c, blocks);
        });
    });
}

}  // namespace

Status self_attention_routing(const Capsules& c, const void* prior, const void* input_weight, double scale, void* v,
                              void* total, void* s) {
    return for_accumulation(c.dtype, [&]<class A>() {
        const int64_t rows = c.B * c.J, size = rows * c.D;
        Workspace w(c.context);
        A* scaled = w.take<A>(size);
        CAPSOPS_TRY(sum_votes(c, 1, w, total));
        CAPSOPS_TRY(launch_over(size, multiply<A>, c.context, static_cast<const A*>(total), static_cast<A>(scale),
                                scaled, size));
        CAPSOPS_TRY(input_weight ? sum_weighed(c, scaled, prior, input_weight, w, s)
                                 : sum_agreeing(c, scaled, prior, false, w, s));
        return launch_over_rows(rows, c.D, squash_rows<A>, c.context, static_cast<const A*>(s), static_cast<A*>(v),
                                rows, c.D, SquashKind::efficient);
    });
}

Status self_attention_routing_backward(const Capsules& c, const void* prior, const void* input_weight, double scale,
                                       const void* total, const void* s, const void* g_v, void* g_u, void* g_weight,
                                       void* g_prior, void* g_input_weight) {
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
        CAPSOPS_TRY(input_weight ? sum_coupled_adjoint(c, {nullptr, input_weight}, x, g_s, w, H)
                                 : sum_adjoint(c, x, g_s, false, w, H));
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
        return input_weight ? emit_weighed(c, terms, input_weight, {g_u, g_weight}, g_input_weight, w)
                            : emit_agreement(c, terms, {g_u, g_weight}, w);
    });
}

}  // namespace capsops::cuda
