// The policies of dynamic and self-attention routing: one coupling for all components of a vote. The threads of a batch
// item and input capsule have its output capsules.
#pragma once

#include "../../math/softmax.h"
#include "../engine/stream.cuh"
#include "staged_agreement.cuh"
#include "wide_agreement.h"

namespace capsops::cuda {

// The softmax over the output capsules of each of a thread's batch items. In shared memory: two numbers for each of
// them, from 0 on.
template <class A, int items> struct RowSoftmax {
    A coupling[items];               // c
    A gradient[items], mean[items];  // if wanted: c (q − Σ_k c_k q_k), and Σ_k c_k q_k

    // z: the logits of a thread's output capsule; q: the gradients of its couplings.
    template <int width>
    __device__ RowSoftmax(const ThreadPosition<A, width, items>& at, const A (&z)[items], const A (&q)[items],
                          bool leaky, bool with_gradient) {
        A largest[items], sums[items], means[2 * items];
#pragma unroll
        for (int m = 0; m < items; ++m) largest[m] = z[m];
        join_capsules(at, 0, largest, Max{});
#pragma unroll
        for (int m = 0; m < items; ++m) {
            if (leaky) largest[m] = max(largest[m], A(0));
            coupling[m] = exponential(z[m] - largest[m]);
            means[m] = sums[m] = coupling[m];
            means[items + m] = coupling[m] * q[m];
        }
        if (with_gradient)
            join_capsules(at, 0, means, Add{});
        else
            join_capsules(at, 0, sums, Add{});
#pragma unroll
        for (int m = 0; m < items; ++m) {
            const A sum = with_gradient ? means[m] : sums[m];
            const A inverse = reciprocal(leaky ? sum + exponential(-largest[m]) : sum);
            coupling[m] *= inverse;
            mean[m] = means[items + m] * inverse;
            gradient[m] = coupling[m] * (q[m] - mean[m]);
        }
    }
};

// The couplings of two output capsules in the loops of warp.cuh: c = softmax_j(û · x), and δ = c (q − Σ_k c_k q_k) with
// q = û · y if wanted. Each lane computes those of one batch item; of() gets those of another one.
template <class A, class At> struct PairSoftmax {
    static constexpr int items = At::items;
    const At& at;
    bool leaky;
    A c[2], delta[2];

    template <bool with_gradient>
    __device__ void compute(const A (&v)[items][2], const A (&x)[items][2], const A (&y)[items][2]) {
        A z[2], q[2] = {A(0), A(0)};
        dots(v, x, z);
        if (with_gradient) dots(v, y, q);
        A largest = max(z[0], z[1]);
        if (leaky) largest = max(largest, A(0));
        A sum = leaky ? exponential(-largest) : A(0);
#pragma unroll
        for (int j = 0; j < 2; ++j) c[j] = exponential(z[j] - largest), sum += c[j];
        const A inverse = reciprocal(sum);
        c[0] *= inverse, c[1] *= inverse;
        const A mean = c[0] * q[0] + c[1] * q[1];
        delta[0] = c[0] * (q[0] - mean), delta[1] = c[1] * (q[1] - mean);
    }
    // Numbers of the lane's batch item number n: c or delta.
    __device__ void of(const A (&x)[2], int n, A (&to)[2]) const {
        to[0] = at.of_item(x[0], n), to[1] = at.of_item(x[1], n);
    }

  private:
    // The products û · x. Only their difference matters to the softmax of two, so the first one is 0 then.
    __device__ void dots(const A (&v)[items][2], const A (&x)[items][2], A (&to)[2]) const {
        A products[items];
        to[0] = A(0);
        if (leaky) {
#pragma unroll
            for (int m = 0; m < items; ++m) products[m] = v[m][0] * x[m][0];
            to[0] = at.sum_components(products);
        }
#pragma unroll
        for (int m = 0; m < items; ++m) products[m] = leaky ? v[m][1] * x[m][1] : v[m][1] * x[m][1] - v[m][0] * x[m][0];
        to[1] = at.sum_components(products);
    }
};

// In the loops of warp.cuh: all couplings equal.
template <class A> struct WarpEqual {
    template <int> struct Registers {};
    static constexpr int resident(int) { return 6; }
    A coupling;

    template <class At> __device__ void start(const At&, Registers<At::items>&) const {}
    template <class At>
    __device__ void couple(const At&, const Registers<At::items>&, const A (&)[At::items][2],
                           A (&c)[At::items][2]) const {
#pragma unroll
        for (int m = 0; m < At::items; ++m) c[m][0] = c[m][1] = coupling;
    }
};

// In the loops of warp.cuh: as Agreement.
template <class A, bool adjoint> struct WarpAgreement {
    template <int items> struct Registers {
        A x[items][2], y[adjoint ? items : 1][2];
    };
    static constexpr int resident(int items) { return items == 4 && !adjoint ? 6 : 4; }
    const A* x;      // [B, J, D]
    const A* y;      // [B, J, D], if adjoint
    const A* prior;  // [N, J], or null
    bool leaky;

    template <class At> __device__ void start(const At& at, Registers<At::items>& own) const {
        load_state(at, x, own.x);
        if constexpr (adjoint) load_state(at, y, own.y);
    }
    template <class At>
    __device__ void couple(const At& at, const Registers<At::items>& own, const A (&v)[At::items][2],
                           A (&c)[At::items][2]) const {
        PairSoftmax<A, At> softmax{at, leaky};
        if constexpr (adjoint)
            softmax.template compute<true>(v, own.x, own.y);
        else
            softmax.template compute<false>(v, own.x, own.x);
        A added[2] = {A(0), A(0)};
        if (prior) added[0] = prior[at.i * 2], added[1] = prior[at.i * 2 + 1];
#pragma unroll
        for (int n = 0; n < At::batch_items; ++n) {
            A weight[2];
            softmax.of(adjoint ? softmax.delta : softmax.c, n, weight);
#pragma unroll
            for (int m = n * At::components; m < (n + 1) * At::components; ++m)
#pragma unroll
                for (int j = 0; j < 2; ++j) c[m][j] = weight[j] + added[j];
        }
    }
};

// In the loops of warp.cuh: as AgreementGradient.
template <class A> struct WarpAgreementGradient {
    template <int> struct Registers {};
    static constexpr int resident(int items) { return items == 4 ? 5 : 3; }
    const A *x, *g;
    int64_t size, iterations;
    bool equal_first, leaky, detach;
    A equal;
    const A *prior, *rest;
    A* g_prior;

    template <class At> __device__ void start(const At&, Registers<At::items>&) const {}
    template <class At> __device__ void end_warp(const At&, Registers<At::items>&, A*) const {}
    template <class At>
    __device__ void gradient(const At& at, Registers<At::items>&, const A (&v)[At::items][2],
                             A (&out)[At::items][2]) const {
        constexpr int items = At::items;
#pragma unroll
        for (int m = 0; m < items; ++m) out[m][0] = out[m][1] = A(0);
        if (rest) load_state(at, rest, out);
        A added[2] = {A(0), A(0)};
        if (prior) added[0] = prior[at.i * 2], added[1] = prior[at.i * 2 + 1];
#pragma unroll 1
        for (int64_t t = 0; t < iterations; ++t) {
            A own_g[items][2];
            load_state(at, g + t * size, own_g);
            if (t == 0 && equal_first) {
#pragma unroll
                for (int m = 0; m < items; ++m)
#pragma unroll
                    for (int j = 0; j < 2; ++j) out[m][j] += equal * own_g[m][j];
                continue;
            }
            A own_x[items][2];
            load_state(at, x + t * size, own_x);
            if (g_prior) add_to_g_prior(at, v, own_g);
            PairSoftmax<A, At> softmax{at, leaky};
            softmax.template compute<true>(v, own_x, own_g);
#pragma unroll
            for (int n = 0; n < At::batch_items; ++n) {
                constexpr int components = At::components;
                A c[2], delta[2];
                softmax.of(softmax.c, n, c);
#pragma unroll
                for (int m = n * components; m < (n + 1) * components; ++m)
#pragma unroll
                    for (int j = 0; j < 2; ++j) out[m][j] += (c[j] + added[j]) * own_g[m][j];
                if (detach) continue;
                softmax.of(softmax.delta, n, delta);
#pragma unroll
                for (int m = n * components; m < (n + 1) * components; ++m)
#pragma unroll
                    for (int j = 0; j < 2; ++j) out[m][j] += delta[j] * own_x[m][j];
            }
        }
    }

  private:
    // g_prior = Σ_b û · g.
    template <class At>
    __device__ void add_to_g_prior(const At& at, const A (&v)[At::items][2], const A (&own_g)[At::items][2]) const {
        A q[2] = {A(0), A(0)};
#pragma unroll
        for (int m = 0; m < At::items; ++m)
#pragma unroll
            for (int j = 0; j < 2; ++j) q[j] += v[m][j] * own_g[m][j];
        const int lane = at.lane % warp_D;
        A sum = sum_scattered(q, lane);
        sum += __shfl_xor_sync(~0u, sum, warp_D);
        if (at.lane < warp_D && lane % (warp_D / 2) == 0) g_prior[at.i * 2 + lane / (warp_D / 2)] = sum;
    }
};

// All couplings equal.
template <class A, int width> struct Equal {
    static constexpr int items = some_items<A>;
    static constexpr int resident = 3;
    template <int> struct Registers {};
    A coupling;

    WarpEqual<A> in_warps() const { return {coupling}; }

    template <int n> __device__ void start(const ThreadPosition<A, width, n>&, Registers<n>&) const {}
    template <int items>
    __device__ void couple(const ThreadPosition<A, width, items>&, const Registers<items>&, const A (&)[items][width],
                           A (&c)[items][width]) const {
#pragma unroll
        for (int m = 0; m < items; ++m)
#pragma unroll
            for (int d = 0; d < width; ++d) c[m][d] = coupling;
    }

    A uniform_coupling() const { return coupling; }
    Status reduce_wide(const Capsules& c, Workspace& w, A* out) const { return sum_wide(c, nullptr, coupling, w, out); }
};

// z = û · x and e = û · y for each of a thread's batch items. In shared memory: two numbers for each, from 0 on.
template <class A, int width, int items>
__device__ inline void agreements(const ThreadPosition<A, width, items>& at, const A (&v)[items][width],
                                  const A (&x)[items][width], const A (&y)[items][width], A (&z)[items],
                                  A (&e)[items]) {
    A dots[2 * items];
#pragma unroll
    for (int m = 0; m < items; ++m) dots[m] = dot(v[m], x[m]), dots[items + m] = dot(v[m], y[m]);
    join_parts(at, 0, dots, Add{});
#pragma unroll
    for (int m = 0; m < items; ++m) z[m] = dots[m], e[m] = dots[items + m];
}

// c = softmax_j(û · x) + prior; or, if adjoint, δ = c (e − Σ_k c_k e_k) with e = û · y.
template <class A, int width, bool adjoint> struct Agreement {
    static constexpr int items = adjoint ? 1 : some_items<A>;  // two states take many registers
    static constexpr int resident = adjoint ? 3 : 2;
    template <int items> struct State {
        A x[items][width];
    };
    template <int items> struct States : State<items> {
        A y[items][width];
    };
    template <int items> using Registers = std::conditional_t<adjoint, States<items>, State<items>>;
    const A* x;      // [B, J, D]
    const A* y;      // [B, J, D], if adjoint
    const A* prior;  // [N, J], or null
    bool leaky;

    WarpAgreement<A, adjoint> in_warps() const { return {x, y, prior, leaky}; }

    template <int items> __device__ void start(const ThreadPosition<A, width, items>& at, Registers<items>& own) const {
#pragma unroll
        for (int m = 0; m < items; ++m) {
            load(x, at, m, own.x[m]);
            if constexpr (adjoint) load(y, at, m, own.y[m]);
        }
    }
    template <int items>
    __device__ void couple(const ThreadPosition<A, width, items>& at, const Registers<items>& own,
                           const A (&v)[items][width], A (&c)[items][width]) const {
        A z[items], e[items], weight[items];
        if constexpr (adjoint) {
            agreements(at, v, own.x, own.y, z, e);
            const RowSoftmax<A, items> softmax(at, z, e, leaky, true);
#pragma unroll
            for (int m = 0; m < items; ++m) weight[m] = softmax.gradient[m];
        } else {
#pragma unroll
            for (int m = 0; m < items; ++m) z[m] = dot(v[m], own.x[m]), e[m] = A(0);
            join_parts(at, 0, z, Add{});
            const RowSoftmax<A, items> softmax(at, z, e, leaky, false);
#pragma unroll
            for (int m = 0; m < items; ++m) weight[m] = softmax.coupling[m];
        }
#pragma unroll
        for (int m = 0; m < items; ++m) {
            if (!at.present(m))
                weight[m] = A(0);
            else if (prior)
                weight[m] += prior[at.i * at.J + at.j];
#pragma unroll
            for (int d = 0; d < width; ++d) c[m][d] = weight[m];
        }
    }

    Status reduce_wide(const Capsules& c, Workspace& w, A* out) const {
        const WideCouplings couplings{adjoint, x, y, prior, leaky};
        return sum_wide(c, &couplings, 0, w, out);
    }
    static int64_t staged_numbers(int64_t J, int64_t) { return (adjoint ? 2 : 1) * J; }
    Status stage_couplings(const StagedVotes<A>& t, A* scratch, Couplings<A>& c,
                           const ExecutionContext& context) const {
        A* const e = adjoint ? scratch + t.pairs() * t.J : nullptr;
        c.c = adjoint ? e : scratch;
        c.prior = prior;
        CAPSOPS_TRY(stage_agreements(t, x, adjoint ? y : nullptr, scratch, context));
        return stage_softmax(t, scratch, e, leaky, context);
    }
};

// g_prior = Σ_b e of the gradient of self-attention routing.
template <class A> struct PriorGradient {
    A* to = nullptr;        // [N, J], or null
    A* of_split = nullptr;  // [splits, N, J], those of each split of the batch
    int splits = 1;
    ThreadRows rows{1};

    template <class Tiling> void cut(const Tiling& tiling, Workspace& w) {
        rows = tiling.rows, splits = tiling.splits;
        of_split = to && splits > 1 ? w.take<A>(splits * tiling.N * tiling.J) : to;
    }

    // Adds e of a tile of the batch, by the threads of the first row of each team.
    template <int width, int items>
    __device__ void add(const ThreadPosition<A, width, items>& at, const A (&e)[items]) const {
        at.publish_to_block(0, e);
        if (at.team_row == 0 && at.part == 0 && at.in_run(0)) {
            A sum = 0;
#pragma unroll
            for (int m = 0; m < items; ++m)
                for (int row = 0; row < at.team_rows; ++row)
                    sum += at.shared(m, (at.team * at.team_rows + row) * rows.size + at.slot - at.row);
            A& own = of_split[(at.split * at.N + at.i) * at.J + at.j];
            own = at.tile == at.first_tile ? sum : own + sum;
        }
        __syncthreads();
    }

    // For votes in memory, with the weights of the input capsules [B, N], if it is not null.
    Status stage(const StagedVotes<A>& t, const A* e, const A* input_weight, const ExecutionContext& context) const {
        if (!to) return Status::ok;
        return launch_over(t.count * t.J, input_weight ? add_over_items<A, true> : add_over_items<A, false>, context, t,
                           e, input_weight, to);
    }

    // After the kernels; blocks: how many there were.
    Status finish(const Capsules& c, int64_t blocks) const {
        if (!to) return Status::ok;
        const int64_t size = c.N * c.J;
        // Without votes, no kernel has written it.
        if (blocks == 0) return launch_over(size, write_zeros<A>, c.context, to, size);
        if (splits == 1) return Status::ok;
        return add_rows(of_split, splits, size, size, to, false, c.context);
    }
};

// g_û = Σ_t [c^t g^t + δ^t x^t] over iterations.
template <class A, int width> struct AgreementGradient {
    static constexpr int items = some_items<A>;
    static constexpr int resident = 2;
    template <int> struct Registers {};
    const A* x;    // [iterations, B, J, D], the states of the logits
    const A* g;    // [iterations, B, J, D], the gradients of the sums
    int64_t size;  // of one iteration
    int64_t iterations;
    bool equal_first;  // whether the first iteration has equal couplings
    bool leaky, detach;
    A equal;
    const A* prior = nullptr;  // [N, J], or null
    const A* rest = nullptr;   // [B, J, D], added to g_û; or null
    PriorGradient<A> of_prior = {};

    WarpAgreementGradient<A> in_warps() const {
        return {x, g, size, iterations, equal_first, leaky, detach, equal, prior, rest, of_prior.to};
    }

    template <class Tiling> void cut(const Tiling& tiling, int, Workspace& w) { of_prior.cut(tiling, w); }
    __device__ void begin_block() const {}
    __device__ void end_block(A*) const {}
    template <int n> __device__ void start(const ThreadPosition<A, width, n>&, Registers<n>&) const {}
    template <int items>
    __device__ void gradient(const ThreadPosition<A, width, items>& at, const Registers<items>&,
                             const A (&v)[items][width], A (&out)[items][width]) const {
#pragma unroll
        for (int m = 0; m < items; ++m) {
#pragma unroll
            for (int d = 0; d < width; ++d) out[m][d] = A(0);
            if (rest) load(rest, at, m, out[m]);
        }
#pragma unroll 1
        for (int64_t t = 0; t < iterations; ++t) {
            A own_g[items][width];
#pragma unroll
            for (int m = 0; m < items; ++m) load(g + t * size, at, m, own_g[m]);
            if (t == 0 && equal_first) {
#pragma unroll
                for (int m = 0; m < items; ++m)
#pragma unroll
                    for (int d = 0; d < width; ++d) out[m][d] += equal * own_g[m][d];
                continue;
            }
            A own_x[items][width], z[items], q[items];
#pragma unroll
            for (int m = 0; m < items; ++m) load(x + t * size, at, m, own_x[m]);
            agreements(at, v, own_x, own_g, z, q);
            if (of_prior.to) of_prior.add(at, q);
            const RowSoftmax<A, items> softmax(at, z, q, leaky, !detach);
#pragma unroll
            for (int m = 0; m < items; ++m) {
                if (!at.present(m)) continue;
                const A c = softmax.coupling[m] + (prior ? prior[at.i * at.J + at.j] : A(0));
#pragma unroll
                for (int d = 0; d < width; ++d) out[m][d] += c * own_g[m][d];
                if (detach) continue;
#pragma unroll
                for (int d = 0; d < width; ++d) out[m][d] += softmax.gradient[m] * own_x[m][d];
            }
        }
    }

    // Equal couplings in the only iteration.
    bool is_uniform() const { return iterations == 1 && equal_first && !rest; }
    Status uniform_gradient(A* to, const ExecutionContext& context) const {
        return launch_over(size, multiply<A>, context, g, equal, to, size);
    }

    Status emit_wide(const Capsules& c, const CapsuleGradients& gradients, bool more, Workspace& w) const {
        const AgreementTerms terms{.x = x,
                                   .g = g,
                                   .iterations = iterations,
                                   .equal_first = equal_first,
                                   .leaky = leaky,
                                   .detach = detach,
                                   .more = more,
                                   .prior = prior,
                                   .rest = rest,
                                   .g_prior = of_prior.to};
        return cuda::emit_wide(c, terms, gradients, w);
    }
    static constexpr bool needs_votes = true;
    static int64_t staged_numbers(int64_t J, int64_t) { return 2 * J; }
    Status stage_gradient(const StagedVotes<A>& t, A* scratch, A* to, A*, int64_t,
                          const ExecutionContext& context) const {
        for (int64_t m = 0; m < iterations; ++m) {
            const A *own_x = x + m * size, *own_g = g + m * size;
            Couplings<A> c{.equal = equal};
            A* delta = nullptr;
            if (m > 0 || !equal_first) {
                A* const e = scratch + t.pairs() * t.J;
                c.c = scratch, c.prior = prior;
                delta = detach ? nullptr : e;
                CAPSOPS_TRY(stage_agreements(t, own_x, detach && !of_prior.to ? nullptr : own_g, scratch, context));
                CAPSOPS_TRY(of_prior.stage(t, e, nullptr, context));
                CAPSOPS_TRY(stage_softmax(t, scratch, delta, leaky, context));
            }
            CAPSOPS_TRY(launch_rows<A>(add_agreement_gradient<A>, t.pairs() * t.J, t.D, context, t, c, delta, own_x,
                                       own_g, m == 0 ? rest : nullptr, to, m > 0));
        }
        return Status::ok;
    }
};

}  // namespace capsops::cuda
