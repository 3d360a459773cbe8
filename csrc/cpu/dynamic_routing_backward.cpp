// The gradient of routing by agreement. With detached logits: one emitting pass with the last iteration's couplings.
// With the full gradient: for t = R … 2 a reducing pass gives H^t, the gradient of V^t; since V^t is the sum of all
// earlier v, g_v^{t−1} = Σ_{τ≥t} H^τ; then one emitting pass over all iterations.

#include "stream.h"

namespace capsops::cpu {

Status dynamic_routing_backward(const Capsules& c, int iterations, bool leaky, bool detach, const void* s_,
                                const void* g_v_, const CapsuleGradients& gradients, void* g_bias_) {
    return for_dtype(c.dtype, [&]<class T>() {
        using A = accumulation_t<T>;
        const int64_t rows = c.B * c.J, JD = c.J * c.D, size = c.B * JD;
        const A* s = static_cast<const A*>(s_);
        const A* g_v = static_cast<const A*>(g_v_);
        const int last = iterations - 1;

        // V[t], the sum of v over the iterations before t.
        Buffer<A> V(iterations * size), v(size);
        std::fill(V.get(), V.get() + size, A(0));
        for (int t = 1; t < iterations; ++t) {
            squash_outputs(s + (t - 1) * size, v.get(), rows, c.D);
            for (int64_t x = 0; x < size; ++x) V.get()[t * size + x] = V.get()[(t - 1) * size + x] + v.get()[x];
        }

        Buffer<A> g_s(iterations * size);
        squash_outputs_backward(g_v, s + last * size, g_s.get() + last * size, rows, c.D);
        if (!detach) {
            Buffer<A> H(size), g_V(size);
            std::fill(g_V.get(), g_V.get() + size, A(0));
            for (int t = last; t > 0; --t) {
                const Dynamic<A> dynamic{V.get() + t * size, c.J, c.D, leaky};
                reduce<T>(c, DynamicAdjoint<A>{dynamic, g_s.get() + t * size}, H.get());
                for (int64_t x = 0; x < size; ++x) g_V.get()[x] += H.get()[x];
                squash_outputs_backward(g_V.get(), s + (t - 1) * size, g_s.get() + (t - 1) * size, rows, c.D);
            }
        }

        if (g_bias_) {
            A* g_bias = static_cast<A*>(g_bias_);
            std::fill(g_bias, g_bias + JD, A(0));
            for (int64_t x = (detach ? last : 0) * size; x < iterations * size; ++x) g_bias[x % JD] += g_s.get()[x];
        }
        if (!gradients.u && !gradients.weight) return;
        const DynamicGradient<A> policy{V.get(), g_s.get(), c.B, c.J, c.D, iterations, leaky, detach};
        emit<T>(c, policy, gradients, static_cast<A*>(nullptr));
    });
}

}  // namespace capsops::cpu
