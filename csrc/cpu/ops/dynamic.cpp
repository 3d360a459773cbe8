// Routing by agreement (Sabour et al. 2017, procedure 1), with one pass over u and W for each iteration. Between passes
// only V is kept, the sum of the output capsules so far; the logits are recomputed from it. s of every iteration is
// saved, [iterations, B, J, D].
//
// The gradient with detached logits is one emitting pass with the couplings of the last iteration. The full gradient
// has a reducing pass for each t = R … 2, which computes H^t = Σ_i δ^t_ij û_ij, the gradient of V^t. As V^t is the sum
// of all earlier v, g_v^{t−1} = Σ_{τ≥t} H^τ. Then one emitting pass over all iterations computes
//
//   g_û = Σ_t (c^t g_s^t + δ^t V^t).

#include "dynamic.h"

namespace capsops::cpu::CAPSOPS_ISA {

template <class A> void DynamicPasses<A>::reduce(const Operands<A>& o, const DynamicSum<A>& policy, A* out) {
    CAPSOPS_ISA::reduce(o, policy, out);
}
template <class A> void DynamicPasses<A>::reduce(const Operands<A>& o, const AdjointSum<A>& policy, A* out) {
    CAPSOPS_ISA::reduce(o, policy, out);
}
template <class A>
void DynamicPasses<A>::emit(const Operands<A>& o, const DynamicGradient<A>& policy, const CapsuleGradients& gradients,
                            A* params) {
    CAPSOPS_ISA::emit(o, policy, gradients, params);
}
template struct DynamicPasses<float>;
template struct DynamicPasses<double>;

Status dynamic_routing(const Capsules& c, const void* bias, int64_t iterations, bool leaky, void* v, void* s) {
    return for_accumulation(c.dtype, [&]<class A>() {
        const Operands<A> o(c, best_layout<A, DynamicSum<A>>(c));
        const int64_t rows = c.B * o.J, size = rows * o.H;
        A* out = static_cast<A*>(v);
        Buffer<A> sum(o.state_size()), total(size), V(o.state_size());
        fill(total.get(), size, A(0));
        for (int64_t t = 0; t < iterations; ++t) {
            A* s_t = static_cast<A*>(s) + t * size;
            if (t == 0) {
                contract(o, sum.get());
                const A equal = equal_coupling<A>(o.J, leaky);
                for (int64_t x = 0; x < o.state_size(); ++x) sum.get()[x] *= equal;
            } else {
                o.pack(total.get(), V.get());
                DynamicPasses<A>::reduce(o, DynamicSum<A>{{V.get(), leaky}, o.J, o.D}, sum.get());
            }
            o.unpack(sum.get(), s_t);
            if (bias)
                for (int64_t x = 0; x < size; ++x) s_t[x] += static_cast<const A*>(bias)[x % o.JH];
            squash_outputs(s_t, out, rows, o.H, SquashKind::sabour);
            for (int64_t x = 0; x < size; ++x) total.get()[x] += out[x];
        }
    });
}

Status dynamic_routing_backward(const Capsules& c, int64_t iterations, bool leaky, bool detach, const void* s_,
                                const void* g_v_, void* g_u, void* g_weight, void* g_bias_) {
    const CapsuleGradients gradients{g_u, g_weight};
    return for_accumulation(c.dtype, [&]<class A>() {
        const Operands<A> o(c, best_layout<A, AdjointSum<A>, DynamicGradient<A>>(c));
        const int64_t rows = c.B * o.J, compact = rows * o.H, size = o.state_size();
        const A* s = static_cast<const A*>(s_);
        const int64_t last = iterations - 1;

        // V[t]: the sum of v over the iterations before t.
        Buffer<A> V(iterations * size), v(compact), total(compact);
        fill(V.get(), size, A(0));
        fill(total.get(), compact, A(0));
        for (int64_t t = 1; t < iterations; ++t) {
            throw_if_stopped(c.context);
            squash_outputs(s + (t - 1) * compact, v.get(), rows, o.H, SquashKind::sabour);
            for (int64_t x = 0; x < compact; ++x) total.get()[x] += v.get()[x];
            o.pack(total.get(), V.get() + t * size);
        }

        Buffer<A> g_s(iterations * compact), g_s_packed(iterations * size);
        const auto through_squash = [&](const A* g_v, int64_t t) {
            A* g = g_s.get() + t * compact;
            squash_outputs_backward(g_v, s + t * compact, g, rows, o.H, SquashKind::sabour);
            o.pack(g, g_s_packed.get() + t * size);
        };
        through_squash(static_cast<const A*>(g_v_), last);
        if (!detach) {
            Buffer<A> sum(size), H(compact), g_V(compact);
            fill(g_V.get(), compact, A(0));
            for (int64_t t = last; t > 0; --t) {
                const Dynamic<A> dynamic{V.get() + t * size, leaky};
                DynamicPasses<A>::reduce(o, AdjointSum<A>{{dynamic, g_s_packed.get() + t * size}, o.J, o.D}, sum.get());
                o.unpack(sum.get(), H.get());
                for (int64_t x = 0; x < compact; ++x) g_V.get()[x] += H.get()[x];
                through_squash(g_V.get(), t - 1);
            }
        }

        if (g_bias_) {
            A* g_bias = static_cast<A*>(g_bias_);
            fill(g_bias, o.JH, A(0));
            for (int64_t x = (detach ? last : 0) * compact; x < iterations * compact; ++x)
                g_bias[x % o.JH] += g_s.get()[x];
        }
        if (!gradients.u && !gradients.weight) return;
        const DynamicGradient<A> policy{V.get(), g_s_packed.get(), size, o.J, iterations, true, leaky, detach, 0};
        DynamicPasses<A>::emit(o, policy, gradients, nullptr);
    });
}

}  // namespace capsops::cpu::CAPSOPS_ISA
