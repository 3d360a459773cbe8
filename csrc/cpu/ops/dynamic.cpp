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
namespace {

template <class A> struct DynamicSum {
    static constexpr bool takes_registers = true;
    Dynamic<A> dynamic;
    int64_t J, D;

    int64_t row_size() const { return J * D; }
    int64_t scratch_size() const { return J * Lanes<A>::count; }

    void accumulate(Tile<A>& t, A* sum, A* scratch) const {
        Lanes<A>* c = reinterpret_cast<Lanes<A>*>(scratch);
        dynamic.couplings(t, c);
        add_coupled(t, c, sum);
    }

    template <int rows, int E>
    CAPSOPS_INLINE void accumulate(const Votes<A, rows, E>& votes, const int64_t* b, A* sum) const {
        add_coupled(votes, dynamic.couplings(votes, b), b, sum);
    }
};

}  // namespace

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
                reduce(o, DynamicSum<A>{{V.get(), leaky}, o.J, o.D}, sum.get());
            }
            o.unpack(sum.get(), s_t);
            if (bias)
                for (int64_t x = 0; x < size; ++x) s_t[x] += static_cast<const A*>(bias)[x % o.JH];
            squash_outputs(s_t, out, rows, o.H, SquashKind::sabour);
            for (int64_t x = 0; x < size; ++x) total.get()[x] += out[x];
        }
    });
}

namespace {

template <class A> struct AdjointSum {
    static constexpr bool takes_registers = true;
    DynamicAdjoint<A> adjoint;
    int64_t J, D;

    int64_t row_size() const { return J * D; }
    int64_t scratch_size() const { return 2 * J * Lanes<A>::count; }

    void accumulate(Tile<A>& t, A* H, A* scratch) const {
        Lanes<A>* c = reinterpret_cast<Lanes<A>*>(scratch);
        adjoint.couplings(t, c, c + J);
        add_coupled(t, c + J, H);
    }

    template <int rows, int E>
    CAPSOPS_INLINE void accumulate(const Votes<A, rows, E>& votes, const int64_t* b, A* H) const {
        Lanes<A> c, delta;
        adjoint.couplings(votes, b, &c, &delta);
        add_coupled(votes, delta, b, H);
    }
};

template <class A> struct DynamicGradient {
    static constexpr bool needs_votes = true, takes_registers = true;
    const A* V;    // [iterations, B, J, D]
    const A* g_s;  // [iterations, B, J, D]
    int64_t size;  // of one iteration
    int64_t J;
    int64_t iterations;
    bool leaky, detach;

    static constexpr int64_t term_size = sizeof(Term<A>) / sizeof(A);

    int64_t param_count() const { return 0; }
    int64_t scratch_size() const { return 2 * iterations * (J * Lanes<A>::count + term_size); }

    void emit(Tile<A>& t, A*, A* scratch) const {
        Lanes<A>* coupling = reinterpret_cast<Lanes<A>*>(scratch);
        Term<A>* const terms = reinterpret_cast<Term<A>*>(coupling + 2 * iterations * J);
        int64_t count = 0;
        const auto add = [&](const A* state) {
            terms[count++] = {coupling, state};
            coupling += J;
        };
        for (int64_t iteration = detach ? iterations - 1 : 0; iteration < iterations; ++iteration) {
            const A* g = g_s + iteration * size;
            const A* v = V + iteration * size;
            const Dynamic<A> dynamic{v, leaky};
            if (iteration == 0) {
                for (int64_t j = 0; j < J; ++j) coupling[j] = equal_coupling<A>(J, leaky);
            } else if (detach) {
                dynamic.couplings(t, coupling);
            } else {
                DynamicAdjoint<A>{dynamic, g}.couplings(t, coupling + J, coupling);
                add(v);
            }
            add(g);
        }
        combine(t, terms, count);
    }

    struct Totals {};
    Totals totals() const { return {}; }
    void add(Totals, A*) const {}

    template <int rows, int E> CAPSOPS_INLINE void emit(Votes<A, rows, E>& votes, const int64_t* b, Totals) const {
        constexpr int n = Lanes<A>::count;
        const auto at = [&](const A* x, int64_t t, int r, int v)
                            __attribute__((always_inline)) { return load(x + t * size + (b[r] * 2 * E + v) * n); };
        const int64_t last = iterations - 1;
        if (detach || last == 0) {
            const Lanes<A> c =
                last ? Dynamic<A>{V + last * size, leaky}.couplings(votes, b) : Lanes<A>(equal_coupling<A>(2, leaky));
            for_each_vector(votes, c, [&](int r, int v, Lanes<A> a) __attribute__((always_inline)) {
                votes.of[r][v] = a * at(g_s, last, r, v);
            });
            return;
        }
        Votes<A, rows, E> sum;
        for_each_vector(votes, Lanes<A>(equal_coupling<A>(2, leaky)),
                        [&](int r, int v, Lanes<A> a)
                            __attribute__((always_inline)) { sum.of[r][v] = a * at(g_s, 0, r, v); });
        for (int64_t t = 1; t <= last; ++t) {
            Lanes<A> c, delta;
            DynamicAdjoint<A>{{V + t * size, leaky}, g_s + t * size}.couplings(votes, b, &c, &delta);
            for_each_vector(votes, c, [&](int r, int v, Lanes<A> a) __attribute__((always_inline)) {
                sum.of[r][v] += a * at(g_s, t, r, v);
            });
            for_each_vector(votes, delta, [&](int r, int v, Lanes<A> a) __attribute__((always_inline)) {
                sum.of[r][v] += a * at(V, t, r, v);
            });
        }
        votes = sum;
    }
};

}  // namespace

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
                reduce(o, AdjointSum<A>{{dynamic, g_s_packed.get() + t * size}, o.J, o.D}, sum.get());
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
        const DynamicGradient<A> policy{V.get(), g_s_packed.get(), size, o.J, iterations, leaky, detach};
        emit(o, policy, gradients, static_cast<A*>(nullptr));
    });
}

}  // namespace capsops::cpu::CAPSOPS_ISA
