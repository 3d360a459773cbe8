// The policy of the forward pass with a softmax over the input capsules.
#pragma once

#include "couplings.cuh"

namespace capsops::cuda {

// For every output capsule, over the runs of capsules: the largest m becomes that of all runs, and Z and the sums S are
// multiplied to match. Then S is divided by Z, so that the sum over the runs is s, and log Z is written. A row for each
// output capsule; its lanes share the runs. 0 where an output capsule has no pairs.
template <class A>
__global__ void join_runs(const A* m, const A* Z /* [runs, rows] */, int64_t runs, int64_t rows, int64_t D,
                          A* S /* [runs, rows, D] */, A* log_sums /* [rows] */, int lanes) {
    const int64_t lane = threadIdx.x % lanes;
    for (int64_t first = blockIdx.x * blockDim.x / lanes; first < rows; first += index_stride() / lanes) {
        const int64_t row = first + threadIdx.x / lanes, end = row < rows ? runs : 0;
        double largest = std::numeric_limits<A>::lowest(), sum = 0;
        for (int64_t r = lane; r < end; r += lanes) largest = max(static_cast<double>(m[r * rows + row]), largest);
        largest = over_lanes(largest, lanes, [](double a, double b) { return max(a, b); });
        const auto factor = [&](int64_t x) { return exponential(static_cast<double>(m[x]) - largest); };
        for (int64_t r = lane; r < end; r += lanes)
            sum += factor(r * rows + row) * static_cast<double>(Z[r * rows + row]);
        sum = sum_over_lanes(sum, lanes);
        const double inverse = sum == 0 ? 0 : 1 / sum;
        if (lane == 0 && end > 0) log_sums[row] = sum == 0 ? A(0) : static_cast<A>(largest + std::log(sum));
        for (int64_t r = lane; r < end; r += lanes) {
            const int64_t x = r * rows + row;
            const A by = static_cast<A>(factor(x) * inverse);
            for (int64_t d = 0; d < D; ++d) S[x * D + d] *= by;
        }
    }
}

// For votes in memory: z = û · x becomes w exp(b − m), with the largest m of this tile and those before. Z and the
// total of the tiles before are multiplied to match, and Z gets the sum over this tile. A row for each output capsule;
// its lanes share the input capsules of the tile.
template <class A>
__global__ void couple_tile(StagedVotes<A> t, Coupled<A> given, A* z /* [pairs, J] */, A* m, double* Z /* [B, J] */,
                            double* total /* [B, J, D] */, int lanes) {
    const int64_t lane = threadIdx.x % lanes, rows = t.B * t.J;
    for (int64_t first = blockIdx.x * blockDim.x / lanes; first < rows; first += index_stride() / lanes) {
        const int64_t row = first + threadIdx.x / lanes, end = row < rows ? t.count : 0, j = row % t.J;
        const A before = end == 0 || t.first == 0 ? given.lowest : m[row];
        A largest = before, sum = 0;
        for (int64_t i = lane; i < end; i += lanes) {
            const int64_t pair = row / t.J * t.count + i;
            A& b = z[pair * t.J + j];
            b = given.logit(b, t.of_all(pair) * t.J + j, t.present(pair));
            largest = max(b, largest);
        }
        largest = over_lanes(largest, lanes, [](A a, A b) { return max(a, b); });
        for (int64_t i = lane; i < end; i += lanes) {
            const int64_t pair = row / t.J * t.count + i;
            A& c = z[pair * t.J + j];
            c = c == given.lowest ? A(0) : exponential(c - largest);
            sum += c;
            c *= given.weight(t.of_all(pair), t.present(pair));
        }
        sum = sum_over_lanes(sum, lanes);
        const double factor = exponential(static_cast<double>(before) - static_cast<double>(largest));
        for (int64_t d = lane; end > 0 && d < t.D; d += lanes) total[row * t.D + d] *= factor;
        if (lane > 0 || end == 0) continue;
        m[row] = largest;
        Z[row] = (t.first == 0 ? 0 : Z[row] * factor) + static_cast<double>(sum);
    }
}

// s /= Z, and log Z. A row for each output capsule.
template <class A>
__global__ void divide_by_sums(const A* m, const double* Z, int64_t rows, int64_t D, A* s, A* log_sums, int lanes) {
    const int64_t lane = threadIdx.x % lanes;
    for (int64_t row = first_index() / lanes; row < rows; row += index_stride() / lanes) {
        const double inverse = Z[row] == 0 ? 0 : 1 / Z[row];
        for (int64_t d = lane; d < D; d += lanes)
            s[row * D + d] = static_cast<A>(static_cast<double>(s[row * D + d]) * inverse);
        if (lane == 0)
            log_sums[row] = Z[row] == 0 ? A(0) : static_cast<A>(static_cast<double>(m[row]) + std::log(Z[row]));
    }
}

// S = Σ_i w exp(b_ij − m) û_ij and Z = Σ_i exp(b_ij − m), with a number m of each thread that keeps the exponentials in
// range: at first the first logit; where a logit is larger by more than `slack`, that logit takes its place, and S and
// Z are multiplied to match. (Were m always the largest logit, that would happen far more often.)
template <class A, int width> struct OnlineSum {
    static constexpr int items = some_items<A>;
    static constexpr int resident = 2;
    static constexpr A slack = 16;
    // Of the partial sums of a block, besides S: numbers for each output capsule.
    static constexpr int64_t scalars = 2;
    template <int items> struct Registers {
        A x[items][width], m[items], Z[items];
    };
    Coupled<A> given;
    const A* x;                                    // [B, J, D], or null
    A* log_sums;                                   // [B, J]
    A* m;                                          // [B, J], for votes in memory
    double* Z;                                     // [B, J], the same
    int64_t rows;                                  // B · J
    A *m_of_runs = nullptr, *Z_of_runs = nullptr;  // [runs, B, J]

    template <int items> __device__ void start(const ThreadPosition<A, width, items>& at, Registers<items>& own) const {
        load_states(x, at, own.x);
#pragma unroll
        for (int m = 0; m < items; ++m) own.m[m] = given.lowest, own.Z[m] = A(0);
    }
    // S: sum.
    template <int items>
    __device__ void couple(const ThreadPosition<A, width, items>& at, Registers<items>& own, const A (&v)[items][width],
                           A (&c)[items][width], A (&sum)[items][width]) const {
        A z[items];
#pragma unroll
        for (int m = 0; m < items; ++m) z[m] = dot(v[m], own.x[m]);
        join_parts(at, 0, z, Add{});
#pragma unroll
        for (int m = 0; m < items; ++m) {
            const int64_t pair = at.b(m) * at.N + at.i;
            const A b = given.logit(z[m], pair * at.J + at.j, at.present(m));
            if (b > own.m[m] + slack) {  // NaN is never larger
                const A factor = exponential(own.m[m] - b);
                own.m[m] = b, own.Z[m] *= factor;
#pragma unroll
                for (int d = 0; d < width; ++d) sum[m][d] *= factor;
            }
            const A weight = b == given.lowest ? A(0) : exponential(b - own.m[m]);
            own.Z[m] += weight;
#pragma unroll
            for (int d = 0; d < width; ++d) c[m][d] = weight * given.weight(pair, at.present(m));
        }
    }
    // Gives all teams the largest m, before their sums are added, and writes m and Z of the run.
    template <int items>
    __device__ void end_run(const ThreadPosition<A, width, items>& at, const Registers<items>& own, int teams,
                            A (&sum)[items][width]) const {
        A numbers[2 * items];
#pragma unroll
        for (int m = 0; m < items; ++m) numbers[m] = own.m[m], numbers[items + m] = own.Z[m];
        at.publish_to_block(0, numbers);
        const int place = at.team_row * at.row_size + at.slot - at.row, team_size = at.team_rows * at.row_size;
#pragma unroll
        for (int m = 0; m < items; ++m) {
            A largest = own.m[m], total = 0;
            for (int team = 0; team < teams; ++team) largest = max(at.shared(m, team * team_size + place), largest);
            const A factor = exponential(own.m[m] - largest);
#pragma unroll
            for (int d = 0; d < width; ++d) sum[m][d] *= factor;
            if (at.idle || at.team > 0 || at.part > 0 || at.b(m) >= at.B) continue;
            for (int team = 0; team < teams; ++team)
                total += exponential(at.shared(m, team * team_size + place) - largest) *
                         at.shared(items + m, team * team_size + place);
            const int64_t to = blockIdx.x * rows + at.b(m) * at.J + at.j;
            m_of_runs[to] = largest, Z_of_runs[to] = total;
        }
    }

    void take_runs(int64_t runs, Workspace& w) {
        m_of_runs = w.take<A>(runs * rows);
        Z_of_runs = w.take<A>(runs * rows);
    }
    Status finish_runs(int64_t runs, int64_t D, A* partial, const ExecutionContext& context) const {
        return launch_rows<double>(join_runs<A>, rows, runs, context, static_cast<const A*>(m_of_runs),
                                   static_cast<const A*>(Z_of_runs), runs, rows, D, partial, log_sums);
    }

    static int64_t staged_numbers(int64_t J, int64_t) { return J; }
    Status stage_couplings(const StagedVotes<A>& t, A* scratch, Couplings<A>& c, double* total,
                           const ExecutionContext& context) const {
        A* const none = nullptr;
        c.c = scratch;
        CAPSOPS_TRY(stage_dots(t, x, static_cast<const A*>(nullptr), scratch, none, context));
        return launch_rows<A>(couple_tile<A>, rows, t.count, context, t, given, scratch, m, Z, total);
    }
    Status finish_staged(int64_t D, A* s, const ExecutionContext& context) const {
        return launch_rows<A>(divide_by_sums<A>, rows, D, context, static_cast<const A*>(m),
                              static_cast<const double*>(Z), rows, D, s, log_sums);
    }
};

}  // namespace capsops::cuda
