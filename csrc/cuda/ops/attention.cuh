// The policies of attention routing: a coupling for each component of a vote.
#pragma once

#include "../../math/softmax.h"
#include "input_weights.cuh"
#include "staged_agreement.cuh"

namespace capsops::cuda {

// In place: z becomes c = softmax_j(z) or, with g_s, the gradient c g_s; then dz is written too. A block takes
// `columns` neighbouring components of a pair, with max_threads / columns lanes for each.
template <class A>
__global__ void couple_components(StagedVotes<A> t, A* z, const A* g_s /* [B, J, D], or null */, A* dz, int columns) {
    const int lanes = static_cast<int>(blockDim.x) / columns, column = static_cast<int>(threadIdx.x) % columns;
    const int64_t groups = ceil_div(t.D, columns), lane = static_cast<int>(threadIdx.x) / columns;
    for (int64_t block = blockIdx.x; block < t.pairs() * groups; block += gridDim.x) {
        const int64_t pair = block / groups, d = block % groups * columns + column, own = pair * t.J * t.D + d;
        const int64_t end = d < t.D ? t.J : 0;
        A* const c = z + own;
        A largest = -INFINITY, sum = 0, mean = 0;
        for (int64_t j = lane; j < end; j += lanes) largest = max(c[j * t.D], largest);
        largest = over_lanes(largest, lanes, [](A a, A b) { return max(a, b); }, columns);
        for (int64_t j = lane; j < end; j += lanes) {
            const A power = exponential(c[j * t.D] - largest);
            c[j * t.D] = power;
            sum += power;
        }
        const A inverse = reciprocal(sum_over_lanes(sum, lanes, columns));
        if (!g_s) {
            for (int64_t j = lane; j < end; j += lanes) c[j * t.D] *= inverse;
            continue;
        }
        A* const e = dz + own;
        const A *const v = t.votes + own, *const g = g_s + pair / t.count * t.J * t.D + d;
        const bool present = t.present(pair);
        for (int64_t j = lane; j < end; j += lanes)
            mean += present ? c[j * t.D] * inverse * g[j * t.D] * v[j * t.D] : A(0);
        mean = sum_over_lanes(mean, lanes, columns);
        for (int64_t j = lane; j < end; j += lanes) {
            const A coupled = present ? c[j * t.D] * inverse : A(0), g_c = g[j * t.D] * v[j * t.D];
            e[j * t.D] = present ? coupled * (g_c - mean) : A(0);
            c[j * t.D] = present ? coupled * g[j * t.D] : A(0);
        }
    }
}

// out [pairs, J, D] = weight û, or out += weightᵀ û if transposed: the 1×1 convolution over the output capsules.
template <class A> Product mix_capsules(const StagedVotes<A>& t, const A* weight, bool transposed, const A* x, A* out) {
    const Axis components{1, t.D, t.J * t.D};
    return {.left = {weight, {transposed ? 1 : t.J}, {transposed ? t.J : 1}},
            .right = {x, components, {t.D}},
            .out = out,
            .right_type = dtype_of<A>,
            .out_type = dtype_of<A>,
            .row = {t.D},
            .column = components,
            .rows = t.J,
            .columns = t.pairs() * t.D,
            .depth = t.J,
            .add = transposed};
}

// out, in pieces of [J, columns]: Σ over pairs and components of dz_k û_j, or of dz_k if votes is null.
template <class A>
Product mixing_gradient(const StagedVotes<A>& t, const A* dz, const A* votes, A* out, int64_t pieces, int64_t piece) {
    const Axis components{1, t.D, t.J * t.D};
    const int64_t columns = votes ? t.J : 1;
    return {.left = {dz, {t.D}, components},
            .right = {votes, {t.D}, components},
            .out = out,
            .right_type = dtype_of<A>,
            .out_type = dtype_of<A>,
            .row = {columns},
            .column = {1},
            .piece = piece,
            .rows = t.J,
            .columns = columns,
            .depth = t.pairs() * t.D,
            .pieces = pieces};
}

// Multiplies x and dz [pairs, J, D], the gradients c g_s and dz, by the weights of the input capsules; before that,
// g_input_weight, if it is not null, is Σ_jd x û. A row for each pair.
template <class A>
__global__ void weigh_components(StagedVotes<A> t, const A* input_weight, A* x, A* dz, A* g_input_weight, int lanes) {
    const int64_t size = t.J * t.D, lane = threadIdx.x % lanes;
    for (int64_t first = blockIdx.x * blockDim.x / lanes; first < t.pairs(); first += index_stride() / lanes) {
        const int64_t pair = first + threadIdx.x / lanes, end = pair < t.pairs() ? size : 0;
        const int64_t own = end > 0 ? t.of_all(pair) : 0;
        const A w = end > 0 && t.present(pair) ? input_weight[own] : A(0);
        A sum = 0;
        for (int64_t n = pair * size + lane; n < pair * size + end; n += lanes) {
            if (g_input_weight) sum += x[n] * t.votes[n];
            x[n] *= w, dz[n] *= w;
        }
        if (!g_input_weight) continue;
        sum = sum_over_lanes(sum, lanes);
        if (end > 0 && lane == 0) g_input_weight[own] = sum;
    }
}

// The attention of two output capsules in the loops of warp.cuh.
template <class A> struct WarpAttention {
    // (z_1 − z_0) log2(e) = first û_0 + second û_1 + constant. 2^x is cheaper than e^x.
    template <int items> struct Registers {
        A first, second, constant;
    };
    static constexpr int resident(int) { return 6; }
    static constexpr A log2_e = A(1.4426950408889634);
    const A* weight;  // [2, 2]
    const A* bias;    // [2], or null

    template <class At> __device__ void start(const At&, Registers<At::items>& own) const {
        own.first = (weight[2] - weight[0]) * log2_e;
        own.second = (weight[3] - weight[1]) * log2_e;
        own.constant = bias ? (bias[1] - bias[0]) * log2_e : A(0);
    }
    template <class At>
    __device__ void couple(const At&, const Registers<At::items>& own, const A (&v)[At::items][2],
                           A (&c)[At::items][2]) const {
#pragma unroll
        for (int m = 0; m < At::items; ++m) {
            c[m][0] = reciprocal(A(1) + exponential_2(own.constant + own.first * v[m][0] + own.second * v[m][1]));
            c[m][1] = A(1) - c[m][0];
        }
    }
};

template <class A> struct WarpAttentionGradient {
    template <int items> struct Registers {
        typename WarpAttention<A>::template Registers<items> attention;
        A first, second;  // A_10 − A_00 and A_11 − A_01
        A g_s[items][2];
        A params[3];  // the lane's g_A,00, g_A,01 and g_a,0; those of output capsule 1 are their negatives
    };
    static constexpr int resident(int items) { return items == 4 ? 6 : 4; }
    WarpAttention<A> attention;
    const A* g_s;  // [B, J, D]
    bool wants_params;

    template <class At> __device__ void start(const At& at, Registers<At::items>& own) const {
        attention.start(at, own.attention);
        own.first = attention.weight[2] - attention.weight[0];
        own.second = attention.weight[3] - attention.weight[1];
        load_state(at, g_s, own.g_s);
        own.params[0] = own.params[1] = own.params[2] = A(0);
    }
    template <class At>
    __device__ void gradient(const At& at, Registers<At::items>& own, const A (&v)[At::items][2],
                             A (&g)[At::items][2]) const {
        attention.couple(at, own.attention, v, g);
#pragma unroll
        for (int m = 0; m < At::items; ++m) {
            // dz_0 = −dz_1 = c_0 c_1 (q_0 − q_1).
            const A dz = g[m][0] * g[m][1] * (own.g_s[m][0] * v[m][0] - own.g_s[m][1] * v[m][1]);
            g[m][0] = g[m][0] * own.g_s[m][0] - own.first * dz;
            g[m][1] = g[m][1] * own.g_s[m][1] - own.second * dz;
            own.params[0] += dz * v[m][0];
            own.params[1] += dz * v[m][1];
            own.params[2] += dz;
        }
    }
    // params [J·J + J]: g_A and g_a.
    template <class At> __device__ void end_warp(const At& at, Registers<At::items>& own, A* params) const {
#pragma unroll
        for (int m = 0; m < 3; ++m)
            for (int step = 1; step < warp_size; step *= 2) own.params[m] += __shfl_xor_sync(~0u, own.params[m], step);
        if (!wants_params || at.lane > 0) return;
        params[0] = own.params[0], params[1] = own.params[1], params[4] = own.params[2];
        params[2] = -own.params[0], params[3] = -own.params[1], params[5] = -own.params[2];
    }
};

// z_k = Σ_j A_kj û_j + a_k and c = softmax_k(z), for each component by itself (CardioCaps, eq. 4). In shared memory,
// for one batch item after another: the votes [width], then z or other numbers that the threads of a row exchange
// [width].
template <class A, int width> struct Attention {
    static constexpr int items = 1;  // here the limit is what the threads exchange, not W
    static constexpr int resident = 3;
    static constexpr int64_t most_capsules = 128;  // of more, the threads' J² steps are slower than matrix products
    // For two output capsules j and k: z_k − z_j = own û_j + other û_k + constant determines the softmax.
    template <int items> struct Registers {
        A own, other, constant;
    };
    const A* weight;  // [J, J]
    const A* bias;    // [J], or null

    WarpAttention<A> in_warps() const { return {weight, bias}; }

    template <int items> __device__ void start(const ThreadPosition<A, width, items>& at, Registers<items>& own) const {
        if (at.J != 2) return;
        const int j = at.j, k = 1 - j;
        own.own = weight[k * 2 + j] - weight[j * 2 + j];
        own.other = weight[k * 2 + k] - weight[j * 2 + k];
        own.constant = bias ? bias[k] - bias[j] : A(0);
    }
    template <int items>
    __device__ void couple(const ThreadPosition<A, width, items>& at, const Registers<items>& own,
                           const A (&v)[items][width], A (&c)[items][width]) const {
#pragma unroll
        for (int m = 0; m < items; ++m) couple_item(at, own, v[m], c[m]);
    }
    template <int items>
    __device__ void couple_item(const ThreadPosition<A, width, items>& at, const Registers<items>& own,
                                const A (&v)[width], A (&c)[width]) const {
        at.publish(0, v);
        if (at.J == 2) {
#pragma unroll
            for (int d = 0; d < width; ++d)
                c[d] = reciprocal(A(1) + exponential(own.own * v[d] + own.other * at.of(d, 1 - at.j) + own.constant));
            return;
        }
        const A a = bias ? bias[at.j] : A(0);
#pragma unroll
        for (int d = 0; d < width; ++d) c[d] = a;
#pragma unroll 1
        for (int k = 0; k < at.J; ++k) {
            const A a = weight[at.j * at.J + k];
#pragma unroll
            for (int d = 0; d < width; ++d) c[d] += a * at.of(d, k);
        }
        A x[width];
#pragma unroll
        for (int d = 0; d < width; ++d) x[d] = c[d];
        join_capsules(at, width, x, Max{});
#pragma unroll
        for (int d = 0; d < width; ++d) x[d] = c[d] = exponential(c[d] - x[d]);
        join_capsules(at, width, x, Add{});
#pragma unroll
        for (int d = 0; d < width; ++d) c[d] *= reciprocal(x[d]);
    }

    static int64_t staged_numbers(int64_t J, int64_t D) { return J * D; }
    Status stage_couplings(const StagedVotes<A>& t, A* scratch, Couplings<A>& c,
                           const ExecutionContext& context) const {
        c.c = scratch, c.elementwise = true;
        return stage(t, scratch, nullptr, nullptr, context);
    }
    // Computes the couplings c; or, with g_s, the gradients c g_s of the weighted votes, and dz.
    Status stage(const StagedVotes<A>& t, A* c, const A* g_s, A* dz, const ExecutionContext& context) const {
        Product z = mix_capsules<A>(t, weight, false, t.votes, c);
        z.bias = bias;
        CAPSOPS_TRY(multiply_matrices(z, context));
        const int columns = static_cast<int>(at_most(power_of_two(t.D), warp_size));
        const int64_t blocks = at_least(at_most(t.pairs() * ceil_div(t.D, columns), max_blocks), 1);
        return launch(couple_components<A>, dim3{static_cast<unsigned>(blocks)}, max_threads,
                      max_threads * static_cast<int64_t>(sizeof(A)), context, t, c, g_s, dz, columns);
    }
};

// dz_k = c_k (q_k − Σ_j c_j q_j) with q = g_s û;   g_û,j = c_j g_s,j + Σ_k A_kj dz_k
// g_A,kj = Σ dz_k û_j;   g_a,k = Σ dz_k
// In shared memory, behind the numbers of Attention: this thread's g_A and g_a [J + 1].
// If weighed, g_û and dz are multiplied by the weight of the input capsule, whose gradient is Σ_jd c_j q_j; then it has
// the general loops alone.
template <class A, int width, bool weighed = false> struct AttentionGradient {
    static constexpr int items = 1;  // more would take too many registers
    static constexpr int resident = 3;
    static constexpr int64_t most_capsules = Attention<A, width>::most_capsules;
    template <int items> struct Registers {
        typename Attention<A, width>::template Registers<items> attention;
        A g_s[items][width], other[items][width];  // other: g_s of the other one of two output capsules
    };
    Attention<A, width> attention;
    const A* g_s;  // [B, J, D]
    bool wants_params;
    int J, params_at;                 // params_at: the first number of g_A and g_a in shared memory
    const A* input_weight = nullptr;  // [B, N], if weighed
    A* g_input_weight = nullptr;      // [B, N], or null
    ThreadRows rows{1};
    int row_count = 0, parts = 0;

    WarpAttentionGradient<A> in_warps() const
        requires(!weighed)
    {
        return {attention.in_warps(), g_s, wants_params};
    }

    template <class Tiling> void cut(const Tiling& tiling, int count, Workspace&) {
        rows = tiling.rows, row_count = count, parts = tiling.parts;
    }
    __device__ A& param(int m, int slot) const {
        return reinterpret_cast<A*>(shared_memory())[(params_at + m) * (static_cast<int>(blockDim.x) + 1) + slot];
    }
    __device__ void begin_block() const {
        for (int m = 0; wants_params && m <= J; ++m) param(m, static_cast<int>(threadIdx.x)) = 0;
        __syncthreads();
    }
    template <int items> __device__ void start(const ThreadPosition<A, width, items>& at, Registers<items>& own) const {
        attention.start(at, own.attention);
#pragma unroll
        for (int m = 0; m < items; ++m) {
            load(g_s, at, m, own.g_s[m]);
            if (at.J == 2) load(g_s + (at.j == 0 ? at.D : -at.D), at, m, own.other[m]);
        }
    }
    template <int items>
    __device__ void gradient(const ThreadPosition<A, width, items>& at, const Registers<items>& own,
                             const A (&v)[items][width], A (&g)[items][width]) const {
#pragma unroll
        for (int m = 0; m < items; ++m) gradient_of_item(at, own.attention, m, own.g_s[m], own.other[m], v[m], g[m]);
    }
    // means: Σ_j c_j q_j of the thread's components.
    template <int items>
    __device__ void write_weight_gradient(const ThreadPosition<A, width, items>& at, int m,
                                          const A (&means)[width]) const {
        if (!g_input_weight) return;
        A sum[1] = {A(0)};
#pragma unroll
        for (int d = 0; d < width; ++d) sum[0] += means[d];
        join_parts(at, width, sum, Add{});
        cuda::write_weight_gradient(at, m, sum[0], g_input_weight);
    }
    template <int items>
    __device__ void gradient_of_item(const ThreadPosition<A, width, items>& at,
                                     const typename Attention<A, width>::template Registers<items>& own, int m,
                                     const A (&own_g_s)[width], const A (&other_g_s)[width], const A (&v)[width],
                                     A (&g)[width]) const {
        const bool present = at.present(m);
        A w = A(1);
        if constexpr (weighed) w = weight_of(at, m, input_weight);
        A c[width], dz[width], mean[width];
        attention.couple_item(at, own, v, c);
        if (at.J == 2) {
            // dz_j = −dz_k = c_j c_k (q_j − q_k).
            A own_product = 0, other_product = 0, sum = 0;
#pragma unroll
            for (int d = 0; d < width; ++d) {
                const A other = at.of(d, 1 - at.j);
                const A difference = own_g_s[d] * v[d] - other_g_s[d] * other;
                dz[d] = present ? c[d] * (A(1) - c[d]) * difference : A(0);
                g[d] = present ? c[d] * own_g_s[d] : A(0);
                if constexpr (weighed) {
                    mean[d] = other_g_s[d] * other + c[d] * difference;
                    dz[d] *= w, g[d] *= w;
                }
                if (present) g[d] -= own.own * dz[d];
                own_product += dz[d] * v[d];
                other_product += dz[d] * other;
                sum += dz[d];
            }
            if constexpr (weighed) write_weight_gradient(at, m, mean);
            if (wants_params && present) {
                param(at.j, at.slot) += own_product;
                param(1 - at.j, at.slot) += other_product;
                param(2, at.slot) += sum;
            }
            return;
        }
#pragma unroll
        for (int d = 0; d < width; ++d) {
            if (!present) c[d] = A(0);
            g[d] = c[d] * own_g_s[d];
            dz[d] = g[d] * v[d];
        }
#pragma unroll
        for (int d = 0; d < width; ++d) mean[d] = dz[d];
        join_capsules(at, width, mean, Add{});
#pragma unroll
        for (int d = 0; d < width; ++d) dz[d] -= c[d] * mean[d];
        if constexpr (weighed) {
            write_weight_gradient(at, m, mean);
#pragma unroll
            for (int d = 0; d < width; ++d) dz[d] *= w, g[d] *= w;
        }
        at.publish(width, dz);
        if (!present) return;
#pragma unroll 1
        for (int k = 0; k < at.J; ++k) {
            const A a = attention.weight[k * at.J + at.j];
            A product = 0;
#pragma unroll
            for (int d = 0; d < width; ++d) {
                g[d] += a * at.of(width + d, k);
                product += dz[d] * at.of(d, k);
            }
            if (wants_params) param(k, at.slot) += product;
        }
        A sum = 0;
#pragma unroll
        for (int d = 0; d < width; ++d) sum += dz[d];
        if (wants_params) param(J, at.slot) += sum;
    }
    // params [J·J + J]: g_A and g_a.
    __device__ void end_block(A* params) const {
        if (!wants_params) return;
        __syncthreads();
        for (int x = static_cast<int>(threadIdx.x); x < J * (J + 1); x += static_cast<int>(blockDim.x)) {
            const int k = x / (J + 1), m = x % (J + 1);
            A sum = 0;
            for (int row = 0; row < row_count; ++row)
                for (int part = 0; part < parts; ++part) sum += param(m, row * rows.size + k * parts + part);
            params[m < J ? k * J + m : J * J + k] = sum;
        }
    }

    static constexpr bool needs_votes = true;
    static int64_t staged_numbers(int64_t J, int64_t D) { return J * D; }
    Status stage_gradient(const StagedVotes<A>& t, A* dz, A* g, A* params, int64_t pieces,
                          const ExecutionContext& context) const {
        CAPSOPS_TRY(attention.stage(t, g, g_s, dz, context));
        if constexpr (weighed)
            CAPSOPS_TRY(launch_rows<A>(weigh_components<A>, t.pairs(), J * t.D, context, t, input_weight, g, dz,
                                       g_input_weight));
        CAPSOPS_TRY(multiply_matrices(mix_capsules<A>(t, attention.weight, true, dz, g), context));
        if (!wants_params) return Status::ok;
        CAPSOPS_TRY(multiply_matrices(mixing_gradient<A>(t, dz, t.votes, params, pieces, J * J + J), context));
        return multiply_matrices(mixing_gradient<A>(t, dz, nullptr, params + J * J, pieces, J * J + J), context);
    }
};

}  // namespace capsops::cuda
