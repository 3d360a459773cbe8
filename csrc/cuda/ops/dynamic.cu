// Routing by agreement (Sabour et al. 2017, procedure 1); the steps are those of csrc/cpu/ops/dynamic.cpp. One pass
// over u and W for each iteration. s of every iteration is saved, [iterations, B, J, D].
//
// The gradient with detached logits is one emitting pass; the full gradient has R − 1 reducing passes before it. If the
// states of all iterations would take too much memory, groups of iterations are emitted, the last ones first.

#include "../../math/softmax.h"
#include "../engine/rows.cuh"
#include "agreement.h"

namespace capsops::cuda {
namespace {

// s += bias; v = squash(s); V (+)= v.
template <class A>
__global__ void finish_iteration(A* s, const A* bias, A* v, A* V, int64_t rows, int64_t J, int64_t D, bool first,
                                 SquashKind kind, int lanes) {
    for_rows(rows, lanes, [&](int64_t r, const RowLanes& lane) {
        A *own = s + r * D, *out = v + r * D, *sum = V + r * D;
        for (int64_t d = lane.first; bias && d < D; d += lane.step) own[d] += bias[r % J * D + d];
        squash_vector<A>(own, out, D, kind, lane);
        for (int64_t d = lane.first; d < D; d += lane.step) sum[d] = first ? out[d] : sum[d] + out[d];
    });
}

}  // namespace

Status dynamic_routing(const Capsules& c, const void* bias, int64_t iterations, bool leaky, SquashKind kind, void* v,
                       void* s) {
    return for_accumulation(c.dtype, [&]<class A>() {
        const int64_t rows = c.B * c.J, size = rows * c.D;
        if (size == 0) iterations = 1;  // nothing to compute
        Workspace w(c.context);
        A* V = w.take<A>(size);
        for (int64_t t = 0; t < iterations; ++t) {
            A* sum = static_cast<A*>(s) + t * size;
            CAPSOPS_TRY(t == 0 ? sum_votes(c, equal_coupling<double>(c.J, leaky), w, sum)
                               : sum_agreeing(c, V, nullptr, leaky, w, sum));
            CAPSOPS_TRY(launch_over_rows(rows, c.D, finish_iteration<A>, c.context, sum, static_cast<const A*>(bias),
                                         static_cast<A*>(v), V, rows, c.J, c.D, t == 0, kind));
        }
        return Status::ok;
    });
}

namespace {

// For the iterations begin … end − 1: V, the sum of v over all iterations before each of them. If g_v is not null, also
// g_s of the last one, the gradient of its s.
template <class A>
__global__ void states(const A* s, const A* g_v, A* V, A* g_s, int64_t rows, int64_t D, int64_t begin, int64_t end,
                       SquashKind kind, int lanes) {
    const int64_t size = rows * D;
    A* const v = g_s;  // scratch memory: g_s is written later
    for_rows(rows, lanes, [&](int64_t r, const RowLanes& lane) {
        const int64_t row = r * D;
        for (int64_t d = lane.first; d < D; d += lane.step) V[row + d] = A(0);
        for (int64_t t = 1; t < end; ++t) {
            squash_vector<A>(s + (t - 1) * size + row, v + row, D, kind, lane);
            const A* const before = V + at_least(t - 1 - begin, 0) * size + row;
            A* const sum = V + at_least(t - begin, 0) * size + row;
            for (int64_t d = lane.first; d < D; d += lane.step) sum[d] = before[d] + v[row + d];
        }
        if (g_v)
            squash_vector_backward<A>(g_v + row, s + (end - 1) * size + row, g_s + (end - 1 - begin) * size + row, D,
                                      kind, lane);
    });
}

// g_V (+)= H; g_s = the gradient of s through squash.
template <class A>
__global__ void earlier_gradient(const A* H, A* g_V, const A* s, A* g_s, int64_t rows, int64_t D, bool first,
                                 SquashKind kind, int lanes) {
    for_rows(rows, lanes, [&](int64_t r, const RowLanes& lane) {
        const int64_t row = r * D;
        for (int64_t d = lane.first; d < D; d += lane.step)
            g_V[row + d] = first ? H[row + d] : g_V[row + d] + H[row + d];
        squash_vector_backward<A>(g_V + row, s + row, g_s + row, D, kind, lane);
    });
}

}  // namespace

Status dynamic_routing_backward(const Capsules& c, int64_t iterations, bool leaky, bool detach, SquashKind kind,
                                const void* s_, const void* g_v, void* g_u, void* g_weight, void* g_bias) {
    const CapsuleGradients gradients{g_u, g_weight};
    return for_accumulation(c.dtype, [&]<class A>() {
        const int64_t rows = c.B * c.J, size = rows * c.D;
        if (size == 0) iterations = 1;  // nothing to compute
        const int64_t last = iterations - 1;
        const A* s = static_cast<const A*>(s_);
        const int64_t bytes = 2 * size * static_cast<int64_t>(sizeof(A));
        const int64_t fitting = at_least(limits.states / at_least(bytes, 1), limits.min_iterations);
        const int64_t group = detach ? 1 : at_most(iterations, fitting);
        Workspace w(c.context);
        A* V = w.take<A>(group * size);
        A* g_s = w.take<A>(group * size);
        A* H = w.take<A>(size);
        A* g_V = w.take<A>(size);
        for (int64_t end = iterations; end > 0; end = detach ? 0 : end - group) {
            const int64_t begin = at_least(end - group, 0);
            CAPSOPS_TRY(launch_over_rows(rows, c.D, states<A>, c.context, s,
                                         end == iterations ? static_cast<const A*>(g_v) : nullptr, V, g_s, rows, c.D,
                                         begin, end, kind));
            for (int64_t t = end - 1; t >= begin; --t) {
                const A* const own_V = V + (t - begin) * size;
                A* const own_g_s = g_s + (t - begin) * size;
                if (t < last)
                    CAPSOPS_TRY(launch_over_rows(rows, c.D, earlier_gradient<A>, c.context, static_cast<const A*>(H),
                                                 g_V, s + t * size, own_g_s, rows, c.D, t == last - 1, kind));
                if (t > 0 && !detach) CAPSOPS_TRY(sum_adjoint(c, own_V, own_g_s, leaky, w, H));
            }
            if (g_bias)
                CAPSOPS_TRY(add_rows(static_cast<const A*>(g_s), (end - begin) * c.B, c.J * c.D, c.J * c.D,
                                     static_cast<A*>(g_bias), end < iterations, c.context));
            if (!gradients.u && !gradients.weight) continue;
            const AgreementTerms terms{.x = V,
                                       .g = g_s,
                                       .iterations = end - begin,
                                       .equal_first = begin == 0,
                                       .leaky = leaky,
                                       .detach = detach,
                                       .more = end < iterations};
            CAPSOPS_TRY(emit_agreement(c, terms, gradients, w));
        }
        return Status::ok;
    });
}

}  // namespace capsops::cuda
