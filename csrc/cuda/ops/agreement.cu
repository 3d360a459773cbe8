// The passes of agreement.h.

#include "agreement.cuh"
#include "agreement.h"

namespace capsops::cuda {

Status sum_votes(const Capsules& c, double coupling, Workspace& w, void* out) {
    return for_storage_and_width(c, [&]<class T, int width>() {
        using A = Accumulation<T>;
        return reduce<width, T>(c, Equal<A, width>{static_cast<A>(coupling)}, 0, w, static_cast<A*>(out));
    });
}

Status sum_agreeing(const Capsules& c, const void* x, const void* prior, bool leaky, Workspace& w, void* out) {
    return for_storage_and_width(c, [&]<class T, int width>() {
        using A = Accumulation<T>;
        const Agreement<A, width, false> policy{static_cast<const A*>(x), nullptr, static_cast<const A*>(prior), leaky};
        return reduce<width, T>(c, policy, 2 * policy.items, w, static_cast<A*>(out));
    });
}

Status sum_adjoint(const Capsules& c, const void* x, const void* y, bool leaky, Workspace& w, void* out) {
    return for_storage_and_width(c, [&]<class T, int width>() {
        using A = Accumulation<T>;
        const Agreement<A, width, true> policy{static_cast<const A*>(x), static_cast<const A*>(y), nullptr, leaky};
        return reduce<width, T>(c, policy, 2 * policy.items, w, static_cast<A*>(out));
    });
}

Status emit_agreement(const Capsules& c, const AgreementTerms& terms, const CapsuleGradients& gradients, Workspace& w) {
    return for_storage_and_width(c, [&]<class T, int width>() {
        using A = Accumulation<T>;
        AgreementGradient<A, width> policy{.x = static_cast<const A*>(terms.x),
                                           .g = static_cast<const A*>(terms.g),
                                           .size = c.B * c.J * c.D,
                                           .iterations = terms.iterations,
                                           .equal_first = terms.equal_first,
                                           .leaky = terms.leaky,
                                           .detach = terms.detach,
                                           .equal = equal_coupling<A>(c.J, terms.leaky),
                                           .prior = static_cast<const A*>(terms.prior),
                                           .rest = static_cast<const A*>(terms.rest),
                                           .of_prior = {.to = static_cast<A*>(terms.g_prior)}};
        return emit<width, T>(c, policy, 2 * policy.items, gradients, 0, w, terms.more,
                              [&](const auto*, int64_t blocks) { return policy.of_prior.finish(c, blocks); });
    });
}

}  // namespace capsops::cuda
