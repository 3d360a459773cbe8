// EM routing on the votes of a pair of batch item b and input capsule i: their assignment to the output capsules, and
// the loops over the pairs.
//
// A pose of P rows is P vectors that are multiplied by the same matrices; a vote has H = P·D components. A thread has a
// part of one vote in registers, `rows` × `width` components. The threads of a pair form a row: `parts` for each output
// capsule; all numbers of threads are powers of 2. If a row cannot hold all output capsules, it holds a chunk of them,
// and another kernel has computed before what the softmax needs of all.
#pragma once

#include "../../math/em.h"
#include "../engine/stream.cuh"

namespace capsops::cuda {

// How the votes are divided among threads. Depends on the shape alone, so that sums have one order.
template <class T, int rows_, int width_> struct PoseTiling {
    using Storage = T;
    using A = Accumulation<T>;
    static constexpr int rows = rows_, width = width_, size = rows * width;
    // The terms of an iteration: for each thread of a row, `size` numbers of each kind, then two constants; by fours.
    static constexpr int logit_shift = 0, logit_quadratic = 1, shift = 2, linear = 3, quadratic = 4, kinds = 5;
    static constexpr int groups = kinds * size / 4 + 1;

    const T *u, *weight;  // [B, N, P, K], or [B, N, J, D] if these are the votes; [N, K, J, D] by weight_stride
    const uint8_t* mask;  // [B, N], or null
    const A* activation;  // [B, N]
    int64_t B, N, P, K, J, D, weight_stride;
    bool votes_given;           // as in Capsules; P is 1 then
    int columns, parts;         // parts of a vote along D; threads of an output capsule
    int lanes;                  // threads of a row
    int chunks;                 // of the output capsules
    bool aligned_u, aligned_w;  // whether the parts of u, and of W or of votes, can be read by 16 bytes

    PoseTiling(const Capsules& c, const void* activation)
        : u(static_cast<const T*>(c.u)),
          weight(static_cast<const T*>(c.weight)),
          mask(c.mask),
          activation(static_cast<const A*>(activation)),
          B(c.B),
          N(c.N),
          P(c.rows),
          K(c.K),
          J(c.J),
          D(c.D),
          weight_stride(c.weight_stride),
          votes_given(c.votes_given),
          aligned_u(c.K % 4 == 0 && reinterpret_cast<uintptr_t>(c.u) % 16 == 0),
          aligned_w(c.D % width == 0 && reinterpret_cast<uintptr_t>(c.votes_given ? c.u : c.weight) % 16 == 0) {
        const int64_t of_vote = ceil_div(P, rows) * at_least(ceil_div(D, width), 1), all = power_of_two(of_vote);
        columns = static_cast<int>(at_least(at_most(ceil_div(D, width), max_threads + 1), 1));
        parts = static_cast<int>(at_most(all, 2 * max_threads));
        lanes = static_cast<int>(at_least(at_most(power_of_two(J) * parts, max_threads), parts));
        chunks = static_cast<int>(ceil_div(J * parts, lanes));
    }
    // Whether a row has room for a vote.
    bool fits() const { return lanes <= max_threads; }
    // Of a block: no more rows than there are input capsules.
    int threads() const {
        return static_cast<int>(
            at_least(at_most(power_of_two(at_most(N, max_threads)) * lanes, max_threads), warp_size));
    }
    int block_rows() const { return threads() / lanes; }
    __host__ __device__ int64_t all_lanes() const { return static_cast<int64_t>(chunks) * lanes; }
    __host__ __device__ int64_t H() const { return P * D; }
    // Numbers of a row of sums: Σ w x [H], Σ w x² [H] and Σ w.
    __host__ __device__ int64_t moments() const { return 2 * H() + 1; }
    int64_t terms() const { return B * groups * 4 * all_lanes(); }
};

// A thread's place in its row.
template <class Tiling> struct PosePosition {
    int row, lane;  // of the block; of the row
    int j, p, d;    // its output capsule, and its first component
    int count;      // of its components along D; 0 if it has none
    bool exists;    // its output capsule

    __device__ PosePosition(const Tiling& t, int chunk) : PosePosition(t, chunk, static_cast<int>(threadIdx.x)) {}
    __device__ PosePosition(const Tiling& t, int chunk, int thread) : row(thread / t.lanes), lane(thread % t.lanes) {
        const int part = lane % t.parts;
        j = (chunk * t.lanes + lane) / t.parts;
        p = part / t.columns * Tiling::rows, d = part % t.columns * Tiling::width;
        exists = j < t.J;
        count = exists && p < t.P ? static_cast<int>(at_most(Tiling::width, t.D - d)) : 0;
    }
};

// The terms of a thread in an iteration, which pack_terms() has written: numbers of batch item b.
template <class Tiling> struct PoseTerms {
    using A = typename Tiling::A;
    const A* numbers;
    int64_t stride;  // from one group of four to the next

    __device__ PoseTerms(const Tiling& t, const A* terms, int64_t b, int chunk)
        : numbers(terms + (b * Tiling::groups * t.all_lanes() + static_cast<int64_t>(chunk) * t.lanes +
                           static_cast<int>(threadIdx.x) % t.lanes) *
                              4),
          stride(t.all_lanes() * 4) {}
    __device__ void load(int kind, A (&to)[Tiling::size]) const {
#pragma unroll
        for (int x = 0; x < Tiling::size; x += 4) {
            const auto some = Piece<A, 4>::load(numbers + (kind * Tiling::size + x) / 4 * stride);
#pragma unroll
            for (int m = 0; m < 4; ++m) to[x + m] = some.x[m];
        }
    }
    // Of the logit and of the gradient of a weight.
    __device__ void constants(A& logit, A& gradient) const {
        const auto some = Piece<A, 4>::load(numbers + (Tiling::groups - 1) * stride);
        logit = some.x[0], gradient = some.x[1];
    }
};

// The thread's part of a vote; 0 if the pair is absent, and beyond P and D.
template <class Tiling, class A = typename Tiling::A>
__device__ __forceinline__ void make_vote(const Tiling& t, const PosePosition<Tiling>& at, int64_t b, int64_t i,
                                          bool present, A (&v)[Tiling::size]) {
    constexpr int rows = Tiling::rows, width = Tiling::width;
#pragma unroll
    for (int x = 0; x < Tiling::size; ++x) v[x] = A(0);
    if (!present || at.count == 0) return;
    if constexpr (rows == 1)
        if (t.votes_given)
            return load_numbers(t.u + ((b * t.N + i) * t.J + at.j) * t.D + at.d, at.count, t.aligned_w, v);
    const auto* u = t.u + ((b * t.N + i) * t.P + at.p) * t.K;
    const auto* w = t.weight + i * t.weight_stride + at.j * t.D + at.d;
    const int64_t JD = t.J * t.D;
#pragma unroll 1
    for (int64_t k = 0; k < t.K; k += 4) {
        A a[rows][4];
#pragma unroll
        for (int m = 0; m < rows; ++m)
            load_numbers(u + m * t.K + k, at.p + m < t.P ? static_cast<int>(at_most(t.K - k, 4)) : 0, t.aligned_u,
                         a[m]);
#pragma unroll
        for (int x = 0; x < 4; ++x) {
            A row[width];
            load_numbers(w + (k + x) * JD, k + x < t.K ? at.count : 0, t.aligned_w, row);
#pragma unroll
            for (int m = 0; m < rows; ++m)
#pragma unroll
                for (int d = 0; d < width; ++d) v[m * width + d] += a[m][x] * row[d];
        }
    }
}

// Σ (linear + quadratic x) x with x = v − shift.
template <class A, int size>
__device__ inline A form(const A (&v)[size], const A (&shift)[size], const A (&linear)[size],
                         const A (&quadratic)[size]) {
    A sum = 0;
#pragma unroll
    for (int x = 0; x < size; ++x) {
        const A moved = v[x] - shift[x];
        sum += (linear[x] + quadratic[x] * moved) * moved;
    }
    return sum;
}
template <class A, int size>
__device__ inline A form(const A (&v)[size], const A (&shift)[size], const A (&quadratic)[size]) {
    A sum = 0;
#pragma unroll
    for (int x = 0; x < size; ++x) {
        const A moved = v[x] - shift[x];
        sum += quadratic[x] * moved * moved;
    }
    return sum;
}

// Joins x over every step-th thread among each `size` neighbouring ones, both powers of 2. x is the same for the
// threads in between. All threads of the block call it together.
template <class A, int n, class Join> __device__ inline void join_lanes(A (&x)[n], int step, int size, Join join) {
    for (int other = step; other < size && other < warp_size; other *= 2)
#pragma unroll
        for (int m = 0; m < n; ++m) x[m] = join(x[m], __shfl_xor_sync(~0u, x[m], other));
    if (size <= warp_size) return;
    A* const shared = reinterpret_cast<A*>(shared_memory());
    const int warps = size / warp_size, warp_step = step > warp_size ? step / warp_size : 1;
    const int warp = static_cast<int>(threadIdx.x) / warp_size, first = warp / warps * warps + warp % warp_step;
    if (threadIdx.x % warp_size == 0)
#pragma unroll
        for (int m = 0; m < n; ++m) shared[warp * n + m] = x[m];
    __syncthreads();
#pragma unroll
    for (int m = 0; m < n; ++m) x[m] = shared[first * n + m];
    for (int k = warp_step; k < warps; k += warp_step)
#pragma unroll
        for (int m = 0; m < n; ++m) x[m] = join(x[m], shared[(first + k) * n + m]);
    __syncthreads();
}

// The logit z of an output capsule, and the gradient e of its weight if wanted: sums over the threads of a vote.
template <bool with_gradient, class Tiling, class A> __device__ inline void join_forms(const Tiling& t, A& z, A& e) {
    if constexpr (with_gradient) {
        A both[2] = {z, e};
        join_lanes(both, 1, t.parts, Add{});
        z = both[0], e = both[1];
    } else {
        A one[1] = {z};
        join_lanes(one, 1, t.parts, Add{});
        z = one[0];
    }
}

// The responsibility r = softmax_j(z) of an output capsule, and Σ_j r e if wanted.
template <class A> struct Responsibility {
    A r, mean = A(0);

    // normaliser: log Σ_j e^z and Σ_j r e of the pair, if the row has a chunk of the output capsules; else null.
    template <bool with_gradient, class Tiling>
    __device__ void compute(const Tiling& t, bool exists, A z, A e, const A* normaliser) {
        if (normaliser) {
            r = exists ? exponential(z - normaliser[0]) : A(0);
            mean = normaliser[1];
            return;
        }
        A largest[1] = {exists ? z : A(-INFINITY)};
        join_lanes(largest, t.parts, t.lanes, Max{});
        r = exists ? exponential(z - largest[0]) : A(0);
        A sums[with_gradient ? 2 : 1];
        sums[0] = r;
        if constexpr (with_gradient) sums[1] = exists ? r * e : A(0);
        join_lanes(sums, t.parts, t.lanes, Add{});
        const A inverse = reciprocal(sums[0]);
        r *= inverse;
        if constexpr (with_gradient) mean = sums[1] * inverse;
    }
};

// Writes, for the pairs of the input capsules first … first + count − 1, log Σ_j e^z and, if with_gradient, Σ_j r e.
// equal: all z are 0. With sums the first number is the largest z instead, and the sums are Σ_j e^(z − largest): their
// logarithm would lose digits beside the largest z.
template <class Tiling, class A = typename Tiling::A>
__global__ void __launch_bounds__(max_threads, 1)
    normalise_pairs(Tiling t, const A* terms, bool equal, bool with_gradient, int64_t first, int64_t count,
                    A* normalisers /* [B, count, 2] */, A* own_sums /* [B, count], or null */) {
    const PosePosition<Tiling> own(t, 0);
    const int64_t pair = static_cast<int64_t>(blockIdx.x) * (static_cast<int>(blockDim.x) / t.lanes) + own.row;
    const bool in_run = pair < t.B * count;
    const int64_t b = in_run ? pair / count : 0, i = first + (in_run ? pair % count : 0);
    const bool present = in_run && (!t.mask || t.mask[b * t.N + i]);
    A largest[1] = {A(-INFINITY)}, sums[2] = {A(0), A(0)};
    for (int chunk = 0; chunk < t.chunks; ++chunk) {
        const PosePosition<Tiling> at(t, chunk);
        const PoseTerms<Tiling> term(t, terms, b, chunk);
        A v[Tiling::size], z, e = A(0), constant;
        make_vote(t, at, b, i, present, v);
        A shift[Tiling::size], quadratic[Tiling::size];
        term.constants(z, constant);
        term.load(Tiling::logit_shift, shift), term.load(Tiling::logit_quadratic, quadratic);
        A part = form(v, shift, quadratic), gradient = A(0);
        if (with_gradient) {
            A linear[Tiling::size];
            term.load(Tiling::shift, shift), term.load(Tiling::linear, linear), term.load(Tiling::quadratic, quadratic);
            gradient = form(v, shift, linear, quadratic);
        }
        join_forms<true>(t, part, gradient);
        z = equal ? A(0) : z + part, e = constant + gradient;
        if (!at.exists) continue;
        const A larger_one = max(largest[0], z), scale = exponential(largest[0] - larger_one),
                weight = exponential(z - larger_one);
        sums[0] = sums[0] * scale + weight, sums[1] = sums[1] * scale + weight * e;
        largest[0] = larger_one;
    }
    const A before = largest[0];
    join_lanes(largest, t.parts, t.lanes, Max{});
    const A scale = exponential(before - largest[0]);
    sums[0] *= scale, sums[1] *= scale;
    join_lanes(sums, t.parts, t.lanes, Add{});
    if (own.lane > 0 || !in_run) return;
    normalisers[2 * pair] = own_sums ? largest[0] : largest[0] + std::log(sums[0]);
    if (own_sums) own_sums[pair] = sums[0];
    normalisers[2 * pair + 1] = sums[1] / sums[0];
}

// Σ_i w (1, x, x²) over a run of input capsules. Forward: w is the responsibility times the activation, and x = û −
// shift. adjoint: w is the gradient of the logit, and x = û − logit_shift. again: leaves out the batch items that have
// 0. means: of windows that compete, Σ r e over the output capsules of all of them.
template <bool adjoint, class Tiling, class A = typename Tiling::A>
__global__ void __launch_bounds__(max_threads, 1)
    sum_moments(Tiling t, const A* terms, const A* normalisers, const A* means /* [B, N], or null */, bool equal,
                const A* again, int64_t first, int64_t count, int64_t length, A* partial /* [runs, B, J, moments] */) {
    constexpr int size = Tiling::size;
    const int64_t b = blockIdx.x % t.B, run = blockIdx.x / t.B, H = t.H();
    if (again && again[b] == A(0)) return;
    const int chunk = static_cast<int>(blockIdx.y), block_rows = static_cast<int>(blockDim.x) / t.lanes;
    const PosePosition<Tiling> at(t, chunk);
    const PoseTerms<Tiling> term(t, terms, b, chunk);
    A logit_shift[size], logit_quadratic[size], shift[size], logit_constant, constant;
    term.constants(logit_constant, constant);
    term.load(Tiling::logit_shift, logit_shift), term.load(Tiling::logit_quadratic, logit_quadratic);
    term.load(Tiling::shift, shift);
    A linear[adjoint ? size : 1], quadratic[adjoint ? size : 1];
    if constexpr (adjoint) term.load(Tiling::linear, linear), term.load(Tiling::quadratic, quadratic);
    A sums[size] = {}, squares[size] = {}, mass = A(0);
    const int64_t begin = run * length, end = at_most(begin + length, count);
    for (int64_t x = begin; x < end; x += block_rows) {
        const int64_t own = x + at.row, i = first + own;
        const bool present = own < end && (!t.mask || t.mask[b * t.N + i]);
        A v[size];
        make_vote(t, at, b, i, present, v);
        A w = present ? t.activation[b * t.N + i] : A(0);
        if (equal && !adjoint) {
            w /= static_cast<A>(t.J);
        } else {
            A z = form(v, logit_shift, logit_quadratic), e = A(0);
            if constexpr (adjoint) e = form(v, shift, linear, quadratic);
            join_forms<adjoint>(t, z, e);
            Responsibility<A> own_r;
            const A* const normaliser = normalisers ? normalisers + 2 * (b * count + at_most(own, end - 1)) : nullptr;
            own_r.template compute<adjoint>(t, at.exists, logit_constant + z, constant + e, normaliser);
            w *= own_r.r;
            if constexpr (adjoint) w *= constant + e - (means && present ? means[b * t.N + i] : own_r.mean);
        }
        if (!present) w = A(0);  // also where the terms are not finite
        mass += w;
#pragma unroll
        for (int m = 0; m < size; ++m) {
            const A moved = v[m] - (adjoint ? logit_shift[m] : shift[m]), weighted = w * moved;
            sums[m] += weighted, squares[m] += weighted * moved;
        }
    }
    // Sums over the rows of the block: in shared memory, numbers [2 · size + 1, threads].
    A* const shared = reinterpret_cast<A*>(shared_memory());
    const int threads = static_cast<int>(blockDim.x), own = static_cast<int>(threadIdx.x);
    __syncthreads();
#pragma unroll
    for (int m = 0; m < size; ++m) {
        shared[m * threads + own] = sums[m];
        shared[(size + m) * threads + own] = squares[m];
    }
    shared[2 * size * threads + own] = mass;
    __syncthreads();
    for (int x = own; x < (2 * size + 1) * t.lanes; x += threads) {
        const int number = x / t.lanes, m = number % size, p = m / Tiling::width, d = m % Tiling::width;
        const PosePosition<Tiling> of(t, chunk, x % t.lanes);
        const bool is_mass = number == 2 * size;
        if (is_mass ? !of.exists || of.p > 0 || of.d > 0 : of.p + p >= t.P || d >= of.count) continue;
        A sum = 0;
        for (int row = 0; row < block_rows; ++row) sum += shared[number * threads + row * t.lanes + of.lane];
        const int64_t h = (of.p + p) * t.D + of.d + d;
        partial[((run * t.B + b) * t.J + of.j) * t.moments() + (is_mass ? 2 * H : number < size ? h : H + h)] = sum;
    }
}

// The gradient of the votes through all iterations, and of the activations. As in csrc/cpu/ops/em.cpp:
//
//   g_û = Σ_t [w^t (linear^t + 2 quadratic^t (û − μ^t)) + δ^t 2 logit_quadratic^t (û − μ^{t−1})]
//
// Windows that compete have a weight in place of the activation, and Σ r e, for each iteration.
template <class Tiling, class A = typename Tiling::A>
__global__ void __launch_bounds__(max_threads, 1)
    vote_gradients(Tiling t, const A* terms /* of each iteration */, int64_t of_iteration, int64_t iterations,
                   const A* normalisers /* [iterations, B, count, 2], or null */,
                   const A* weights /* [iterations, B, N], or null */,
                   const A* means /* [iterations, B, N]; null if weights are */, int64_t first, int64_t count,
                   A* g /* [B, count, P, J, D] */, A* g_activation /* [B, N], or null */) {
    constexpr int size = Tiling::size, width = Tiling::width;
    const int chunk = static_cast<int>(blockIdx.y);
    const PosePosition<Tiling> at(t, chunk);
    const int64_t pairs = t.B * count;
    const int64_t pair = static_cast<int64_t>(blockIdx.x) * (static_cast<int>(blockDim.x) / t.lanes) + at.row;
    const bool in_run = pair < pairs;
    const int64_t own = in_run ? pair : 0, b = own / count, i = first + own % count;
    const bool present = in_run && (!t.mask || t.mask[b * t.N + i]);
    const A activation = present ? t.activation[b * t.N + i] : A(0);
    A v[size], out[size] = {}, total = A(0);
    make_vote(t, at, b, i, present, v);
#pragma unroll 1
    for (int64_t iteration = 0; iteration < iterations; ++iteration) {
        const PoseTerms<Tiling> term(t, terms + iteration * of_iteration, b, chunk);
        A logit_shift[size], logit_quadratic[size], shift[size], linear[size], quadratic[size], z, e;
        term.constants(z, e);
        term.load(Tiling::logit_shift, logit_shift), term.load(Tiling::logit_quadratic, logit_quadratic);
        term.load(Tiling::shift, shift), term.load(Tiling::linear, linear), term.load(Tiling::quadratic, quadratic);
        A part = form(v, logit_shift, logit_quadratic), gradient = form(v, shift, linear, quadratic);
        join_forms<true>(t, part, gradient);
        z = iteration == 0 ? A(0) : z + part, e += gradient;
        Responsibility<A> r;
        r.template compute<true>(t, at.exists, z, e,
                                 normalisers ? normalisers + 2 * (iteration * pairs + own) : nullptr);
        total += r.mean;
        A weight = activation, mean = r.mean;
        if (weights && present) {
            const int64_t at = (iteration * t.B + b) * t.N + i;
            weight = weights[at], mean = means[at];
        }
        const A w = weight * r.r, delta = w * (e - mean);
#pragma unroll
        for (int m = 0; m < size; ++m) {
            out[m] += w * (linear[m] + A(2) * quadratic[m] * (v[m] - shift[m]));
            if (iteration > 0) out[m] += delta * A(2) * logit_quadratic[m] * (v[m] - logit_shift[m]);
        }
    }
    if (!in_run) return;
    if (g_activation && chunk == 0 && at.lane == 0) g_activation[b * t.N + i] = present ? total : A(0);
    if (at.count == 0) return;
#pragma unroll
    for (int p = 0; p < Tiling::rows; ++p) {
        if (at.p + p >= t.P) continue;
        A* const to = g + ((pair * t.P + at.p + p) * t.J + at.j) * t.D + at.d;
        if (t.aligned_w) {
#pragma unroll
            for (int d = 0; d < width; d += 4) {
                Piece<A, 4> some;
#pragma unroll
                for (int m = 0; m < 4; ++m) some.x[m] = present ? out[p * width + d + m] : A(0);
                *reinterpret_cast<Piece<A, 4>*>(to + d) = some;
            }
        } else {
#pragma unroll
            for (int d = 0; d < width; ++d)
                if (d < at.count) to[d] = present ? out[p * width + d] : A(0);
        }
    }
}

}  // namespace capsops::cuda
