// The policies of the passes of couplings.h, but for the forward pass over the input capsules (over_inputs.cuh).
#pragma once

#include <limits>

#include "agreement.cuh"
#include "couplings.h"

namespace capsops::cuda {

// CoupledTerms of one iteration, for numbers of type A.
//
// A logit of −∞ removes its pair: c = 0, even where that leaves an input or an output capsule without pairs. +∞ and NaN
// make all couplings of their sum NaN.
template <class A> struct Coupled {
    static constexpr A lowest = std::numeric_limits<A>::lowest();
    const A *logits, *input_weight;
    bool leaky;
    const A *log_sums, *means;

    explicit Coupled(const CoupledTerms& terms)
        : logits(static_cast<const A*>(terms.logits)),
          input_weight(static_cast<const A*>(terms.input_weight)),
          leaky(terms.leaky),
          log_sums(static_cast<const A*>(terms.log_sums)),
          means(static_cast<const A*>(terms.means)) {}

    // b of a pair: dot + logits[index], or `lowest` if it is removed or absent.
    __device__ A logit(A dot, int64_t index, bool present) const {
        if (!present) return lowest;
        if (!logits) return dot;
        const A x = logits[index];
        // x − x is 0, or NaN if x is +∞.
        return x == -std::numeric_limits<A>::infinity() ? lowest : dot + x + (x - x);
    }
    // w of the input capsule with this index in [B, N].
    __device__ A weight(int64_t index, bool present) const {
        return input_weight && present ? input_weight[index] : A(1);
    }
};

// The couplings of each of a thread's batch items. In shared memory: two numbers for each of them, from 0 on.
template <class A, int items> struct PairCouplings {
    A c[items];      // without the weights of the input capsules
    A w[items];      // these weights
    A delta[items];  // δ, if wanted
    A sum[items];    // Σ_j c_ij e_ij, if wanted

    // z = û · x and e = û · y. iteration: of log_sums and means.
    template <int width>
    __device__ PairCouplings(const ThreadPosition<A, width, items>& at, const Coupled<A>& given, int64_t iteration,
                             A (&z)[items], A (&e)[items], bool with_delta, bool with_sum) {
        bool removed[items];
#pragma unroll
        for (int m = 0; m < items; ++m) {
            const int64_t pair = at.b(m) * at.N + at.i;
            z[m] = given.logit(z[m], pair * at.J + at.j, at.present(m));
            w[m] = given.weight(pair, at.present(m));
            removed[m] = z[m] == given.lowest;
            if (removed[m]) e[m] = A(0);
        }
        if (given.log_sums) {
#pragma unroll
            for (int m = 0; m < items; ++m) {
                const int64_t scalar = (iteration * at.B + at.b(m)) * at.J + at.j;
                c[m] = removed[m] ? A(0) : exponential(z[m] - given.log_sums[scalar]);
                delta[m] = with_delta && !removed[m] ? c[m] * (w[m] * e[m] - given.means[scalar]) : A(0);
                sum[m] = c[m] * e[m];
            }
            if (with_sum) join_capsules(at, 0, sum, Add{});
        } else {
            const RowSoftmax<A, items> softmax(at, z, e, given.leaky, with_delta || with_sum);
#pragma unroll
            for (int m = 0; m < items; ++m) {
                c[m] = removed[m] ? A(0) : softmax.coupling[m];
                delta[m] = removed[m] ? A(0) : w[m] * softmax.gradient[m];
                sum[m] = softmax.mean[m];
            }
        }
    }
};

// The thread's part of a state for each of its batch items; 0 if x is null.
template <class A, int width, int items>
__device__ inline void load_states(const A* x, const ThreadPosition<A, width, items>& at, A (&to)[items][width]) {
#pragma unroll
    for (int m = 0; m < items; ++m) {
        if (x) {
            load(x, at, m, to[m]);
        } else {
#pragma unroll
            for (int d = 0; d < width; ++d) to[m][d] = A(0);
        }
    }
}

// For votes in memory, in place: û · x becomes w c, and û · y becomes δ; e may be null. A row for each pair. g_logits
// [B, N, J] and g_input_weight [B, N], each or null, get δ and Σ_j c e; more: these are added. with_prior: c + prior
// takes the place of c, but for δ.
template <class A, bool with_prior = false>
__global__ void couple_pairs(StagedVotes<A> t, Coupled<A> given, const A* prior /* [N, J] */, int64_t iteration, A* z,
                             A* e /* [pairs, J] */, A* g_logits, A* g_input_weight, bool more, int lanes) {
    const int64_t lane = threadIdx.x % lanes, J = t.J;
    for (int64_t first = blockIdx.x * blockDim.x / lanes; first < t.pairs(); first += index_stride() / lanes) {
        const int64_t pair = first + threadIdx.x / lanes, end = pair < t.pairs() ? J : 0;
        const bool present = end > 0 && t.present(pair);
        const int64_t own = end > 0 ? t.of_all(pair) : 0, scalar = (iteration * t.B + pair / t.count) * J;
        const A w = given.weight(own, present);
        A *const c = z + pair * J, *const delta = e + pair * J;
        const A* const added = with_prior ? prior + (t.first + pair % t.count) * J : nullptr;
        A largest = given.leaky ? A(0) : given.lowest, sum = 0, mean = 0, of_prior = 0;
        for (int64_t j = lane; j < end; j += lanes) {
            c[j] = given.logit(c[j], own * J + j, present);
            largest = max(c[j], largest);
        }
        if (!given.log_sums) largest = over_lanes(largest, lanes, [](A a, A b) { return max(a, b); });
        for (int64_t j = lane; j < end; j += lanes) {
            const A to_subtract = given.log_sums ? given.log_sums[scalar + j] : largest;
            c[j] = c[j] == given.lowest ? A(0) : exponential(c[j] - to_subtract);
            sum += c[j];
        }
        if (!given.log_sums) {
            sum = sum_over_lanes(sum, lanes) + (given.leaky ? exponential(-largest) : A(0));
            const A inverse = sum == A(0) ? A(0) : reciprocal(sum);
            for (int64_t j = lane; j < end; j += lanes) c[j] *= inverse;
        }
        if (e) {
            for (int64_t j = lane; j < end; j += lanes) {
                mean += c[j] * delta[j];
                if (with_prior) of_prior += added[j] * delta[j];
            }
            mean = sum_over_lanes(mean, lanes);
            if (with_prior) of_prior = sum_over_lanes(of_prior, lanes);
        }
        for (int64_t j = lane; j < end; j += lanes) {
            if (e) {
                delta[j] = given.log_sums ? given.means ? c[j] * (w * delta[j] - given.means[scalar + j]) : A(0)
                                          : w * c[j] * (delta[j] - mean);
                if (g_logits) g_logits[own * J + j] = delta[j] + (more ? g_logits[own * J + j] : A(0));
            }
            c[j] = w * (with_prior ? c[j] + added[j] : c[j]);
        }
        if (g_input_weight && end > 0 && lane == 0)
            g_input_weight[own] = (with_prior ? mean + of_prior : mean) + (more ? g_input_weight[own] : A(0));
    }
}

// The dots of the votes of a tile, 0 where x is null: û · x, and û · y if e is not null.
template <class A>
Status stage_dots(const StagedVotes<A>& t, const A* x, const A* y, A* z, A* e, const ExecutionContext& context) {
    if (x) return stage_agreements(t, x, e ? y : nullptr, z, context);  // e follows z
    const int64_t size = t.pairs() * t.J;
    CAPSOPS_TRY(launch_over(size, write_zeros<A>, context, z, size));
    return e ? stage_agreements(t, y, static_cast<const A*>(nullptr), e, context) : Status::ok;
}

// w c; or, if adjoint, δ.
template <class A, int width, bool adjoint> struct CoupledSum {
    static constexpr int items = Agreement<A, width, adjoint>::items;
    static constexpr int resident = Agreement<A, width, adjoint>::resident;
    template <int items> using Registers = typename Agreement<A, width, adjoint>::template Registers<items>;
    Coupled<A> given;
    const A* x;  // [B, J, D], or null
    const A* y;  // [B, J, D], if adjoint

    template <int items> __device__ void start(const ThreadPosition<A, width, items>& at, Registers<items>& own) const {
        load_states(x, at, own.x);
        if constexpr (adjoint) load_states(y, at, own.y);
    }
    template <int items>
    __device__ void couple(const ThreadPosition<A, width, items>& at, const Registers<items>& own,
                           const A (&v)[items][width], A (&c)[items][width]) const {
        A z[items], e[items];
        if constexpr (adjoint) {
            agreements(at, v, own.x, own.y, z, e);
        } else {
#pragma unroll
            for (int m = 0; m < items; ++m) z[m] = dot(v[m], own.x[m]), e[m] = A(0);
            join_parts(at, 0, z, Add{});
        }
        const PairCouplings<A, items> couplings(at, given, 0, z, e, adjoint, false);
#pragma unroll
        for (int m = 0; m < items; ++m)
#pragma unroll
            for (int d = 0; d < width; ++d) c[m][d] = adjoint ? couplings.delta[m] : couplings.w[m] * couplings.c[m];
    }

    static int64_t staged_numbers(int64_t J, int64_t) { return (adjoint ? 2 : 1) * J; }
    Status stage_couplings(const StagedVotes<A>& t, A* scratch, Couplings<A>& c,
                           const ExecutionContext& context) const {
        A *const e = adjoint ? scratch + t.pairs() * t.J : nullptr, *const none = nullptr;
        c.c = adjoint ? e : scratch;
        CAPSOPS_TRY(stage_dots(t, x, y, scratch, e, context));
        return launch_rows<A>(couple_pairs<A>, t.pairs(), t.J, context, t, given, static_cast<const A*>(none),
                              int64_t{0}, scratch, e, none, none, false);
    }
};

// The gradients of CoupledGradientTerms.
template <class A, int width> struct CoupledGradient {
    static constexpr int items = some_items<A>;
    static constexpr int resident = 2;
    template <int> struct Registers {};
    Coupled<A> given;
    const A *x, *g;
    int64_t size;  // of one iteration
    int64_t iterations;
    bool zero_first, detach, more;
    A *g_logits, *g_input_weight;  // each or null

    template <class Tiling> void cut(const Tiling&, int, Workspace&) {}
    __device__ void begin_block() const {}
    __device__ void end_block(A*) const {}
    template <int n> __device__ void start(const ThreadPosition<A, width, n>&, Registers<n>&) const {}
    template <int items>
    __device__ void gradient(const ThreadPosition<A, width, items>& at, const Registers<items>&,
                             const A (&v)[items][width], A (&out)[items][width]) const {
        A of_logits[items] = {}, of_weight[items] = {};
#pragma unroll
        for (int m = 0; m < items; ++m)
#pragma unroll
            for (int d = 0; d < width; ++d) out[m][d] = A(0);
#pragma unroll 1
        for (int64_t t = 0; t < iterations; ++t) {
            A own_x[items][width], own_g[items][width], z[items], e[items];
            load_states(t == 0 && zero_first ? nullptr : x + t * size, at, own_x);
            load_states(g + t * size, at, own_g);
            agreements(at, v, own_x, own_g, z, e);
            const PairCouplings<A, items> couplings(at, given, t, z, e, !detach, g_input_weight != nullptr);
#pragma unroll
            for (int m = 0; m < items; ++m) {
                const A c = couplings.w[m] * couplings.c[m];
#pragma unroll
                for (int d = 0; d < width; ++d) out[m][d] += c * own_g[m][d];
                if (g_input_weight) of_weight[m] += couplings.sum[m];
                if (detach) continue;
                of_logits[m] += couplings.delta[m];
#pragma unroll
                for (int d = 0; d < width; ++d) out[m][d] += couplings.delta[m] * own_x[m][d];
            }
        }
        if (at.part > 0) return;
#pragma unroll
        for (int m = 0; m < items; ++m) {
            if (!at.in_run(m)) continue;
            const int64_t pair = at.b(m) * at.N + at.i;
            if (g_logits) write(g_logits[pair * at.J + at.j], of_logits[m]);
            if (g_input_weight && at.j == 0) write(g_input_weight[pair], of_weight[m]);
        }
    }

    static constexpr bool needs_votes = true;
    static int64_t staged_numbers(int64_t J, int64_t) { return 2 * J; }
    Status stage_gradient(const StagedVotes<A>& t, A* scratch, A* to, A*, int64_t,
                          const ExecutionContext& context) const {
        A* const e = detach && !g_input_weight ? nullptr : scratch + t.pairs() * t.J;
        for (int64_t m = 0; m < iterations; ++m) {
            const A *own_x = m == 0 && zero_first ? nullptr : x + m * size, *own_g = g + m * size;
            const Couplings<A> c{.c = scratch};
            const A *const delta = detach || !own_x ? nullptr : e, *const none = nullptr;
            CAPSOPS_TRY(stage_dots(t, own_x, own_g, scratch, e, context));
            CAPSOPS_TRY(launch_rows<A>(couple_pairs<A>, t.pairs(), t.J, context, t, given, none, m, scratch, e,
                                       g_logits, g_input_weight, more || m > 0));
            CAPSOPS_TRY(launch_rows<A>(add_agreement_gradient<A>, t.pairs() * t.J, t.D, context, t, c, delta, own_x,
                                       own_g, none, to, m > 0));
        }
        return Status::ok;
    }

  private:
    __device__ void write(A& to, A sum) const { to = more ? to + sum : sum; }
};

}  // namespace capsops::cuda
