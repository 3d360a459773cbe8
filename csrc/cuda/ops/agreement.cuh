// The policies of dynamic and self-attention routing: one coupling for all components of a vote. The threads of a batch
// item and input capsule have its output capsules.
#pragma once

#include "../../math/softmax.h"
#include "../engine/stream.cuh"
#include "staged_agreement.cuh"

namespace capsops::cuda {

// The softmax over the output capsules of a batch item. The logits are number 0 in shared memory; number 1 is e, the
// gradient of the couplings, if wanted. Both are summed over the parts of a vote.
template <class A, int width> struct RowSoftmax {
    const ThreadPosition<A, width>& at;
    A largest, inverse, mean = 0;  // mean: Σ_k c_k e_k

    __device__ A dot_of(int number, int64_t k) const {
        A sum = 0;
        for (int part = 0; part < at.parts; ++part) sum += at.shared(number, at.row + k * at.parts + part);
        return sum;
    }
    __device__ RowSoftmax(const ThreadPosition<A, width>& at_, bool leaky, bool with_gradient) : at(at_) {
        largest = leaky ? A(0) : dot_of(0, 0);
#pragma unroll 1
        for (int64_t k = 0; k < at.J; ++k) largest = max(dot_of(0, k), largest);
        A sum = leaky ? exponential(-largest) : A(0);
#pragma unroll 1
        for (int64_t k = 0; k < at.J; ++k) {
            const A e = exponential(dot_of(0, k) - largest);
            sum += e;
            if (with_gradient) mean += e * dot_of(1, k);
        }
        inverse = reciprocal(sum);
        mean *= inverse;
    }
    __device__ A coupling() const { return exponential(dot_of(0, at.j) - largest) * inverse; }
    // c (e − Σ_k c_k e_k)
    __device__ A gradient() const { return coupling() * (dot_of(1, at.j) - mean); }
};

// All couplings equal.
template <class A, int width> struct Equal {
    struct Registers {};
    A coupling;

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
    struct Registers {
        A x[width], y[width];
    };
    const A* x;      // [B, J, D]
    const A* y;      // [B, J, D], if adjoint
    const A* prior;  // [N, J], or null
    bool leaky;

    __device__ void start(const ThreadPosition<A, width>& at, Registers& own) const {
        load(x, at, own.x);
        if (adjoint) load(y, at, own.y);
    }
    __device__ void couple(const ThreadPosition<A, width>& at, const Registers& own, const A (&v)[width],
                           A (&c)[width]) const {
        const A dots[2] = {dot(v, own.x), adjoint ? dot(v, own.y) : A(0)};
        at.publish(0, dots);
        A weight = 0;
        if (at.present) {
            const RowSoftmax<A, width> softmax(at, leaky, adjoint);
            weight = adjoint ? softmax.gradient() : softmax.coupling();
            if (prior) weight += prior[at.i * at.J + at.j];
        }
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
    const A* prior = nullptr;  // [N, J], or null
    const A* rest = nullptr;   // [B, J, D], added to g_û; or null
    A* g_prior = nullptr;      // [N, J], or null

    void cut(int, int) {}
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
                const A dots[2] = {dot(v, own_x), dot(v, own_g)};
                at.publish(0, dots);
                if (g_prior) {
                    __syncthreads();
                    add_up(at);
                    __syncthreads();
                }
                c = 0;
                if (at.present) {
                    const RowSoftmax<A, width> softmax(at, leaky, !detach);
                    c = softmax.coupling();
                    if (!detach) delta = softmax.gradient();
                    if (prior) c += prior[at.i * at.J + at.j];
                }
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
    // g_prior = Σ_b e, computed by the threads of the first item of each tile.
    __device__ void add_up(const ThreadPosition<A, width>& at) const {
        if (at.item > 0 || at.part > 0 || !at.in_run) return;
        A sum = 0;
        for (int item = 0; item < at.items; ++item)
            for (int part = 0; part < at.parts; ++part) sum += at.shared(1, at.slot + item * at.row_size + part);
        A& to = g_prior[at.i * at.J + at.j];
        to = at.tile == 0 ? sum : to + sum;
    }
};

}  // namespace capsops::cuda
