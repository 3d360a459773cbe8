// v = squash(Σ_i c_i · û_i) with c = softmax over the output capsules of a 1×1 convolution of the votes (CardioCaps,
// eq. 4): one pass over u and W. Saves s [B, J, D] and nothing else.

#include "couplings.cuh"
#include "operators.h"

namespace capsops::cuda {

Status attention_routing(const Capsules& c, const void* attn_weight, const void* attn_bias, void* v, void* s) {
    return for_storage(c.dtype, [&]<class T>() {
        return for_width<T>(c.D, [&]<int width>() {
            using A = Accumulation<T>;
            Workspace w(c.place);
            const Attention<A, width> policy{static_cast<const A*>(attn_weight), static_cast<const A*>(attn_bias)};
            CAPSOPS_TRY((reduce<width, T>(c, policy, 2 * width, w, static_cast<A*>(s))));
            return launch(squash_rows<A>, blocks_for(c.B * c.J), most_threads, 0, c.place, static_cast<const A*>(s),
                          static_cast<A*>(v), c.B * c.J, c.D, SquashKind::sabour);
        });
    });
}

}  // namespace capsops::cuda
