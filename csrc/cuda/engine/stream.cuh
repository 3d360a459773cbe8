// The loops over the input capsules on a GPU, as csrc/cpu/engine/stream.h has them on a CPU.
//
//   reduce   out[b] = Σ_i policy(û_bi)
//   emit     g_u,bi = g_û,bi W_iᵀ;  g_W,i = Σ_b u_biᵀ g_û,bi
//
// Votes that are given are read as they are, and g_û is written.
//
// A thread has `items` batch items, one output capsule and `width` components of its votes in registers; a longer vote
// is split into parts, one for each of several threads. The threads of the same batch items form a row; those of one
// tile of the batch form a team. A block consists of several teams, each with its own input capsule, and strides
// through a run of capsules. Each number of W that a thread reads serves all its batch items.
//
// u and W of a step are copied to shared memory while the block computes the step before (inputs.cuh). If they do not
// fit there, threads read them from GPU memory.
//
// grid: runs of capsules × tiles of the batch. In emit a block sums g_W over tiles, so it takes several, a split of the
// batch; more than one split only where there would be too few blocks. Every block has its own partial sums, which are
// added in the order of the blocks, in double: no atomics, and bitwise the same results in every run.
//
// What distinguishes the routings is in policies: ReducingPolicy and EmittingPolicy below. All threads of a block call
// the functions of a policy together, because they exchange numbers through shared memory. If the votes of one batch
// item do not fit into a block, reduce and emit use the policy's own passes, if it has any, or the loops of staged.cuh.
#pragma once

#include "../../math/softmax.h"
#include "gradients.cuh"
#include "inputs.cuh"
#include "staged.cuh"
#include "tensor_cores.cuh"

namespace capsops::cuda {

// v = u W for the thread's batch items. Input: CopiedInputs or InputsInMemory.
template <class Input, class A, int width, int items>
__device__ __forceinline__ void multiply_vectors(const Input& input, int K, A (&v)[items][width]) {
#pragma unroll 1
    for (int k = 0; k < K; k += InputLayout::k_step) {
        A a[items][4];
#pragma unroll
        for (int m = 0; m < items; ++m) input.vector(m, k, a[m]);
#pragma unroll
        for (int x = 0; x < 4; ++x) {
            A row[width];
            input.weight(k + x, row);
#pragma unroll
            for (int m = 0; m < items; ++m)
#pragma unroll
                for (int d = 0; d < width; ++d) v[m][d] += a[m][x] * row[d];
        }
    }
}

// Votes that are given.
template <class T, int width, int items>
__device__ __forceinline__ void load_votes(const Tiling<T, width, items>& tiling, const Inputs<T, width, items>& inputs,
                                           const ThreadPosition<Accumulation<T>, width, items>& at,
                                           Accumulation<T> (&v)[items][width]) {
    const int first = (tiling.one_vote ? 0 : at.j * static_cast<int>(tiling.D)) + at.part * width;
#pragma unroll
    for (int m = 0; m < items; ++m)
        if (inputs.copied())
            inputs.copies(at).vote(m, first, at.count, tiling.aligned, v[m]);
        else
            inputs.in_memory(at).vote(m, first, at.count, tiling.aligned, v[m]);
}

// The votes of the thread's batch items; 0 if the pair is absent, and beyond D.
template <class T, int width, int items>
__device__ __forceinline__ void make_votes(const Tiling<T, width, items>& tiling, const Inputs<T, width, items>& inputs,
                                           const ThreadPosition<Accumulation<T>, width, items>& at,
                                           Accumulation<T> (&v)[items][width]) {
#pragma unroll
    for (int m = 0; m < items; ++m)
#pragma unroll
        for (int d = 0; d < width; ++d) v[m][d] = 0;
    if (at.unmasked == 0) return;
    if (tiling.votes_given) return load_votes(tiling, inputs, at, v);
    const int K = static_cast<int>(tiling.K);
    if (inputs.copied())
        multiply_vectors(inputs.copies(at), K, v);
    else
        multiply_vectors(inputs.in_memory(at), K, v);
}

// Loads the thread's part of a state [B, J, D] for batch item m.
template <class A, int width, int items>
__device__ inline void load(const A* x, const ThreadPosition<A, width, items>& at, int m, A (&to)[width]) {
    load_numbers(x + at.state(m), at.present(m) ? at.count : 0, at.whole, to);
}

struct Add {
    template <class A> __device__ A operator()(A a, A b) const { return a + b; }
};
struct Max {
    template <class A> __device__ A operator()(A a, A b) const { return max(a, b); }
};

// Joins x over the parts of a vote. numbers: n numbers of shared memory begin there. Here and below, all threads of the
// block take part, and all threads of a row get bitwise the same result.
template <class A, int width, int items, int n, class Join>
__device__ inline void join_parts(const ThreadPosition<A, width, items>& at, int numbers, A (&x)[n], Join join) {
    if (at.parts == 1) return;
    if (at.aligned) {
        for (int step = 1; step < at.parts; step *= 2)
#pragma unroll
            for (int m = 0; m < n; ++m) x[m] = join(x[m], __shfl_xor_sync(~0u, x[m], step));
        return;
    }
    at.publish(numbers, x);
    const int first = at.slot - at.part;
#pragma unroll
    for (int m = 0; m < n; ++m) x[m] = at.shared(numbers + m, first);
    for (int part = 1; part < at.parts; ++part)
#pragma unroll
        for (int m = 0; m < n; ++m) x[m] = join(x[m], at.shared(numbers + m, first + part));
}

// Joins x over the output capsules: the threads of a row that have the same part of a vote.
template <class A, int width, int items, int n, class Join>
__device__ inline void join_capsules(const ThreadPosition<A, width, items>& at, int numbers, A (&x)[n], Join join) {
    if (at.aligned) {
        for (int step = at.parts; step < at.row_size; step *= 2)
#pragma unroll
            for (int m = 0; m < n; ++m) x[m] = join(x[m], __shfl_xor_sync(~0u, x[m], step));
        return;
    }
    const auto join_some = [&](int first, int step, int end) {
        at.publish(numbers, x);
#pragma unroll
        for (int m = 0; m < n; ++m) x[m] = at.of(numbers + m, first);
#pragma unroll(n < 8 ? 4 : 1)
        for (int k = first + step; k < end; k += step)
#pragma unroll
            for (int m = 0; m < n; ++m) x[m] = join(x[m], at.of(numbers + m, k));
    };
    // For many output capsules in two steps: over a group of about √J of them, then over the groups.
    constexpr int few = 16;
    const int J = at.J;
    int group = 1;
    if (J > few) {
        while (group * group < J) ++group;
        const int first = at.j / group * group;
        join_some(first, 1, static_cast<int>(at_most(first + group, J)));
    }
    join_some(0, group, J);
}

// ---- policies ------------------------------------------------------------------------------------------------

// A policy whose sums cannot be added up as they are (over_inputs.cuh): couple() changes the sum of a thread too,
// end_run() those of a block before the teams' sums are added, and finish_runs() those of all runs before these are
// added. A run takes P::scalars numbers more for each output capsule.
template <class P, class T, int width, class A = Accumulation<T>, int items = P::items>
concept RescalingPolicy =
    StagedRescalingPolicy<P, A> &&
    requires(P& policy, const P& on_device, const ThreadPosition<A, width, items>& at,
             typename P::template Registers<items>& own, A (&v)[items][width], A (&c)[items][width], int64_t runs,
             Workspace& w, A* partial, const ExecutionContext& context) {
        on_device.start(at, own);
        on_device.couple(at, own, v, c, c);
        on_device.end_run(at, own, int{}, c);
        policy.take_runs(runs, w);
        { policy.finish_runs(runs, runs, partial, context) } -> std::same_as<Status>;
    };

// What `reduce` needs. P::items is the number of batch items of a thread. start() loads what the thread keeps in
// registers for a tile of the batch; couple() computes the weights c of the components of the votes v.
template <class P, class T, int width, class A = Accumulation<T>, int items = P::items>
concept ReducingPolicy =
    RescalingPolicy<P, T, width> ||
    ((StagedReducingPolicy<P, A> || UniformPolicy<P, A>) &&
     requires(const P& policy, const ThreadPosition<A, width, items>& at, typename P::template Registers<items>& own,
              A (&v)[items][width], A (&c)[items][width]) {
         policy.start(at, own);
         policy.couple(at, own, v, c);
     });

// What `emit` needs. P::items is the number of batch items of a thread. The host calls cut() with the number of rows of
// votes in a block, and may take memory there. gradient() computes the gradient g of the votes v. end_block() writes
// the sums of the block to params [param_count].
template <class P, class T, int width, class A = Accumulation<T>, int items = P::items>
concept EmittingPolicy =
    StagedEmittingPolicy<P, A> &&
    requires(P& policy, const P& on_device, const ThreadPosition<A, width, items>& at,
             typename P::template Registers<items>& own, A (&v)[items][width], A (&g)[items][width], A* params,
             const Tiling<T, width, items>& tiling, Workspace& workspace) {
        policy.cut(tiling, int{}, workspace);
        on_device.begin_block();
        on_device.start(at, own);
        on_device.gradient(at, own, v, g);
        on_device.end_block(params);
    };

// ---- reduce ------------------------------------------------------------------------------------------------

template <int width, int items, class T, class Policy>
__global__ void __launch_bounds__(max_threads, 1)
    reduce_kernel(Tiling<T, width, items> tiling, Policy policy, Accumulation<T>* partial /* [runs, B, J, D] */) {
    using A = Accumulation<T>;
    Thread<T, width, items> thread(tiling);
    ThreadPosition<A, width, items>& at = thread.at;
    const int64_t begin = static_cast<int64_t>(blockIdx.x) * tiling.runs.length,
                  end = at_most(begin + tiling.runs.length, tiling.N);
    const int tile = static_cast<int>(blockIdx.y);
    thread.go_to_tile(tiling, tile);
    typename Policy::template Registers<items> own;
    policy.start(at, own);
    A sum[items][width] = {};
    Inputs<T, width, items> inputs(tiling);
    for (int64_t first = begin; first < end; first += tiling.teams) {
        inputs.begin_step(first, tile, first + tiling.teams, tile, end);
        thread.go_to(tiling, first, end);
        A v[items][width], c[items][width];
        make_votes(tiling, inputs, at, v);
        if constexpr (RescalingPolicy<Policy, T, width>)
            policy.couple(at, own, v, c, sum);
        else
            policy.couple(at, own, v, c);
#pragma unroll
        for (int m = 0; m < items; ++m)
#pragma unroll
            for (int d = 0; d < width; ++d) sum[m][d] += c[m][d] * v[m][d];
    }
    if constexpr (RescalingPolicy<Policy, T, width>) policy.end_run(at, own, tiling.teams, sum);
    // Sums over the teams.
    const int D = static_cast<int>(tiling.D), JD = at.J * D;
    const int existing =
        static_cast<int>(at_most(tiling.tile_items(), tiling.B - static_cast<int64_t>(tile) * tiling.tile_items()));
    A* const to = partial + (blockIdx.x * tiling.B + static_cast<int64_t>(tile) * tiling.tile_items()) * JD;
#pragma unroll
    for (int m = 0; m < items; ++m) {
        at.publish_to_block(0, sum[m]);
        for (int jd = static_cast<int>(threadIdx.x); jd < JD; jd += static_cast<int>(blockDim.x)) {
            const int d = jd % D, place = jd / D * tiling.parts + d / width;
            const int begin_item = m * tiling.team_rows,
                      end_item = static_cast<int>(at_most(begin_item + tiling.team_rows, existing));
            for (int item = begin_item; item < end_item; ++item) {
                A total = 0;
                for (int team = 0; team < tiling.teams; ++team)
                    total +=
                        at.shared(d % width, (team * tiling.team_rows + item - begin_item) * tiling.rows.size + place);
                to[static_cast<int64_t>(item) * JD + jd] = total;
            }
        }
    }
}

// ---- emit --------------------------------------------------------------------------------------------------

// Where a thread puts its contributions to g_u, K numbers for each of its batch items: behind the gradients of its
// votes in shared memory; or, if the rows divide a warp, the sum over the row goes to GPU memory.
template <class T, int width, int items> struct VectorGradient {
    using A = Accumulation<T>;
    const Tiling<T, width, items>& tiling;
    const ThreadPosition<A, width, items>& at;
    const GradientsOf<T>& to;

    __device__ __forceinline__ void write(int m, int k, A sum) const {
        to.write(to.u[(at.b(m) * tiling.N + at.i) * tiling.K + k], sum);
    }
    __device__ __forceinline__ void add(int m, int k, A own) const {
        if (!at.aligned) {
            if (!at.idle) at.shared(items * width + m * static_cast<int>(tiling.K) + k, at.slot) = own;
            return;
        }
        for (int step = at.row_size / 2; step > 0; step /= 2) own += __shfl_xor_sync(~0u, own, step);
        if (at.slot == at.row && at.in_run(m)) write(m, k, own);
    }
    __device__ __forceinline__ void finish() const {
        if (at.aligned) return;
        at.sync();
        const int K = static_cast<int>(tiling.K);
        for (int x = at.slot - at.row; x < items * K; x += at.row_size) {
            A sum = 0;
            for (int other = 0; other < at.row_size; ++other) sum += at.shared(items * width + x, at.row + other);
            if (at.in_run(x / K)) write(x / K, x % K, sum);
        }
    }
};

template <class Input, class T, int width, int items>
__device__ __forceinline__ void multiply_gradients(const Input& input, bool present,
                                                   const Accumulation<T> (&g)[items][width],
                                                   const VectorGradient<T, width, items>& to) {
    using A = Accumulation<T>;
    const int K = static_cast<int>(to.tiling.K);
#pragma unroll 1
    for (int k = 0; k < K; ++k) {
        A row[width] = {};
        if (present) input.weight(k, row);
#pragma unroll
        for (int m = 0; m < items; ++m) to.add(m, k, dot(row, g[m]));
    }
}

// g_u,bi = g_û,bi W_iᵀ. Every thread computes the products of its part of a vote; the threads of a row add them up.
template <class T, int width, int items>
__device__ __forceinline__ void emit_u(const Tiling<T, width, items>& tiling, const Inputs<T, width, items>& inputs,
                                       const ThreadPosition<Accumulation<T>, width, items>& at,
                                       const Accumulation<T> (&g)[items][width], const GradientsOf<T>& to) {
    const VectorGradient<T, width, items> gradient{tiling, at, to};
    if (inputs.copied())
        multiply_gradients(inputs.copies(at), at.unmasked != 0, g, gradient);
    else
        multiply_gradients(inputs.in_memory(at), at.unmasked != 0, g, gradient);
    gradient.finish();
}

// g_W,i = Σ_b u_biᵀ g_û,bi for a tile of the batch. A thread has column jd of one input capsule's matrix, `rows` of its
// K rows at a time. It keeps its column in every tile and, for a shared matrix, which is summed over the teams, in
// every step. complete: whether this is the last tile of the block.
template <class T, int width, int items>
__device__ inline void emit_weight(const Tiling<T, width, items>& tiling, const Inputs<T, width, items>& inputs,
                                   const ThreadPosition<Accumulation<T>, width, items>& at, int64_t first,
                                   int64_t begin, int64_t end, bool complete, const GradientsOf<T>& to) {
    using A = Accumulation<T>;
    constexpr int rows = 8;
    const bool shared = tiling.shared_weight();
    const unsigned JD = static_cast<unsigned>(tiling.J * tiling.D), D = static_cast<unsigned>(tiling.D);
    const int matrices = shared ? 1 : tiling.teams;
    const bool again = at.tile > at.first_tile || (shared && first > begin), several = tiling.splits > 1;
    const int64_t b0 = static_cast<int64_t>(at.tile) * tiling.tile_items(), KJD = tiling.K * JD;
    const int64_t block = static_cast<int64_t>(at.split) * gridDim.x + blockIdx.x;
    const int existing = static_cast<int>(at_most(tiling.tile_items(), tiling.B - b0));
    for (unsigned x = threadIdx.x; x < matrices * JD; x += blockDim.x) {
        const unsigned jd = x % JD, j = jd / D, d = jd % D;
        const int first_team = shared ? 0 : static_cast<int>(x / JD);
        const int end_team = static_cast<int>(at_most(shared ? tiling.teams : first_team + 1, end - first));
        const int place = static_cast<int>(j) * tiling.parts + static_cast<int>(d / width);
        if (!shared && first + first_team >= end) continue;
        A* const sums = !to.sums ? nullptr
                                 : to.sums + KJD * (shared    ? block
                                                    : several ? at.split * tiling.N + first + first_team
                                                              : block * matrices + first_team);
        for (int k = 0; k < tiling.K; k += rows) {
            A sum[rows];
#pragma unroll
            for (int m = 0; m < rows; ++m) sum[m] = A(0);
            for (int team = first_team; team < end_team; ++team)
#pragma unroll
                for (int m = 0; m < items; ++m) {
                    const int first_item = m * tiling.team_rows;
                    const A* g = &at.shared(m * width + static_cast<int>(d % width),
                                            team * tiling.team_rows * tiling.rows.size + place);
                    inputs.add_products(team, first_item,
                                        static_cast<int>(at_most(first_item + tiling.team_rows, existing)), b0,
                                        first + team, k, g, tiling.rows.size, sum);
                }
#pragma unroll
            for (int m = 0; m < rows; ++m) {
                if (k + m >= tiling.K) continue;
                const int64_t entry = (k + m) * static_cast<int64_t>(JD) + jd;
                A total = sum[m];
                if (sums) {
                    if (again) total += sums[entry];
                    sums[entry] = total;
                }
                if (!shared && !several && complete)
                    to.write(to.weight[(first + first_team) * tiling.weight_stride + entry], total);
            }
        }
    }
}

// The gradients of votes that are given, from the gradients of all threads' votes in shared memory. The threads of a
// row write neighbouring numbers. If all output capsules get the same vote, its gradient is the sum over them.
template <class T, int width, int items>
__device__ __forceinline__ void emit_votes(const Tiling<T, width, items>& tiling,
                                           const ThreadPosition<Accumulation<T>, width, items>& at,
                                           const GradientsOf<T>& to) {
    using A = Accumulation<T>;
    const unsigned K = static_cast<unsigned>(tiling.K), D = static_cast<unsigned>(tiling.D);
    const int copies = tiling.one_vote ? at.J : 1;
#pragma unroll 1
    for (int m = 0; m < items; ++m) {
        if (!at.in_run(m)) continue;
        T* const g_u = to.u + (at.b(m) * tiling.N + at.i) * tiling.K;
#pragma unroll 1
        for (unsigned x = static_cast<unsigned>(at.slot - at.row); x < K; x += static_cast<unsigned>(at.row_size)) {
            const unsigned j = x / D, d = x % D;
            const int number = m * width + static_cast<int>(d % width);
            const int place = at.row + static_cast<int>(j) * at.parts + static_cast<int>(d / width);
            A sum = 0;
            for (int k = 0; k < copies; ++k) sum += at.shared(number, place + k * at.parts);
            to.write(g_u[x], sum);
        }
    }
}

// A thread's numbers in shared memory, for each of its batch items: the gradient of its part of a vote [width], and
// behind these its contribution to g_u [K], unless the votes are given.
template <int width, int items, class T, class Policy>
__global__ void __launch_bounds__(max_threads, 1)
    emit_kernel(Tiling<T, width, items> tiling, Policy policy, GradientsOf<T> to,
                Accumulation<T>* params /* [splits, runs, param_count] */, int64_t param_count) {
    using A = Accumulation<T>;
    const int64_t begin = static_cast<int64_t>(blockIdx.x) * tiling.runs.length,
                  end = at_most(begin + tiling.runs.length, tiling.N);
    Thread<T, width, items> thread(tiling);
    ThreadPosition<A, width, items>& at = thread.at;
    at.split = static_cast<int>(blockIdx.y), at.first_tile = at.split * tiling.tiles_of_split;
    const int end_tile = at_most(at.first_tile + tiling.tiles_of_split, tiling.tiles);
    typename Policy::template Registers<items> own;
    policy.begin_block();
    Inputs<T, width, items> inputs(tiling);
    for (int64_t first = begin; first < end; first += tiling.teams) {
        for (int tile = at.first_tile; tile < end_tile; ++tile) {
            if (tiling.tiles_of_split > 1 || first == begin) {
                thread.go_to_tile(tiling, tile);
                policy.start(at, own);
            }
            const bool last = tile + 1 == end_tile;
            inputs.begin_step(first, tile, last ? first + tiling.teams : first, last ? at.first_tile : tile + 1, end);
            thread.go_to(tiling, first, end);
            A v[items][width], g[items][width];
            make_votes(tiling, inputs, at, v);
            policy.gradient(at, own, v, g);
            __syncthreads();
#pragma unroll
            for (int m = 0; m < items; ++m) at.write(m * width, g[m]);
            __syncthreads();
            if (to.u && tiling.votes_given) emit_votes(tiling, at, to);
            if (to.u && !tiling.votes_given) emit_u(tiling, inputs, at, g, to);
            if (to.weight) emit_weight(tiling, inputs, at, first, begin, end, last, to);
            __syncthreads();  // before numbers are published for which only a warp waits
        }
    }
    policy.end_block(params + (blockIdx.y * static_cast<int64_t>(gridDim.x) + blockIdx.x) * param_count);
}

// ---- the loops, as the operators call them -------------------------------------------------------------------

// Calls function.operator()<storage type, width>(). The width is small for double and for short votes of float32, to
// save registers.
template <class Function> inline Status for_storage_and_width(const Capsules& c, Function function) {
    return for_storage(c.dtype, [&]<class T>() {
        if constexpr (sizeof(T) == 8) return function.template operator()<T, 8>();
        if constexpr (sizeof(T) == 4)
            if (c.D <= 8) return function.template operator()<T, 8>();
        if constexpr (sizeof(T) < 8) return function.template operator()<T, 16>();
    });
}

// Whether the votes of one batch item go through registers; else the loops of staged.cuh run. A policy may say from how
// many output capsules on these are faster (most_capsules).
template <class Policy, class Tiling> bool fits(const Tiling& tiling, int64_t numbers) {
    if constexpr (requires { Policy::most_capsules; })
        if (tiling.J > Policy::most_capsules) return false;
    return tiling.fits(numbers);
}

// Whether a policy's own passes take a shape whose votes do not fit, if it has such passes: reduce_wide() and
// emit_wide(). They compute votes several times, so they are for few batch items.
inline bool takes_wide(const Capsules& c) {
    return c.weight_stride != 0 && c.B <= limits.wide_items;
}

// out [B, J, D] = Σ_i policy(û_bi). numbers: that each thread of the policy has in shared memory.
template <int width, class T, ReducingPolicy<T, width> Policy>
Status reduce(const Capsules& c, const Policy& policy, int64_t numbers, Workspace& whole, Accumulation<T>* out) {
    using A = Accumulation<T>;
    const int64_t size = c.B * c.J * c.D;
    if (c.rows != 1) return Status::unsupported;
    if (size == 0) return Status::ok;
    if (c.N == 0) return launch_over(size, write_zeros<A>, c.context, out, size);
    if constexpr (sizeof(A) == 4 && requires { policy.in_warps(); })
        if (takes_warps(c)) {
            if constexpr (std::is_same_v<T, bfloat16>)
                if (takes_tensor_cores(c)) return reduce_in_tensor_cores(c, policy.in_warps(), whole, out);
            return reduce_in_warps<T>(c, policy.in_warps(), whole, out);
        }
    constexpr int items = Policy::items;
    numbers = at_least(numbers, width);
    Tiling<T, width, items> tiling(c, numbers, Policy::resident);
    if (!fits<Policy>(tiling, numbers)) {
        if constexpr (requires { policy.reduce_wide(c, whole, out); })
            if (takes_wide(c)) return policy.reduce_wide(c, whole, out);
        if constexpr (UniformPolicy<Policy, A>)
            return reduce_uniform<T>(c, policy.uniform_coupling(), whole, out);
        else
            return reduce_staged<T>(c, policy, whole, out);
    }
    int64_t numbers_of_run = size;
    if constexpr (RescalingPolicy<Policy, T, width>) numbers_of_run += Policy::scalars * c.B * c.J;
    tiling.runs = cut_runs(c.N, tiling.teams, tiling.tiles,
                           ceil_div(numbers_of_run, tiling.tiles) * static_cast<int64_t>(sizeof(A)), tiling.wanted);
    Workspace w(&whole);
    Policy own = policy;
    if constexpr (RescalingPolicy<Policy, T, width>) own.take_runs(tiling.runs.count, w);
    // The sums of a single run are the result.
    A* const partial = tiling.runs.count == 1 ? out : w.take<A>(tiling.runs.count * size);
    const dim3 blocks{static_cast<unsigned>(tiling.runs.count), static_cast<unsigned>(tiling.tiles)};
    CAPSOPS_TRY(launch(reduce_kernel<width, items, T, Policy>, blocks, tiling.threads, tiling.bytes(), c.context,
                       tiling, own, partial));
    if constexpr (RescalingPolicy<Policy, T, width>)
        CAPSOPS_TRY(own.finish_runs(tiling.runs.count, c.D, partial, c.context));
    if (tiling.runs.count == 1) return Status::ok;
    return add_rows(partial, tiling.runs.count, size, size, out, false, c.context);
}

// The numbers that each thread of emit_kernel has in shared memory, besides those of the policy: the gradients of its
// votes and, unless the threads of a row exchange them by shuffles or the votes are given, its contributions to g_u.
template <int width> inline int64_t emit_numbers(const Capsules& c, int items) {
    const int64_t row = c.J * ceil_div(c.D, width);
    return items * (c.votes_given || (row > 0 && warp_size % row == 0) ? width : width + c.K);
}

// The gradients if there are no votes: 0.
template <class T, class Add> Status emit_nothing(const Capsules& c, const CapsuleGradients& gradients, Add add) {
    const int64_t KJD = c.K * c.J * c.D;
    const auto clear = [&](void* to, int64_t size) {
        if (!to) return Status::ok;
        return launch_over(size, write_zeros<T>, c.context, static_cast<T*>(to), size);
    };
    CAPSOPS_TRY(clear(gradients.u, c.B * c.N * c.K));
    CAPSOPS_TRY(clear(gradients.weight, c.weight_stride ? c.N * KJD : KJD));
    return add(static_cast<const Accumulation<T>*>(nullptr), 0);
}

// The gradients of u and W, and of parameters: each block writes its sums to params [blocks, param_count], which
// add(params, blocks) adds up. more: adds to the numbers in the gradients of u and W.
template <int width, class T, EmittingPolicy<T, width> Policy, class Add>
Status emit(const Capsules& c, Policy& policy, int64_t numbers, CapsuleGradients gradients, int64_t param_count,
            Workspace& whole, bool more, Add add) {
    using A = Accumulation<T>;
    if (c.rows != 1) return Status::unsupported;
    if (c.votes_given) gradients.weight = nullptr;
    if (c.B == 0 || c.N == 0 || c.J == 0 || c.D == 0) return more ? Status::ok : emit_nothing<T>(c, gradients, add);
    if constexpr (sizeof(A) == 4 && requires { policy.in_warps(); })
        if (takes_warps(c)) {
            if constexpr (std::is_same_v<T, bfloat16>)
                if (takes_tensor_cores(c) && is_aligned(gradients.u) && is_aligned(gradients.weight))
                    return emit_in_tensor_cores(c, policy.in_warps(), gradients, param_count, whole, more, add);
            return emit_in_warps<T>(c, policy.in_warps(), gradients, param_count, whole, more, add);
        }
    constexpr int items = Policy::items;
    numbers = at_least(numbers, emit_numbers<width>(c, items));
    Tiling<T, width, items> tiling(c, numbers, Policy::resident);
    if (!fits<Policy>(tiling, numbers)) {
        if constexpr (requires { policy.emit_wide(c, gradients, more, whole); })
            if (takes_wide(c)) return policy.emit_wide(c, gradients, more, whole);
        return emit_staged<T>(c, policy, gradients, param_count, whole, more, add);
    }
    const int64_t KJD = c.K * c.J * c.D;
    const bool shared = tiling.shared_weight();
    // The numbers of one block's sums of g_W, if it keeps them apart.
    const auto block_sums = [&]() -> int64_t {
        if (!gradients.weight || (!shared && (tiling.splits > 1 || tiling.tiles == 1))) return 0;
        return shared ? KJD : tiling.teams * KJD;
    };
    const auto bytes = [](int64_t count) { return count * static_cast<int64_t>(sizeof(A)); };
    tiling.split(bytes(c.votes_given ? 0 : shared ? tiling.steps() * KJD : c.N * KJD));
    tiling.runs = cut_runs(c.N, tiling.teams, tiling.splits, bytes(block_sums() + param_count), tiling.wanted);
    Workspace w(&whole);
    const int64_t blocks = tiling.runs.count * tiling.splits;
    const bool add_splits = gradients.weight && !shared && tiling.splits > 1;
    const int64_t sums = add_splits ? tiling.splits * c.N * KJD : blocks * block_sums();
    const GradientsOf<T> to{static_cast<T*>(gradients.u), static_cast<T*>(gradients.weight),
                            sums ? w.take<A>(sums) : nullptr, more};
    A* params = w.take<A>(blocks * param_count);
    policy.cut(tiling, tiling.teams * tiling.team_rows, w);
    const dim3 grid{static_cast<unsigned>(tiling.runs.count), static_cast<unsigned>(tiling.splits)};
    CAPSOPS_TRY(launch(emit_kernel<width, items, T, Policy>, grid, tiling.threads, tiling.bytes(), c.context, tiling,
                       policy, to, params, param_count));
    if (add_splits) CAPSOPS_TRY(add_rows(to.sums, tiling.splits, c.N * KJD, c.N * KJD, to.weight, more, c.context));
    if (gradients.weight && shared) CAPSOPS_TRY(add_rows(to.sums, blocks, KJD, KJD, to.weight, more, c.context));
    return add(static_cast<const A*>(params), blocks);
}

}  // namespace capsops::cuda
