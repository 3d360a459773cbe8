// The gradient of routing by agreement; the steps are those of csrc/cpu/dynamic_routing_backward.cpp. With detached
// logits one emitting pass; with the full gradient R − 1 reducing passes before it.

#include "agreement.h"
#include "operators.h"
#include "rows.cuh"

namespace capsops::cuda {
namespace {

// V[t], the sum of v over the iterations before t, and the gradient of the last s: a thread for each output capsule.
template <class A>
__global__ void states(const A* s, const A* g_v, A* V, A* g_s, A* v, int64_t rows, int64_t D, int64_t iterations) {
    const int64_t size = rows * D, last = (iterations - 1) * size;
    for (int64_t r = first_index(); r < rows; r += index_stride()) {
        const int64_t row = r * D;
        for (int64_t d = 0; d < D; ++d) V[row + d] = A(0);
        for (int64_t t = 1; t < iterations; ++t) {
            squash_vector<A>(s + (t - 1) * size + row, v + row, D, SquashKind::sabour);
            for (int64_t d = row; d < row + D; ++d) V[t * size + d] = V[(t - 1) * size + d] + v[d];
        }
        squash_vector_backward<A>(g_v + row, s + last + row, g_s + last + row, D, SquashKind::sabour);
    }
}

// g_V (+)= H; g_s = the gradient of s through squash.
template <class A>
__global__ void earlier_gradient(const A* H, A* g_V, const A* s, A* g_s, int64_t rows, int64_t D, bool first) {
    for (int64_t r = first_index(); r < rows; r += index_stride()) {
        for (int64_t d = r * D; d < (r + 1) * D; ++d) g_V[d] = first ? H[d] : g_V[d] + H[d];
        squash_vector_backward<A>(g_V + r * D, s + r * D, g_s + r * D, D, SquashKind::sabour);
    }
}

}  // namespace

Status dynamic_routing_backward(const Capsules& c, int64_t iterations, bool leaky, bool detach, const void* s_,
                                const void* g_v, const CapsuleGradients& gradients, void* g_bias) {
    if (iterations < 1) return Status::invalid_argument;
    return for_accumulation(c.dtype, [&]<class A>() {
        const int64_t rows = c.B * c.J, size = rows * c.D;
        const int64_t last = iterations - 1;
        const A* s = static_cast<const A*>(s_);
        Workspace w(c.place);
        A* V = w.take<A>(iterations * size);
        A* g_s = w.take<A>(iterations * size);
        A* H = w.take<A>(size);
        A* g_V = w.take<A>(size);
        CAPSOPS_TRY(launch(states<A>, blocks_for(rows), most_threads, 0, c.place, s, static_cast<const A*>(g_v), V, g_s,
                           H, rows, c.D, iterations));
        for (int64_t t = last; !detach && t > 0; --t) {
            CAPSOPS_TRY(sum_adjoint(c, V + t * size, g_s + t * size, leaky, w, H));
            CAPSOPS_TRY(launch(earlier_gradient<A>, blocks_for(rows), most_threads, 0, c.place,
                               static_cast<const A*>(H), g_V, s + (t - 1) * size, g_s + (t - 1) * size, rows, c.D,
                               t == last));
        }
        const int64_t first = detach ? last : 0;
        if (g_bias)
            CAPSOPS_TRY(launch(add_rows<A>, blocks_for(c.J * c.D), most_threads, 0, c.place,
                               static_cast<const A*>(g_s + first * size), (iterations - first) * c.B, c.J * c.D,
                               c.J * c.D, static_cast<A*>(g_bias)));
        if (!gradients.u && !gradients.weight) return Status::ok;
        const AgreementTerms terms{.x = V,
                                   .g = g_s,
                                   .first = first,
                                   .iterations = iterations,
                                   .equal_first = true,
                                   .leaky = leaky,
                                   .detach = detach};
        return emit_agreement(c, terms, gradients, w);
    });
}

}  // namespace capsops::cuda
