// The loops of stream.cuh for two output capsules of 16 components and a small batch, as in CardioCaps. There, reading
// u and W is the limit: everything is read once, and little is computed with it.
//
// A warp has an input capsule. A lane has one component of both votes, for `items` batch items: those of its half of
// the warp. So the softmax over the output capsules needs no other lane. W and u are copied to shared memory two
// capsules ahead. A block strides through a run of capsules and has its own partial sums, as in stream.cuh.
//
// What distinguishes the routings is in policies: WarpReducingPolicy and WarpEmittingPolicy below.
#pragma once

#include <concepts>

#include "gradients.cuh"
#include "rows.cuh"
#include "runs.h"

namespace capsops::cuda {

constexpr int warp_J = 2, warp_D = 16, warp_JD = warp_J * warp_D;
// Rows of W that a lane multiplies in one turn of a loop.
constexpr int k_step = 8;

template <class T, int items> struct WarpTiling {
    static constexpr int max_B = warp_size / warp_D * items, stages = 3;

    const T* u;           // [B, N, K]
    const T* weight;      // [N, K, J, D]
    const uint8_t* mask;  // [B, N], or null
    int64_t N;
    int B, K, padded_K;  // padded_K: K, rounded up for shared memory
    bool asynchronous;   // whether u and W can be copied by 16 bytes as they are
    int warps = max_threads / warp_size;
    Runs runs;

    explicit WarpTiling(const Capsules& c)
        : u(static_cast<const T*>(c.u)),
          weight(static_cast<const T*>(c.weight)),
          mask(c.mask),
          N(c.N),
          B(static_cast<int>(c.B)),
          K(static_cast<int>(c.K)),
          padded_K(static_cast<int>(ceil_div(c.K, k_step) * k_step)),
          asynchronous(!mask && c.K * static_cast<int64_t>(sizeof(T)) % 16 == 0 &&
                       reinterpret_cast<uintptr_t>(u) % 16 == 0 && reinterpret_cast<uintptr_t>(weight) % 16 == 0) {
        while (bytes() > shared_bytes) warps /= 2;
        runs = cut_runs(N, warps, 1, c.B * warp_JD * static_cast<int64_t>(sizeof(Accumulation<T>)),
                        8 * limits.multiprocessors);
    }
    // Numbers of a capsule in shared memory: W [padded_K, J, D] and u [max_B, padded_K].
    __host__ __device__ int capsule() const { return padded_K * (warp_JD + max_B); }
    // Shared memory of a block: the stages; after the loop, the sums of its warps.
    int64_t bytes() const {
        const int64_t stage_bytes = stages * capsule() * static_cast<int64_t>(sizeof(T));
        return warps * at_least(stage_bytes, max_B * warp_JD * static_cast<int64_t>(sizeof(Accumulation<T>)));
    }
    int threads() const { return warps * warp_size; }
};

// Whether these loops take the capsules. Depends on the shape alone, so that sums have one order.
inline bool takes_warps(const Capsules& c) {
    constexpr int64_t max_B = 16, max_K = 16;
    return c.dtype != Dtype::float64 && c.J == warp_J && c.D == warp_D && c.B <= max_B && c.K <= max_K &&
           c.weight_stride != 0;
}

// Sums n numbers, at most 16, over the lanes of a half. The lane with component d gets the sum of number d / (16 / n).
// bit: of the lanes that exchange numbers first.
template <int n, class A> __device__ __forceinline__ A sum_scattered(A (&x)[n], int d, int bit = warp_D / 2) {
    if constexpr (n == 1) {
        A sum = x[0];
        for (; bit > 0; bit /= 2) sum += __shfl_xor_sync(~0u, sum, bit);
        return sum;
    } else {
        A rest[n / 2];
#pragma unroll
        for (int m = 0; m < n / 2; ++m) {
            const A low = x[m], high = x[m + n / 2];
            rest[m] = (d & bit ? high : low) + __shfl_xor_sync(~0u, d & bit ? low : high, bit);
        }
        return sum_scattered(rest, d, bit / 2);
    }
}

// The position of a lane in the work. The lane has numbers 0 … items − 1: each is one component of one batch item, of
// both votes.
template <class A, int items_> struct WarpPosition {
    static constexpr int items = items_, batch_items = items, components = 1;  // items = batch_items · components
    int64_t i = 0;                                                             // the input capsule of its warp
    int B;
    int warp = static_cast<int>(threadIdx.x) / warp_size, lane = static_cast<int>(threadIdx.x) % warp_size;
    int d = lane % warp_D, half = lane / warp_D;

    // The batch item of number m; it exists if it is less than B.
    __device__ int b(int m) const { return m * (warp_size / warp_D) + half; }
    // The index of number m, for output capsule j, in a state [B, J, D].
    __device__ int state(int m, int j) const { return (b(m) * warp_J + j) * warp_D + d; }

    // Sums over all components. The lane gets the sum of one batch item.
    __device__ A sum_components(A (&x)[items]) const { return sum_scattered(x, d); }
    // The sum x for the lane's batch item number n, from the lane that has it by sum_components.
    __device__ A of_item(A x, int n) const { return __shfl_sync(~0u, x, half * warp_D + n * (warp_D / items)); }
};

// Loads a lane's part of a state; 0 where there is no batch item.
template <class At, class A> __device__ inline void load_state(const At& at, const A* x, A (&to)[At::items][warp_J]) {
#pragma unroll
    for (int m = 0; m < At::items; ++m)
#pragma unroll
        for (int j = 0; j < warp_J; ++j) to[m][j] = at.b(m) < at.B ? x[at.state(m, j)] : A(0);
}

// Four neighbouring numbers.
template <class T> struct alignas(4 * sizeof(T)) Four {
    T x[4];
};

// Reads four rows of W in the lane's component.
template <class T> __device__ inline void read_rows(const T* w, Accumulation<T> (&to)[4][warp_J]) {
#pragma unroll
    for (int x = 0; x < 4; ++x)
#pragma unroll
        for (int j = 0; j < warp_J; ++j) to[x][j] = static_cast<Accumulation<T>>(w[x * warp_JD + j * warp_D]);
}

// The capsules of a warp, one after another, in shared memory.
template <class T, int items> class Pipeline {
    using A = Accumulation<T>;
    using Tiling = WarpTiling<T, items>;
    static constexpr int piece = 16 / static_cast<int>(sizeof(T));  // numbers that are copied at once

  public:
    __device__ Pipeline(const Tiling& tiling, WarpPosition<A, items>& at) : tiling_(tiling), at_(at) {
        const int64_t begin = static_cast<int64_t>(blockIdx.x) * tiling.runs.length;
        const int64_t end = at_most(begin + tiling.runs.length, tiling.N);
        at.B = tiling.B;
        at.i = begin + at.warp;
        left_ = left_to_fetch_ = static_cast<int>(ceil_div(end - at.i, tiling.warps));
        capsule_ = tiling.capsule();
        own_b_ = at.lane % Tiling::max_B, own_k_ = at.lane / Tiling::max_B * piece;
        from_w_ = tiling.weight + at.i * tiling.K * warp_JD;
        from_u_ = tiling.u + at.i * tiling.K;
        if (tiling.asynchronous) {
            from_w_ += at.lane * piece;
            from_u_ += own_b_ * tiling.N * tiling.K + own_k_;
            if (own_b_ >= tiling.B) own_k_ = tiling.K;
        }
        memory_ = reinterpret_cast<T*>(shared_memory()) + at.warp * Tiling::stages * capsule_;
        // What is never copied is 0: batch items that do not exist, and numbers beyond K.
#pragma unroll 1
        for (int x = at.lane; x < Tiling::stages * capsule_; x += warp_size) memory_[x] = static_cast<T>(A(0));
        __syncwarp();
#pragma unroll 1
        for (int ahead = 1; ahead < Tiling::stages; ++ahead) fetch();
    }
    __device__ bool has_capsule() const { return left_ > 0; }
    // Waits for the capsule at.i, and fetches a later one in the meantime.
    __device__ void wait() {
        __syncwarp();  // all lanes have finished with the capsule that is overwritten
        fetch();
        wait_for_copies<Tiling::stages - 1>();
        __syncwarp();
    }
    __device__ void advance() {
        at_.i += tiling_.warps;
        --left_;
        read_ = next(read_);
    }
    // W in the lane's component: number (k, j) is weight()[k · J · D + j · D].
    __device__ const T* weight() const { return memory_ + read_ + at_.d; }
    // u [max_B, padded_K].
    __device__ const T* u() const { return memory_ + read_ + tiling_.padded_K * warp_JD; }

  private:
    __device__ int next(int stage) const { return stage == (Tiling::stages - 1) * capsule_ ? 0 : stage + capsule_; }

    __device__ void fetch() {
        if (left_to_fetch_ > 0) {
            T* const w = memory_ + stored_;
            T* const u = w + tiling_.padded_K * warp_JD;
            if (tiling_.asynchronous)
                copy(w, u);
            else
                read(w, u);
        }
        commit_copies();
        --left_to_fetch_;
        from_w_ += tiling_.warps * tiling_.K * warp_JD;
        from_u_ += tiling_.warps * tiling_.K;
        stored_ = next(stored_);
    }
    __device__ void copy(T* w, T* u) const {
        constexpr int size = static_cast<int>(sizeof(T)), u_step = warp_size / Tiling::max_B * piece;
        const T* from = from_w_;
        SharedAddress to = shared_address(w + at_.lane * piece);
#pragma unroll 1
        for (int k = 0; k < tiling_.K; k += piece, from += piece * warp_JD, to += piece * warp_JD * size)
            copy_async(to, from);
        from = from_u_;
        to = shared_address(u + own_b_ * tiling_.padded_K + own_k_);
#pragma unroll 1
        for (int k = own_k_; k < tiling_.K; k += u_step, from += u_step, to += u_step * size) copy_async(to, from);
    }
    __device__ void read(T* w, T* u) const {
#pragma unroll 1
        for (int x = at_.lane; x < tiling_.K * warp_JD; x += warp_size) w[x] = from_w_[x];
        const int64_t i = (from_u_ - tiling_.u) / tiling_.K;
#pragma unroll 1
        for (int x = at_.lane; x < tiling_.B * tiling_.K; x += warp_size) {
            const int b = x / tiling_.K, k = x % tiling_.K;
            const bool present = !tiling_.mask || tiling_.mask[b * tiling_.N + i];
            u[b * tiling_.padded_K + k] = present ? from_u_[b * tiling_.N * tiling_.K + k] : static_cast<T>(A(0));
        }
    }

    const Tiling& tiling_;
    WarpPosition<A, items>& at_;
    T* memory_;
    const T *from_w_, *from_u_;  // of the capsule that is fetched next
    int left_, left_to_fetch_;   // capsules of the warp
    int capsule_;                // numbers of a capsule
    int own_b_, own_k_;          // the part of u that the lane copies
    int read_ = 0, stored_ = 0;  // where the capsule at.i lies, and the one that is fetched next
};

// The lane's components of the votes; 0 if the pair is masked or there is no batch item.
template <class T, int items>
__device__ inline void make_votes(const WarpTiling<T, items>& tiling, const WarpPosition<Accumulation<T>, items>& at,
                                  const Pipeline<T, items>& capsule, Accumulation<T> (&v)[items][warp_J]) {
    using A = Accumulation<T>;
#pragma unroll
    for (int m = 0; m < items; ++m) v[m][0] = v[m][1] = A(0);
    const T *w = capsule.weight(), *u = capsule.u() + at.half * tiling.padded_K;
#pragma unroll 1
    for (int k = 0; k < tiling.padded_K; k += k_step, w += k_step * warp_JD, u += k_step) {
#pragma unroll
        for (int some = 0; some < k_step; some += 4) {
            A row[4][warp_J];
            read_rows(w + some * warp_JD, row);
#pragma unroll
            for (int m = 0; m < items; ++m) {
                const auto a = *reinterpret_cast<const Four<T>*>(u + 2 * m * tiling.padded_K + some);
#pragma unroll
                for (int x = 0; x < 4; ++x)
#pragma unroll
                    for (int j = 0; j < warp_J; ++j) v[m][j] += static_cast<A>(a.x[x]) * row[x][j];
            }
        }
    }
}

// ---- policies ------------------------------------------------------------------------------------------------

// What reduce_in_warps needs. start() loads what a lane keeps in registers; couple() computes the weights c of the
// components of the votes v. At: the position of a lane, as WarpPosition.
template <class P, class A, class At>
concept WarpReducingPolicy = requires(const P& policy, const At& at, typename P::template Registers<At::items>& own,
                                      const A (&v)[At::items][warp_J], A (&c)[At::items][warp_J]) {
    policy.start(at, own);
    policy.couple(at, own, v, c);
};

// What emit_in_warps needs. gradient() computes the gradient g of the votes v, and adds to sums of parameters in `own`;
// end_warp() writes these to params [param_count] of the warp.
template <class P, class A, class At>
concept WarpEmittingPolicy = requires(const P& policy, const At& at, typename P::template Registers<At::items>& own,
                                      const A (&v)[At::items][warp_J], A (&g)[At::items][warp_J], A* params) {
    policy.start(at, own);
    policy.gradient(at, own, v, g);
    policy.end_warp(at, own, params);
};

// ---- the loops -----------------------------------------------------------------------------------------------

template <int items, class T, class Policy>
__global__ void __launch_bounds__(max_threads, items <= 4 ? 2 : 1)
    reduce_warps_kernel(WarpTiling<T, items> tiling, Policy policy, Accumulation<T>* partial /* [runs, B, J, D] */) {
    using A = Accumulation<T>;
    WarpPosition<A, items> at;
    Pipeline<T, items> capsule(tiling, at);
    typename Policy::template Registers<items> own;
    policy.start(at, own);
    A sum[items][warp_J] = {};
    for (; capsule.has_capsule(); capsule.advance()) {
        capsule.wait();
        A v[items][warp_J], c[items][warp_J];
        make_votes(tiling, at, capsule, v);
        policy.couple(at, own, v, c);
#pragma unroll
        for (int m = 0; m < items; ++m)
#pragma unroll
            for (int j = 0; j < warp_J; ++j) sum[m][j] += c[m][j] * v[m][j];
    }
    __syncthreads();
    A* const sums = reinterpret_cast<A*>(shared_memory());  // [warps, max_B, J, D]
    constexpr int size = WarpTiling<T, items>::max_B * warp_JD;
#pragma unroll
    for (int m = 0; m < items; ++m)
#pragma unroll
        for (int j = 0; j < warp_J; ++j) sums[at.warp * size + at.state(m, j)] = sum[m][j];
    __syncthreads();
#pragma unroll 1
    for (int x = static_cast<int>(threadIdx.x); x < tiling.B * warp_JD; x += static_cast<int>(blockDim.x)) {
        A total = 0;
#pragma unroll 1
        for (int warp = 0; warp < tiling.warps; ++warp) total += sums[warp * size + x];
        partial[static_cast<int64_t>(blockIdx.x) * tiling.B * warp_JD + x] = total;
    }
}

// g_u,bi = g_û,bi W_iᵀ.
template <class T, int items>
__device__ inline void emit_u(const WarpTiling<T, items>& tiling, const WarpPosition<Accumulation<T>, items>& at,
                              const Pipeline<T, items>& capsule, const Accumulation<T> (&g)[items][warp_J],
                              const GradientsOf<T>& to) {
    using A = Accumulation<T>;
    constexpr int some = 4;  // batch items at a time, with four rows of W
    static_assert(items % some == 0 && some * 4 == warp_D);
#pragma unroll 1
    for (int k = 0; k < tiling.K; k += 4) {
        A w[4][warp_J];
        read_rows(capsule.weight() + k * warp_JD, w);
#pragma unroll
        for (int first = 0; first < items; first += some) {
            A products[some * 4];
#pragma unroll
            for (int m = 0; m < some; ++m)
#pragma unroll
                for (int x = 0; x < 4; ++x) products[m * 4 + x] = g[first + m][0] * w[x][0] + g[first + m][1] * w[x][1];
            A sum = sum_scattered(products, at.d);
            const int b = at.b(first + at.d / 4), own_k = k + at.d % 4;
            if (b >= tiling.B || own_k >= tiling.K) continue;
            const int64_t pair = b * tiling.N + at.i;
            if (tiling.mask && !tiling.mask[pair]) sum = A(0);
            to.write(to.u[pair * tiling.K + own_k], sum);
        }
    }
}

// g_W,i = Σ_b u_biᵀ g_û,bi. The lower half of the warp writes output capsule 0, the upper half 1.
template <class T, int items>
__device__ inline void emit_weight(const WarpTiling<T, items>& tiling, const WarpPosition<Accumulation<T>, items>& at,
                                   const Pipeline<T, items>& capsule, const Accumulation<T> (&g)[items][warp_J],
                                   const GradientsOf<T>& to) {
    using A = Accumulation<T>;
    T* const weight = to.weight + at.i * tiling.K * warp_JD + at.lane;
#pragma unroll 1
    for (int k = 0; k < tiling.K; k += 4) {
        A sum[4][warp_J] = {};
#pragma unroll
        for (int m = 0; m < items; ++m) {
            const auto u = *reinterpret_cast<const Four<T>*>(capsule.u() + at.b(m) * tiling.padded_K + k);
#pragma unroll
            for (int x = 0; x < 4; ++x)
#pragma unroll
                for (int j = 0; j < warp_J; ++j) sum[x][j] += static_cast<A>(u.x[x]) * g[m][j];
        }
#pragma unroll
        for (int x = 0; x < 4; ++x) {
            const A kept = at.half ? sum[x][1] : sum[x][0], given = at.half ? sum[x][0] : sum[x][1];
            const A total = kept + __shfl_xor_sync(~0u, given, warp_D);
            if (k + x < tiling.K) to.write(weight[(k + x) * warp_JD], total);
        }
    }
}

template <int items, class T, class Policy>
__global__ void __launch_bounds__(max_threads, items <= 4 ? 2 : 1)
    emit_warps_kernel(WarpTiling<T, items> tiling, Policy policy, GradientsOf<T> to,
                      Accumulation<T>* params /* [runs, warps, param_count] */, int param_count) {
    using A = Accumulation<T>;
    WarpPosition<A, items> at;
    Pipeline<T, items> capsule(tiling, at);
    typename Policy::template Registers<items> own;
    policy.start(at, own);
    for (; capsule.has_capsule(); capsule.advance()) {
        capsule.wait();
        A v[items][warp_J], g[items][warp_J];
        make_votes(tiling, at, capsule, v);
        policy.gradient(at, own, v, g);
        if (to.u) emit_u(tiling, at, capsule, g, to);
        if (to.weight) emit_weight(tiling, at, capsule, g, to);
    }
    // Not summed over the warps of the block: behind a barrier, nvcc makes the loop above 14 % longer.
    policy.end_warp(at, own, params + (static_cast<int64_t>(blockIdx.x) * tiling.warps + at.warp) * param_count);
}

// Calls function.operator()<items>(): the batch items of a lane.
template <class Function> inline Status for_items(const Capsules& c, Function function) {
    return c.B <= 8 ? function.template operator()<4>() : function.template operator()<8>();
}

// As `reduce` of stream.cuh.
template <class T, class Policy>
Status reduce_in_warps(const Capsules& c, const Policy& policy, Workspace& whole, Accumulation<T>* out) {
    using A = Accumulation<T>;
    return for_items(c, [&]<int items>() {
        static_assert(WarpReducingPolicy<Policy, A, WarpPosition<A, items>>);
        const WarpTiling<T, items> tiling(c);
        const int64_t size = c.B * warp_JD;
        Workspace w(&whole);
        A* const partial = tiling.runs.count == 1 ? out : w.take<A>(tiling.runs.count * size);
        CAPSOPS_TRY(launch(reduce_warps_kernel<items, T, Policy>, dim3{static_cast<unsigned>(tiling.runs.count)},
                           tiling.threads(), tiling.bytes(), c.context, tiling, policy, partial));
        if (tiling.runs.count == 1) return Status::ok;
        return add_rows(partial, tiling.runs.count, size, size, out, false, c.context);
    });
}

// As `emit` of stream.cuh: add(params, rows) adds up params [rows, param_count].
template <class T, class Policy, class Add>
Status emit_in_warps(const Capsules& c, const Policy& policy, const CapsuleGradients& gradients, int64_t param_count,
                     Workspace& whole, bool more, Add add) {
    using A = Accumulation<T>;
    return for_items(c, [&]<int items>() {
        static_assert(WarpEmittingPolicy<Policy, A, WarpPosition<A, items>>);
        const WarpTiling<T, items> tiling(c);
        const int64_t rows = tiling.runs.count * tiling.warps;
        Workspace w(&whole);
        A* const params = w.take<A>(rows * param_count);
        const GradientsOf<T> to{static_cast<T*>(gradients.u), static_cast<T*>(gradients.weight), nullptr, more};
        CAPSOPS_TRY(launch(emit_warps_kernel<items, T, Policy>, dim3{static_cast<unsigned>(tiling.runs.count)},
                           tiling.threads(), tiling.bytes(), c.context, tiling, policy, to, params,
                           static_cast<int>(param_count)));
        return add(static_cast<const A*>(params), rows);
    });
}

}  // namespace capsops::cuda
