// Routing by agreement (Sabour et al. 2017, procedure 1): one pass over u and W an iteration. Between the passes
// only V, the sum of the output capsules so far, is kept; the logits are recomputed from it. Saves s of every
// iteration, [iterations, B, J, D].

#include "stream.h"

namespace capsops::cpu {

Status dynamic_routing(const Capsules& c, const void* bias, int iterations, bool leaky, void* v, void* s) {
    return for_dtype(c.dtype, [&]<class T>() {
        using A = accumulation_t<T>;
        const int64_t JD = c.J * c.D, size = c.B * JD;
        A* out = static_cast<A*>(v);
        Buffer<A> V(size);
        std::fill(V.get(), V.get() + size, A(0));
        for (int t = 0; t < iterations; ++t) {
            A* s_t = static_cast<A*>(s) + t * size;
            reduce<T>(c, Dynamic<A>{t == 0 ? nullptr : V.get(), c.J, c.D, leaky}, s_t);
            if (bias)
                for (int64_t x = 0; x < size; ++x) s_t[x] += static_cast<const A*>(bias)[x % JD];
            squash_outputs(s_t, out, c.B * c.J, c.D);
            for (int64_t x = 0; x < size; ++x) V.get()[x] += out[x];
        }
    });
}

}  // namespace capsops::cpu
