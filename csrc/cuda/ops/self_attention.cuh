// The gradient of self-attention routing with weights of the input capsules.
#pragma once

#include "couplings.cuh"
#include "input_weights.cuh"

namespace capsops::cuda {

// g_û = w (c + prior) g + w δ x + rest with c = softmax_j(û · x) and δ = c (e − Σ_k c_k e_k), e = û · g;
// g_prior = Σ_b w e;  g_w = Σ_j (c + prior) e. In shared memory: two numbers for each batch item, from 0 on.
template <class A, int width> struct WeighedAgreementGradient {
    static constexpr int items = some_items<A>;
    static constexpr int resident = 2;
    template <int> struct Registers {};
    const A *x, *g, *rest;  // [B, J, D] each
    const A* prior;         // [N, J], or null
    const A* input_weight;  // [B, N]
    PriorGradient<A> of_prior;
    A* g_input_weight;  // [B, N], or null

    template <class Tiling> void cut(const Tiling& tiling, int, Workspace& w) { of_prior.cut(tiling, w); }
    __device__ void begin_block() const {}
    __device__ void end_block(A*) const {}
    template <int n> __device__ void start(const ThreadPosition<A, width, n>&, Registers<n>&) const {}
    template <int items>
    __device__ void gradient(const ThreadPosition<A, width, items>& at, const Registers<items>&,
                             const A (&v)[items][width], A (&out)[items][width]) const {
        A own_x[items][width], own_g[items][width], w[items], z[items], e[items], weighed[items];
        load_states(x, at, own_x);
        load_states(g, at, own_g);
        load_states(rest, at, out);
        agreements(at, v, own_x, own_g, z, e);
#pragma unroll
        for (int m = 0; m < items; ++m) w[m] = weight_of(at, m, input_weight), weighed[m] = w[m] * e[m];
        if (of_prior.to) of_prior.add(at, weighed);
        const RowSoftmax<A, items> softmax(at, z, e, false, true);
        const A added = prior && at.unmasked != 0 ? prior[at.i * at.J + at.j] : A(0);
        if (g_input_weight) {
            A with_prior[items];
#pragma unroll
            for (int m = 0; m < items; ++m) with_prior[m] = added * e[m];
            if (prior) join_capsules(at, 0, with_prior, Add{});
#pragma unroll
            for (int m = 0; m < items; ++m)
                write_weight_gradient(at, m, softmax.mean[m] + with_prior[m], g_input_weight);
        }
#pragma unroll
        for (int m = 0; m < items; ++m) {
            const A c = w[m] * (softmax.coupling[m] + added), delta = w[m] * softmax.gradient[m];
#pragma unroll
            for (int d = 0; d < width; ++d) out[m][d] += c * own_g[m][d] + delta * own_x[m][d];
        }
    }

    static constexpr bool needs_votes = true;
    static int64_t staged_numbers(int64_t J, int64_t) { return 2 * J; }
    Status stage_gradient(const StagedVotes<A>& t, A* scratch, A* to, A*, int64_t,
                          const ExecutionContext& context) const {
        A *const e = scratch + t.pairs() * t.J, *const none = nullptr;
        CAPSOPS_TRY(stage_agreements(t, x, g, scratch, context));
        CAPSOPS_TRY(of_prior.stage(t, e, input_weight, context));
        const Coupled<A> given(CoupledTerms{.logits = nullptr, .input_weight = input_weight});
        CAPSOPS_TRY(launch_rows<A>(prior ? couple_pairs<A, true> : couple_pairs<A, false>, t.pairs(), t.J, context, t,
                                   given, prior, int64_t{0}, scratch, e, none, g_input_weight, false));
        const Couplings<A> c{.c = scratch};
        return launch_rows<A>(add_agreement_gradient<A>, t.pairs() * t.J, t.D, context, t, c, static_cast<const A*>(e),
                              x, g, rest, to, false);
    }
};

}  // namespace capsops::cuda
