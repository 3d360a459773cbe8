// The passes of couplings.h, but for sum_over_inputs.

#include "couplings.cuh"

namespace capsops::cuda {

Status sum_coupled(const Capsules& c, const CoupledTerms& terms, const void* x, Workspace& w, void* out) {
    return for_storage_and_width(c, [&]<class T, int width>() {
        using A = Accumulation<T>;
        const CoupledSum<A, width, false> policy{Coupled<A>(terms), static_cast<const A*>(x), nullptr};
        return reduce<width, T>(c, policy, 2 * policy.items, w, static_cast<A*>(out));
    });
}

Status sum_coupled_adjoint(const Capsules& c, const CoupledTerms& terms, const void* x, const void* y, Workspace& w,
                           void* out) {
    return for_storage_and_width(c, [&]<class T, int width>() {
        using A = Accumulation<T>;
        const CoupledSum<A, width, true> policy{Coupled<A>(terms), static_cast<const A*>(x), static_cast<const A*>(y)};
        return reduce<width, T>(c, policy, 2 * policy.items, w, static_cast<A*>(out));
    });
}

Status emit_coupled(const Capsules& c, const CoupledGradientTerms& terms, const CoupledGradients& gradients,
                    Workspace& w) {
    return for_storage_and_width(c, [&]<class T, int width>() {
        using A = Accumulation<T>;
        A *const g_logits = static_cast<A*>(gradients.logits), *const g_weight =
                                                                   static_cast<A*>(gradients.input_weight);
        const auto clear = [&](A* to, int64_t size) {
            return to && !terms.more ? launch_over(size, write_zeros<A>, c.context, to, size) : Status::ok;
        };
        // Detached logits have no gradient.
        if (terms.detach) CAPSOPS_TRY(clear(g_logits, c.B * c.N * c.J));
        if (!gradients.capsules.u && !gradients.capsules.weight && (!g_logits || terms.detach) && !g_weight)
            return Status::ok;
        CoupledGradient<A, width> policy{.given = Coupled<A>(terms.terms),
                                         .x = static_cast<const A*>(terms.x),
                                         .g = static_cast<const A*>(terms.g),
                                         .size = c.B * c.J * c.D,
                                         .iterations = terms.iterations,
                                         .zero_first = terms.zero_first,
                                         .detach = terms.detach,
                                         .more = terms.more,
                                         .g_logits = terms.detach ? nullptr : g_logits,
                                         .g_input_weight = g_weight};
        return emit<width, T>(c, policy, 2 * policy.items, gradients.capsules, 0, w, terms.more,
                              [&](const auto*, int64_t blocks) {
                                  if (blocks > 0) return Status::ok;
                                  // Without votes, no kernel has written them.
                                  CAPSOPS_TRY(clear(g_logits, c.B * c.N * c.J));
                                  return clear(g_weight, c.B * c.N);
                              });
    });
}

}  // namespace capsops::cuda
