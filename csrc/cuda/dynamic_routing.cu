// Routing by agreement (Sabour et al. 2017, procedure 1): one pass over u and W an iteration. Between the passes only
// V, the sum of the output capsules so far, is kept; the logits are recomputed from it. Saves s of every iteration,
// [iterations, B, J, D].

#include "couplings.cuh"
#include "operators.h"

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

Status dynamic_routing(const Capsules& c, const void* bias, int iterations, bool leaky, void* v, void* s) {
    return for_storage(c.dtype, [&]<class T>() {
        return for_width<T>(c.D, [&]<int width>() {
            using A = Accumulation<T>;
            const int64_t rows = c.B * c.J, size = rows * c.D;
            Workspace w(c.place);
            A* V = w.take<A>(size);
            for (int t = 0; t < iterations; ++t) {
                A* sum = static_cast<A*>(s) + t * size;
                if (t == 0) {
                    const Equal<A, width> equal{equal_coupling<A>(c.J, leaky)};
                    CAPSOPS_TRY((reduce<width, T>(c, equal, 0, w, sum)));
                } else {
                    const Agreement<A, width, false> agreement{V, nullptr, nullptr, leaky};
                    CAPSOPS_TRY((reduce<width, T>(c, agreement, 2, w, sum)));
                }
                CAPSOPS_TRY(launch(finish_iteration<A>, blocks_for(rows), most_threads, 0, c.place, sum,
                                   static_cast<const A*>(bias), static_cast<A*>(v), V, rows, c.J, c.D, t == 0));
            }
            return Status::ok;
        });
    });
}

}  // namespace capsops::cuda
