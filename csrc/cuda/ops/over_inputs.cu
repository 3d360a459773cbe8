// Routing by agreement with the softmax over the input capsules; the formulas are those of
// csrc/cpu/ops/over_inputs.cpp. One pass over u and W for each iteration.

#include "over_inputs.cuh"

#include "iterations.cuh"

namespace capsops::cuda {
namespace {

// means = (s − bias) · g_s, a row for each.
template <class A>
__global__ void means_of_rows(const A* s, const A* bias, const A* g_s, int64_t rows, int64_t J, int64_t D, A* means,
                              int lanes) {
    for_rows(rows, lanes, [&](int64_t r, const RowLanes& lane) {
        A sum = 0;
        for (int64_t d = lane.first; d < D; d += lane.step)
            sum += (s[r * D + d] - (bias ? bias[r % J * D + d] : A(0))) * g_s[r * D + d];
        sum = lane.sum(sum);
        if (lane.first == 0) means[r] = sum;
    });
}

}  // namespace

Status write_means(const Capsules& c, const void* s, const void* bias, const void* g_s, int64_t rows, void* means) {
    return for_accumulation(c.dtype, [&]<class A>() {
        return launch_over_rows(rows, c.D, means_of_rows<A>, c.context, static_cast<const A*>(s),
                                static_cast<const A*>(bias), static_cast<const A*>(g_s), rows, c.J, c.D,
                                static_cast<A*>(means));
    });
}

Status sum_over_inputs(const Capsules& c, const CoupledTerms& terms, const void* x, Workspace& whole, void* out,
                       void* log_sums) {
    return for_storage_and_width(c, [&]<class T, int width>() {
        using A = Accumulation<T>;
        const int64_t rows = c.B * c.J;
        if (rows == 0) return Status::ok;
        if (c.N == 0) CAPSOPS_TRY(launch_over(rows, write_zeros<A>, c.context, static_cast<A*>(log_sums), rows));
        Workspace w(&whole);
        const OnlineSum<A, width> policy{Coupled<A>(terms), static_cast<const A*>(x), static_cast<A*>(log_sums),
                                         w.take<A>(rows),   w.take<double>(rows),     rows};
        // Without components there are still logits.
        if (c.N > 0 && c.D == 0) return reduce_staged<T>(c, policy, w, static_cast<A*>(out));
        return reduce<width, T>(c, policy, 2 * policy.items, w, static_cast<A*>(out));
    });
}

Status dynamic_routing_over_inputs(const Capsules& c, const void* logits, const void* input_weight, const void* bias,
                                   int64_t iterations, SquashKind kind, void* v, void* s, void* log_sums) {
    return for_accumulation(c.dtype, [&]<class A>() {
        Workspace w(c.context);
        return route<A>(c, bias, iterations, kind, v, s, w, [&](int64_t t, const A* V, A* sum) {
            return sum_over_inputs(c, {logits, input_weight}, V, w, sum, static_cast<A*>(log_sums) + t * c.B * c.J);
        });
    });
}

Status dynamic_routing_over_inputs_backward(const Capsules& c, const void* logits, const void* input_weight,
                                            const void* bias, int64_t iterations, bool detach, SquashKind kind,
                                            const void* s_, const void* log_sums_, const void* g_v, void* g_u,
                                            void* g_weight, void* g_logits, void* g_input_weight, void* g_bias) {
    return for_accumulation(c.dtype, [&]<class A>() {
        const A *s = static_cast<const A*>(s_), *log_sums = static_cast<const A*>(log_sums_);
        const int64_t rows = c.B * c.J, size = rows * c.D;
        Workspace w(c.context);
        // Of the iterations begin … end − 1, whose gradients of s begin at g_s. means: their memory.
        const auto terms_of = [&](int64_t begin, int64_t end, const A* g_s, A* means, CoupledTerms& terms) {
            terms = {logits, input_weight, false, log_sums + begin * rows, means};
            return write_means(c, s + begin * size, bias, g_s, (end - begin) * rows, means);
        };
        return route_backward<A>(
            c, iterations, detach, kind, s, static_cast<const A*>(g_v), static_cast<A*>(g_bias), rows, w,
            [&](int64_t t, const A* V, const A* g_s, A* H) {
                Workspace own(&w);
                CoupledTerms terms;
                CAPSOPS_TRY(terms_of(t, t + 1, g_s, own.take<A>(rows), terms));
                return sum_coupled_adjoint(c, terms, V, g_s, own, H);
            },
            [&](int64_t begin, int64_t end, bool more, const A* V, const A* g_s) {
                Workspace own(&w);
                CoupledTerms terms;
                CAPSOPS_TRY(terms_of(begin, end, g_s, own.take<A>((end - begin) * rows), terms));
                return emit_coupled(c, {terms, V, g_s, end - begin, begin == 0, detach, more},
                                    {{g_u, g_weight}, g_logits, g_input_weight}, own);
            });
    });
}

Status routing_step_over_inputs(const Capsules& c, const void* state, const void* logits, const void* input_weight,
                                void* s, void* total, void* log_sums) {
    return for_accumulation(c.dtype, [&]<class A>() {
        const int64_t size = c.B * c.J * c.D;
        Workspace w(c.context);
        CAPSOPS_TRY(sum_over_inputs(c, {logits, input_weight}, state, w, s, log_sums));
        return launch_over(size, copy_numbers<A, A>, c.context, static_cast<const A*>(s), static_cast<A*>(total), size,
                           false);
    });
}

Status routing_step_over_inputs_backward(const Capsules& c, const void* state, const void* logits,
                                         const void* input_weight, const void* total, const void* log_sums,
                                         const void* g_s, void* g_u, void* g_weight, void* g_state, void* g_logits,
                                         void* g_input_weight) {
    return for_accumulation(c.dtype, [&]<class A>() {
        const int64_t rows = c.B * c.J;
        Workspace w(c.context);
        A* const means = w.take<A>(rows);
        const CoupledTerms terms{logits, input_weight, false, log_sums, means};
        CAPSOPS_TRY(write_means(c, total, nullptr, g_s, rows, means));
        if (g_state) CAPSOPS_TRY(sum_coupled_adjoint(c, terms, state, g_s, w, g_state));
        return emit_coupled(c, {terms, state, g_s, 1, false, false}, {{g_u, g_weight}, g_logits, g_input_weight}, w);
    });
}

}  // namespace capsops::cuda
