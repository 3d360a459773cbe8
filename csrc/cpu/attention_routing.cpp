// v = squash(Σ_i c_i · û_i) with c = softmax over the output capsules of a 1×1 convolution of the votes (CardioCaps,
// eq. 4): one pass over u and W. Saves s [B, J, D] and nothing else.

#include "stream.h"

namespace capsops::cpu {

Status attention_routing(const Capsules& c, const void* attn_weight, const void* attn_bias, void* v, void* s) {
    return for_dtype(c.dtype, [&]<class T>() {
        using A = accumulation_t<T>;
        const Attention<A> attention{static_cast<const A*>(attn_weight), static_cast<const A*>(attn_bias), c.J, c.D};
        reduce<T>(c, attention, static_cast<A*>(s));
        squash_outputs(static_cast<const A*>(s), static_cast<A*>(v), c.B * c.J, c.D);
    });
}

}  // namespace capsops::cpu
