// EM routing (Hinton et al. 2018, procedure 1); the steps and the formulas are those of csrc/cpu/ops/em.cpp. An
// iteration takes two passes over u and W where its sums would lose digits: always the first one, which has no mean to
// shift by, and else only for the batch items whose means moved far, which a flag says. The host waits for nothing.
//
// The gradient has a pass of sums for each iteration but the first one, and one that writes the gradient of the votes
// for a tile of input capsules at a time, of which matrix products make those of u and W (staged.cuh).

#include "em_votes.cuh"

namespace capsops::cuda {
namespace {

// A thread has at most 16 components of a vote, 8 of double.
template <class Function> Status for_poses(const Capsules& c, Function function) {
    return for_storage(c.dtype, [&]<class T>() {
        constexpr int rows = sizeof(T) == 8 ? 2 : 4;
        return c.rows > 1 ? function.template operator()<PoseTiling<T, rows, 4>>()
                          : function.template operator()<PoseTiling<T, 1, 8>>();
    });
}

// The saved numbers of an output capsule in an iteration.
template <class A> __host__ __device__ Gaussian<A> gaussian_at(A* state, int64_t row, int64_t H) {
    A* const g = state + row * (3 * H + 2);
    return {g, g + H, g + 2 * H, A(0), A(0)};
}
template <class A> __device__ Gaussian<A> saved_gaussian(const A* state, int64_t row, int64_t H) {
    Gaussian<A> g = gaussian_at(const_cast<A*>(state), row, H);
    g.mass = g.mean[3 * H], g.logit = g.mean[3 * H + 1];
    return g;
}

// What pack_terms() brings into the order of the threads. Null: zeros.
template <class A> struct TermSources {
    const A* logit_state = nullptr;     // of the iteration before: its mean and its variance
    const A* logit_constant = nullptr;  // [B, J]
    const A* shift_state = nullptr;     // its mean
    const A* linear = nullptr;          // [B, J, H]
    const A* quadratic = nullptr;       // [B, J, H]
    const A* constant = nullptr;        // [B, J]
    A* again = nullptr;                 // [B], becomes 0
};

template <class Tiling, class A = typename Tiling::A>
__global__ void pack_terms(Tiling t, TermSources<A> from, A* terms /* [B, groups, all_lanes, 4] */) {
    const int64_t H = t.H(), saved = 3 * H + 2, all_lanes = t.all_lanes();
    for (int64_t x = first_index(); x < t.B * Tiling::groups * all_lanes; x += index_stride()) {
        const int64_t lane = x % all_lanes, group = x / all_lanes % Tiling::groups, b = x / all_lanes / Tiling::groups;
        const int64_t j = lane / t.parts, part = lane % t.parts, row = b * t.J + j;
        const int64_t first_p = part / t.columns * Tiling::rows, first_d = part % t.columns * Tiling::width;
        if (from.again && lane == 0 && group == 0) from.again[b] = A(0);
        Piece<A, 4> to{};
        if (group == Tiling::groups - 1) {
            if (j < t.J) {
                if (from.logit_constant) to.x[0] = from.logit_constant[row];
                if (from.constant) to.x[1] = from.constant[row];
            }
        } else {
            const int kind = static_cast<int>(group * 4 / Tiling::size);
            for (int m = 0; m < 4; ++m) {
                const int component = static_cast<int>(group * 4 % Tiling::size) + m;
                const int64_t p = first_p + component / Tiling::width, d = first_d + component % Tiling::width;
                if (j >= t.J || p >= t.P || d >= t.D) continue;
                const int64_t h = p * t.D + d;
                if (kind == Tiling::logit_shift && from.logit_state) to.x[m] = from.logit_state[row * saved + h];
                if (kind == Tiling::logit_quadratic && from.logit_state)
                    to.x[m] = e_step_quadratic(from.logit_state[row * saved + 2 * H + h]);
                if (kind == Tiling::shift && from.shift_state) to.x[m] = from.shift_state[row * saved + h];
                if (kind == Tiling::linear && from.linear) to.x[m] = from.linear[row * H + h];
                if (kind == Tiling::quadratic && from.quadratic) to.x[m] = from.quadratic[row * H + h];
            }
        }
        *reinterpret_cast<Piece<A, 4>*>(terms + x * 4) = to;
    }
}

template <class Tiling, class A = typename Tiling::A>
Status pack(const Tiling& t, const TermSources<A>& from, A* terms, const ExecutionContext& context) {
    return launch_over(t.terms() / 4, pack_terms<Tiling>, context, t, from, terms);
}

// Shared memory of a block: a number for each thread.
template <class A> constexpr int64_t exchange_bytes = max_threads * static_cast<int64_t>(sizeof(A));

template <class Tiling, class A = typename Tiling::A>
Status normalise(const Tiling& t, const A* terms, bool equal, bool with_gradient, int64_t first, int64_t count,
                 A* normalisers, A* sums, const ExecutionContext& context) {
    const int64_t blocks = ceil_div(t.B * count, t.block_rows());
    return launch(normalise_pairs<Tiling>, dim3{static_cast<unsigned>(blocks)}, t.threads(), exchange_bytes<A>, context,
                  t, terms, equal, with_gradient, first, count, normalisers, sums);
}

// sums [B, J, moments] of sum_moments() over all input capsules. means: of windows that compete, or null.
template <bool adjoint, class Tiling, class A = typename Tiling::A>
Status sum_over_capsules(const Tiling& t, const A* terms, bool equal, const A* again, const A* means,
                         const ExecutionContext& context, Workspace& whole, A* sums) {
    // Blocks that a multiprocessor runs at a time, by their registers.
    constexpr int64_t resident = sizeof(A) == 4 && Tiling::size == 8 && !adjoint ? 2 : 1;
    const int64_t size = t.B * t.J * t.moments(), number = static_cast<int64_t>(sizeof(A));
    const bool normalises = t.chunks > 1 && (adjoint || !equal);
    const int64_t fitting = at_least(limits.pieces / at_least(2 * number * t.B, 1), 1);
    const int64_t tile = normalises ? at_most(t.N, fitting) : t.N;
    const Runs runs = cut_runs(tile, t.block_rows(), t.B * t.chunks, ceil_div(size * number, t.B * t.chunks),
                               limits.multiprocessors * resident);
    Workspace w(&whole);
    A* const normalisers = w.take<A>(normalises ? 2 * t.B * tile : 0);
    A* const partial = w.take<A>(runs.count * size);
    int64_t first = 0;
    do {
        const int64_t count = at_most(tile, t.N - first), own_runs = ceil_div(count, at_least(runs.length, 1));
        if (count > 0) {
            if (normalises)
                CAPSOPS_TRY(
                    normalise(t, terms, equal, adjoint, first, count, normalisers, static_cast<A*>(nullptr), context));
            const dim3 blocks{static_cast<unsigned>(own_runs * t.B), static_cast<unsigned>(t.chunks)};
            const int64_t exchanged = (2 * Tiling::size + 1) * t.threads() * number;
            CAPSOPS_TRY(launch(sum_moments<adjoint, Tiling>, blocks, t.threads(), exchanged, context, t, terms,
                               normalises ? normalisers : nullptr, means, equal, again, first, count, runs.length,
                               partial));
        }
        CAPSOPS_TRY(add_rows(static_cast<const A*>(partial), own_runs, size, size, sums, first > 0, context));
        first += tile;
    } while (first < t.N);
    return Status::ok;
}

// ---- windows that compete ------------------------------------------------------------------------------------

// What normalise() writes about a pair.
template <class A> struct OwnSums {
    const A* normalisers;  // [B, N, 2]: the largest logit and Σ_j r e; null: the logits are 0
    const A* sums;         // [B, N]: Σ_j exp(logit − largest)

    __device__ A largest(int64_t pair) const { return normalisers ? normalisers[2 * pair] : A(0); }
    __device__ A sum(int64_t pair) const { return normalisers ? sums[pair] : A(1); }
    __device__ A mean(int64_t pair) const { return normalisers ? normalisers[2 * pair + 1] : A(0); }
};

// From the sums of each place of a capsule: the activation of the capsule times the share of the place's window in it,
// and Σ r e over the output capsules of all windows, which is also a term of the gradient of the activation. A place
// that does not exist is left out.
template <class A>
__global__ void join_places(Windows w, const uint8_t* mask /* [B, N], or null */, int64_t N, int64_t capsules,
                            OwnSums<A> own, const A* activation /* [capsules] */, A* weights /* [B, N] */,
                            A* means /* [B, N] */, A* g_activation /* [capsules], or null */, bool more) {
    for (int64_t x = first_index(); x < capsules; x += index_stride()) {
        const int64_t own_pairs = w.count * N, base = x / w.capsules * own_pairs;
        const int64_t* const places = w.places + x % w.capsules * w.most;
        const auto for_places = [&](auto visit) {
            for (int64_t m = 0; m < w.most; ++m)
                if (places[m] >= 0 && places[m] < own_pairs && (!mask || mask[base + places[m]]))
                    visit(base + places[m]);
        };
        A largest = A(-INFINITY), sum = A(0), mean = A(0);
        for_places([&](int64_t pair) { largest = max(largest, own.largest(pair)); });
        for_places([&](int64_t pair) { sum += own.sum(pair) * std::exp(own.largest(pair) - largest); });
        for_places([&](int64_t pair) {
            const A share = own.sum(pair) * std::exp(own.largest(pair) - largest) / sum;
            weights[pair] = activation[x] * share;
            mean += share * own.mean(pair);
        });
        for_places([&](int64_t pair) { means[pair] = mean; });
        if (g_activation) g_activation[x] = more ? g_activation[x] + mean : mean;
    }
}

// The windows of an operator, or none: then every batch item is alone, and nothing runs here.
template <class A> struct Competition {
    const Windows* windows;  // or null
    int64_t pairs;           // B·N; 0 without windows
    A *own, *own_sums;       // [B, N, 2] and [B, N], scratch memory
    A *weights, *means;      // [iterations, B, N]; 0 at a place that no capsule has

    Competition(const Capsules& c, const Windows* windows, int64_t iterations, Workspace& w)
        : windows(windows),
          pairs(windows ? c.B * c.N : 0),
          own(w.take<A>(2 * pairs)),
          own_sums(w.take<A>(pairs)),
          weights(w.take<A>(iterations * pairs)),
          means(w.take<A>(iterations * pairs)) {}

    const A* means_of(int64_t m) const { return windows ? means + m * pairs : nullptr; }
    // The tiling of iteration m, with the weights in place of the activations.
    template <class Tiling> Tiling of_iteration(const Tiling& t, int64_t m) const {
        Tiling own = t;
        if (windows) own.activation = weights + m * pairs;
        return own;
    }

    Status begin(const Capsules& c, int64_t iterations) const {
        if (pairs == 0) return Status::ok;
        CAPSOPS_TRY(launch_over(iterations * pairs, write_zeros<A>, c.context, weights, iterations * pairs));
        return launch_over(iterations * pairs, write_zeros<A>, c.context, means, iterations * pairs);
    }

    // Sets the numbers of iteration m from its terms. equal: all logits are 0. wants_means: whether Σ r e is wanted;
    // the g_activation, if any, gets it or, if `more`, is increased by it.
    template <class Tiling>
    Status join(const Capsules& c, const Tiling& t, const A* terms, bool equal, bool wants_means, int64_t m,
                const A* activation, A* g_activation, bool more) const {
        if (!windows) return Status::ok;
        const bool from_votes = !equal || wants_means;
        if (from_votes && pairs > 0)
            CAPSOPS_TRY(normalise(t, terms, equal, wants_means, 0, t.N, own, own_sums, c.context));
        const OwnSums<A> sums{from_votes ? own : nullptr, own_sums};
        const int64_t capsules = c.B / windows->count * windows->capsules;
        return launch_over(capsules, join_places<A>, c.context, *windows, t.mask, t.N, capsules, sums, activation,
                           weights + m * pairs, means + m * pairs, g_activation, more);
    }
};

// ---- forward -------------------------------------------------------------------------------------------------

// The mean of a saved row, or zeros.
template <class A> struct Shift {
    const A* mean;

    __device__ A operator[](int64_t h) const { return mean ? mean[h] : A(0); }
};

template <class A> struct MStep {
    const A* sums;         // [B, J, 2H + 1]
    const A* shift_state;  // or null
    A* state;              // of this iteration, [B, J, 3H + 2]
    const A *beta_u, *beta_a;
    A inverse_temperature;
    const A* only;  // [B], or null: leaves the batch items that have 0 as they are
    A* again;       // [B], or null: 1 for batch items whose sums lost digits
    A* constant;    // [B, J], of the E-step that follows
    A* mean;        // [B, J, H], the result
    A* activation;  // [B, J], the result
};

template <class A> __global__ void m_step_rows(MStep<A> s, int64_t rows, int64_t J, int64_t H, int lanes) {
    for_rows(rows, lanes, [&](int64_t r, const RowLanes& lane) {
        const int64_t row = at_most(r, rows - 1), j = row % J;
        const bool skipped = s.only && s.only[row / J] == A(0);
        // Without components it neither reads nor writes; all lanes of a warp join their numbers.
        const RowLanes own{skipped ? int64_t{1} << 62 : lane.first, lane.step};
        const A* const sums = s.sums + row * (2 * H + 1);
        Gaussian<A> g = gaussian_at(s.state, row, H);
        const Shift<A> shift{s.shift_state ? s.shift_state + row * (3 * H + 2) : nullptr};
        const bool precise = m_step(g, sums[2 * H], sums, sums + H, shift, H, A(em_epsilon), s.beta_u[j], s.beta_a[j],
                                    s.inverse_temperature, own);
        const A constant = e_step_constant(g, H, own);
        for (int64_t h = own.first; h < H; h += own.step) s.mean[row * H + h] = g.mean[h];
        if (own.first != 0) return;
        g.mean[3 * H] = g.mass, g.mean[3 * H + 1] = g.logit;
        s.constant[row] = constant;
        s.activation[row] = A(1) / (A(1) + std::exp(-g.logit));
        if (s.again && !precise) s.again[row / J] = A(1);
    });
}

// windows: null if every batch item is alone.
template <class Tiling, class A = typename Tiling::A>
Status route(const Capsules& c, const void* activation, const A* beta_u, const A* beta_a,
             std::span<const double> inverse_temperatures, const Windows* windows, A* mean, A* out_activation,
             A* state) {
    Workspace w(c.context);
    const Competition<A> competition(c, windows, 1, w);
    const Tiling t(c, activation);
    if (!t.fits()) return Status::unsupported;
    const int64_t rows = c.B * c.J, H = t.H();
    if (rows == 0) return Status::ok;
    CAPSOPS_TRY(competition.begin(c, 1));
    A* const terms = w.take<A>(t.terms());
    A* const sums = w.take<A>(rows * t.moments());
    A* const constants[2] = {w.take<A>(rows), w.take<A>(rows)};
    A* const again = w.take<A>(c.B);
    for (size_t iteration = 0; iteration < inverse_temperatures.size(); ++iteration) {
        const bool later = iteration > 0;
        A* const own = state + static_cast<int64_t>(iteration) * rows * (3 * H + 2);
        const A* const before = later ? own - rows * (3 * H + 2) : nullptr;
        for (int pass = 0; pass < 2; ++pass) {
            const A* const shift = pass ? own : before;
            const A* const only = later && pass ? again : nullptr;
            const TermSources<A> from{.logit_state = before,
                                      .logit_constant = later ? constants[(iteration - 1) % 2] : nullptr,
                                      .shift_state = shift,
                                      .again = later && !pass ? again : nullptr};
            CAPSOPS_TRY(pack(t, from, terms, c.context));
            const A* const own_terms = terms;
            if (pass == 0)
                CAPSOPS_TRY(competition.join(c, t, own_terms, !later, false, 0, static_cast<const A*>(activation),
                                             static_cast<A*>(nullptr), false));
            CAPSOPS_TRY((sum_over_capsules<false>(competition.of_iteration(t, 0), own_terms, !later, only,
                                                  static_cast<const A*>(nullptr), c.context, w, sums)));
            const MStep<A> step{.sums = sums,
                                .shift_state = shift,
                                .state = own,
                                .beta_u = beta_u,
                                .beta_a = beta_a,
                                .inverse_temperature = static_cast<A>(inverse_temperatures[iteration]),
                                .only = only,
                                .again = later && !pass ? again : nullptr,
                                .constant = constants[iteration % 2],
                                .mean = mean,
                                .activation = out_activation};
            CAPSOPS_TRY(launch_over_rows(rows, H, m_step_rows<A>, c.context, step, rows, c.J, H));
        }
    }
    return Status::ok;
}

// ---- backward ------------------------------------------------------------------------------------------------

template <class A> struct IterationGradient {
    const A* sums;    // [B, J, 2H + 1], the adjoint's of the iteration after this one; null for the last one
    const A* state;   // of this iteration
    const A* before;  // of the one before, or null
    const A *g_out_mean, *g_out_activation;  // of the results
    const A* beta_u;
    A inverse_temperature;
    A *g_mean, *g_variance;        // [B, J, H], scratch memory
    A *linear, *quadratic;         // [B, J, H]: the gradient of a weight
    A *constant, *logit_constant;  // [B, J]: of the gradient of a weight, and of the logits of this iteration
    A *g_beta_u, *g_beta_a;        // [B, J], summed over iterations
};

template <class A>
__global__ void iteration_gradient(IterationGradient<A> s, int64_t rows, int64_t J, int64_t H, int lanes) {
    for_rows(rows, lanes, [&](int64_t r, const RowLanes& lane) {
        const int64_t row = at_most(r, rows - 1);
        const Gaussian<A> g = saved_gaussian(s.state, row, H);
        A *const g_mean = s.g_mean + row * H, *const g_variance = s.g_variance + row * H;
        A g_logit;
        if (s.sums) {
            const A* const sums = s.sums + row * (2 * H + 1);
            g_logit = e_step_backward(g, sums[2 * H], sums, sums + H, H, g_mean, g_variance, lane);
        } else {
            for (int64_t h = lane.first; h < H; h += lane.step)
                g_mean[h] = s.g_out_mean[row * H + h], g_variance[h] = A(0);
            g_logit = s.g_out_activation[row] / ((A(1) + std::exp(-g.logit)) * (A(1) + std::exp(g.logit)));
        }
        const MStepGradient<A> out =
            m_step_backward(g, static_cast<const A*>(g_mean), g_variance, g_logit, H, A(em_epsilon), s.beta_u[row % J],
                            s.inverse_temperature, s.linear + row * H, s.quadratic + row * H, lane);
        const A logit_constant = s.before ? e_step_constant(saved_gaussian(s.before, row, H), H, lane) : A(0);
        if (lane.first != 0) return;
        s.constant[row] = out.constant, s.logit_constant[row] = logit_constant;
        s.g_beta_u[row] = out.g_beta_u + (s.sums ? s.g_beta_u[row] : A(0));
        s.g_beta_a[row] = out.g_beta_a + (s.sums ? s.g_beta_a[row] : A(0));
    });
}

// For emit_staged: the gradient of the votes of a tile.
template <class Tiling> struct VoteGradients {
    using A = typename Tiling::A;
    static constexpr bool needs_votes = false;
    const Tiling& t;
    const A* terms;
    int64_t iterations;
    A* g_activation;           // [B, N], or null
    const A *weights, *means;  // [iterations, B, N], of windows that compete; or null

    int64_t staged_numbers(int64_t, int64_t) const { return t.chunks > 1 ? 2 * iterations : 0; }
    Status stage_gradient(const StagedVotes<A>& tile, A* scratch, A* g, A*, int64_t,
                          const ExecutionContext& context) const {
        const int64_t pairs = tile.pairs();
        if (pairs == 0) return Status::ok;
        for (int64_t m = 0; t.chunks > 1 && m < iterations; ++m)
            CAPSOPS_TRY(normalise(t, terms + m * t.terms(), m == 0, true, tile.first, tile.count,
                                  scratch + 2 * m * pairs, static_cast<A*>(nullptr), context));
        const dim3 blocks{static_cast<unsigned>(ceil_div(pairs, t.block_rows())), static_cast<unsigned>(t.chunks)};
        return launch(vote_gradients<Tiling>, blocks, t.threads(), exchange_bytes<A>, context, t, terms, t.terms(),
                      iterations, t.chunks > 1 ? scratch : nullptr, weights, means, tile.first, tile.count, g,
                      weights ? nullptr : g_activation);
    }
};

template <class Tiling, class A = typename Tiling::A>
Status route_backward(const Capsules& c, const void* activation, const A* beta_u,
                      std::span<const double> inverse_temperatures, const Windows* windows, const A* state,
                      const A* g_mean, const A* g_out_activation, const CapsuleGradients& gradients, A* g_activation,
                      A* g_beta_u, A* g_beta_a) {
    const int64_t rows = c.B * c.J, iterations = static_cast<int64_t>(inverse_temperatures.size());
    Workspace w(c.context);
    const Competition<A> competition(c, windows, iterations, w);
    const Tiling t(c, activation);
    if (!t.fits()) return Status::unsupported;
    const int64_t H = t.H();
    CAPSOPS_TRY(competition.begin(c, iterations));
    A* const terms = w.take<A>(iterations * t.terms());
    A* const sums = w.take<A>(rows * t.moments());
    IterationGradient<A> step{.g_out_mean = g_mean,
                              .g_out_activation = g_out_activation,
                              .beta_u = beta_u,
                              .g_mean = w.take<A>(rows * H),
                              .g_variance = w.take<A>(rows * H),
                              .linear = w.take<A>(rows * H),
                              .quadratic = w.take<A>(rows * H),
                              .constant = w.take<A>(rows),
                              .logit_constant = w.take<A>(rows),
                              .g_beta_u = w.take<A>(rows),
                              .g_beta_a = w.take<A>(rows)};
    for (int64_t m = iterations - 1; m >= 0 && rows > 0; --m) {
        step.state = state + m * rows * (3 * H + 2);
        step.before = m > 0 ? step.state - rows * (3 * H + 2) : nullptr;
        step.sums = m < iterations - 1 ? sums : nullptr;
        step.inverse_temperature = static_cast<A>(inverse_temperatures[static_cast<size_t>(m)]);
        CAPSOPS_TRY(launch_over_rows(rows, H, iteration_gradient<A>, c.context, step, rows, c.J, H));
        const TermSources<A> from{.logit_state = step.before,
                                  .logit_constant = step.logit_constant,
                                  .shift_state = step.state,
                                  .linear = step.linear,
                                  .quadratic = step.quadratic,
                                  .constant = step.constant};
        A* const own = terms + m * t.terms();
        CAPSOPS_TRY(pack(t, from, own, c.context));
        CAPSOPS_TRY(competition.join(c, t, own, m == 0, m > 0 || g_activation, m, static_cast<const A*>(activation),
                                     g_activation, m < iterations - 1));
        if (m > 0)
            CAPSOPS_TRY(
                (sum_over_capsules<true>(competition.of_iteration(t, m), static_cast<const A*>(own), false,
                                         static_cast<const A*>(nullptr), competition.means_of(m), c.context, w, sums)));
    }
    if (g_beta_u)
        CAPSOPS_TRY(add_rows(static_cast<const A*>(step.g_beta_u), c.B, c.J, c.J, g_beta_u, false, c.context));
    if (g_beta_a)
        CAPSOPS_TRY(add_rows(static_cast<const A*>(step.g_beta_a), c.B, c.J, c.J, g_beta_a, false, c.context));
    if (!gradients.u && !gradients.weight && (!g_activation || windows)) return Status::ok;
    const VoteGradients<Tiling> policy{
        t, terms, iterations, g_activation, windows ? competition.weights : nullptr, competition.means_of(0)};
    return emit_staged<typename Tiling::Storage>(c, policy, gradients, 0, w, false,
                                                 [](const double*, int64_t) { return Status::ok; });
}

Status route_any(const Capsules& c, const void* activation, const void* beta_u, const void* beta_a,
                 std::span<const double> inverse_temperatures, const Windows* windows, void* mean, void* out_activation,
                 void* state) {
    return for_poses(c, [&]<class Tiling>() {
        using A = typename Tiling::A;
        return route<Tiling>(c, activation, static_cast<const A*>(beta_u), static_cast<const A*>(beta_a),
                             inverse_temperatures, windows, static_cast<A*>(mean), static_cast<A*>(out_activation),
                             static_cast<A*>(state));
    });
}

Status route_any_backward(const Capsules& c, const void* activation, const void* beta_u,
                          std::span<const double> inverse_temperatures, const Windows* windows, const void* state,
                          const void* g_mean, const void* g_out_activation, const CapsuleGradients& gradients,
                          void* g_activation, void* g_beta_u, void* g_beta_a) {
    return for_poses(c, [&]<class Tiling>() {
        using A = typename Tiling::A;
        return route_backward<Tiling>(c, activation, static_cast<const A*>(beta_u), inverse_temperatures, windows,
                                      static_cast<const A*>(state), static_cast<const A*>(g_mean),
                                      static_cast<const A*>(g_out_activation), gradients, static_cast<A*>(g_activation),
                                      static_cast<A*>(g_beta_u), static_cast<A*>(g_beta_a));
    });
}

}  // namespace

Status em_routing(const Capsules& c, const void* activation, const void* beta_u, const void* beta_a,
                  std::span<const double> inverse_temperatures, void* mean, void* out_activation, void* state) {
    return route_any(c, activation, beta_u, beta_a, inverse_temperatures, nullptr, mean, out_activation, state);
}

Status em_routing_over_positions(const Capsules& c, const void* activation, const void* beta_u, const void* beta_a,
                                 std::span<const double> inverse_temperatures, int64_t windows, int64_t capsules,
                                 int64_t most, const void* places, void* mean, void* out_activation, void* state) {
    const Windows w{windows, capsules, most, static_cast<const int64_t*>(places)};
    return route_any(c, activation, beta_u, beta_a, inverse_temperatures, &w, mean, out_activation, state);
}

Status em_routing_backward(const Capsules& c, const void* activation, const void* beta_u,
                           std::span<const double> inverse_temperatures, const void* state, const void* g_mean,
                           const void* g_out_activation, void* g_u, void* g_weight, void* g_activation, void* g_beta_u,
                           void* g_beta_a) {
    return route_any_backward(c, activation, beta_u, inverse_temperatures, nullptr, state, g_mean, g_out_activation,
                              {g_u, g_weight}, g_activation, g_beta_u, g_beta_a);
}

Status em_routing_over_positions_backward(const Capsules& c, const void* activation, const void* beta_u,
                                          std::span<const double> inverse_temperatures, int64_t windows,
                                          int64_t capsules, int64_t most, const void* state, const void* g_mean,
                                          const void* g_out_activation, const void* places, void* g_u, void* g_weight,
                                          void* g_activation, void* g_beta_u, void* g_beta_a) {
    const Windows w{windows, capsules, most, static_cast<const int64_t*>(places)};
    return route_any_backward(c, activation, beta_u, inverse_temperatures, &w, state, g_mean, g_out_activation,
                              {g_u, g_weight}, g_activation, g_beta_u, g_beta_a);
}

}  // namespace capsops::cuda
