// Loops for votes that are too large for a block, even for one batch item. The votes are in GPU memory. Tiles of input
// capsules are processed one after another, each for all batch items.
//
//   û = u W                                      a matrix product, [B, tile, J, D]; a copy of votes that are given
//   reduce   s += Σ_i c û                        with the couplings that the policy computes from û
//   emit     g_u = g_û Wᵀ;  g_W = Σ_b uᵀ g_û     with the gradient that the policy computes from û; g_û itself is
//                                                written if the votes are given
//
// Equal couplings need no votes, unless these are given: s = Σ_i u_i W_i is one product, and so are the gradients of u
// and W.
//
// `limits` sets the number of capsules of a tile, from the shape alone. Sums over all capsules are made of the pieces
// of each tile, added in their order, in double.
//
// Masked pairs have votes of 0. Capsules may be matrices of P rows: their votes are [P, J, D] then, the rows one after
// another.
#pragma once

#include <concepts>

#include "product.h"
#include "rows.cuh"

namespace capsops::cuda {

// The input capsules first … first + count − 1. The pair of batch item b and capsule first + i has index b · count + i.
template <class A> struct StagedVotes {
    const uint8_t* mask;                  // [B, N], or null
    int64_t B, N, K, J, D, first, count;  // K: numbers_of_u()
    A* u;                                 // [B, count, K]; 0 where masked; null if the votes are given
    A* votes;                             // [B, count, P, J, D]

    // numbers: of memory for each pair.
    StagedVotes(const Capsules& c, int64_t numbers)
        : mask(c.mask), B(c.B), N(c.N), K(numbers_of_u(c)), J(c.J), D(c.D), first(0), u(nullptr), votes(nullptr) {
        const int64_t bytes = at_least(B * numbers * static_cast<int64_t>(sizeof(A)), 1);
        count = at_least(at_most(limits.tile / bytes, N), 1);
    }
    __host__ __device__ int64_t pairs() const { return B * count; }
    // The index of a pair in [B, N].
    __device__ int64_t of_all(int64_t pair) const { return pair / count * N + first + pair % count; }
    __device__ bool present(int64_t pair) const { return !mask || mask[of_all(pair)]; }
};

// The couplings that a policy computes for the votes of a tile.
template <class A> struct Couplings {
    const A* c = nullptr;      // [pairs, J], or [pairs, J, D] if elementwise; null: all are `equal`
    const A* prior = nullptr;  // [N, J], added; or null
    A equal = A(0);
    bool elementwise = false;

    __device__ A of(const StagedVotes<A>& t, int64_t pair, int64_t j) const {
        const A own = c ? c[pair * t.J + j] : equal;
        return prior ? own + prior[(t.first + pair % t.count) * t.J + j] : own;
    }
};

// What reduce_staged needs of a policy: the couplings of a tile. staged_numbers(J, D) is how many numbers of scratch
// memory it takes for each pair of batch item and input capsule.
template <class P, class A>
concept StagedReducingPolicy =
    requires(const P& policy, const StagedVotes<A>& t, A* scratch, Couplings<A>& c, const ExecutionContext& context) {
        { policy.staged_numbers(t.J, t.D) } -> std::same_as<int64_t>;
        { policy.stage_couplings(t, scratch, c, context) } -> std::same_as<Status>;
    };

// The same for a policy whose sums cannot be added up as they are (over_inputs.cuh): stage_couplings() also changes the
// total of the tiles before, and finish_staged() the sum over all tiles.
template <class P, class A>
concept StagedRescalingPolicy = requires(const P& policy, const StagedVotes<A>& t, A* scratch, Couplings<A>& c,
                                         double* total, A* out, const ExecutionContext& context) {
    { policy.staged_numbers(t.J, t.D) } -> std::same_as<int64_t>;
    { policy.stage_couplings(t, scratch, c, total, context) } -> std::same_as<Status>;
    { policy.finish_staged(t.D, out, context) } -> std::same_as<Status>;
};

// What reduce_uniform needs: the coupling of all pairs.
template <class P, class A>
concept UniformPolicy = requires(const P& policy) {
    { policy.uniform_coupling() } -> std::same_as<A>;
};

// What emit_staged needs: the gradient g of the votes of a tile, computed from the votes if needs_votes, and sums over
// the tile in params [pieces, param_count].
template <class P, class A>
concept StagedEmittingPolicy = requires(const P& policy, const StagedVotes<A>& t, A* scratch, A* g, A* params,
                                        int64_t pieces, const ExecutionContext& context) {
    { P::needs_votes } -> std::convertible_to<bool>;
    { policy.staged_numbers(t.J, t.D) } -> std::same_as<int64_t>;
    { policy.stage_gradient(t, scratch, g, params, pieces, context) } -> std::same_as<Status>;
};

// The number of pieces of a sum, reduced if they would take too much memory. size: numbers of a piece.
template <class A> int64_t fitting_pieces(int64_t pieces, int64_t size) {
    return at_least(at_most(pieces, limits.pieces / at_least(size * static_cast<int64_t>(sizeof(A)), 1)), 1);
}

// A sum over all tiles. Each tile contributes `count` rows of `size` numbers.
template <class A> struct RunningSum {
    int64_t size, count;
    double* total;
    A* rows = nullptr;

    RunningSum(Workspace& w, int64_t size_, int64_t count_)
        : size(size_), count(fitting_pieces<A>(count_, size)), total(w.take<double>(size)) {}
    void start_tile(Workspace& tile) { rows = tile.take<A>(size * count); }
    Status start(const ExecutionContext& context) const {
        return launch_over(size, write_zeros<double>, context, total, size);
    }
    Status add(const ExecutionContext& context) const {
        return launch_over(size, add_to_total<A>, context, rows, count, size, total);
    }
    template <class To> Status write(To* to, bool more, const ExecutionContext& context) const {
        return launch_over(size, copy_numbers<double, To>, context, total, to, size, more);
    }
};

// Combines x of all lanes of a row with `join`; the lanes of a row are every step-th thread, powers of 2 both. All
// threads of the block must call it.
template <class A, class Join> __device__ inline A over_lanes(A x, int lanes, Join join, int step = 1) {
    if (lanes * step <= warp_size) {
        for (int other = 1; other < lanes; other *= 2) x = join(x, __shfl_xor_sync(~0u, x, other * step));
        return x;
    }
    A* const memory = reinterpret_cast<A*>(shared_memory());
    const int t = static_cast<int>(threadIdx.x), lane = t / step % lanes;
    memory[t] = x;
    __syncthreads();
    for (int others = lanes / 2; others > 0; others /= 2) {
        if (lane < others) memory[t] = join(memory[t], memory[t + others * step]);
        __syncthreads();
    }
    const A all = memory[t - lane * step];
    __syncthreads();
    return all;
}
template <class A> __device__ inline A sum_over_lanes(A x, int lanes, int step = 1) {
    return over_lanes(x, lanes, [](A a, A b) { return a + b; }, step);
}

// Copies the tile's rows of x [B, N, own] to [B, count, size], where each is repeated until it has `size` numbers; 0
// where masked.
template <class A, class T> __global__ void stage_rows(StagedVotes<A> t, const T* x, int64_t own, int64_t size, A* to) {
    for (int64_t m = first_index(); m < t.pairs() * size; m += index_stride()) {
        const int64_t pair = m / size, number = m % size;
        to[m] =
            t.present(pair) ? static_cast<A>(x[t.of_all(pair) * own + (number < own ? number : number % own)]) : A(0);
    }
}

// The matrices as factors of products over the rows of the pairs' capsules: a product for each input capsule or, if
// they share a matrix, one for all.
template <class T> struct Matrices {
    using A = Accumulation<T>;
    int64_t P, count, batches, rows;
    int64_t step;   // pairs from one to the next in a product
    int64_t batch;  // rows from one product to the next
    int64_t K, JD;
    const T* weight;
    int64_t weight_stride;
    Dtype storage;

    Matrices(const Capsules& c, const StagedVotes<A>& t)
        : P(c.rows),
          count(t.count),
          batches(c.weight_stride ? t.count : 1),
          rows(c.rows * (c.weight_stride ? t.B : t.pairs())),
          step(c.weight_stride ? t.count : 1),
          batch(c.weight_stride ? c.rows : 0),
          K(c.K),
          JD(c.J * c.D),
          weight(static_cast<const T*>(c.weight) + t.first * c.weight_stride),
          weight_stride(c.weight_stride),
          storage(c.dtype) {}

    // The rows of a product, with `size` numbers each.
    Axis row(int64_t size) const { return P == 1 ? Axis{step * size} : Axis{size, P, step * P * size}; }
    // Rows of g, the gradient of the votes: [B, tile, P, J, D], or [B, J, D] if it is the same for every input capsule.
    Axis row_of(bool uniform) const {
        if (!uniform) return row(JD);
        return weight_stride ? Axis{JD} : Axis{0, count, JD};
    }

    Product votes(const A* u, A* to) const {
        return {.left = {u, row(K), {1}, batch * K},
                .right = {weight, {1}, {JD}, weight_stride},
                .out = to,
                .right_type = storage,
                .out_type = dtype_of<A>,
                .row = row(JD),
                .column = {1},
                .batch = batch * JD,
                .rows = rows,
                .columns = JD,
                .depth = K,
                .batches = batches};
    }
    // to: pieces of [B, tile, P, K], `piece` numbers apart.
    Product capsule_gradients(const A* g, bool uniform, A* to, int64_t pieces, int64_t piece) const {
        return {.left = {g, row_of(uniform), {1}, uniform ? 0 : batch * JD},
                .right = {weight, {JD}, {1}, weight_stride},
                .out = to,
                .right_type = storage,
                .out_type = dtype_of<A>,
                .row = row(K),
                .column = {1},
                .batch = batch * K,
                .piece = piece,
                .rows = rows,
                .columns = K,
                .depth = JD,
                .batches = batches,
                .pieces = pieces};
    }
    // Σ_i u_i W_i, in pieces of [B, J, D]. Only if P is 1.
    Product sums(const StagedVotes<A>& t, A* to, int64_t pieces) const {
        return {.left = {t.u, {count * K}, {1}},
                .right = {weight, {1}, {JD, K, weight_stride}},
                .out = to,
                .right_type = storage,
                .out_type = dtype_of<A>,
                .row = {JD},
                .column = {1},
                .piece = t.B * JD,
                .rows = t.B,
                .columns = JD,
                .depth = count * K,
                .pieces = pieces};
    }
    // to: as the matrices, or pieces of the gradient of a shared matrix.
    Product weight_gradients(const A* u, const A* g, bool uniform, void* to, Dtype type, int64_t pieces,
                             bool more) const {
        return {.left = {u, {1}, row(K), batch * K},
                .right = {g, {1}, row_of(uniform), uniform ? 0 : batch * JD},
                .out = to,
                .right_type = dtype_of<A>,
                .out_type = type,
                .row = {JD},
                .column = {1},
                .batch = weight_stride,
                .piece = K * JD,
                .rows = K,
                .columns = JD,
                .depth = rows,
                .batches = batches,
                .pieces = pieces,
                .add = more};
    }
};

// Adds up the pieces of g_u of a tile: `pieces` numbers, `piece` numbers apart, for each number of a row. There is a
// row of `row` numbers for each pair or, if uniform, for each batch item.
template <class A, class T>
__global__ void write_capsule_gradients(StagedVotes<A> t, const A* sums, int64_t row, bool uniform, int64_t pieces,
                                        int64_t piece, T* g_u, bool more) {
    for (int64_t x = first_index(); x < t.pairs() * t.K; x += index_stride()) {
        const int64_t pair = x / t.K;
        const A* const own = sums + (uniform ? pair / t.count : pair) * row + x % t.K;
        T& to = g_u[t.of_all(pair) * t.K + x % t.K];
        double sum = more ? static_cast<double>(static_cast<A>(to)) : 0;
        for (int64_t m = 0; m < pieces && t.present(pair); ++m) sum += static_cast<double>(own[m * piece]);
        to = static_cast<T>(static_cast<A>(sum));
    }
}

// sums [count, B, J, D] = Σ_i c û, over each of `count` runs of the tile's capsules.
template <class A> __global__ void weigh_votes(StagedVotes<A> t, Couplings<A> c, int64_t count, A* sums) {
    const int64_t JD = t.J * t.D, size = t.B * JD, run = ceil_div(t.count, count);
    for (int64_t x = first_index(); x < count * size; x += index_stride()) {
        const int64_t begin = x / size * run, end = at_most(begin + run, t.count), b = x % size / JD, jd = x % JD;
        const int64_t j = jd / t.D;
        A sum = 0;
#pragma unroll 8
        for (int64_t i = begin; i < end; ++i) {
            const int64_t pair = b * t.count + i;
            if (t.present(pair))
                sum += (c.elementwise ? c.c[pair * JD + jd] : c.of(t, pair, j)) * t.votes[pair * JD + jd];
        }
        sums[x] = sum;
    }
}

// ---- the loops ---------------------------------------------------------------------------------------------

// Calls step() for every tile, after computing t.u, unless the votes are given, and, if wanted, t.votes. w: the memory
// of a tile.
template <class T, class Step>
Status for_tiles(const Capsules& c, StagedVotes<Accumulation<T>>& t, const Workspace& w, bool wants_votes, Step step) {
    using A = Accumulation<T>;
    const int64_t most = t.count;
    for (; t.first < t.N; t.first += most) {
        w.start_over();
        t.count = at_most(most, t.N - t.first);
        const auto stage = [&](int64_t size, A* to) {
            return launch_over(t.pairs() * size, stage_rows<A, T>, c.context, t, static_cast<const T*>(c.u), t.K, size,
                               to);
        };
        if (!c.votes_given) CAPSOPS_TRY(stage(t.K, t.u));
        if (wants_votes)
            CAPSOPS_TRY(c.votes_given ? stage(t.J * t.D, t.votes)
                                      : multiply_matrices(Matrices<T>(c, t).votes(t.u, t.votes), c.context));
        CAPSOPS_TRY(step());
    }
    return Status::ok;
}

template <class T, class Policy>
    requires StagedReducingPolicy<Policy, Accumulation<T>> || StagedRescalingPolicy<Policy, Accumulation<T>>
Status reduce_staged(const Capsules& c, const Policy& policy, Workspace& whole, Accumulation<T>* out) {
    using A = Accumulation<T>;
    const int64_t JD = c.J * c.D, own = policy.staged_numbers(c.J, c.D), of_u = c.votes_given ? 0 : c.K;
    StagedVotes<A> t(c, of_u + JD + own);
    // Enough runs for some ten thousand threads, but no short run.
    const int64_t runs = at_least(at_most((int64_t{1} << 16) / at_least(c.B * JD, 1), t.count / 16), 1);
    Workspace w(&whole);
    RunningSum<A> sum(w, c.B * JD, runs);
    Workspace tile(&w);
    sum.start_tile(tile);
    t.u = tile.take<A>(t.pairs() * of_u);
    t.votes = tile.take<A>(t.pairs() * JD);
    A* scratch = tile.take<A>(t.pairs() * own);
    if (c.context.needed) return Status::ok;
    CAPSOPS_TRY(sum.start(c.context));
    CAPSOPS_TRY((for_tiles<T>(c, t, tile, true, [&] {
        Couplings<A> couplings{};
        if constexpr (StagedRescalingPolicy<Policy, A>)
            CAPSOPS_TRY(policy.stage_couplings(t, scratch, couplings, sum.total, c.context));
        else
            CAPSOPS_TRY(policy.stage_couplings(t, scratch, couplings, c.context));
        CAPSOPS_TRY(launch_over(sum.count * sum.size, weigh_votes<A>, c.context, t, couplings, sum.count, sum.rows));
        return sum.add(c.context);
    })));
    CAPSOPS_TRY(sum.write(out, false, c.context));
    if constexpr (StagedRescalingPolicy<Policy, A>) return policy.finish_staged(c.D, out, c.context);
    return Status::ok;
}

// For reduce_staged: the same coupling everywhere.
template <class A> struct EqualCouplings {
    A coupling;

    static int64_t staged_numbers(int64_t, int64_t) { return 0; }
    Status stage_couplings(const StagedVotes<A>&, A*, Couplings<A>& c, const ExecutionContext&) const {
        c.equal = coupling;
        return Status::ok;
    }
};

// out [B, J, D] = coupling Σ_i û_i.
template <class T>
Status reduce_uniform(const Capsules& c, Accumulation<T> coupling, Workspace& whole, Accumulation<T>* out) {
    using A = Accumulation<T>;
    if (c.votes_given) return reduce_staged<T>(c, EqualCouplings<A>{coupling}, whole, out);
    const int64_t JD = c.J * c.D, size = c.B * JD;
    StagedVotes<A> t(c, c.K);
    Workspace w(&whole);
    RunningSum<A> sum(w, size, pieces_for(blocks_along(c.B) * blocks_along(JD), t.count * c.K));
    Workspace tile(&w);
    sum.start_tile(tile);
    t.u = tile.take<A>(t.pairs() * c.K);
    if (c.context.needed) return Status::ok;
    CAPSOPS_TRY(sum.start(c.context));
    CAPSOPS_TRY((for_tiles<T>(c, t, tile, false, [&] {
        CAPSOPS_TRY(multiply_matrices(Matrices<T>(c, t).sums(t, sum.rows, sum.count), c.context));
        return sum.add(c.context);
    })));
    CAPSOPS_TRY(sum.write(out, false, c.context));
    return launch_over(size, multiply<A>, c.context, static_cast<const A*>(out), coupling, out, size);
}

// Whether a policy's gradient of the votes is the same for every input capsule. It says so by is_uniform(), and
// uniform_gradient() writes it.
template <class Policy> bool is_uniform(const Policy& policy) {
    if constexpr (requires { policy.is_uniform(); }) return policy.is_uniform();
    return false;
}

template <class T, StagedEmittingPolicy<Accumulation<T>> Policy, class Add>
Status emit_staged(const Capsules& c, const Policy& policy, CapsuleGradients gradients, int64_t param_count,
                   Workspace& whole, bool more, Add add) {
    using A = Accumulation<T>;
    const bool uniform = is_uniform(policy), shared = c.weight_stride == 0;
    if (c.votes_given) gradients.weight = nullptr;
    const bool needs_votes = Policy::needs_votes && !uniform;
    const int64_t JD = c.J * c.D, KJD = c.K * JD, vote = uniform ? 0 : c.rows * JD;
    const int64_t own = uniform ? 0 : policy.staged_numbers(c.J, c.D);
    const int64_t of_u = c.votes_given ? 0 : c.rows * c.K;
    StagedVotes<A> t(c, 2 * of_u + (needs_votes ? 2 : 1) * vote + own);
    const int64_t pairs = t.pairs();
    const bool sums = shared && gradients.weight;
    Workspace w(&whole);
    RunningSum<A> g_weight(w, sums ? KJD : 0, pieces_for(blocks_along(c.K) * blocks_along(JD), pairs));
    RunningSum<A> params(w, param_count, pieces_for(ceil_div(param_count, 4096), pairs * c.D));
    A* const same = w.take<A>(uniform ? c.B * JD : 0);
    Workspace memory(&w);
    g_weight.start_tile(memory);
    params.start_tile(memory);
    t.u = memory.take<A>(pairs * of_u);
    t.votes = memory.take<A>(needs_votes ? pairs * vote : 0);
    A* const g = uniform ? same : memory.take<A>(pairs * vote);
    A* scratch = memory.take<A>(pairs * own);
    const Matrices<T> m(c, t);
    const int64_t u_pieces =
        fitting_pieces<A>(pieces_for(m.batches * blocks_along(m.rows) * blocks_along(c.K), JD), pairs * of_u);
    A* g_u = memory.take<A>(gradients.u ? u_pieces * pairs * of_u : 0);
    if (c.context.needed) return Status::ok;
    CAPSOPS_TRY(g_weight.start(c.context));
    CAPSOPS_TRY(params.start(c.context));
    if constexpr (requires { policy.is_uniform(); })
        if (uniform) CAPSOPS_TRY(policy.uniform_gradient(same, c.context));
    CAPSOPS_TRY((for_tiles<T>(c, t, memory, needs_votes, [&] {
        if (!uniform) CAPSOPS_TRY(policy.stage_gradient(t, scratch, g, params.rows, params.count, c.context));
        if (param_count) CAPSOPS_TRY(params.add(c.context));
        const Matrices<T> tile(c, t);
        const auto write = [&](const A* sums, int64_t row, bool same, int64_t pieces, int64_t piece) {
            return launch_over(t.pairs() * t.K, write_capsule_gradients<A, T>, c.context, t, sums, row, same, pieces,
                               piece, static_cast<T*>(gradients.u), more);
        };
        if (gradients.u && c.votes_given)
            CAPSOPS_TRY(c.one_vote ? write(g, JD, uniform, c.J, c.D) : write(g, JD, uniform, 1, 0));
        if (gradients.u && !c.votes_given) {
            CAPSOPS_TRY(multiply_matrices(tile.capsule_gradients(g, uniform, g_u, u_pieces, pairs * of_u), c.context));
            CAPSOPS_TRY(write(g_u, of_u, false, u_pieces, pairs * of_u));
        }
        if (!gradients.weight) return Status::ok;
        if (!shared) {
            T* const to = static_cast<T*>(gradients.weight) + t.first * c.weight_stride;
            return multiply_matrices(tile.weight_gradients(t.u, g, uniform, to, c.dtype, 1, more), c.context);
        }
        CAPSOPS_TRY(multiply_matrices(
            tile.weight_gradients(t.u, g, uniform, g_weight.rows, dtype_of<A>, g_weight.count, false), c.context));
        return g_weight.add(c.context);
    })));
    if (sums) CAPSOPS_TRY(g_weight.write(static_cast<T*>(gradients.weight), more, c.context));
    return add(static_cast<const double*>(params.total), 1);
}

}  // namespace capsops::cuda
