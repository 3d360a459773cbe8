// The policies of dynamic and self-attention routing: one coupling for all components of a vote. The threads of a batch
// item and input capsule have its output capsules.
#pragma once

#include "../../math/softmax.h"
#include "../engine/stream.cuh"
#include "staged_agreement.cuh"

namespace capsops::cuda {

// The softmax over the output capsules of a batch item. In shared memory: two numbers from 0 on.
template <class A> struct RowSoftmax {
    A coupling, gradient;  // c, and c (q − Σ_k c_k q_k) if wanted

    // z: the logit of a thread's output capsule; q: the gradient of its coupling.
    template <int width>
    __device__ RowSoftmax(const ThreadPosition<A, width>& at, A z, A q, bool leaky, bool with_gradient) {
        A largest[1] = {z};
        join_capsules(at, 0, largest, Max{});
        if (leaky) largest[0] = max(largest[0], A(0));
        const A e = exponential(z - largest[0]);
        A mean = 0;
        coupling = e;
        if (with_gradient) {
            A sums[2] = {e, e * q};
            join_capsules(at, 0, sums, Add{});
            coupling = sums[0], mean = sums[1];
        } else {
            A sums[1] = {e};
            join_capsules(at, 0, sums, Add{});
            coupling = sums[0];
        }
        const A inverse = reciprocal(leaky ? coupling + exponential(-largest[0]) : coupling);
        coupling = e * inverse;
        gradient = coupling * (q - mean * inverse);
    }
};

// The couplings of two output capsules in the loops of warp.cuh: c = softmax_j(û · x), and δ = c (q − Σ_k c_k q_k) with
// q = û · y if wanted. Each lane computes those of one batch item; of() gets those of another one.
template <class A, int items> struct PairSoftmax {
    const WarpPosition<A, items>& at;
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
    // Numbers of batch item m: c or delta.
    __device__ void of(const A (&x)[2], int m, A (&to)[2]) const {
        to[0] = gather<items>(x[0], m, at.half), to[1] = gather<items>(x[1], m, at.half);
    }

  private:
    // The products û · x. Only their difference matters to the softmax of two, so the first one is 0 then.
    __device__ void dots(const A (&v)[items][2], const A (&x)[items][2], A (&to)[2]) const {
        A products[items];
        to[0] = A(0);
        if (leaky) {
#pragma unroll
            for (int m = 0; m < items; ++m) products[m] = v[m][0] * x[m][0];
            to[0] = sum_scattered(products, at.d);
        }
#pragma unroll
        for (int m = 0; m < items; ++m) products[m] = leaky ? v[m][1] * x[m][1] : v[m][1] * x[m][1] - v[m][0] * x[m][0];
        to[1] = sum_scattered(products, at.d);
    }
};

// In the loops of warp.cuh: all couplings equal.
template <class A> struct WarpEqual {
    template <int items> struct Registers {};
    A coupling;

    template <int items> __device__ void start(const WarpPosition<A, items>&, Registers<items>&) const {}
    template <int items>
    __device__ void couple(const WarpPosition<A, items>&, const Registers<items>&, const A (&)[items][2],
                           A (&c)[items][2]) const {
#pragma unroll
        for (int m = 0; m < items; ++m) c[m][0] = c[m][1] = coupling;
    }
};

// In the loops of warp.cuh: as Agreement.
template <class A, bool adjoint> struct WarpAgreement {
    template <int items> struct Registers {
        A x[items][2], y[adjoint ? items : 1][2];
    };
    const A* x;      // [B, J, D]
    const A* y;      // [B, J, D], if adjoint
    const A* prior;  // [N, J], or null
    bool leaky;

    template <int items> __device__ void start(const WarpPosition<A, items>& at, Registers<items>& own) const {
        at.load(x, own.x);
        if constexpr (adjoint) at.load(y, own.y);
    }
    template <int items>
    __device__ void couple(const WarpPosition<A, items>& at, const Registers<items>& own, const A (&v)[items][2],
                           A (&c)[items][2]) const {
        PairSoftmax<A, items> softmax{at, leaky};
        if constexpr (adjoint)
            softmax.template compute<true>(v, own.x, own.y);
        else
            softmax.template compute<false>(v, own.x, own.x);
        A added[2] = {A(0), A(0)};
        if (prior) added[0] = prior[at.i * 2], added[1] = prior[at.i * 2 + 1];
#pragma unroll
        for (int m = 0; m < items; ++m) {
            softmax.of(adjoint ? softmax.delta : softmax.c, m, c[m]);
            c[m][0] += added[0], c[m][1] += added[1];
        }
    }
};

// In the loops of warp.cuh: as AgreementGradient.
template <class A> struct WarpAgreementGradient {
    template <int items> struct Registers {};
    const A *x, *g;
    int64_t size, iterations;
    bool equal_first, leaky, detach;
    A equal;
    const A *prior, *rest;
    A* g_prior;

    template <int items> __device__ void start(const WarpPosition<A, items>&, Registers<items>&) const {}
    template <int items> __device__ void end_warp(const WarpPosition<A, items>&, Registers<items>&, A*) const {}
    template <int items>
    __device__ void gradient(const WarpPosition<A, items>& at, Registers<items>&, const A (&v)[items][2],
                             A (&out)[items][2]) const {
#pragma unroll
        for (int m = 0; m < items; ++m) out[m][0] = out[m][1] = A(0);
        if (rest) at.load(rest, out);
        A added[2] = {A(0), A(0)};
        if (prior) added[0] = prior[at.i * 2], added[1] = prior[at.i * 2 + 1];
#pragma unroll 1
        for (int64_t t = 0; t < iterations; ++t) {
            A own_g[items][2];
            at.load(g + t * size, own_g);
            if (t == 0 && equal_first) {
#pragma unroll
                for (int m = 0; m < items; ++m)
#pragma unroll
                    for (int j = 0; j < 2; ++j) out[m][j] += equal * own_g[m][j];
                continue;
            }
            A own_x[items][2];
            at.load(x + t * size, own_x);
            if (g_prior) add_to_g_prior(at, v, own_g);
            PairSoftmax<A, items> softmax{at, leaky};
            softmax.template compute<true>(v, own_x, own_g);
#pragma unroll
            for (int m = 0; m < items; ++m) {
                A c[2], delta[2];
                softmax.of(softmax.c, m, c);
#pragma unroll
                for (int j = 0; j < 2; ++j) out[m][j] += (c[j] + added[j]) * own_g[m][j];
                if (detach) continue;
                softmax.of(softmax.delta, m, delta);
#pragma unroll
                for (int j = 0; j < 2; ++j) out[m][j] += delta[j] * own_x[m][j];
            }
        }
    }

  private:
    // g_prior = Σ_b û · g.
    template <int items>
    __device__ void add_to_g_prior(const WarpPosition<A, items>& at, const A (&v)[items][2],
                                   const A (&own_g)[items][2]) const {
        A q[2] = {A(0), A(0)};
#pragma unroll
        for (int m = 0; m < items; ++m)
#pragma unroll
            for (int j = 0; j < 2; ++j) q[j] += v[m][j] * own_g[m][j];
        A sum = sum_scattered(q, at.d);
        sum += __shfl_xor_sync(~0u, sum, warp_D);
        if (at.half == 0 && at.d % (warp_D / 2) == 0) g_prior[at.i * 2 + at.d / (warp_D / 2)] = sum;
    }
};

// All couplings equal.
template <class A, int width> struct Equal {
    struct Registers {};
    A coupling;

    WarpEqual<A> in_warps() const { return {coupling}; }

    __device__ void start(const ThreadPosition<A, width>&, Registers&) const {}
    __device__ void couple(const ThreadPosition<A, width>&, const Registers&, const A (&)[width], A (&c)[width]) const {
#pragma unroll
        for (int d = 0; d < width; ++d) c[d] = coupling;
    }

    static int64_t staged_numbers(int64_t, int64_t) { return 0; }
    Status stage_couplings(const StagedVotes<A>&, A*, Couplings<A>& c, const ExecutionContext&) const {
        c.equal = coupling;
        return Status::ok;
    }
};

// c = softmax_j(û · x) + prior; or, if adjoint, δ = c (e − Σ_k c_k e_k) with e = û · y.
template <class A, int width, bool adjoint> struct Agreement {
    struct State {
        A x[width];
    };
    struct States : State {
        A y[width];
    };
    using Registers = std::conditional_t<adjoint, States, State>;
    const A* x;      // [B, J, D]
    const A* y;      // [B, J, D], if adjoint
    const A* prior;  // [N, J], or null
    bool leaky;

    WarpAgreement<A, adjoint> in_warps() const { return {x, y, prior, leaky}; }

    __device__ void start(const ThreadPosition<A, width>& at, Registers& own) const {
        load(x, at, own.x);
        if constexpr (adjoint) load(y, at, own.y);
    }
    __device__ void couple(const ThreadPosition<A, width>& at, const Registers& own, const A (&v)[width],
                           A (&c)[width]) const {
        A weight;
        if constexpr (adjoint) {
            A dots[2] = {dot(v, own.x), dot(v, own.y)};
            join_parts(at, 0, dots, Add{});
            weight = RowSoftmax<A>(at, dots[0], dots[1], leaky, true).gradient;
        } else {
            A dots[1] = {dot(v, own.x)};
            join_parts(at, 0, dots, Add{});
            weight = RowSoftmax<A>(at, dots[0], A(0), leaky, false).coupling;
        }
        if (!at.present)
            weight = 0;
        else if (prior)
            weight += prior[at.i * at.J + at.j];
#pragma unroll
        for (int d = 0; d < width; ++d) c[d] = weight;
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

// g_û = Σ_t [c^t g^t + δ^t x^t] over iterations.
template <class A, int width> struct AgreementGradient {
    struct Registers {};
    const A* x;    // [iterations, B, J, D], the states of the logits
    const A* g;    // [iterations, B, J, D], the gradients of the sums
    int64_t size;  // of one iteration
    int64_t iterations;
    bool equal_first;  // whether the first iteration has equal couplings
    bool leaky, detach;
    A equal;
    const A* prior = nullptr;       // [N, J], or null
    const A* rest = nullptr;        // [B, J, D], added to g_û; or null
    A* g_prior = nullptr;           // [N, J], or null
    A* g_prior_of_split = nullptr;  // [splits, N, J], g_prior of each split of the batch; or null
    int splits = 1;
    ThreadRows rows{1};

    WarpAgreementGradient<A> in_warps() const {
        return {x, g, size, iterations, equal_first, leaky, detach, equal, prior, rest, g_prior};
    }

    template <class Tiling> void cut(const Tiling& tiling, int, Workspace& w) {
        rows = tiling.rows, splits = tiling.splits;
        g_prior_of_split = g_prior && splits > 1 ? w.take<A>(splits * tiling.N * tiling.J) : g_prior;
    }
    __device__ void begin_block() const {}
    __device__ void end_block(A*) const {}
    __device__ void start(const ThreadPosition<A, width>&, Registers&) const {}
    __device__ void gradient(const ThreadPosition<A, width>& at, const Registers&, const A (&v)[width],
                             A (&out)[width]) const {
#pragma unroll
        for (int d = 0; d < width; ++d) out[d] = A(0);
        if (rest) load(rest, at, out);
        for (int64_t t = 0; t < iterations; ++t) {
            A own_x[width], own_g[width], c = equal, delta = 0;
            load(g + t * size, at, own_g);
            if (t > 0 || !equal_first) {
                load(x + t * size, at, own_x);
                A dots[2] = {dot(v, own_x), dot(v, own_g)};
                join_parts(at, 0, dots, Add{});
                if (g_prior) add_to_g_prior(at, dots[1]);
                const RowSoftmax<A> softmax(at, dots[0], dots[1], leaky, !detach);
                c = at.present ? softmax.coupling : A(0);
                if (at.present && prior) c += prior[at.i * at.J + at.j];
                if (at.present && !detach) delta = softmax.gradient;
            }
#pragma unroll
            for (int d = 0; d < width; ++d) out[d] += c * own_g[d];
            if (detach || (t == 0 && equal_first)) continue;
#pragma unroll
            for (int d = 0; d < width; ++d) out[d] += delta * own_x[d];
        }
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
                CAPSOPS_TRY(stage_agreements(t, own_x, detach && !g_prior ? nullptr : own_g, scratch, context));
                if (g_prior) CAPSOPS_TRY(launch_over(t.count * t.J, add_over_items<A>, context, t, e, g_prior));
                CAPSOPS_TRY(stage_softmax(t, scratch, delta, leaky, context));
            }
            CAPSOPS_TRY(launch_rows<A>(add_agreement_gradient<A>, t.pairs() * t.J, t.D, context, t, c, delta, own_x,
                                       own_g, m == 0 ? rest : nullptr, to, m > 0));
        }
        return Status::ok;
    }

  private:
    // g_prior = Σ_b q, computed by the threads of the first item of each tile.
    __device__ void add_to_g_prior(const ThreadPosition<A, width>& at, A q) const {
        const A own[1] = {q};
        at.publish_to_block(1, own);
        if (at.item == 0 && at.part == 0 && at.in_run) {
            A sum = 0;
            for (int item = 0; item < at.items; ++item)
                sum += at.shared(1, rows.first(at.team * at.items + item) + at.slot - at.row);
            A& to = g_prior_of_split[(at.split * at.N + at.i) * at.J + at.j];
            to = at.tile == at.first_tile ? sum : to + sum;
        }
        __syncthreads();
    }
};

}  // namespace capsops::cuda
