// The votes û_bi = u_bi W_i as a tensor. For inspection only: the routings avoid this memory, [B, N, J, D]. The forward
// kernel has a thread for each component of a vote.

#include "../engine/stream.cuh"

namespace capsops::cuda {
namespace {

// The gradient of the votes that the caller gave.
template <class T, int width> struct StoredGradient {
    static constexpr int items = some_items<Accumulation<T>>;
    static constexpr int resident = 3;
    template <int> struct Registers {};
    using A = Accumulation<T>;
    const T* g_votes;  // [B, N, J, D]

    template <class Tiling> void cut(const Tiling&, int, Workspace&) {}
    __device__ void begin_block() const {}
    __device__ void end_block(A*) const {}
    template <int n> __device__ void start(const ThreadPosition<A, width, n>&, Registers<n>&) const {}
    template <int items>
    __device__ void gradient(const ThreadPosition<A, width, items>& at, const Registers<items>&,
                             const A (&)[items][width], A (&g)[items][width]) const {
#pragma unroll
        for (int m = 0; m < items; ++m) {
            const int64_t vote = ((at.b(m) * at.N + at.i) * at.J + at.j) * at.D;
            load_numbers(g_votes + vote + at.part * width, at.present(m) ? at.count : 0, false, g[m]);
        }
    }

    static constexpr bool needs_votes = false;
    static int64_t staged_numbers(int64_t, int64_t) { return 0; }
    Status stage_gradient(const StagedVotes<A>& t, A*, A* g, A*, int64_t, const ExecutionContext& context) const {
        return launch_over(t.pairs() * t.J * t.D, stage_rows<A, T>, context, t, g_votes, t.J * t.D, t.J * t.D, g);
    }
};

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
        const Workspace w(c.context);
        return launch_over(c.B * c.N * c.J * c.D, write_votes<T>, c.context, c, static_cast<T*>(votes));
    });
}

Status affine_votes_backward(const Capsules& c, const void* g_votes, void* g_u, void* g_weight) {
    return for_storage_and_width(c, [&]<class T, int width>() {
        Workspace w(c.context);
        StoredGradient<T, width> policy{static_cast<const T*>(g_votes)};
        return emit<width, T>(c, policy, 0, {g_u, g_weight}, 0, w, false, [](auto*, int64_t) { return Status::ok; });
    });
}

}  // namespace capsops::cuda
