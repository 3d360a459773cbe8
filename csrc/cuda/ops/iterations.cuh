// The iterations of routing by agreement, around the passes that its forms differ in; csrc/cpu/ops/iterations.h has the
// same for a CPU. s of every iteration is saved, [iterations, B, J, D].
#pragma once

#include "../engine/rows.cuh"

namespace capsops::cuda {

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

// Forward. reduce(t, V, sum) writes Σ_i c_ij û_ij of iteration t to sum [B, J, D]. V [B, J, D] is the sum of the output
// capsules of all earlier iterations; null in the first iteration.
template <class A, class Reduce>
Status route(const Capsules& c, const void* bias, int64_t iterations, SquashKind kind, void* v, void* s, Workspace& w,
             Reduce reduce) {
    const int64_t rows = c.B * c.J, size = rows * c.D;
    if (rows == 0) iterations = 1;  // nothing to compute
    A* V = w.take<A>(size);
    for (int64_t t = 0; t < iterations; ++t) {
        A* sum = static_cast<A*>(s) + t * size;
        CAPSOPS_TRY(reduce(t, t == 0 ? nullptr : V, sum));
        CAPSOPS_TRY(launch_over_rows(rows, c.D, finish_iteration<A>, c.context, sum, static_cast<const A*>(bias),
                                     static_cast<A*>(v), V, rows, c.J, c.D, t == 0, kind));
    }
    return Status::ok;
}

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

// Backward. With detached logits it is one emitting pass; the full gradient has R − 1 reducing passes before it. If the
// states of all iterations would take too much memory, groups of iterations are emitted, the last ones first.
//
// adjoint(t, V^t, g_s^t, H) writes H^t = Σ_i δ^t_ij û_ij, the gradient of V^t, to H. It is called for the iterations
// from the last one to the second. emit(begin, end, more, V, g_s) gets V and g_s of the iterations begin … end − 1, or
// with detach those of the last one alone; more: it adds to the gradients. numbers: how many it takes for each
// iteration from the workspace.
template <class A, class Adjoint, class Emit>
Status route_backward(const Capsules& c, int64_t iterations, bool detach, SquashKind kind,
                      const A* s /* [iterations, B, J, D] */, const A* g_v, A* g_bias /* [J, D], or null */,
                      int64_t numbers, Workspace& w, Adjoint adjoint, Emit emit) {
    const int64_t rows = c.B * c.J, size = rows * c.D;
    if (size == 0) iterations = 1;  // nothing to compute
    const int64_t last = iterations - 1;
    const int64_t bytes = (2 * size + numbers) * static_cast<int64_t>(sizeof(A));
    const int64_t fitting = at_least(limits.states / at_least(bytes, 1), limits.min_iterations);
    const int64_t group = detach ? 1 : at_most(iterations, fitting);
    A* V = w.take<A>(group * size);
    A* g_s = w.take<A>(group * size);
    A* H = w.take<A>(size);
    A* g_V = w.take<A>(size);
    for (int64_t end = iterations; end > 0; end = detach ? 0 : end - group) {
        const int64_t begin = at_least(end - group, 0);
        CAPSOPS_TRY(launch_over_rows(rows, c.D, states<A>, c.context, s, end == iterations ? g_v : nullptr, V, g_s,
                                     rows, c.D, begin, end, kind));
        for (int64_t t = end - 1; t >= begin; --t) {
            const A* const own_V = V + (t - begin) * size;
            A* const own_g_s = g_s + (t - begin) * size;
            if (t < last)
                CAPSOPS_TRY(launch_over_rows(rows, c.D, earlier_gradient<A>, c.context, static_cast<const A*>(H), g_V,
                                             s + t * size, own_g_s, rows, c.D, t == last - 1, kind));
            if (t > 0 && !detach) CAPSOPS_TRY(adjoint(t, own_V, static_cast<const A*>(own_g_s), H));
        }
        if (g_bias)
            CAPSOPS_TRY(add_rows(static_cast<const A*>(g_s), (end - begin) * c.B, c.J * c.D, c.J * c.D, g_bias,
                                 end < iterations, c.context));
        CAPSOPS_TRY(emit(begin, end, end < iterations, static_cast<const A*>(V), static_cast<const A*>(g_s)));
    }
    return Status::ok;
}

}  // namespace capsops::cuda
