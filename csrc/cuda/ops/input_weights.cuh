// Weights w_i of the input capsules, by which the couplings of a policy are multiplied: s_j = Σ_i w_i c_ij û_ij.
#pragma once

#include "../engine/stream.cuh"

namespace capsops::cuda {

// The weight of batch item m of a thread, or 0 where the pair is absent, whatever its weight is.
template <class A, int width, int items>
__device__ inline A weight_of(const ThreadPosition<A, width, items>& at, int m, const A* input_weight /* [B, N] */) {
    return at.present(m) ? input_weight[at.b(m) * at.N + at.i] : A(0);
}

// Writes the gradient of the weight of batch item m, which the threads of a row have in common.
template <class A, int width, int items>
__device__ inline void write_weight_gradient(const ThreadPosition<A, width, items>& at, int m, A gradient,
                                             A* g_input_weight /* [B, N] */) {
    if (at.j == 0 && at.part == 0 && at.in_run(m))
        g_input_weight[at.b(m) * at.N + at.i] = at.present(m) ? gradient : A(0);
}

// After the kernels of a gradient; blocks: how many there were. Without votes, no kernel has written g_input_weight.
template <class A> Status finish_weight_gradient(const Capsules& c, int64_t blocks, A* g_input_weight) {
    if (!g_input_weight || blocks > 0) return Status::ok;
    return launch_over(c.B * c.N, write_zeros<A>, c.context, g_input_weight, c.B * c.N);
}

// to = w (c + prior): `size` numbers for each pair, J or J·D of them. to may be c.c.
template <class A>
__global__ void weigh_couplings(StagedVotes<A> t, Couplings<A> c, const A* input_weight, int64_t size, A* to) {
    for (int64_t x = first_index(); x < t.pairs() * size; x += index_stride()) {
        const int64_t pair = x / size;
        const A w = t.present(pair) ? input_weight[t.of_all(pair)] : A(0);
        to[x] = w * (c.elementwise ? c.c[x] : c.of(t, pair, x % size));
    }
}

// A reducing policy whose couplings are multiplied by the weights. It has the general loops alone.
template <class A, class Policy> struct Weighed : Policy {
    const A* input_weight;  // [B, N]

    void in_warps() const = delete;
    void reduce_wide() const = delete;

    template <int width, int items>
    __device__ void couple(const ThreadPosition<A, width, items>& at,
                           const typename Policy::template Registers<items>& own, const A (&v)[items][width],
                           A (&c)[items][width]) const {
        Policy::couple(at, own, v, c);
#pragma unroll
        for (int m = 0; m < items; ++m) {
            const A w = weight_of(at, m, input_weight);
#pragma unroll
            for (int d = 0; d < width; ++d) c[m][d] *= w;
        }
    }

    Status stage_couplings(const StagedVotes<A>& t, A* scratch, Couplings<A>& c,
                           const ExecutionContext& context) const {
        CAPSOPS_TRY(Policy::stage_couplings(t, scratch, c, context));
        const int64_t size = c.elementwise ? t.J * t.D : t.J;
        CAPSOPS_TRY(launch_over(t.pairs() * size, weigh_couplings<A>, context, t, c, input_weight, size, scratch));
        c.c = scratch, c.prior = nullptr;
        return Status::ok;
    }
};

}  // namespace capsops::cuda
