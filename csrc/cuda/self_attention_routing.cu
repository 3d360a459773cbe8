// Self-attention routing (Mazzia et al. 2021, Efficient-CapsNet, eq. 5 to 7), in two passes over u and W each way; the
// steps are those of csrc/cpu/self_attention_routing.cpp.

#include "agreement.h"
#include "operators.h"
#include "rows.cuh"

namespace capsops::cuda {

Status self_attention_routing(const Capsules& c, const void* prior, double scale, void* v, void* total, void* s) {
    return for_accumulation(c.dtype, [&]<class A>() {
        const int64_t rows = c.B * c.J, size = rows * c.D;
        Workspace w(c.place);
        A* scaled = w.take<A>(size);
        CAPSOPS_TRY(sum_votes(c, 1, w, total));
        CAPSOPS_TRY(launch(multiply<A>, blocks_for(size), most_threads, 0, c.place, static_cast<const A*>(total),
                           static_cast<A>(scale), scaled, size));
        CAPSOPS_TRY(sum_agreeing(c, scaled, prior, false, w, s));
        return launch(squash_rows<A>, blocks_for(rows), most_threads, 0, c.place, static_cast<const A*>(s),
                      static_cast<A*>(v), rows, c.D, SquashKind::efficient);
    });
}

}  // namespace capsops::cuda
