// The passes of agreement.h for many output capsules and few batch items: the votes of an input capsule need more
// threads than a block has, so no block can compute their softmax. Only the couplings are in GPU memory, for a tile of
// input capsules at a time.
//
//   logits       z = û · x, and e = û · y               a thread has an output capsule
//   softmax      c, and δ = c (e − Σ_k c_k e_k)         couple_rows of staged_agreement.cuh
//   sums         Σ_i c û                                a thread has `width` components of an output capsule
//   gradients    g_û = Σ_t [c^t g^t + δ^t x^t];  g_u = g_û Wᵀ;  g_W = Σ_b uᵀ g_û
//
// Each computes the votes anew from W: K products are cheaper than to write a vote and to read it twice. Neighbouring
// threads read neighbouring numbers of W. A thread has `items` batch items at a time.

#include "../engine/gradients.cuh"
#include "../engine/inputs.cuh"
#include "../engine/runs.h"
#include "../engine/warp.cuh"
#include "staged_agreement.cuh"
#include "wide_agreement.h"

namespace capsops::cuda {
namespace {

constexpr int items = 4;
// Components of a thread: in `logits`, and in the other kernels.
constexpr int long_width = 8, width = 4;
// Threads of a block, and how many of them a multiprocessor runs at the same time, by their registers in float32.
constexpr int threads = 128;
constexpr int64_t resident_logits = 4, resident_adjoint_logits = 3, resident_sums = 5, resident_gradients = 4;
// Numbers of u that are read at once.
constexpr int k_step = 4;

// A tile of input capsules, first … first + count − 1. The pair of batch item b and capsule first + i has index
// b · count + i.
template <class T> struct WideTile {
    using A = Accumulation<T>;
    const T *u_of_all, *weight;  // [B, N, K], [N, K, J, D]
    const uint8_t* mask;         // [B, N], or null
    A* u;                        // [B, count, padded_K]: 0 where masked, and beyond K
    int64_t B, N, K, J, D, padded_K, parts, first, count;
    bool aligned;  // whether a thread can read its components of W and of the states at once

    // numbers: of memory for each pair, besides u.
    WideTile(const Capsules& c, int64_t numbers)
        : u_of_all(static_cast<const T*>(c.u)),
          weight(static_cast<const T*>(c.weight)),
          mask(c.mask),
          u(nullptr),
          B(c.B),
          N(c.N),
          K(c.K),
          J(c.J),
          D(c.D),
          padded_K(ceil_div(c.K, k_step) * k_step),
          parts(ceil_div(c.D, width)),
          first(0),
          aligned(c.D % long_width == 0 && reinterpret_cast<uintptr_t>(c.weight) % 16 == 0) {
        const int64_t bytes = B * (padded_K + numbers) * static_cast<int64_t>(sizeof(A));
        count = at_least(at_most(limits.tile / at_least(bytes, 1), N), 1);
    }
    __host__ __device__ int64_t pairs() const { return B * count; }
    __host__ __device__ int64_t columns() const { return J * parts; }
    __device__ bool present(int64_t b, int64_t i) const { return !mask || mask[b * N + first + i]; }
};

template <class T> __global__ void stage_vectors(WideTile<T> t) {
    using A = Accumulation<T>;
    for (int64_t x = first_index(); x < t.pairs() * t.padded_K; x += index_stride()) {
        const int64_t pair = x / t.padded_K, k = x % t.padded_K, b = pair / t.count, i = pair % t.count;
        t.u[x] = k < t.K && t.present(b, i) ? static_cast<A>(t.u_of_all[(b * t.N + t.first + i) * t.K + k]) : A(0);
    }
}

// Numbers d … d + n − 1 of row k of W; 0 beyond `count` of them.
template <int n, class T>
__device__ __forceinline__ void read_weight(const WideTile<T>& t, int64_t i, int64_t k, int64_t jd, int count,
                                            Accumulation<T> (&to)[n]) {
    load_numbers(t.weight + ((t.first + i) * t.K + k) * t.J * t.D + jd, count, t.aligned, to);
}

// Components of the votes of capsule i and batch items b0 …; 0 where there is no batch item.
template <int n, class T>
__device__ __forceinline__ void make_votes(const WideTile<T>& t, int64_t i, int64_t b0, int64_t jd, int count,
                                           Accumulation<T> (&v)[items][n]) {
    using A = Accumulation<T>;
#pragma unroll
    for (int m = 0; m < items; ++m)
#pragma unroll
        for (int d = 0; d < n; ++d) v[m][d] = A(0);
#pragma unroll 2
    for (int64_t k = 0; k < t.K; k += k_step) {
        A u[items][k_step];
#pragma unroll
        for (int m = 0; m < items; ++m) {
            const int64_t pair = b0 + m < t.B ? (b0 + m) * t.count + i : b0 * t.count + i;
            const auto some = Piece<A, k_step>::load(t.u + pair * t.padded_K + k);
#pragma unroll
            for (int x = 0; x < k_step; ++x) u[m][x] = some.x[x];
        }
#pragma unroll
        for (int x = 0; x < k_step; ++x) {
            A row[n];
            read_weight(t, i, k + x, jd, k + x < t.K ? count : 0, row);
#pragma unroll
            for (int m = 0; m < items; ++m)
#pragma unroll
                for (int d = 0; d < n; ++d) v[m][d] += u[m][x] * row[d];
        }
    }
}

// The thread's components of a state [B, J, D] for batch items b0 …; 0 where there is no batch item.
template <int n, class T, class A>
__device__ __forceinline__ void load_states(const WideTile<T>& t, const A* x, int64_t b0, int64_t jd, int count,
                                            A (&to)[items][n]) {
#pragma unroll
    for (int m = 0; m < items; ++m)
        load_numbers(x + (b0 + m) * t.J * t.D + jd, b0 + m < t.B ? count : 0, t.aligned, to[m]);
}

// z = û · x and, if adjoint, e = û · y for `states` states that lie `size` numbers apart.
// grid: output capsules, runs of input capsules, batch items.
template <bool adjoint, class T, class A = Accumulation<T>>
__global__ void __launch_bounds__(threads)
    logits_kernel(WideTile<T> t, int64_t run, const A* x, const A* y, int64_t states, int64_t size,
                  A* z /* [states, pairs, J] */, A* e /* as z */) {
    const int64_t j = first_index(), b0 = static_cast<int64_t>(blockIdx.z) * items;
    const int64_t begin = blockIdx.y * run, end = at_most(begin + run, t.count);
    if (j >= t.J) return;
    const bool whole = t.D <= long_width;
    A v[items][long_width];
    for (int64_t i = begin; i < end; ++i) {
        for (int64_t s = 0; s < states; ++s) {
            A with_x[items] = {}, with_y[items] = {};
            for (int64_t d = 0; d < t.D; d += long_width) {
                const int count = static_cast<int>(at_most(t.D - d, long_width));
                const int64_t jd = j * t.D + d, state = s * size + jd;
                if (s == 0 || !whole) make_votes(t, i, b0, jd, count, v);
#pragma unroll
                for (int m = 0; m < items; ++m) {
                    const int64_t item = state + (b0 + m) * t.J * t.D;
                    const int there = b0 + m < t.B ? count : 0;
                    A own[long_width];
                    load_numbers(x + item, there, t.aligned, own);
                    with_x[m] += dot(v[m], own);
                    if constexpr (!adjoint) continue;
                    load_numbers(y + item, there, t.aligned, own);
                    with_y[m] += dot(v[m], own);
                }
            }
#pragma unroll
            for (int m = 0; m < items; ++m) {
                if (b0 + m >= t.B) continue;
                const int64_t to = (s * t.pairs() + (b0 + m) * t.count + i) * t.J + j;
                z[to] = with_x[m];
                if constexpr (adjoint) e[to] = with_y[m];
            }
        }
    }
}

// partial [runs, B, J, D] = Σ_i (c + prior) û, or Σ_i û if c is null.
// grid: components, runs of input capsules, batch items.
template <class T, class A = Accumulation<T>>
__global__ void __launch_bounds__(threads) sums_kernel(WideTile<T> t, int64_t run, const A* c /* [pairs, J], or null */,
                                                       const A* prior /* [N, J], or null */, A* partial) {
    const int64_t column = first_index(), b0 = static_cast<int64_t>(blockIdx.z) * items;
    const int64_t begin = blockIdx.y * run, end = at_most(begin + run, t.count);
    if (column >= t.columns()) return;
    const int64_t j = column / t.parts, d = column % t.parts * width, jd = j * t.D + d;
    const int own = static_cast<int>(at_most(t.D - d, width));
    A sum[items][width] = {};
    for (int64_t i = begin; i < end; ++i) {
        A v[items][width];
        make_votes(t, i, b0, jd, own, v);
        const A added = prior ? prior[(t.first + i) * t.J + j] : A(0);
#pragma unroll
        for (int m = 0; m < items; ++m) {
            const A weight = !c ? A(1) : b0 + m < t.B ? c[((b0 + m) * t.count + i) * t.J + j] + added : A(0);
#pragma unroll
            for (int n = 0; n < width; ++n) sum[m][n] += weight * v[m][n];
        }
    }
#pragma unroll
    for (int m = 0; m < items; ++m)
#pragma unroll
        for (int n = 0; n < width; ++n)
            if (b0 + m < t.B && n < own) partial[((blockIdx.y * t.B + b0 + m) * t.J * t.D) + jd + n] = sum[m][n];
}

// The terms of the gradient of the votes. c and delta belong to the iterations from `first` on.
template <class A> struct WideTerms {
    const A *x, *g;  // [iterations, B, J, D]
    int64_t size, iterations;
    int first;  // 1 if the first iteration has equal couplings, else 0
    A equal;
    const A *c, *delta;  // [iterations − first, pairs, J]; delta may be null
    const A *prior, *rest;
};

// Writes numbers of the gradient of W.
template <class T, class A>
__device__ __forceinline__ void write_weight(const WideTile<T>& t, const GradientsOf<T>& to, int64_t i, int64_t k,
                                             int64_t jd, int count, const A (&x)[width]) {
    T* const own = to.weight + ((t.first + i) * t.K + k) * t.J * t.D + jd;
    if (t.aligned && !to.more) {
        Piece<T, width> piece;
#pragma unroll
        for (int n = 0; n < width; ++n) piece.x[n] = static_cast<T>(x[n]);
        if (count) *reinterpret_cast<Piece<T, width>*>(own) = piece;
        return;
    }
#pragma unroll
    for (int n = 0; n < width; ++n)
        if (n < count) to.write(own[n], x[n]);
}

// The gradient of the votes of capsule i and batch items b0 …; 0 where the pair is masked or there is no batch item.
template <class T, class A>
__device__ __forceinline__ void vote_gradients(const WideTile<T>& t, const WideTerms<A>& terms, int64_t i, int64_t b0,
                                               int64_t j, int64_t jd, int count, A (&out)[items][width]) {
#pragma unroll
    for (int m = 0; m < items; ++m)
#pragma unroll
        for (int n = 0; n < width; ++n) out[m][n] = A(0);
    if (terms.rest) load_states(t, terms.rest, b0, jd, count, out);
    if (terms.first) {
        A g[items][width];
        load_states(t, terms.g, b0, jd, count, g);
#pragma unroll
        for (int m = 0; m < items; ++m)
#pragma unroll
            for (int n = 0; n < width; ++n) out[m][n] += terms.equal * g[m][n];
    }
    const A added = terms.prior && count ? terms.prior[(t.first + i) * t.J + j] : A(0);
#pragma unroll 1
    for (int64_t s = terms.first; s < terms.iterations; ++s) {
        A g[items][width], x[items][width];
        load_states(t, terms.g + s * terms.size, b0, jd, count, g);
        if (terms.delta) load_states(t, terms.x + s * terms.size, b0, jd, count, x);
#pragma unroll
        for (int m = 0; m < items; ++m) {
            if (b0 + m >= t.B || count == 0) continue;
            const int64_t at = ((s - terms.first) * t.pairs() + (b0 + m) * t.count + i) * t.J + j;
            const A c = terms.c[at] + added;
#pragma unroll
            for (int n = 0; n < width; ++n) out[m][n] += c * g[m][n];
            if (!terms.delta) continue;
            const A delta = terms.delta[at];
#pragma unroll
            for (int n = 0; n < width; ++n) out[m][n] += delta * x[m][n];
        }
    }
    if (!t.mask) return;
#pragma unroll
    for (int m = 0; m < items; ++m)
        if (b0 + m < t.B && !t.present(b0 + m, i))
#pragma unroll
            for (int n = 0; n < width; ++n) out[m][n] = A(0);
}

// Sums 32 numbers over the lanes of a warp. Lane x gets the sum of number x.
template <class A> __device__ __forceinline__ A sum_over_warp(A (&x)[warp_size]) {
    const int lane = static_cast<int>(threadIdx.x) % warp_size;
    const bool upper = lane >= warp_D;
    A half[warp_D];
#pragma unroll
    for (int m = 0; m < warp_D; ++m)
        half[m] = (upper ? x[m + warp_D] : x[m]) + __shfl_xor_sync(~0u, upper ? x[m] : x[m + warp_D], warp_D);
    return sum_scattered(half, lane % warp_D);
}

// g_W, and g_u of the block's components.
// grid: components, runs of input capsules. Shared memory: a number for each thread.
template <class T, class A = Accumulation<T>>
__global__ void __launch_bounds__(threads)
    gradients_kernel(WideTile<T> t, int64_t run, WideTerms<A> terms, GradientsOf<T> to,
                     A* g_u /* [blocks of components, B, count, K], or null */) {
    constexpr int rows = warp_size / items;  // of W at a time
    const int64_t column = first_index();
    const int64_t begin = blockIdx.y * run, end = at_most(begin + run, t.count);
    const bool exists = column < t.columns();
    const int64_t j = exists ? column / t.parts : 0, d = exists ? column % t.parts * width : 0, jd = j * t.D + d;
    const int own = exists ? static_cast<int>(at_most(t.D - d, width)) : 0;
    const int lane = static_cast<int>(threadIdx.x) % warp_size, warp = static_cast<int>(threadIdx.x) / warp_size;
    A* const sums = reinterpret_cast<A*>(shared_memory());
    for (int64_t i = begin; i < end; ++i)
#pragma unroll 1
        for (int64_t k = 0; k < t.K; k += rows) {
            A g_weight[rows][width] = {};
#pragma unroll 1
            for (int64_t b0 = 0; b0 < t.B; b0 += items) {
                A g[items][width];
                vote_gradients(t, terms, i, b0, j, jd, own, g);
                if (to.weight) {
#pragma unroll
                    for (int m = 0; m < items; ++m) {
                        const A* const u = t.u + ((b0 + m < t.B ? b0 + m : b0) * t.count + i) * t.padded_K;
#pragma unroll
                        for (int some = 0; some < rows; some += k_step) {
                            if (k + some >= t.K) continue;
                            const auto numbers = Piece<A, k_step>::load(u + k + some);
#pragma unroll
                            for (int x = 0; x < k_step; ++x)
#pragma unroll
                                for (int n = 0; n < width; ++n) g_weight[some + x][n] += numbers.x[x] * g[m][n];
                        }
                    }
                }
                if (!g_u) continue;
                A products[warp_size];
#pragma unroll
                for (int x = 0; x < rows; ++x) {
                    A row[width];
                    read_weight(t, i, k + x, jd, k + x < t.K ? own : 0, row);
#pragma unroll
                    for (int m = 0; m < items; ++m) {
                        products[m * rows + x] = dot(row, g[m]);
                    }
                }
                const A sum = sum_over_warp(products);
                __syncthreads();  // the sums before have been read
                sums[threadIdx.x] = sum;
                __syncthreads();
                const int64_t b = b0 + lane / rows, own_k = k + lane % rows;
                if (warp > 0 || b >= t.B || own_k >= t.K) continue;
                A total = 0;
#pragma unroll
                for (int other = 0; other < threads; other += warp_size) total += sums[other + lane];
                g_u[((blockIdx.x * t.B + b) * t.count + i) * t.K + own_k] = total;
            }
            if (!to.weight) continue;
#pragma unroll
            for (int x = 0; x < rows; ++x) {
                if (k + x >= t.K) continue;
                write_weight(t, to, i, k + x, jd, own, g_weight[x]);
            }
        }
}

// Adds up g_u over blocks of components.
template <class T, class A = Accumulation<T>>
__global__ void write_vectors(WideTile<T> t, const A* g_u, int64_t blocks, T* to, bool more) {
    const int64_t size = t.pairs() * t.K;
    for (int64_t x = first_index(); x < size; x += index_stride()) {
        const int64_t pair = x / t.K, b = pair / t.count, i = pair % t.count;
        T& own = to[(b * t.N + t.first + i) * t.K + x % t.K];
        double sum = more ? static_cast<double>(static_cast<A>(own)) : 0;
        for (int64_t m = 0; m < blocks; ++m) sum += static_cast<double>(g_u[m * size + x]);
        own = static_cast<T>(static_cast<A>(sum));
    }
}

// ---- launches ------------------------------------------------------------------------------------------------

// The runs of input capsules for kernels with `blocks` blocks for each.
template <class T> Runs wide_runs(const WideTile<T>& t, int64_t blocks, int64_t bytes, int64_t resident) {
    return cut_runs(t.count, 1, blocks, bytes, limits.multiprocessors * resident);
}

template <class T> int64_t item_blocks(const WideTile<T>& t) {
    return ceil_div(t.B, items);
}

template <class T, class A = Accumulation<T>>
Status compute_logits(const WideTile<T>& t, const A* x, const A* y, int64_t states, A* z, A* e,
                      const ExecutionContext& context) {
    const int64_t across = ceil_div(t.J, threads);
    const Runs runs = wide_runs(t, across * item_blocks(t), 0, y ? resident_adjoint_logits : resident_logits);
    const dim3 grid{static_cast<unsigned>(across), static_cast<unsigned>(runs.count),
                    static_cast<unsigned>(item_blocks(t))};
    return launch(y ? logits_kernel<true, T> : logits_kernel<false, T>, grid, threads, 0, context, t, runs.length, x, y,
                  states, t.B * t.J * t.D, z, e);
}

template <class A>
Status compute_softmax(A* z, A* e, int64_t rows, int64_t J, bool leaky, const ExecutionContext& context) {
    return launch_rows<A>(couple_rows<A>, rows, J, context, z, e, rows, J, leaky);
}

// Calls step() for every tile, after computing t.u.
template <class T, class Step>
Status for_wide_tiles(WideTile<T>& t, const Workspace& w, const ExecutionContext& context, Step step) {
    const int64_t most = t.count;
    for (; t.first < t.N; t.first += most) {
        w.start_over();
        t.count = at_most(most, t.N - t.first);
        CAPSOPS_TRY(launch_over(t.pairs() * t.padded_K, stage_vectors<T>, context, t));
        CAPSOPS_TRY(step());
    }
    return Status::ok;
}

}  // namespace

Status sum_wide(const Capsules& c, const WideCouplings* couplings, double equal, Workspace& whole, void* to) {
    return for_storage(c.dtype, [&]<class T>() {
        using A = Accumulation<T>;
        const bool adjoint = couplings && couplings->adjoint;
        A* const out = static_cast<A*>(to);
        const int64_t size = c.B * c.J * c.D;
        WideTile<T> t(c, couplings ? (adjoint ? 2 : 1) * c.J : 0);
        const int64_t across = ceil_div(t.columns(), threads);
        const int64_t bytes = ceil_div(size, across * item_blocks(t)) * static_cast<int64_t>(sizeof(A));
        Runs runs = wide_runs(t, across * item_blocks(t), bytes, resident_sums);
        Workspace w(&whole);
        A* const partial = w.take<A>(runs.count * size);
        Workspace tile(&w);
        t.u = tile.take<A>(t.pairs() * t.padded_K);
        A* const z = tile.take<A>(couplings ? t.pairs() * c.J : 0);
        A* const e = tile.take<A>(adjoint ? t.pairs() * c.J : 0);
        if (c.context.needed) return Status::ok;
        CAPSOPS_TRY(for_wide_tiles(t, tile, c.context, [&] {
            if (couplings) {
                CAPSOPS_TRY(compute_logits(t, static_cast<const A*>(couplings->x), static_cast<const A*>(couplings->y),
                                           1, z, e, c.context));
                CAPSOPS_TRY(compute_softmax(z, adjoint ? e : nullptr, t.pairs(), c.J, couplings->leaky, c.context));
            }
            runs.count = ceil_div(t.count, runs.length);
            const dim3 grid{static_cast<unsigned>(across), static_cast<unsigned>(runs.count),
                            static_cast<unsigned>(item_blocks(t))};
            const A* const weights = !couplings ? nullptr : adjoint ? e : z;
            const A* const prior = couplings ? static_cast<const A*>(couplings->prior) : nullptr;
            CAPSOPS_TRY(launch(sums_kernel<T>, grid, threads, 0, c.context, t, runs.length, weights, prior, partial));
            return add_rows(static_cast<const A*>(partial), runs.count, size, size, out, t.first > 0, c.context);
        }));
        if (couplings) return Status::ok;
        return launch_over(size, multiply<A>, c.context, static_cast<const A*>(out), static_cast<A>(equal), out, size);
    });
}

Status emit_wide(const Capsules& c, const AgreementTerms& given, const CapsuleGradients& gradients, Workspace& whole) {
    return for_storage(c.dtype, [&]<class T>() {
        using A = Accumulation<T>;
        const int64_t size = c.B * c.J * c.D, first = given.equal_first ? 1 : 0;
        const int64_t states = given.iterations - first;
        const bool adjoint = states > 0 && (!given.detach || given.g_prior);
        const int64_t across = ceil_div(c.J * ceil_div(c.D, width), threads);
        WideTile<T> t(c, (adjoint ? 2 : 1) * states * c.J + (gradients.u ? across * c.K : 0));
        Workspace tile(&whole);
        t.u = tile.take<A>(t.pairs() * t.padded_K);
        A* const z = tile.take<A>(states * t.pairs() * c.J);
        A* const e = tile.take<A>(adjoint ? states * t.pairs() * c.J : 0);
        A* const g_u = tile.take<A>(gradients.u ? across * t.pairs() * c.K : 0);
        if (c.context.needed) return Status::ok;
        const GradientsOf<T> to{static_cast<T*>(gradients.u), static_cast<T*>(gradients.weight), nullptr, given.more};
        const WideTerms<A> terms{.x = static_cast<const A*>(given.x),
                                 .g = static_cast<const A*>(given.g),
                                 .size = size,
                                 .iterations = given.iterations,
                                 .first = static_cast<int>(first),
                                 .equal = equal_coupling<A>(c.J, given.leaky),
                                 .c = z,
                                 .delta = given.detach || states == 0 ? nullptr : e,
                                 .prior = static_cast<const A*>(given.prior),
                                 .rest = static_cast<const A*>(given.rest)};
        return for_wide_tiles(t, tile, c.context, [&] {
            if (states > 0) {
                const A* const y = adjoint ? terms.g + first * size : nullptr;
                CAPSOPS_TRY(compute_logits(t, terms.x + first * size, y, states, z, e, c.context));
                if (given.g_prior) {
                    // [pairs, J] has an index for b, i and j, and g_prior begins at the tile's first capsule.
                    A* const g_prior = static_cast<A*>(given.g_prior) + t.first * c.J;
                    CAPSOPS_TRY(add_rows(static_cast<const A*>(e), c.B, t.count * c.J, t.count * c.J, g_prior, false,
                                         c.context));
                }
                A* const delta = given.detach ? nullptr : e;
                CAPSOPS_TRY(compute_softmax(z, delta, states * t.pairs(), c.J, given.leaky, c.context));
            }
            const Runs runs = wide_runs(t, across, 0, resident_gradients);
            const dim3 grid{static_cast<unsigned>(across), static_cast<unsigned>(runs.count)};
            CAPSOPS_TRY(launch(gradients_kernel<T>, grid, threads, threads * static_cast<int64_t>(sizeof(A)), c.context,
                               t, runs.length, terms, to, gradients.u ? g_u : nullptr));
            if (!gradients.u) return Status::ok;
            return launch_over(t.pairs() * t.K, write_vectors<T>, c.context, t, static_cast<const A*>(g_u), across,
                               to.u, given.more);
        });
    });
}

}  // namespace capsops::cuda
