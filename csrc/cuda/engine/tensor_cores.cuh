// The loops of warp.cuh in tensor cores, for bfloat16. They have the policies of warp.cuh, of which each also says how
// many blocks of 128 threads its registers leave room for on a multiprocessor (`resident`).
//
// A warp takes some input capsules at a time: a step. All of its data in shared memory are tiles. A tile has 8 rows of
// 4 pieces, and a piece is 8 numbers of 16 bytes. Eight rows k of W are a tile, because a row has the 32 components of
// both votes. u of 8 batch items is a tile: a row is a batch item, and its pieces are the capsules of the step or,
// where K = 16, the two halves of each. Lane 4 r + p copies piece p of row r.
//
// The votes are [batch items, K] [K, components]. The tensor cores give them to the lanes as they give every product:
// lane 4 g + t has row g, and g + 8, and of each 8 columns numbers 2 t and 2 t + 1. So both votes of a component are in
// the same lane, and the softmax over the output capsules needs no other one.
//
// Gradients of votes become two numbers of type bfloat16 each, the rounded one and the rest, so that sums keep at least
// 16 bits. Gradients replace u and W in shared memory, from where they go to global memory by whole pieces.
#pragma once

#include "warp.cuh"

namespace capsops::cuda {

// rows: batch items, 8 or 16. pieces: K / 8, which is 1 or 2.
template <int rows_, int pieces_> struct TensorTiling {
    static constexpr int rows = rows_, pieces = pieces_, K = 8 * pieces, u_tiles = rows / 8;
    static constexpr int capsules = 4 / pieces;  // of a step
    static constexpr int warps = 4, stages = 3;
    static constexpr int tile = 512, stage = (4 + u_tiles) * tile;  // bytes: the tiles of W, then those of u

    const bfloat16* u;       // [B, N, K]
    const bfloat16* weight;  // [N, K, J, D]
    const uint8_t* mask;     // [B, N], or null
    int64_t N;
    int B;
    Runs runs;

    // resident: blocks that run on a multiprocessor at the same time.
    TensorTiling(const Capsules& c, int resident)
        : u(static_cast<const bfloat16*>(c.u)),
          weight(static_cast<const bfloat16*>(c.weight)),
          mask(c.mask),
          N(c.N),
          B(static_cast<int>(c.B)),
          runs(cut_runs(N, warps * capsules, 1, c.B * warp_JD * static_cast<int64_t>(sizeof(float)),
                        resident * limits.multiprocessors)) {}
    static constexpr int threads() { return warps * warp_size; }
    // Shared memory of a block: the stages; after the loop, the sums of its warps.
    static constexpr int64_t bytes() { return warps * stages * stage; }
    static_assert(stages * stage >= rows * warp_JD * static_cast<int>(sizeof(float)) && bytes() <= shared_bytes);
};

inline bool is_aligned(const void* address) {
    return reinterpret_cast<uintptr_t>(address) % 16 == 0;
}

// Whether these loops take capsules that takes_warps() takes.
inline bool takes_tensor_cores(const Capsules& c) {
    return c.dtype == Dtype::bfloat16 && (c.K == 8 || c.K == 16) && is_aligned(c.u) && is_aligned(c.weight);
}

// The position of a lane in the work, as WarpPosition.
template <int rows> struct TensorPosition {
    static constexpr int batch_items = rows / 8, components = 4, items = batch_items * components;
    int64_t i = 0;  // the input capsule
    int B;
    int warp = static_cast<int>(threadIdx.x) / warp_size, lane = static_cast<int>(threadIdx.x) % warp_size;

    __device__ int b(int m) const { return lane / 4 + m / components * 8; }
    __device__ int d(int m) const { return m % components / 2 * 8 + lane % 4 * 2 + m % 2; }
    __device__ int state(int m, int j) const { return (b(m) * warp_J + j) * warp_D + d(m); }

    __device__ float sum_components(const float (&x)[items]) const {
        float sums[batch_items];
#pragma unroll
        for (int n = 0; n < batch_items; ++n) {
            const int m = n * components;
            sums[n] = (x[m] + x[m + 1]) + (x[m + 2] + x[m + 3]);
        }
        return sum_scattered(sums, lane, 2);
    }
    __device__ float of_item(float x, int n) const {
        return batch_items == 1 ? x : __shfl_sync(~0u, x, lane / 4 * 4 + n * (4 / batch_items));
    }
};

// A piece.
struct alignas(16) Sixteen {
    unsigned words[4];
};

// Where a piece of a tile is, in bytes. The pieces of rows are exchanged so that neither 8 pieces of a column nor 8
// pieces of two rows are in the same banks of shared memory.
__device__ inline int piece_at(int row, int piece) {
    return row * 64 + (piece ^ row / 2 % 4) * 16;
}

// The steps of a warp, one after another, in shared memory.
template <class Tiling> class TensorPipeline {
    using At = TensorPosition<Tiling::rows>;
    static constexpr int pieces = Tiling::pieces, u_tiles = Tiling::u_tiles, tile = Tiling::tile;

  public:
    __device__ TensorPipeline(const Tiling& tiling, At& at) : tiling_(tiling) {
        const int64_t begin = static_cast<int64_t>(blockIdx.x) * tiling.runs.length;
        end_ = at_most(begin + tiling.runs.length, tiling.N);
        at.B = tiling.B;
        first_ = begin + at.warp * Tiling::capsules;
        left_ = left_to_fetch_ = static_cast<int>(end_ - first_);
        row_ = at.lane / 4, capsule_ = at.lane % 4 / pieces;
        piece_ = piece_at(at.lane / 4, at.lane % 4);
        column_ = piece_at(at.lane % 8, at.lane / 8);
        const int matrix = at.lane / 8 % (u_tiles * pieces);
        u_row_ = (4 + matrix / pieces) * tile + piece_at(at.lane % 8, matrix % pieces);
        word_ = piece_at(at.lane / 4, 0) + at.lane % 4 * 4;
        from_w_ = tiling.weight + weight_offset(at.lane);
        from_u_ = tiling.u + u_offset(at.lane);
        memory_ = shared_memory() + at.warp * Tiling::stages * Tiling::stage;
#pragma unroll 1
        for (int ahead = 1; ahead < Tiling::stages; ++ahead) fetch();
    }
    // The first capsule of the step, and how many there are from it on; none if this is not positive.
    __device__ int64_t first() const { return first_; }
    __device__ int left() const { return left_; }
    // Waits for the step, and fetches a later one in the meantime.
    __device__ void wait() {
        __syncwarp();  // all lanes have finished with the step that is overwritten
        fetch();
        wait_for_copies<Tiling::stages - 1>();
        __syncwarp();
    }
    __device__ void advance() {
        first_ += Tiling::warps * Tiling::capsules;
        left_ -= Tiling::warps * Tiling::capsules;
        read_ = next(read_);
    }
    // The four columns of pieces of 8 rows of W, from row k = 8 · piece of capsule number x of the step.
    template <bool transposed> __device__ void load_weight(int x, int piece, unsigned (&to)[4]) const {
        load_matrices<transposed>(shared_address(memory_ + read_ + (x * pieces + piece) * tile + column_), to);
    }
    // u of capsule number x: for each 8 batch items, the pieces.
    template <bool transposed> __device__ void load_u(int x, unsigned (&to)[u_tiles * pieces]) const {
        load_matrices<transposed>(shared_address(memory_ + read_ + (u_row_ ^ x * pieces * 16)), to);
    }
    // Replace the lane's word of a product: of 8 components of W, of 8 batch items of u.
    __device__ void put_weight(int x, int piece, int column, unsigned word) const {
        put((x * pieces + piece) * tile + (word_ ^ column * 16), word);
    }
    __device__ void put_u(int x, int piece, int items, unsigned word) const {
        put((4 + items) * tile + (word_ ^ (x * pieces + piece) * 16), word);
    }
    // Writes what has replaced W and u to global memory.
    __device__ void write_weight(bfloat16* to, int lane) const {
        to += weight_offset(lane);
#pragma unroll
        for (int n = 0; n < 4; ++n)
            if (n / pieces < left_) at(to + n * 8 * warp_JD) = at(memory_ + read_ + n * tile + piece_);
    }
    // more: the numbers are sums with those that are there.
    __device__ void write_u(bfloat16* to, int lane, bool more) const {
        to += u_offset(lane);
#pragma unroll
        for (int n = 0; n < u_tiles; ++n) {
            if (!exists(n, left_)) continue;
            Sixteen piece = at(memory_ + read_ + (4 + n) * tile + piece_);
            if (is_masked(n, first_)) {
                if (more) continue;
                piece = {};
            }
            at(to + n * 8 * tiling_.N * Tiling::K) = piece;
        }
    }

  private:
    static __device__ Sixteen& at(void* x) { return *static_cast<Sixteen*>(x); }
    __device__ int next(int stage) const {
        return stage == (Tiling::stages - 1) * Tiling::stage ? 0 : stage + Tiling::stage;
    }
    // The lane's piece of the step, in W and in u.
    __device__ int64_t weight_offset(int lane) const { return first_ * Tiling::K * warp_JD + lane * 8; }
    __device__ int64_t u_offset(int lane) const { return (row_ * tiling_.N + first_) * Tiling::K + lane % 4 * 8; }
    // Whether there are the batch item and the capsule of the lane's piece of tile n of u.
    __device__ bool exists(int n, int left) const { return row_ + n * 8 < tiling_.B && capsule_ < left; }
    __device__ bool is_masked(int n, int64_t first) const {
        return tiling_.mask && !tiling_.mask[(row_ + n * 8) * tiling_.N + first + capsule_];
    }
    __device__ void put(int offset, unsigned word) const {
        *reinterpret_cast<unsigned*>(memory_ + read_ + offset) = word;
    }

    // What is not there is 0.
    __device__ void fetch() {
        if (left_to_fetch_ > 0) {
            const SharedAddress to = shared_address(memory_ + stored_ + piece_);
#pragma unroll
            for (int n = 0; n < 4; ++n)
                copy_async(to + n * tile, from_w_ + n * 8 * warp_JD, n / pieces < left_to_fetch_);
#pragma unroll
            for (int n = 0; n < u_tiles; ++n) {
                bool there = exists(n, left_to_fetch_);
                if (tiling_.mask) there = there && !is_masked(n, end_ - left_to_fetch_);
                copy_async(to + (4 + n) * tile, from_u_ + n * 8 * tiling_.N * Tiling::K, there);
            }
        }
        commit_copies();
        constexpr int capsules = Tiling::warps * Tiling::capsules;
        left_to_fetch_ -= capsules;
        from_w_ += capsules * Tiling::K * warp_JD;
        from_u_ += capsules * Tiling::K;
        stored_ = next(stored_);
    }

    const Tiling& tiling_;
    char* memory_;
    const bfloat16 *from_w_, *from_u_;  // the lane's pieces of the step that is fetched next
    int64_t first_, end_;               // capsules: of the step; of the run
    int left_, left_to_fetch_;          // capsules of the run, from these steps on
    int row_, capsule_;                 // of the lane's piece of u
    // In bytes from a tile's begin: the lane's piece; the row that it gives to load_weight, and to load_u from a
    // stage's begin; its word of a product in the first column of pieces.
    int piece_, column_, u_row_, word_;
    int read_ = 0, stored_ = 0;  // where the step lies, and the one that is fetched next
};

// The lane's components of the votes of capsule number x of the step; 0 if the pair is masked or there is no batch
// item.
template <class Tiling, int items>
__device__ inline void make_votes(const TensorPipeline<Tiling>& step, int x, float (&v)[items][warp_J]) {
    constexpr int pieces = Tiling::pieces, u_tiles = Tiling::u_tiles;
    unsigned u[u_tiles * pieces];
    step.template load_u<false>(x, u);
    float product[4][4] = {};
#pragma unroll
    for (int piece = 0; piece < pieces; ++piece) {
        unsigned w[4];
        step.template load_weight<true>(x, piece, w);
#pragma unroll
        for (int n = 0; n < 4; ++n)
            multiply_fragments<1>({u[piece], u_tiles == 2 ? u[(u_tiles - 1) * pieces + piece] : 0u}, {w[n]},
                                  product[n]);
    }
#pragma unroll
    for (int m = 0; m < items; ++m)
#pragma unroll
        for (int j = 0; j < warp_J; ++j) v[m][j] = product[2 * j + m % 4 / 2][m / 4 * 2 + m % 2];
}

// ---- the loops -----------------------------------------------------------------------------------------------

template <class Policy, int rows> constexpr int resident_blocks = Policy::resident(TensorPosition<rows>::items);

template <class Tiling, class Policy>
__global__ void __launch_bounds__(Tiling::threads(), resident_blocks<Policy, Tiling::rows>)
    reduce_tensor_kernel(Tiling tiling, Policy policy, float* partial /* [runs, B, J, D] */) {
    using At = TensorPosition<Tiling::rows>;
    constexpr int items = At::items;
    At at;
    TensorPipeline<Tiling> step(tiling, at);
    typename Policy::template Registers<items> own;
    policy.start(at, own);
    float sum[items][warp_J] = {};
    for (; step.left() > 0; step.advance()) {
        step.wait();
        // If there are fewer capsules, the votes of the others are 0. More of them at once take too many registers.
#pragma unroll(8 / items)
        for (int x = 0; x < Tiling::capsules; ++x) {
            at.i = step.first() + at_most(x, step.left() - 1);
            float v[items][warp_J], c[items][warp_J];
            make_votes(step, x, v);
            policy.couple(at, own, v, c);
#pragma unroll
            for (int m = 0; m < items; ++m)
#pragma unroll
                for (int j = 0; j < warp_J; ++j) sum[m][j] += c[m][j] * v[m][j];
        }
    }
    __syncthreads();
    float* const sums = reinterpret_cast<float*>(shared_memory());  // [warps, rows, J, D]
    constexpr int size = Tiling::rows * warp_JD;
#pragma unroll
    for (int m = 0; m < items; ++m)
#pragma unroll
        for (int j = 0; j < warp_J; ++j) sums[at.warp * size + at.state(m, j)] = sum[m][j];
    __syncthreads();
#pragma unroll 1
    for (int x = static_cast<int>(threadIdx.x); x < tiling.B * warp_JD; x += static_cast<int>(blockDim.x)) {
        float total = 0;
#pragma unroll
        for (int warp = 0; warp < Tiling::warps; ++warp) total += sums[warp * size + x];
        partial[static_cast<int64_t>(blockIdx.x) * tiling.B * warp_JD + x] = total;
    }
}

// Gradients of votes as operands of tensor cores: for each 8 batch items and each 8 components, the lane's two numbers
// in a word, rounded to bfloat16; and what remains of them.
template <int u_tiles> struct SplitGradients {
    unsigned high[u_tiles][4], low[u_tiles][4];

    __device__ explicit SplitGradients(const float (&g)[u_tiles * 4][warp_J]) {
#pragma unroll
        for (int t = 0; t < u_tiles; ++t)
#pragma unroll
            for (int n = 0; n < 4; ++n) {
                const int m = t * 4 + n % 2 * 2, j = n / 2;
                const unsigned word = pack(g[m][j], g[m + 1][j]);
                high[t][n] = word;
                low[t][n] = pack(g[m][j] - first_of(word), g[m + 1][j] - second_of(word));
            }
    }
    static __device__ float first_of(unsigned word) { return std::bit_cast<float>(word << 16); }
    static __device__ float second_of(unsigned word) { return std::bit_cast<float>(word & 0xffff0000u); }
};

// Adds the two numbers at `to` to a lane's numbers of a product.
__device__ inline void add_existing(const bfloat16* to, float& first, float& second) {
    first += static_cast<float>(to[0]), second += static_cast<float>(to[1]);
}

// g_u,bi = g_û,bi W_iᵀ, of capsule number x of the step.
template <class Tiling>
__device__ inline void emit_u(const Tiling& tiling, const TensorPosition<Tiling::rows>& at,
                              const TensorPipeline<Tiling>& step, int x, const SplitGradients<Tiling::u_tiles>& g,
                              const GradientsOf<bfloat16>& to) {
    constexpr int pieces = Tiling::pieces, u_tiles = Tiling::u_tiles, last = u_tiles - 1;
#pragma unroll
    for (int piece = 0; piece < pieces; ++piece) {
        unsigned w[4];
        step.template load_weight<false>(x, piece, w);
        float product[4] = {};
#pragma unroll
        for (int n = 0; n < 4; n += 2) {
            const unsigned rows[2] = {w[n], w[n + 1]};
            // There are 16 rows: 8 batch items, once with what is rounded and once with the rest; or 16 batch items.
            const auto &first = g.high[0], &second = u_tiles == 1 ? g.low[0] : g.high[last];
            multiply_fragments<2>({first[n], second[n], first[n + 1], second[n + 1]}, rows, product);
            if (u_tiles == 2)
                multiply_fragments<2>({g.low[0][n], g.low[last][n], g.low[0][n + 1], g.low[last][n + 1]}, rows,
                                      product);
        }
        if (u_tiles == 1) product[0] += product[2], product[1] += product[3];
        if (to.more) {
#pragma unroll
            for (int t = 0; t < u_tiles; ++t) {
                const int b = at.lane / 4 + t * 8, k = piece * 8 + at.lane % 4 * 2;
                if (b < tiling.B)
                    add_existing(to.u + (b * tiling.N + at.i) * Tiling::K + k, product[2 * t], product[2 * t + 1]);
            }
        }
#pragma unroll
        for (int t = 0; t < u_tiles; ++t) step.put_u(x, piece, t, pack(product[2 * t], product[2 * t + 1]));
    }
}

// g_W,i = Σ_b u_biᵀ g_û,bi, of capsule number x of the step. u: transposed.
template <class Tiling>
__device__ inline void emit_weight(const TensorPosition<Tiling::rows>& at, const TensorPipeline<Tiling>& step, int x,
                                   const unsigned (&u)[Tiling::u_tiles * Tiling::pieces],
                                   const SplitGradients<Tiling::u_tiles>& g, const GradientsOf<bfloat16>& to) {
    constexpr int pieces = Tiling::pieces, u_tiles = Tiling::u_tiles, last = u_tiles - 1;
    // There are 16 rows k, of which the last may be 0, and 16 columns: 8 batch items twice, or 16.
    const unsigned items[4] = {u[0], pieces == 2 ? u[pieces - 1] : 0u, u[last * pieces],
                               pieces == 2 ? u[last * pieces + pieces - 1] : 0u};
    float product[4][4] = {};
#pragma unroll
    for (int n = 0; n < 4; ++n) {
        multiply_fragments<2>(items, {transpose(g.high[0][n]), transpose(u_tiles == 1 ? g.low[0][n] : g.high[last][n])},
                              product[n]);
        if (u_tiles == 2) multiply_fragments<2>(items, {transpose(g.low[0][n]), transpose(g.low[last][n])}, product[n]);
    }
    if (to.more) {
        const bfloat16* const there = to.weight + (at.i * Tiling::K + at.lane / 4) * warp_JD + at.lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < 4; ++n)
#pragma unroll
            for (int piece = 0; piece < pieces; ++piece)
                add_existing(there + (piece * warp_JD + n) * 8, product[n][2 * piece], product[n][2 * piece + 1]);
    }
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int piece = 0; piece < pieces; ++piece)
            step.put_weight(x, piece, n, pack(product[n][2 * piece], product[n][2 * piece + 1]));
}

template <class Tiling, class Policy>
__global__ void __launch_bounds__(Tiling::threads(), resident_blocks<Policy, Tiling::rows>)
    emit_tensor_kernel(Tiling tiling, Policy policy, GradientsOf<bfloat16> to,
                       float* params /* [runs, warps, param_count] */, int param_count) {
    using At = TensorPosition<Tiling::rows>;
    At at;
    TensorPipeline<Tiling> step(tiling, at);
    typename Policy::template Registers<At::items> own;
    policy.start(at, own);
    for (; step.left() > 0; step.advance()) {
        step.wait();
#pragma unroll 1
        for (int x = 0; x < Tiling::capsules; ++x) {
            if (x >= step.left()) break;
            at.i = step.first() + x;
            float v[At::items][warp_J], g[At::items][warp_J];
            make_votes(step, x, v);
            policy.gradient(at, own, v, g);
            const SplitGradients<Tiling::u_tiles> split(g);
            unsigned u[Tiling::u_tiles * Tiling::pieces];
            step.template load_u<true>(x, u);
            __syncwarp();  // before gradients replace what other lanes read
            if (to.u) emit_u(tiling, at, step, x, split, to);
            __syncwarp();
            if (to.weight) emit_weight<Tiling>(at, step, x, u, split, to);
        }
        __syncwarp();
        if (to.u) step.write_u(to.u, at.lane, to.more);
        if (to.weight) step.write_weight(to.weight, at.lane);
    }
    policy.end_warp(at, own, params + (static_cast<int64_t>(blockIdx.x) * Tiling::warps + at.warp) * param_count);
}

// Calls function.operator()<rows, pieces>().
template <class Function> inline Status for_tensor_tilings(const Capsules& c, Function function) {
    if (c.B <= 8) return c.K == 8 ? function.template operator()<8, 1>() : function.template operator()<8, 2>();
    return c.K == 8 ? function.template operator()<16, 1>() : function.template operator()<16, 2>();
}

// As `reduce` of stream.cuh.
template <class Policy>
Status reduce_in_tensor_cores(const Capsules& c, const Policy& policy, Workspace& whole, float* out) {
    return for_tensor_tilings(c, [&]<int rows, int pieces>() {
        static_assert(WarpReducingPolicy<Policy, float, TensorPosition<rows>>);
        using Tiling = TensorTiling<rows, pieces>;
        const Tiling tiling(c, resident_blocks<Policy, rows>);
        const int64_t size = c.B * warp_JD;
        Workspace w(&whole);
        float* const partial = tiling.runs.count == 1 ? out : w.take<float>(tiling.runs.count * size);
        CAPSOPS_TRY(launch(reduce_tensor_kernel<Tiling, Policy>, dim3{static_cast<unsigned>(tiling.runs.count)},
                           tiling.threads(), tiling.bytes(), c.context, tiling, policy, partial));
        if (tiling.runs.count == 1) return Status::ok;
        return add_rows(partial, tiling.runs.count, size, size, out, false, c.context);
    });
}

// As `emit` of stream.cuh: add(params, rows) adds up params [rows, param_count].
template <class Policy, class Add>
Status emit_in_tensor_cores(const Capsules& c, const Policy& policy, const CapsuleGradients& gradients,
                            int64_t param_count, Workspace& whole, bool more, Add add) {
    return for_tensor_tilings(c, [&]<int rows, int pieces>() {
        static_assert(WarpEmittingPolicy<Policy, float, TensorPosition<rows>>);
        using Tiling = TensorTiling<rows, pieces>;
        const Tiling tiling(c, resident_blocks<Policy, rows>);
        const int64_t params_rows = tiling.runs.count * Tiling::warps;
        Workspace w(&whole);
        float* const params = w.take<float>(params_rows * param_count);
        const GradientsOf<bfloat16> to{static_cast<bfloat16*>(gradients.u), static_cast<bfloat16*>(gradients.weight),
                                       nullptr, more};
        CAPSOPS_TRY(launch(emit_tensor_kernel<Tiling, Policy>, dim3{static_cast<unsigned>(tiling.runs.count)},
                           tiling.threads(), tiling.bytes(), c.context, tiling, policy, to, params,
                           static_cast<int>(param_count)));
        return add(static_cast<const float*>(params), params_rows);
    });
}

}  // namespace capsops::cuda
