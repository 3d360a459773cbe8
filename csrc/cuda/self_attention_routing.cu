// Self-attention routing (Mazzia et al. 2021, Efficient-CapsNet, eq. 5 to 7), in two passes over u and W each way; the
// steps are those of csrc/cpu/self_attention_routing.cpp.

#include "couplings.cuh"
#include "operators.h"

namespace capsops::cuda {

Status self_attention_routing(const Capsules& c, const void* prior, double scale, void* v, void* total, void* s) {
    return for_storage(c.dtype, [&]<class T>() {
        return for_width<T>(c.D, [&]<int width>() {
            using A = Accumulation<T>;
            const int64_t rows = c.B * c.J, size = rows * c.D;
            Workspace w(c.place);
            A* scaled = w.take<A>(size);
            CAPSOPS_TRY((reduce<width, T>(c, Equal<A, width>{A(1)}, 0, w, static_cast<A*>(total))));
            CAPSOPS_TRY(launch(multiply<A>, blocks_for(size), most_threads, 0, c.place, static_cast<const A*>(total),
                               static_cast<A>(scale), scaled, size));
            const Agreement<A, width, false> policy{scaled, nullptr, static_cast<const A*>(prior), false};
            CAPSOPS_TRY((reduce<width, T>(c, policy, 2, w, static_cast<A*>(s))));
            return launch(squash_rows<A>, blocks_for(rows), most_threads, 0, c.place, static_cast<const A*>(s),
                          static_cast<A*>(v), rows, c.D, SquashKind::efficient);
        });
    });
}

}  // namespace capsops::cuda
