// û_bi = u_bi W_i, written out: for inspection only, since [B, N, J, D] is what the routings avoid.

#include "stream.h"

namespace capsops::cpu {
namespace {

// The gradient of the votes, as stored by the caller.
template <class T, class A> struct StoredVoteGradient {
    const T* g_votes;  // [B, N, J, D]
    int64_t N, JD;

    int64_t param_count() const { return 0; }
    int64_t scratch_size() const { return 0; }
    void emit(int64_t b, int64_t i, A* out) const {
        const T* g = g_votes + (b * N + i) * JD;
        for (int64_t jd = 0; jd < JD; ++jd) out[jd] = static_cast<A>(g[jd]);
    }
};

}  // namespace

Status affine_votes(const Capsules& c, void* votes) {
    return for_dtype(c.dtype, [&]<class T>() {
        using A = accumulation_t<T>;
        const int64_t JD = c.J * c.D, KJD = c.K * JD;
        Buffer<A> scratch((KJD + JD) * c.threads);
#pragma omp parallel for schedule(static) num_threads(c.threads)
        for (int64_t i = 0; i < c.N; ++i) {
            A* weight_scratch = scratch.get() + omp_get_thread_num() * (KJD + JD);
            A* row = weight_scratch + KJD;
            const A* weight = load_weight<T>(c, i, weight_scratch);
            for (int64_t b = 0; b < c.B; ++b) {
                const int64_t item = b * c.N + i;
                make_votes(static_cast<const T*>(c.u) + item * c.K, weight, c.K, JD, row);
                T* out = static_cast<T*>(votes) + item * JD;
                for (int64_t jd = 0; jd < JD; ++jd) out[jd] = T(row[jd]);
            }
        }
    });
}

Status affine_votes_backward(const Capsules& c, const void* g_votes, const CapsuleGradients& gradients) {
    return for_dtype(c.dtype, [&]<class T>() {
        using A = accumulation_t<T>;
        const StoredVoteGradient<T, A> policy{static_cast<const T*>(g_votes), c.N, c.J * c.D};
        emit<T>(c, policy, gradients, static_cast<A*>(nullptr));
    });
}

}  // namespace capsops::cpu
