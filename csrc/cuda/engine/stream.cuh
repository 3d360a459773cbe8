// The loops over the input capsules on a GPU, as csrc/cpu/engine/stream.h has them on a CPU:
//
//   reduce   out[b] = Σ_i policy(û_bi)
//   emit     g_u,bi = g_û,bi W_iᵀ;  g_W,i = Σ_b u_biᵀ g_û,bi
//
// A thread has one batch item, one output capsule and `width` components of its vote in registers; a longer vote is
// split into parts, one for each of several threads. The threads of one batch item form a row; those of one tile of the
// batch form a team. A block consists of several teams, each with its own input capsule, and strides through a run of
// capsules. The threads of a team read the same matrix at the same time, so that it is loaded once in a pass for the
// whole tile.
//
// grid: runs of capsules × tiles of the batch. In emit a block sums g_W over tiles, so it takes several, a split of the
// batch; more than one split only where there would be too few blocks. Every block has its own partial sums, which are
// added in the order of the blocks, in double: no atomics, and bitwise the same results in every run.
//
// What distinguishes the routings is in policies: ReducingPolicy and EmittingPolicy below. All threads of a block call
// the functions of a policy together, because they exchange numbers through shared memory. If the votes of one batch
// item do not fit into a block, reduce and emit use the loops of staged.cuh.
#pragma once

#include "../../math/softmax.h"
#include "gradients.cuh"
#include "runs.h"
#include "staged.cuh"
#include "warp.cuh"

namespace capsops::cuda {

// Numbers of u that a thread loads at once, with their rows of W. More would take too many registers.
constexpr int u_piece = 2;

// Where the rows of threads lie in a block. A row of at most a warp lies in one warp, so that its threads need not wait
// for the block; unless more than a quarter of the lanes would be idle.
struct ThreadRows {
    int size;      // threads of a row
    int per_warp;  // rows of a warp; 0 if they are not aligned to warps

    explicit ThreadRows(int size_) : size(size_), per_warp(warp_size / size) {
        if (4 * per_warp * size < 3 * warp_size) per_warp = 0;
    }
    // Rows of a block with this many threads, and threads of a block with this many rows.
    int within(int threads) const { return per_warp ? threads / warp_size * per_warp : threads / size; }
    int threads(int rows) const {
        return per_warp ? static_cast<int>(ceil_div(rows, per_warp)) * warp_size
                        : whole_warps(static_cast<int64_t>(rows) * size);
    }
    // The first thread of a row.
    __host__ __device__ int first(int row) const {
        return per_warp ? row / per_warp * warp_size + row % per_warp * size : row * size;
    }
};

// How the capsules are divided into tiles and runs. Depends on the shape alone, so that sums have one order.
template <class T, int width> struct Tiling {
    const T* u;           // [B, N, K]
    const T* weight;      // [N, K, J, D], or [K, J, D] if weight_stride is 0
    const uint8_t* mask;  // [B, N], or null
    int64_t B, N, K, J, D, weight_stride;
    bool aligned, aligned_u;  // whether rows of W can be read by 16 bytes, and rows of u by u_piece numbers
    int parts;                // threads for a vote
    ThreadRows rows;          // of the threads for the votes of one batch item
    int items, tiles;         // batch items of a tile, which are the rows of a team; tiles
    int teams, threads;
    int tiles_of_split, splits;  // in emit: tiles of a block; blocks along them
    Runs runs;                   // of capsules; cut_runs() makes them

    // numbers: that each thread has in shared memory, of the accumulation type.
    Tiling(const Capsules& c, int64_t numbers)
        : u(static_cast<const T*>(c.u)),
          weight(static_cast<const T*>(c.weight)),
          mask(c.mask),
          B(c.B),
          N(c.N),
          K(c.K),
          J(c.J),
          D(c.D),
          weight_stride(c.weight_stride),
          aligned(c.D % width == 0 && reinterpret_cast<uintptr_t>(c.weight) % 16 == 0),
          aligned_u(c.K % u_piece == 0 && reinterpret_cast<uintptr_t>(c.u) % 16 == 0),
          parts(static_cast<int>(at_most(ceil_div(D, width), max_threads + 1))),
          rows(static_cast<int>(at_most(at_least(J * parts, 1), max_threads + 1))) {
        const int64_t bytes = numbers * static_cast<int64_t>(sizeof(Accumulation<T>));
        const int fitting = static_cast<int>(at_most(max_threads, (shared_bytes / bytes - 1) / warp_size * warp_size));
        constexpr int min_threads = 64;
        // Smaller blocks if there would be too few.
        for (int most = fitting;; most /= 2) {
            make_teams(at_least(rows.within(most), 1));
            if (steps() * tiles >= limits.blocks || most / 2 < at_least(min_threads, rows.threads(1))) break;
        }
        tiles_of_split = tiles, splits = 1;
    }
    // Divides the tiles into splits, if there are too few steps for all blocks. bytes: the sums of a split.
    void split(int64_t bytes) {
        const int64_t wanted = ceil_div(limits.blocks, steps()), fitting = limits.sums / at_least(bytes, 1);
        const int64_t most = at_least(at_most(at_most(wanted, fitting), tiles), 1);
        tiles_of_split = static_cast<int>(ceil_div(tiles, most));
        splits = static_cast<int>(ceil_div(tiles, tiles_of_split));
    }
    // For all teams of a block together.
    int64_t steps() const { return ceil_div(N, teams); }

    __host__ __device__ bool shared_weight() const { return weight_stride == 0; }
    // Whether the votes of one batch item fit into a block.
    bool fits(int64_t numbers) const { return threads <= max_threads && bytes(numbers) <= shared_bytes; }
    int64_t bytes(int64_t numbers) const {
        return numbers * (threads + 1) * static_cast<int64_t>(sizeof(Accumulation<T>));
    }

  private:
    void make_teams(int64_t fitting) {
        // The limit of a grid along y. A larger batch has tiles that do not fit.
        constexpr int64_t max_tiles = 65535;
        tiles = static_cast<int>(at_most(at_least(ceil_div(B, fitting), 1), max_tiles));
        items = static_cast<int>(at_least(ceil_div(B, tiles), 1));
        teams = static_cast<int>(at_least(at_most(fitting / items, N), 1));
        threads = rows.threads(teams * items);
    }
};

// The position of a thread in the work, and its access to shared memory.
template <class A, int width> struct ThreadPosition {
    int64_t i = 0, b, j;  // its input capsule, batch item and output capsule
    int part, parts;      // it has the components part · width … part · width + count − 1
    int count;
    bool in_run = false;            // whether the capsule is in the block's run and the batch item exists
    bool present = false;           // the same, and the pair is not masked
    bool in_warp;                   // whether all threads of a row are in one warp
    bool aligned;                   // whether the rows divide a warp
    int team;                       // of the block; one too many if the thread is idle
    int item, items, tile;          // batch item in the tile, items of a tile, tile
    int split = 0, first_tile = 0;  // the block's split, and its first tile
    int64_t N, J, D;
    int slot, row;  // index in the block: of this thread, of the first thread of its row (batch item and team)
    int row_size;   // threads of a row
    A* memory;      // [numbers, threads + 1]: + 1 against bank conflicts between the numbers of a thread

    __device__ A& shared(int64_t number, int64_t slot_) const {
        return memory[number * (static_cast<int64_t>(blockDim.x) + 1) + slot_];
    }
    // Number `number` of the thread with the same part of output capsule k.
    __device__ A of(int64_t number, int64_t k) const { return shared(number, row + k * parts + part); }
    // The index of its first component in [B, J, D].
    __device__ int64_t state() const { return (b * J + j) * D + part * width; }

    // Publishes numbers to the threads of the same batch item and team, after they have read the previous ones.
    template <int n> __device__ void publish(int64_t first, const A (&x)[n]) const {
        sync();
        write(first, x);
        sync();
    }
    // Publishes numbers to the whole block.
    template <int n> __device__ void publish_to_block(int64_t first, const A (&x)[n]) const {
        __syncthreads();
        write(first, x);
        __syncthreads();
    }
    __device__ void sync() const {
        if (in_warp)
            __syncwarp();
        else
            __syncthreads();
    }

  private:
    template <int n> __device__ void write(int64_t first, const A (&x)[n]) const {
#pragma unroll
        for (int m = 0; m < n; ++m) shared(first + m, slot) = x[m];
    }
};

template <class T, int width> struct Thread {
    ThreadPosition<Accumulation<T>, width> at;
    bool paired;  // whether it has a batch item in this tile

    __device__ explicit Thread(const Tiling<T, width>& tiling) {
        const ThreadRows& rows = tiling.rows;
        at.slot = static_cast<int>(threadIdx.x);
        int row = at.slot / rows.size, place = at.slot % rows.size;
        bool idle = false;
        if (rows.per_warp) {
            const int lane = at.slot % warp_size;
            row = at.slot / warp_size * rows.per_warp + lane / rows.size, place = lane % rows.size;
            idle = lane >= rows.per_warp * rows.size;
        }
        idle = idle || row >= tiling.teams * tiling.items;
        at.team = idle ? tiling.teams : row / tiling.items;
        at.item = row % tiling.items, at.items = tiling.items;
        at.in_warp = rows.per_warp > 0, at.aligned = warp_size % rows.size == 0;
        at.j = place / tiling.parts;
        at.part = place % tiling.parts, at.parts = tiling.parts;
        at.count = static_cast<int>(at_most(width, tiling.D - at.part * width));
        at.row = idle ? 0 : at.slot - place, at.row_size = rows.size;
        at.N = tiling.N, at.J = tiling.J, at.D = tiling.D;
        at.memory = reinterpret_cast<Accumulation<T>*>(shared_memory());
    }
    // Moves to a tile of the batch, before its capsules.
    __device__ void go_to_tile(const Tiling<T, width>& tiling, int tile) {
        at.tile = tile;
        at.b = static_cast<int64_t>(tile) * tiling.items + at.item;
        paired = at.present = at.team < tiling.teams && at.b < tiling.B;
    }
    // Moves to the capsules from `first` on, one for each team.
    __device__ void go_to(const Tiling<T, width>& tiling, int64_t first, int64_t end) {
        at.i = first + at.team;
        at.in_run = paired && at.i < end;
        at.present = at.in_run && (!tiling.mask || tiling.mask[at.b * tiling.N + at.i]);
    }
};

// Numbers that a thread loads at once.
template <class T, int size> struct alignas(size * sizeof(T)) Piece {
    T x[size];

    __device__ static Piece load(const T* from) { return *reinterpret_cast<const Piece*>(from); }
    __device__ Accumulation<T> operator[](int m) const { return static_cast<Accumulation<T>>(x[m]); }
};

// Reads `count` numbers of a row of W; the others are 0.
template <int width, class T>
__device__ inline void read_row(const T* from, int count, bool aligned, Accumulation<T> (&to)[width]) {
    if (aligned) {
        constexpr int piece = 16 / static_cast<int>(sizeof(T));
#pragma unroll
        for (int d = 0; d < width; d += piece) {
            const auto x = Piece<T, piece>::load(from + d);
#pragma unroll
            for (int m = 0; m < piece; ++m) to[d + m] = x[m];
        }
    } else {
#pragma unroll
        for (int d = 0; d < width; ++d) to[d] = d < count ? static_cast<Accumulation<T>>(from[d]) : Accumulation<T>(0);
    }
}

// The thread's part of u_bi W_ij; 0 if it has none, and beyond D.
template <class T, int width>
__device__ inline void make_vote(const Tiling<T, width>& tiling, const ThreadPosition<Accumulation<T>, width>& at,
                                 Accumulation<T> (&v)[width]) {
    using A = Accumulation<T>;
#pragma unroll
    for (int d = 0; d < width; ++d) v[d] = A(0);
    if (!at.present) return;
    const T* u = tiling.u + (at.b * tiling.N + at.i) * tiling.K;
    const T* w = tiling.weight + at.i * tiling.weight_stride + at.j * tiling.D + at.part * width;
    const int64_t JD = tiling.J * tiling.D;
    const auto add = [&](A a, int64_t k) {
        A row[width];
        read_row(w + k * JD, at.count, tiling.aligned, row);
#pragma unroll
        for (int d = 0; d < width; ++d) v[d] += a * row[d];
    };
    if (tiling.aligned_u) {
#pragma unroll 1
        for (int64_t k = 0; k < tiling.K; k += u_piece) {
            const auto a = Piece<T, u_piece>::load(u + k);
#pragma unroll
            for (int m = 0; m < u_piece; ++m) add(a[m], k + m);
        }
    } else {
#pragma unroll 2
        for (int64_t k = 0; k < tiling.K; ++k) add(static_cast<A>(u[k]), k);
    }
}

// Prefetches what the teams read in the step from `first` on.
template <class T, int width>
__device__ inline void ask_for(const Tiling<T, width>& tiling, const ThreadPosition<Accumulation<T>, width>& at,
                               int64_t first, int64_t end) {
    constexpr int64_t line = 128;
    if (at.team < tiling.teams && first + at.team < end && at.j == 0 && at.part == 0 && at.b < tiling.B)
        prefetch(tiling.u + (at.b * tiling.N + first + at.team) * tiling.K);
    if (tiling.shared_weight() || first >= end) return;
    const char* from = reinterpret_cast<const char*>(tiling.weight + first * tiling.weight_stride);
    const int64_t bytes = at_most(tiling.teams, end - first) * tiling.weight_stride * static_cast<int64_t>(sizeof(T));
    for (int64_t x = threadIdx.x * line; x < bytes; x += blockDim.x * line) prefetch(from + x);
}

// Loads the thread's part of a state [B, J, D].
template <class A, int width>
__device__ inline void load(const A* x, const ThreadPosition<A, width>& at, A (&to)[width]) {
#pragma unroll
    for (int d = 0; d < width; ++d) to[d] = at.present && d < at.count ? x[at.state() + d] : A(0);
}

template <int width, class A> __device__ inline A dot(const A (&x)[width], const A (&y)[width]) {
    A sum = 0;
#pragma unroll
    for (int d = 0; d < width; ++d) sum += x[d] * y[d];
    return sum;
}

struct Add {
    template <class A> __device__ A operator()(A a, A b) const { return a + b; }
};
struct Max {
    template <class A> __device__ A operator()(A a, A b) const { return max(a, b); }
};

// Joins x over the parts of a vote. numbers: n numbers of shared memory begin there. Here and below, all threads of the
// block take part, and all threads of a row get bitwise the same result.
template <class A, int width, int n, class Join>
__device__ inline void join_parts(const ThreadPosition<A, width>& at, int64_t numbers, A (&x)[n], Join join) {
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
template <class A, int width, int n, class Join>
__device__ inline void join_capsules(const ThreadPosition<A, width>& at, int64_t numbers, A (&x)[n], Join join) {
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
#pragma unroll 1
        for (int k = first + step; k < end; k += step)
#pragma unroll
            for (int m = 0; m < n; ++m) x[m] = join(x[m], at.of(numbers + m, k));
    };
    // For many output capsules in two steps: over a group of about √J of them, then over the groups.
    constexpr int few = 16;
    const int J = static_cast<int>(at.J);
    int group = 1;
    if (J > few) {
        while (group * group < J) ++group;
        const int first = static_cast<int>(at.j) / group * group;
        join_some(first, 1, static_cast<int>(at_most(first + group, J)));
    }
    join_some(0, group, J);
}

// ---- policies ------------------------------------------------------------------------------------------------

// What `reduce` needs. start() loads what the thread keeps in registers for a tile of the batch; couple() computes the
// weights c of the components of the vote v.
template <class P, class T, int width, class A = Accumulation<T>>
concept ReducingPolicy =
    StagedReducingPolicy<P, A> && requires(const P& policy, const ThreadPosition<A, width>& at,
                                           typename P::Registers& own, A (&v)[width], A (&c)[width]) {
        policy.start(at, own);
        policy.couple(at, own, v, c);
    };

// What `emit` needs. The host calls cut() with the number of rows of votes in a block, and may take memory there.
// gradient() computes the gradient g of the vote v. end_block() writes the sums of the block to params [param_count].
template <class P, class T, int width, class A = Accumulation<T>>
concept EmittingPolicy =
    StagedEmittingPolicy<P, A> &&
    requires(P& policy, const P& on_device, const ThreadPosition<A, width>& at, typename P::Registers& own,
             A (&v)[width], A (&g)[width], A* params, const Tiling<T, width>& tiling, Workspace& workspace) {
        policy.cut(tiling, int{}, workspace);
        on_device.begin_block();
        on_device.start(at, own);
        on_device.gradient(at, own, v, g);
        on_device.end_block(params);
    };

// ---- reduce ------------------------------------------------------------------------------------------------

// Blocks that should fit on a multiprocessor, which limits the registers of a thread: one if numbers are double or the
// policy keeps two states of the output capsules.
template <class A, class Registers> constexpr int blocks_of = sizeof(A) == 4 && sizeof(Registers) <= 64 ? 2 : 1;

template <int width, class T, class Policy>
__global__ void __launch_bounds__(max_threads, blocks_of<Accumulation<T>, typename Policy::Registers>)
    reduce_kernel(Tiling<T, width> tiling, Policy policy, Accumulation<T>* partial /* [runs, B, J, D] */) {
    using A = Accumulation<T>;
    Thread<T, width> thread(tiling);
    ThreadPosition<A, width>& at = thread.at;
    const int64_t begin = static_cast<int64_t>(blockIdx.x) * tiling.runs.length,
                  end = at_most(begin + tiling.runs.length, tiling.N);
    thread.go_to_tile(tiling, static_cast<int>(blockIdx.y));
    typename Policy::Registers own;
    policy.start(at, own);
    A sum[width];
#pragma unroll
    for (int d = 0; d < width; ++d) sum[d] = A(0);
    for (int64_t first = begin; first < end; first += tiling.teams) {
        thread.go_to(tiling, first, end);
        ask_for(tiling, at, first + tiling.teams, end);
        A v[width], c[width];
        make_vote(tiling, at, v);
        policy.couple(at, own, v, c);
#pragma unroll
        for (int d = 0; d < width; ++d) sum[d] += c[d] * v[d];
    }
    at.publish_to_block(0, sum);
    // Sums over the teams.
    const unsigned J = static_cast<unsigned>(tiling.J), D = static_cast<unsigned>(tiling.D), JD = J * D;
    for (unsigned x = threadIdx.x; x < tiling.items * JD; x += blockDim.x) {
        const unsigned item = x / JD, j = x / D % J, d = x % D;
        const int64_t b = static_cast<int64_t>(blockIdx.y) * tiling.items + item;
        if (b >= tiling.B) continue;
        A total = 0;
        for (int team = 0; team < tiling.teams; ++team)
            total += at.shared(d % width, tiling.rows.first(team * tiling.items + static_cast<int>(item)) +
                                              static_cast<int>(j) * tiling.parts + static_cast<int>(d / width));
        partial[(blockIdx.x * tiling.B + b) * JD + j * D + d] = total;
    }
}

// ---- emit --------------------------------------------------------------------------------------------------

// g_u,bi = g_û,bi W_iᵀ. Every thread computes the products of its part of a vote; the threads of a row add them up.
template <class T, int width>
__device__ inline void emit_u(const Tiling<T, width>& tiling, const ThreadPosition<Accumulation<T>, width>& at,
                              const Accumulation<T> (&g)[width], const GradientsOf<T>& to) {
    using A = Accumulation<T>;
    const T* w = tiling.weight + at.i * tiling.weight_stride + at.j * tiling.D + at.part * width;
    const int64_t JD = tiling.J * tiling.D;
    for (int64_t k = 0; k < tiling.K; ++k) {
        A row[width], sum = 0;
        if (at.present) {
            read_row(w + k * JD, at.count, tiling.aligned, row);
            sum = dot(row, g);
        }
        if (at.aligned) {
            for (int step = at.row_size / 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
            if (at.slot == at.row && at.in_run) to.write(to.u[(at.b * tiling.N + at.i) * tiling.K + k], sum);
        } else {
            at.shared(width + k, at.slot) = sum;
        }
    }
    if (at.aligned) return;
    at.sync();
    for (int64_t k = at.slot - at.row; at.in_run && k < tiling.K; k += at.row_size) {
        A sum = 0;
        for (int m = 0; m < at.row_size; ++m) sum += at.shared(width + k, at.row + m);
        to.write(to.u[(at.b * tiling.N + at.i) * tiling.K + k], sum);
    }
}

// g_W,i = Σ_b u_biᵀ g_û,bi for a tile of the batch. A thread has column jd of one input capsule's matrix, `rows` of its
// K rows at a time. It keeps its column in every tile and, for a shared matrix, which is summed over the teams, in
// every step. complete: whether this is the last tile of the block.
template <class T, int width>
__device__ inline void emit_weight(const Tiling<T, width>& tiling, const ThreadPosition<Accumulation<T>, width>& at,
                                   int64_t first, int64_t begin, int64_t end, bool complete, const GradientsOf<T>& to) {
    using A = Accumulation<T>;
    constexpr int rows = 8;
    const bool shared = tiling.shared_weight();
    const unsigned JD = static_cast<unsigned>(tiling.J * tiling.D), D = static_cast<unsigned>(tiling.D);
    const int matrices = shared ? 1 : tiling.teams;
    const bool again = at.tile > at.first_tile || (shared && first > begin), several = tiling.splits > 1;
    const int64_t b0 = static_cast<int64_t>(at.tile) * tiling.items, KJD = tiling.K * JD;
    const int64_t block = static_cast<int64_t>(at.split) * gridDim.x + blockIdx.x;
    const int items = static_cast<int>(at_most(tiling.items, tiling.B - b0));
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
        for (int64_t k = 0; k < tiling.K; k += rows) {
            A sum[rows];
#pragma unroll
            for (int m = 0; m < rows; ++m) sum[m] = A(0);
            for (int team = first_team; team < end_team; ++team)
                for (int item = 0; item < items; ++item) {
                    const int64_t pair = (b0 + item) * tiling.N + first + team;
                    if (tiling.mask && !tiling.mask[pair]) continue;
                    const A g = at.shared(d % width, tiling.rows.first(team * tiling.items + item) + place);
                    const T* u = tiling.u + pair * tiling.K + k;
#pragma unroll
                    for (int m = 0; m < rows; ++m)
                        if (k + m < tiling.K) sum[m] += static_cast<A>(u[m]) * g;
                }
#pragma unroll
            for (int m = 0; m < rows; ++m) {
                if (k + m >= tiling.K) continue;
                const int64_t entry = (k + m) * JD + jd;
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

// A thread's numbers in shared memory: the gradient of its part of a vote [width], and its contribution to g_u [K].
template <int width, class T, class Policy>
__global__ void __launch_bounds__(max_threads, 1)
    emit_kernel(Tiling<T, width> tiling, Policy policy, GradientsOf<T> to,
                Accumulation<T>* params /* [splits, runs, param_count] */, int64_t param_count) {
    using A = Accumulation<T>;
    const int64_t begin = static_cast<int64_t>(blockIdx.x) * tiling.runs.length,
                  end = at_most(begin + tiling.runs.length, tiling.N);
    Thread<T, width> thread(tiling);
    ThreadPosition<A, width>& at = thread.at;
    at.split = static_cast<int>(blockIdx.y), at.first_tile = at.split * tiling.tiles_of_split;
    const int end_tile = at_most(at.first_tile + tiling.tiles_of_split, tiling.tiles);
    typename Policy::Registers own;
    policy.begin_block();
    for (int64_t first = begin; first < end; first += tiling.teams) {
        for (int tile = at.first_tile; tile < end_tile; ++tile) {
            if (tiling.tiles_of_split > 1 || first == begin) {
                thread.go_to_tile(tiling, tile);
                policy.start(at, own);
            }
            thread.go_to(tiling, first, end);
            if (tile == at.first_tile) ask_for(tiling, at, first + tiling.teams, end);
            A v[width], g[width];
            make_vote(tiling, at, v);
            policy.gradient(at, own, v, g);
            at.publish_to_block(0, g);
            if (to.u) emit_u(tiling, at, g, to);
            if (to.weight) emit_weight(tiling, at, first, begin, end, tile + 1 == end_tile, to);
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

// out [B, J, D] = Σ_i policy(û_bi). numbers: that each thread of the policy has in shared memory.
template <int width, class T, ReducingPolicy<T, width> Policy>
Status reduce(const Capsules& c, const Policy& policy, int64_t numbers, Workspace& whole, Accumulation<T>* out) {
    using A = Accumulation<T>;
    const int64_t size = c.B * c.J * c.D;
    if (c.rows != 1) return Status::unsupported;
    if (size == 0) return Status::ok;
    if (c.N == 0) return launch_over(size, write_zeros<A>, c.context, out, size);
    if constexpr (sizeof(A) == 4 && requires { policy.in_warps(); })
        if (takes_warps(c)) return reduce_in_warps<T>(c, policy.in_warps(), whole, out);
    numbers = at_least(numbers, width);
    Tiling<T, width> tiling(c, numbers);
    if (!tiling.fits(numbers)) return reduce_staged<T>(c, policy, whole, out);
    tiling.runs =
        cut_runs(c.N, tiling.teams, tiling.tiles, ceil_div(size, tiling.tiles) * static_cast<int64_t>(sizeof(A)));
    Workspace w(&whole);
    // The sums of a single run are the result.
    A* const partial = tiling.runs.count == 1 ? out : w.take<A>(tiling.runs.count * size);
    const dim3 blocks{static_cast<unsigned>(tiling.runs.count), static_cast<unsigned>(tiling.tiles)};
    CAPSOPS_TRY(launch(reduce_kernel<width, T, Policy>, blocks, tiling.threads, tiling.bytes(numbers), c.context,
                       tiling, policy, partial));
    if (tiling.runs.count == 1) return Status::ok;
    return add_rows(partial, tiling.runs.count, size, size, out, false, c.context);
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
Status emit(const Capsules& c, Policy& policy, int64_t numbers, const CapsuleGradients& gradients, int64_t param_count,
            Workspace& whole, bool more, Add add) {
    using A = Accumulation<T>;
    if (c.rows != 1) return Status::unsupported;
    if (c.B == 0 || c.N == 0 || c.J == 0 || c.D == 0) return more ? Status::ok : emit_nothing<T>(c, gradients, add);
    if constexpr (sizeof(A) == 4 && requires { policy.in_warps(); })
        if (takes_warps(c)) return emit_in_warps<T>(c, policy.in_warps(), gradients, param_count, whole, more, add);
    numbers = at_least(numbers, width + c.K);
    Tiling<T, width> tiling(c, numbers);
    if (!tiling.fits(numbers)) return emit_staged<T>(c, policy, gradients, param_count, whole, more, add);
    const int64_t KJD = c.K * c.J * c.D;
    const bool shared = tiling.shared_weight();
    // The numbers of one block's sums of g_W, if it keeps them apart.
    const auto block_sums = [&]() -> int64_t {
        if (!gradients.weight || (!shared && (tiling.splits > 1 || tiling.tiles == 1))) return 0;
        return shared ? KJD : tiling.teams * KJD;
    };
    const auto bytes = [](int64_t count) { return count * static_cast<int64_t>(sizeof(A)); };
    tiling.split(bytes(shared ? tiling.steps() * KJD : c.N * KJD));
    tiling.runs = cut_runs(c.N, tiling.teams, tiling.splits, bytes(block_sums() + param_count));
    Workspace w(&whole);
    const int64_t blocks = tiling.runs.count * tiling.splits;
    const bool add_splits = gradients.weight && !shared && tiling.splits > 1;
    const int64_t sums = add_splits ? tiling.splits * c.N * KJD : blocks * block_sums();
    const GradientsOf<T> to{static_cast<T*>(gradients.u), static_cast<T*>(gradients.weight),
                            sums ? w.take<A>(sums) : nullptr, more};
    A* params = w.take<A>(blocks * param_count);
    policy.cut(tiling, tiling.teams * tiling.items, w);
    const dim3 grid{static_cast<unsigned>(tiling.runs.count), static_cast<unsigned>(tiling.splits)};
    CAPSOPS_TRY(launch(emit_kernel<width, T, Policy>, grid, tiling.threads, tiling.bytes(numbers), c.context, tiling,
                       policy, to, params, param_count));
    if (add_splits) CAPSOPS_TRY(add_rows(to.sums, tiling.splits, c.N * KJD, c.N * KJD, to.weight, more, c.context));
    if (gradients.weight && shared) CAPSOPS_TRY(add_rows(to.sums, blocks, KJD, KJD, to.weight, more, c.context));
    return add(static_cast<const A*>(params), blocks);
}

}  // namespace capsops::cuda
