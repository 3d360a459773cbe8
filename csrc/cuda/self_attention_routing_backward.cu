// The gradient of self-attention routing, again in two passes: H_j = Σ_i δ_ij û_ij, and then
// g_û = (p + prior) g_s + scale (δ T + H).

#include "couplings.cuh"
#include "operators.h"

namespace capsops::cuda {

Status self_attention_routing_backward(const Capsules& c, const void* prior, double scale, const void* total,
                                       const void* s, const void* g_v, const CapsuleGradients& gradients,
                                       void* g_prior) {
    return for_storage(c.dtype, [&]<class T>() {
        return for_width<T>(c.D, [&]<int width>() {
            using A = Accumulation<T>;
            const int64_t rows = c.B * c.J, size = rows * c.D;
            Workspace w(c.place);
            A* x = w.take<A>(size);
            A* g_s = w.take<A>(size);
            A* H = w.take<A>(size);
            CAPSOPS_TRY(launch(multiply<A>, blocks_for(size), most_threads, 0, c.place, static_cast<const A*>(total),
                               static_cast<A>(scale), x, size));
            CAPSOPS_TRY(launch(squash_rows_backward<A>, blocks_for(rows), most_threads, 0, c.place,
                               static_cast<const A*>(g_v), static_cast<const A*>(s), g_s, rows, c.D,
                               SquashKind::efficient));
            CAPSOPS_TRY((reduce<width, T>(c, Agreement<A, width, true>{x, g_s, nullptr, false}, 2, w, H)));
            CAPSOPS_TRY(launch(multiply<A>, blocks_for(size), most_threads, 0, c.place, static_cast<const A*>(H),
                               static_cast<A>(scale), H, size));
            const AgreementGradient<A, width> policy{.x = x,
                                                     .g = g_s,
                                                     .size = size,
                                                     .first = 0,
                                                     .iterations = 1,
                                                     .equal_first = false,
                                                     .leaky = false,
                                                     .detach = false,
                                                     .equal = A(0),
                                                     .prior = static_cast<const A*>(prior),
                                                     .rest = H,
                                                     .g_prior = static_cast<A*>(g_prior)};
            return emit<width, T>(c, policy, 2, gradients, 0, w, [](A*, int64_t) { return Status::ok; });
        });
    });
}

}  // namespace capsops::cuda
