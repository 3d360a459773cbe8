// Routing by agreement (Sabour et al. 2017, procedure 1): one pass over u and W an iteration. Between the passes only
// V, the sum of the output capsules so far, is kept; the logits are recomputed from it. Saves s of every iteration,
// [iterations, B, J, D].

#include "agreement.h"
#include "operators.h"
#include "rows.cuh"

namespace capsops::cuda {
namespace {

// s += bias; v = squash(s); V (+)= v: a thread for each output capsule.
template <class A>
__global__ void finish_iteration(A* s, const A* bias, A* v, A* V, int64_t rows, int64_t J, int64_t D, bool first) {
    for (int64_t r = first_index(); r < rows; r += index_stride()) {
        A *own = s + r * D, *out = v + r * D, *sum = V + r * D;
        for (int64_t d = 0; bias && d < D; ++d) own[d] += bias[r % J * D + d];
        squash_vector<A>(own, out, D, SquashKind::sabour);
        for (int64_t d = 0; d < D; ++d) sum[d] = first ? out[d] : sum[d] + out[d];
    }
}

}  // namespace

Status dynamic_routing(const Capsules& c, const void* bias, int64_t iterations, bool leaky, void* v, void* s) {
    if (iterations < 1) return Status::invalid_argument;
    return for_accumulation(c.dtype, [&]<class A>() {
        const int64_t rows = c.B * c.J, size = rows * c.D;
        if (size == 0) iterations = 1;  // of nothing
        Workspace w(c.place);
        A* V = w.take<A>(size);
        for (int64_t t = 0; t < iterations; ++t) {
            A* sum = static_cast<A*>(s) + t * size;
            CAPSOPS_TRY(t == 0 ? sum_votes(c, equal_coupling<double>(c.J, leaky), w, sum)
                               : sum_agreeing(c, V, nullptr, leaky, w, sum));
            CAPSOPS_TRY(launch(finish_iteration<A>, blocks_for(rows), most_threads, 0, c.place, sum,
                               static_cast<const A*>(bias), static_cast<A*>(v), V, rows, c.J, c.D, t == 0));
        }
        return Status::ok;
    });
}

}  // namespace capsops::cuda
