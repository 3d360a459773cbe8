// û_bi = u_bi W_i, written out: for inspection only, since [B, N, J, D] is what the routings avoid. Forward a thread
// for each component of a vote.

#include "couplings.cuh"
#include "operators.h"

namespace capsops::cuda {
namespace {

template <class T> __global__ void write_votes(Capsules c, T* votes) {
    using A = Accumulation<T>;
    const int64_t JD = c.J * c.D;
    for (int64_t x = first_index(); x < c.B * c.N * JD; x += index_stride()) {
        const int64_t pair = x / JD, jd = x % JD;
        const T* u = static_cast<const T*>(c.u) + pair * c.K;
        const T* w = static_cast<const T*>(c.weight) + pair % c.N * c.weight_stride + jd;
        A sum = 0;
        for (int64_t k = 0; k < c.K; ++k) sum += static_cast<A>(u[k]) * static_cast<A>(w[k * JD]);
        votes[x] = static_cast<T>(sum);
    }
}

}  // namespace

Status affine_votes(const Capsules& c, void* votes) {
    if (c.rows != 1) return Status::unsupported;
    return for_storage(c.dtype, [&]<class T>() {
        const Workspace w(c.place);
        return launch(write_votes<T>, blocks_for(c.B * c.N * c.J * c.D), most_threads, 0, c.place, c,
                      static_cast<T*>(votes));
    });
}

Status affine_votes_backward(const Capsules& c, const void* g_votes, const CapsuleGradients& gradients) {
    return for_storage(c.dtype, [&]<class T>() {
        return for_width<T>(c.D, [&]<int width>() {
            Workspace w(c.place);
            const StoredGradient<T, width> policy{static_cast<const T*>(g_votes)};
            return emit<width, T>(c, policy, 0, gradients, 0, w, false, [](auto*, int64_t) { return Status::ok; });
        });
    });
}

}  // namespace capsops::cuda
