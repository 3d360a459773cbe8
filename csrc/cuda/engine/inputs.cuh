// How the loops of stream.cuh divide the work among threads, and how they read u and W.
//
// Votes that are given are read as u, with K = J·D or, if all output capsules get the same vote, K = D; there is no W.
#pragma once

#include "device.h"
#include "runs.h"

namespace capsops::cuda {

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
};

// Where the copies of u and W lie in shared memory, in numbers of type T. K is padded with zeros to a multiple of
// k_step, and so is every thread's part of a row of W to `width`. Behind each part are 16 unused bytes, so that
// neighbouring threads read from different banks.
struct InputLayout {
    static constexpr int k_step = 4;
    int padded_K;
    int part, row, matrix;      // from one part of a row of W to the next; from row to row; from capsule to capsule
    int matrices, vectors;      // of a step
    int stages, weight_stages;  // copies of the vectors, of the matrices
    int64_t size;               // of everything
};

// Numbers of an input capsule, in all its rows.
inline int64_t numbers_of_u(const Capsules& c) {
    return c.votes_given ? (c.one_vote ? 1 : c.J) * c.D : c.rows * c.K;
}

// How the capsules are divided into tiles and runs. Depends on the shape alone, so that sums have one order.
template <class T, int width, int items> struct Tiling {
    using A = Accumulation<T>;
    static constexpr int piece = 16 / static_cast<int>(sizeof(T));  // numbers that are copied or loaded at once

    const T* u;           // [B, N, K]
    const T* weight;      // [N, K, J, D], or [K, J, D] if weight_stride is 0
    const uint8_t* mask;  // [B, N], or null
    int64_t B, N, K, J, D, weight_stride;
    bool votes_given, one_vote;  // as in Capsules
    bool aligned;  // whether a thread's part of a row of W, of a vote that is given or of a state can be read by 16
                   // bytes
    bool aligned_w, aligned_u;  // whether rows of W, and of u, can be copied by 16 bytes
    int parts;                  // threads for a vote
    ThreadRows rows;            // of the threads for the votes of some batch items
    int64_t wanted;             // blocks that run at a time on all multiprocessors
    int team_rows;              // rows of a team
    int tiles;                  // of the batch; each has team_rows · items batch items
    int teams, threads;
    int tiles_of_split, splits;  // in emit: tiles of a block; blocks along them
    Runs runs;                   // of capsules; cut_runs() makes them
    int64_t copies_at;           // bytes that the threads exchange, which come first in shared memory
    bool copies;                 // whether u and W are copied to shared memory
    InputLayout layout;          // of the copies

    // numbers: that each thread has in shared memory, of the accumulation type. resident: blocks that a multiprocessor
    // runs at a time.
    Tiling(const Capsules& c, int64_t numbers, int resident)
        : u(static_cast<const T*>(c.u)),
          weight(static_cast<const T*>(c.weight)),
          mask(c.mask),
          B(c.B),
          N(c.N),
          K(numbers_of_u(c)),
          J(c.J),
          D(c.D),
          weight_stride(c.weight_stride),
          votes_given(c.votes_given),
          one_vote(c.one_vote),
          aligned(c.D % width == 0 && reinterpret_cast<uintptr_t>(c.votes_given ? c.u : c.weight) % 16 == 0),
          aligned_w(c.D % piece == 0 && reinterpret_cast<uintptr_t>(c.weight) % 16 == 0),
          aligned_u(K % piece == 0 && reinterpret_cast<uintptr_t>(c.u) % 16 == 0),
          parts(static_cast<int>(at_most(ceil_div(D, width), max_threads + 1))),
          rows(static_cast<int>(at_most(at_least(J * parts, 1), max_threads + 1))),
          wanted(limits.multiprocessors * resident) {
        const int64_t of_thread = numbers * static_cast<int64_t>(sizeof(A));
        const int fitting =
            static_cast<int>(at_most(max_threads, (shared_bytes / of_thread - 1) / warp_size * warp_size));
        constexpr int min_threads = 64, usual_threads = 128;
        // Smaller blocks if there would be too few.
        for (int most = static_cast<int>(at_most(fitting, at_least(usual_threads, rows.threads(1))));; most /= 2) {
            make_teams(at_least(rows.within(most), 1));
            if (steps() * tiles >= wanted || most / 2 < at_least(min_threads, rows.threads(1))) break;
        }
        tiles_of_split = tiles, splits = 1;
        copies_at = exchange_bytes(numbers);
        copies = true;
        lay_out(2);
        const int64_t most = most_shared_bytes(c.context);
        if (bytes() > most) lay_out(1);
        copies = bytes() <= most;
    }
    // Divides the tiles into splits, if there are too few steps for all blocks. bytes: the sums of a split.
    void split(int64_t bytes) {
        const int64_t fitting = limits.sums / at_least(bytes, 1);
        const int64_t most = at_least(at_most(at_most(wanted / steps(), fitting), tiles), 1);
        tiles_of_split = static_cast<int>(ceil_div(tiles, most));
        splits = static_cast<int>(ceil_div(tiles, tiles_of_split));
    }
    // For all teams of a block together.
    int64_t steps() const { return ceil_div(N, teams); }

    __host__ __device__ bool shared_weight() const { return weight_stride == 0; }
    // Batch items of a tile.
    __host__ __device__ int tile_items() const { return team_rows * items; }
    // Whether the votes of one batch item fit into a block.
    bool fits(int64_t numbers) const { return threads <= max_threads && exchange_bytes(numbers) <= shared_bytes; }
    int64_t bytes() const { return copies_at + (copies ? layout.size * static_cast<int64_t>(sizeof(T)) : 0); }

  private:
    int64_t exchange_bytes(int64_t numbers) const {
        return ceil_div(numbers * (threads + 1) * static_cast<int64_t>(sizeof(A)), 16) * 16;
    }
    void make_teams(int64_t fitting) {
        // The limit of a grid along y. A larger batch has tiles that do not fit.
        constexpr int64_t max_tiles = 65535;
        tiles = static_cast<int>(at_most(at_least(ceil_div(B, fitting * items), 1), max_tiles));
        team_rows = static_cast<int>(at_least(ceil_div(ceil_div(B, tiles), items), 1));
        teams = static_cast<int>(at_least(at_most(fitting / team_rows, N), 1));
        threads = rows.threads(teams * team_rows);
    }
    void lay_out(int stages) {
        layout.padded_K = static_cast<int>(at_most(ceil_div(K, piece) * piece, 1 << 20));
        if (layout.padded_K % InputLayout::k_step) layout.padded_K += InputLayout::k_step - piece;
        layout.part = width + piece;
        const int64_t row = votes_given ? 0 : rows.size * static_cast<int64_t>(layout.part);
        const int64_t matrix = layout.padded_K * row;
        layout.row = static_cast<int>(row);
        layout.matrix = static_cast<int>(at_most(matrix, 1 << 24));
        layout.matrices = shared_weight() ? 1 : teams;
        layout.vectors = teams * tile_items();
        layout.stages = stages;
        layout.weight_stages = shared_weight() ? 1 : stages;
        // k_step more, for a thread that reads some numbers beyond the last vector.
        layout.size = layout.weight_stages * layout.matrices * matrix +
                      static_cast<int64_t>(stages) * layout.vectors * layout.padded_K + InputLayout::k_step;
    }
};

// Batch items of a thread, where they share a number of W that it reads. Of double, more take too many registers.
template <class A> constexpr int some_items = sizeof(A) < 8 ? 2 : 1;

// The position of a thread in the work, and its access to shared memory.
template <class A, int width, int items> struct ThreadPosition {
    int64_t i = 0, first_b;  // its input capsule and first batch item
    int j, part, parts;  // its output capsule, of which it has the components part · width … part · width + count − 1
    int count;
    unsigned runs = 0;              // bit m: batch item number m exists, and the capsule is in the block's run
    unsigned unmasked = 0;          // the same, and the pair is not masked
    bool in_warp;                   // whether all threads of a row are in one warp
    bool aligned;                   // whether the rows divide a warp
    bool whole;                     // whether its components of a state can be read by 16 bytes
    int team;                       // of the block; one too many if the thread is idle
    int team_row, team_rows;        // the thread's row in its team, rows of a team
    int tile;                       // of the batch
    int split = 0, first_tile = 0;  // the block's split, and its first tile
    int J;
    int64_t B, N, D;
    // In shared memory the threads of all rows are in one sequence: the place of this thread, and of the first one of
    // its row. An idle thread has the first row of its warp, which it waits for; it writes nothing.
    int slot, row;
    int row_size;  // threads of a row
    bool idle;
    A* memory;  // [numbers, threads + 1]: + 1 against bank conflicts between the numbers of a thread

    __device__ A& shared(int number, int slot_) const {
        return memory[number * (static_cast<int>(blockDim.x) + 1) + slot_];
    }
    // Number `number` of the thread with the same part of output capsule k.
    __device__ A of(int number, int k) const { return shared(number, row + k * parts + part); }
    __device__ bool in_run(int m) const { return runs >> m & 1; }
    __device__ bool present(int m) const { return unmasked >> m & 1; }
    // Its batch item number m.
    __device__ int64_t b(int m) const { return first_b + m * team_rows; }
    // The index of its first component of batch item m in [B, J, D].
    __device__ int64_t state(int m) const { return (b(m) * J + j) * D + part * width; }

    // Publishes numbers to the threads of the same row, after they have read the previous ones.
    template <int n> __device__ void publish(int first, const A (&x)[n]) const {
        sync();
        write(first, x);
        sync();
    }
    // Publishes numbers to the whole block.
    template <int n> __device__ void publish_to_block(int first, const A (&x)[n]) const {
        __syncthreads();
        write(first, x);
        __syncthreads();
    }
    template <int n> __device__ void write(int first, const A (&x)[n]) const {
        if (idle) return;
#pragma unroll
        for (int m = 0; m < n; ++m) shared(first + m, slot) = x[m];
    }
    __device__ void sync() const {
        if (in_warp)
            __syncwarp();
        else
            __syncthreads();
    }
};

template <class T, int width, int items> struct Thread {
    ThreadPosition<Accumulation<T>, width, items> at;
    unsigned existing;  // bit m: batch item number m exists in this tile

    __device__ explicit Thread(const Tiling<T, width, items>& tiling) {
        const ThreadRows& rows = tiling.rows;
        const int thread = static_cast<int>(threadIdx.x), lane = thread % warp_size;
        const int first_row = rows.per_warp ? thread / warp_size * rows.per_warp : 0;
        const int own = rows.per_warp ? lane : thread;  // among the threads of the rows from first_row on
        const int row = first_row + own / rows.size, place = own % rows.size;
        at.idle = (rows.per_warp && lane >= rows.per_warp * rows.size) || row >= tiling.teams * tiling.team_rows;
        at.team = at.idle ? tiling.teams : row / tiling.team_rows;
        at.team_row = row % tiling.team_rows, at.team_rows = tiling.team_rows;
        at.row = (at.idle ? first_row : row) * rows.size, at.row_size = rows.size;
        at.slot = at.row + place;
        at.in_warp = rows.per_warp > 0, at.aligned = warp_size % rows.size == 0, at.whole = tiling.aligned;
        at.j = place / tiling.parts;
        at.part = place % tiling.parts, at.parts = tiling.parts;
        at.count = static_cast<int>(at_most(width, tiling.D - at.part * width));
        at.J = static_cast<int>(tiling.J), at.B = tiling.B, at.N = tiling.N, at.D = tiling.D;
        at.memory = reinterpret_cast<Accumulation<T>*>(shared_memory());
    }
    // Moves to a tile of the batch, before its capsules.
    __device__ void go_to_tile(const Tiling<T, width, items>& tiling, int tile) {
        at.tile = tile;
        at.first_b = static_cast<int64_t>(tile) * tiling.tile_items() + at.team_row;
        existing = 0;
#pragma unroll
        for (int m = 0; m < items; ++m) existing |= unsigned{at.team < tiling.teams && at.b(m) < tiling.B} << m;
        at.unmasked = existing;
    }
    // Moves to the capsules from `first` on, one for each team.
    __device__ void go_to(const Tiling<T, width, items>& tiling, int64_t first, int64_t end) {
        at.i = first + at.team;
        at.unmasked = at.runs = at.i < end ? existing : 0;
        if (!tiling.mask) return;
#pragma unroll
        for (int m = 0; m < items; ++m)
            if (at.in_run(m) && !tiling.mask[at.b(m) * tiling.N + at.i]) at.unmasked &= ~(1u << m);
    }
};

template <int width, class A> __device__ inline A dot(const A (&x)[width], const A (&y)[width]) {
    A sum = 0;
#pragma unroll
    for (int d = 0; d < width; ++d) sum += x[d] * y[d];
    return sum;
}

// Numbers that a thread loads at once.
template <class T, int size> struct alignas(size * sizeof(T)) Piece {
    T x[size];

    __device__ static Piece load(const T* from) { return *reinterpret_cast<const Piece*>(from); }
};

// Loads `n` numbers; those behind `count` are 0. whole: count is n or 0, and they can be read by 16 bytes. It is the
// same for all lanes, so that they do not run both branches.
template <int n, class T>
__device__ inline void load_numbers(const T* from, int count, bool whole, Accumulation<T> (&to)[n]) {
    using A = Accumulation<T>;
    constexpr int piece = static_cast<int>(at_most(16 / static_cast<int>(sizeof(T)), n));
#pragma unroll
    for (int d = 0; d < n; ++d) to[d] = A(0);
    if (whole) {
        if (count == 0) return;
#pragma unroll
        for (int d = 0; d < n; d += piece) {
            const auto some = Piece<T, piece>::load(from + d);
#pragma unroll
            for (int m = 0; m < piece; ++m) to[d + m] = static_cast<A>(some.x[m]);
        }
    } else {
#pragma unroll
        for (int d = 0; d < n; ++d)
            if (d < count) to[d] = static_cast<A>(from[d]);
    }
}

// Four numbers of u for a batch item, and rows of W, from the copies in shared memory. Numbers beyond K are 0.
template <class T, int width, int items> struct CopiedInputs {
    using A = Accumulation<T>;
    const T *w, *u;  // the thread's part of the first row of W; u of its first batch item
    int row, next_item;

    __device__ void vector(int m, int k, A (&to)[4]) const {
        const auto some = Piece<T, 4>::load(u + m * next_item + k);
#pragma unroll
        for (int x = 0; x < 4; ++x) to[x] = static_cast<A>(some.x[x]);
    }
    __device__ void weight(int k, A (&to)[width]) const { load_numbers(w + k * row, width, true, to); }
    // The thread's part of a vote that is given: `count` numbers from `first` on.
    __device__ void vote(int m, int first, int count, bool whole, A (&to)[width]) const {
        load_numbers(u + m * next_item + first, count, whole, to);
    }
};

// The same from GPU memory.
template <class T, int width, int items> struct InputsInMemory {
    using A = Accumulation<T>;
    const Tiling<T, width, items>& tiling;
    const ThreadPosition<A, width, items>& at;

    __device__ void vector(int m, int k, A (&to)[4]) const {
        const T* u = tiling.u + (at.b(m) * tiling.N + at.i) * tiling.K + k;
        const int count = at.present(m) ? static_cast<int>(at_most(tiling.K - k, 4)) : 0;
        load_numbers(u, count, tiling.aligned_u, to);
    }
    __device__ void weight(int k, A (&to)[width]) const {
        const T* w = tiling.weight + at.i * tiling.weight_stride + k * tiling.J * tiling.D + at.j * tiling.D;
        load_numbers(w + at.part * width, k < tiling.K ? at.count : 0, tiling.aligned, to);
    }
    __device__ void vote(int m, int first, int count, bool whole, A (&to)[width]) const {
        load_numbers(tiling.u + (at.b(m) * tiling.N + at.i) * tiling.K + first, at.present(m) ? count : 0, whole, to);
    }
};

// The copies of u and W of a step in shared memory, made while the block computes the step before.
template <class T, int width, int items> class Inputs {
    using A = Accumulation<T>;
    using Tiling = cuda::Tiling<T, width, items>;
    using Position = ThreadPosition<A, width, items>;
    static constexpr int piece = Tiling::piece;

  public:
    __device__ explicit Inputs(const Tiling& tiling) : tiling_(tiling), layout_(tiling.layout) {
        if (!tiling.copies) return;
        weights_ = reinterpret_cast<T*>(shared_memory() + tiling.copies_at);
        vectors_ = weights_ + layout_.weight_stages * layout_.matrices * layout_.matrix;
        const unsigned step = tiling.aligned_w ? piece : 1, first = threadIdx.x * step;
        own_ = {static_cast<int>(first % tiling.D), static_cast<int>(first / tiling.D % tiling.J),
                static_cast<int>(first / (tiling.D * tiling.J))};
        const unsigned stride = blockDim.x * step;
        next_ = {static_cast<int>(stride % tiling.D), static_cast<int>(stride / tiling.D % tiling.J),
                 static_cast<int>(stride / (tiling.D * tiling.J))};
        // What is never copied is 0: numbers beyond K and D.
        for (int x = static_cast<int>(threadIdx.x); x < layout_.size; x += static_cast<int>(blockDim.x))
            weights_[x] = static_cast<T>(A(0));
        __syncthreads();
    }
    // Waits for the inputs of a step, which are those of the teams' capsules from `first` on and of a tile, and fetches
    // those of the next one, if it has capsules. All threads of the block call it together.
    __device__ void begin_step(int64_t first, int tile, int64_t next_first, int next_tile, int64_t end) {
        if (!tiling_.copies) {
            if (next_first > first) prefetch_weight(next_first, end);
            return;
        }
        if (first_ < 0 || layout_.stages == 1) {
            if (first_ >= 0) __syncthreads();  // all threads have finished with the step before
            if (first_ < 0 || (first > first_ && !tiling_.shared_weight())) copy_weight(first, end, 0);
            copy_vectors(first, end, tile, 0);
            commit_copies();
        } else {
            vector_stage_ = 1 - vector_stage_;
            if (first > first_ && !tiling_.shared_weight()) weight_stage_ = 1 - weight_stage_;
        }
        wait_for_copies<0>();
        __syncthreads();
        first_ = first;
        if (layout_.stages == 1 || next_first >= end) return;
        if (next_first > first && !tiling_.shared_weight()) copy_weight(next_first, end, 1 - weight_stage_);
        copy_vectors(next_first, end, next_tile, 1 - vector_stage_);
        commit_copies();
    }
    // sum[m] += Σ u_bi,k+m g_b over the batch items first_item … end_item − 1 of a tile, whose first one is b0, and
    // input capsule i of a team. g_b: one every g_step numbers; 0 where the pair is absent. What comes of numbers
    // beyond K has no meaning.
    template <int n>
    __device__ __forceinline__ void add_products(int team, int first_item, int end_item, int64_t b0, int64_t i, int k,
                                                 const A* g, int g_step, A (&sum)[n]) const {
        static_assert(n % 4 == 0);
        if (tiling_.copies) {
            const T* u = vectors(team) + first_item * layout_.padded_K + k;
#pragma unroll 4
            for (int item = first_item; item < end_item; ++item, g += g_step, u += layout_.padded_K) {
#pragma unroll
                for (int m = 0; m < n; m += 4) {
                    const auto some = Piece<T, 4>::load(u + m);
#pragma unroll
                    for (int x = 0; x < 4; ++x) sum[m + x] += static_cast<A>(some.x[x]) * *g;
                }
            }
        } else {
            for (int item = first_item; item < end_item; ++item, g += g_step) {
                const int64_t pair = (b0 + item) * tiling_.N + i;
                if (tiling_.mask && !tiling_.mask[pair]) continue;
                A some[n];
                load_numbers(tiling_.u + pair * tiling_.K + k, static_cast<int>(at_most(tiling_.K - k, n)), false,
                             some);
#pragma unroll
                for (int m = 0; m < n; ++m) sum[m] += some[m] * *g;
            }
        }
    }
    __device__ bool copied() const { return tiling_.copies; }
    // What a thread reads.
    __device__ CopiedInputs<T, width, items> copies(const Position& at) const {
        const int matrix = weight_stage_ * layout_.matrices + (tiling_.shared_weight() ? 0 : at.team);
        const int part = at.j * at.parts + at.part;
        return {weights_ + matrix * layout_.matrix + part * layout_.part,
                vectors(at.team) + at.team_row * layout_.padded_K, layout_.row, at.team_rows * layout_.padded_K};
    }
    __device__ InputsInMemory<T, width, items> in_memory(const Position& at) const { return {tiling_, at}; }

  private:
    // u of a team's batch items, padded_K numbers each.
    __device__ const T* vectors(int team) const {
        return vectors_ + (vector_stage_ * layout_.vectors + team * tiling_.tile_items()) * layout_.padded_K;
    }
    // The place of a number in a matrix.
    struct Place {
        int d, j, k;
    };
    __device__ void copy_weight(int64_t first, int64_t end, int stage) const {
        const int D = static_cast<int>(tiling_.D), J = static_cast<int>(tiling_.J), K = static_cast<int>(tiling_.K);
        if (tiling_.votes_given) return;
        const int capsules = tiling_.shared_weight() ? 1 : static_cast<int>(at_most(tiling_.teams, end - first));
        for (int capsule = 0; capsule < capsules; ++capsule) {
            const T* const from = tiling_.weight + (first + capsule) * tiling_.weight_stride;
            T* const to = weights_ + (stage * layout_.matrices + capsule) * layout_.matrix;
            for (Place at = own_; at.k < K;) {
                const T* const source = from + (at.k * J + at.j) * D + at.d;
                T* const place =
                    to + at.k * layout_.row + (at.j * tiling_.parts + at.d / width) * layout_.part + at.d % width;
                if (tiling_.aligned_w)
                    copy_async(shared_address(place), source, true);
                else
                    *place = *source;
                at.d += next_.d, at.j += next_.j, at.k += next_.k;
                if (at.d >= D) at.d -= D, ++at.j;
                if (at.j >= J) at.j -= J, ++at.k;
            }
        }
    }
    __device__ void copy_vectors(int64_t first, int64_t end, int tile, int stage) const {
        const unsigned K = static_cast<unsigned>(tiling_.K), step = tiling_.aligned_u ? piece : 1, pieces = K / step;
        const unsigned vectors = static_cast<unsigned>(layout_.vectors),
                       of_tile = static_cast<unsigned>(tiling_.tile_items());
        T* const to = vectors_ + stage * layout_.vectors * layout_.padded_K;
        for (unsigned x = threadIdx.x; x < vectors * pieces; x += blockDim.x) {
            const unsigned vector = x / pieces, k = x % pieces * step;
            const int64_t i = first + vector / of_tile, b = static_cast<int64_t>(tile) * of_tile + vector % of_tile;
            const bool exists = b < tiling_.B && i < end;
            const int64_t pair = exists ? b * tiling_.N + i : 0;
            const bool present = exists && (!tiling_.mask || tiling_.mask[pair]);
            const T* const from = tiling_.u + pair * tiling_.K + k;
            T* const place = to + vector * static_cast<unsigned>(layout_.padded_K) + k;
            if (tiling_.aligned_u)
                copy_async(shared_address(place), from, present);
            else
                *place = present ? *from : static_cast<T>(A(0));
        }
    }
    __device__ void prefetch_weight(int64_t first, int64_t end) const {
        constexpr int64_t line = 128;
        if (tiling_.shared_weight() || first >= end) return;
        const char* from = reinterpret_cast<const char*>(tiling_.weight + first * tiling_.weight_stride);
        const int64_t bytes =
            at_most(tiling_.teams, end - first) * tiling_.weight_stride * static_cast<int64_t>(sizeof(T));
        for (int64_t x = threadIdx.x * line; x < bytes; x += blockDim.x * line) prefetch(from + x);
    }

    const Tiling& tiling_;
    const InputLayout& layout_;
    T *weights_ = nullptr, *vectors_ = nullptr;
    int64_t first_ = -1;  // the capsules whose W is there; −1: none
    int weight_stage_ = 0, vector_stage_ = 0;
    Place own_{}, next_{};  // of the thread's first number that it copies, and from each to the next one
};

}  // namespace capsops::cuda
