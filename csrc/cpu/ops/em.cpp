// EM routing (Hinton et al. 2018, procedure 1). Each iteration is one pass that recomputes the votes, assigns them by
// the Gaussians of the iteration before (E-step), and sums w, w x and w x² (M-step). The first iteration takes a second
// pass, because it has no mean to shift by; so does an iteration whose means moved far. The Gaussians of every
// iteration are saved.
//
// The gradient goes through all iterations. The M-step of iteration t gives the weight of a vote the gradient e^t, a
// quadratic form of the vote. The softmax gives the logit δ^t = w (e − Σ_j r e). The logit is a quadratic form too, and
// leads to the Gaussians of iteration t − 1, for which a pass sums δ, δ x and δ x². So there are R − 1 reducing passes,
// from the last iteration to the first, and one emitting pass over all iterations:
//
//   g_û = Σ_t [w^t (linear^t + 2 quadratic^t (û − μ^t)) − δ^t (û − μ^{t−1})/σ²^{t−1}];   g_activation = Σ_t Σ_j r^t e^t
//
// Over positions the softmax, and so Σ r e, runs over the output capsules of all windows that contain an input capsule:
// r is the softmax over those of one window, times the share of that window. An iteration but the first then takes a
// pass before, which writes Σ_j exp(logit) for each input capsule of each window and, for the gradient, Σ_j r e. These
// are joined over the places of a capsule (Competition in em_sums.h).

#include "em_sums.h"

namespace capsops::cpu::CAPSOPS_ISA {
namespace {

template <class A> struct EmSum {
    static constexpr bool takes_registers = false;
    Assignment<A> assignment;
    Moments<A> moments;
    const A* shift;  // a state

    int64_t row_size() const { return moments.row_size(); }
    int64_t scratch_size() const { return moments.J * Lanes<A>::count; }

    void accumulate(Tile<A>& t, A* sums, A* scratch) const {
        Lanes<A>* w = reinterpret_cast<Lanes<A>*>(scratch);
        const Lanes<A> a = assignment.responsibilities(t, w);
        for (int64_t j = 0; j < t.J; ++j) w[j] *= a;
        moments.add(t, w, shift, sums);
    }
};

// windows: null if every batch item is alone.
Status route(const Capsules& c, const void* activation_, const void* beta_u_, const void* beta_a_,
             std::span<const double> inverse_temperatures, const Windows* windows, void* mean_, void* out_activation,
             void* state) {
    const int64_t iterations = static_cast<int64_t>(inverse_temperatures.size());
    bool valid = true;
    const Status status = for_accumulation(c.dtype, [&]<class A>() {
        if (windows && !valid_places(*windows, c.N)) {
            valid = false;
            return;
        }
        const Operands<A> o(c, best_layout<A, EmSum<A>>(c));
        const int64_t J = o.J, size = o.state_size();
        const A* beta_u = static_cast<const A*>(beta_u_);
        const A* beta_a = static_cast<const A*>(beta_a_);
        const Moments<A> moments(o);
        Gaussians<A> gaussians(o, iterations, static_cast<const A*>(state));
        Competition<A> competition(o, windows, 1, false);
        const A* activation = competition.begin(static_cast<const A*>(activation_));
        Buffer<A> sums(o.state_rows * moments.row_size()), first(o.H), second(o.H);
        Buffer<A> shift(c.B * o.JH), packed_shift(size);
        fill(shift.get(), c.B * o.JH, A(0));
        fill(packed_shift.get(), size, A(0));

        const auto m_step_all = [&](int64_t t) {
            bool precise = true;
            for (int64_t b = 0; b < c.B; ++b)
                for (int64_t j = 0; j < J; ++j) {
                    A* own_shift = shift.get() + (b * J + j) * o.H;
                    const A mass = moments.of(o, sums.get(), b, j, first.get(), second.get());
                    Gaussian<A> g = gaussians.at(t, b * J + j);
                    precise &= m_step(g, mass, first.get(), second.get(), own_shift, o.H, A(em_epsilon), beta_u[j],
                                      beta_a[j], static_cast<A>(inverse_temperatures[t]));
                    g.mean[3 * o.H] = g.mass;
                    g.mean[3 * o.H + 1] = g.logit;
                    std::memcpy(own_shift, g.mean, sizeof(A) * static_cast<size_t>(o.H));
                }
            gaussians.load_iteration(t);
            std::memcpy(packed_shift.get(), gaussians.mean.get() + t * size, sizeof(A) * static_cast<size_t>(size));
            return precise;
        };
        for (int64_t t = 0; t < iterations; ++t) {
            const Quadratic<A> logits = gaussians.logits(t);
            if (t > 0) competition.set(0, logits, nullptr);
            const EmSum<A> policy{{logits, activation, c.N, competition.shares(0)}, moments, packed_shift.get()};
            for (int pass = 0; pass < 2; ++pass) {
                reduce(o, policy, sums.get());
                const bool precise = m_step_all(t);
                if (t > 0 && precise) break;
            }
        }
        for (int64_t r = 0; r < gaussians.rows; ++r) {
            const Gaussian<A> g = gaussians.at(iterations - 1, r);
            std::memcpy(static_cast<A*>(mean_) + r * o.H, g.mean, sizeof(A) * static_cast<size_t>(o.H));
            static_cast<A*>(out_activation)[r] = A(1) / (A(1) + std::exp(-g.logit));
        }
    });
    return valid ? status : Status::invalid_argument;
}

// The gradient of the assignment in one iteration.
template <class A> struct EmAdjoint {
    Assignment<A> assignment;
    Quadratic<A> e;
    const A* means;  // [B, N], Σ r e over all windows; or null

    // Writes r [J] and e [J], and returns the activations.
    Lanes<A> operator()(const Tile<A>& t, Lanes<A>* r, Lanes<A>* out) const {
        const Lanes<A> a = assignment.responsibilities(t, r);
        e(t, out);
        return a;
    }

    // In place: e becomes δ / a = r (e − Σ r e).
    void logit_gradient(const Tile<A>& t, const Lanes<A>* r, Lanes<A>* out) const {
        if (!means) return softmax_backward(r, out, t.J);
        const Lanes<A> mean = of_pairs(t, means, assignment.N);
        for (int64_t j = 0; j < t.J; ++j) out[j] = r[j] * (out[j] - mean);
    }
};

template <class A> struct EmAdjointSum {
    static constexpr bool takes_registers = false;
    EmAdjoint<A> adjoint;
    Moments<A> moments;

    int64_t row_size() const { return moments.row_size(); }
    int64_t scratch_size() const { return 2 * moments.J * Lanes<A>::count; }

    void accumulate(Tile<A>& t, A* sums, A* scratch) const {
        Lanes<A>* r = reinterpret_cast<Lanes<A>*>(scratch);
        Lanes<A>* delta = r + t.J;
        const Lanes<A> a = adjoint(t, r, delta);
        adjoint.logit_gradient(t, r, delta);
        for (int64_t j = 0; j < t.J; ++j) delta[j] *= a;
        moments.add(t, delta, adjoint.assignment.logits.shift, sums);
    }
};

template <class A> struct EmGradient {
    static constexpr bool needs_votes = true, takes_registers = false;
    const EmAdjoint<A>* adjoints;  // [iterations]
    int64_t iterations;
    int64_t J, N;
    A* g_activation;  // [B, N], or null

    int64_t param_count() const { return 0; }
    int64_t scratch_size() const { return 2 * J * Lanes<A>::count; }

    void emit(Tile<A>& t, A*, A* scratch) const {
        Lanes<A>* r = reinterpret_cast<Lanes<A>*>(scratch);
        Lanes<A>* delta = r + J;
        const A* votes = t.votes;
        A* const g_votes = t.g_votes;
        const int64_t JD = t.JD;
        for (int64_t iteration = 0; iteration < iterations; ++iteration) {
            const EmAdjoint<A>& adjoint = adjoints[iteration];
            const Quadratic<A> e = adjoint.e;
            const Lanes<A> a = adjoint(t, r, delta);
            if (g_activation)
                for (int m = 0; m < t.count; ++m) {
                    if (!t.has(m)) continue;
                    A sum = 0;
                    for (int64_t j = 0; j < J; ++j) sum += lane(r, j, m) * lane(delta, j, m);
                    A* to = g_activation + t.b[m] * N + t.i[m];
                    *to = iteration == 0 ? sum : *to + sum;
                }
            adjoint.logit_gradient(t, r, delta);
            for (int64_t j = 0; j < J; ++j) {
                r[j] *= a;  // now w
                delta[j] *= a;
            }
            for_each_vector(t, r, [=](int64_t own, int64_t row, int64_t jd, Lanes<A> w) {
                const int64_t state = row * JD + jd;
                const Lanes<A> x = load(votes + own) - load(e.shift + state);
                const Lanes<A> term = w * (load(e.linear + state) + load(e.quadratic + state) * x * A(2));
                store(g_votes + own, iteration == 0 ? term : load(g_votes + own) + term);
            });
            if (iteration == 0) continue;
            const Quadratic<A> logits = adjoint.assignment.logits;
            for_each_vector(t, delta, [=](int64_t own, int64_t row, int64_t jd, Lanes<A> d) {
                const int64_t state = row * JD + jd;
                const Lanes<A> x = load(votes + own) - load(logits.shift + state);
                add_to(g_votes + own, d * load(logits.quadratic + state) * x * A(2));
            });
        }
    }
};

// windows: null if every batch item is alone.
Status route_backward(const Capsules& c, const void* activation_, const void* beta_u_,
                      std::span<const double> inverse_temperatures, const Windows* windows, const void* state,
                      const void* g_mean_, const void* g_out_activation, const CapsuleGradients& gradients,
                      void* g_activation_, void* g_beta_u_, void* g_beta_a_) {
    const int64_t iterations = static_cast<int64_t>(inverse_temperatures.size());
    bool valid = true;
    const Status status = for_accumulation(c.dtype, [&]<class A>() {
        if (windows && !valid_places(*windows, c.N)) {
            valid = false;
            return;
        }
        const Operands<A> o(c, best_layout<A, EmAdjointSum<A>, EmGradient<A>>(c));
        const int64_t rows = c.B * o.J, J = o.J, H = o.H, size = o.state_size();
        const A* beta_u = static_cast<const A*>(beta_u_);
        Gaussians<A> gaussians(o, iterations, static_cast<const A*>(state));
        for (int64_t t = 0; t < iterations; ++t) {
            throw_if_stopped(c.context);
            gaussians.load_iteration(t);
        }

        Buffer<A> linears(rows * H), quadratics(rows * H), constants(rows), first(H), second(H);
        Buffer<A> linear(iterations * size), quadratic(iterations * size), constant(iterations * o.scalars_size());
        Buffer<A> g_mean(rows * H), g_variance(rows * H), g_logit(rows), g_beta_u(J), g_beta_a(J);
        fill(g_variance.get(), rows * H, A(0));
        fill(g_beta_u.get(), J, A(0));
        fill(g_beta_a.get(), J, A(0));
        std::memcpy(g_mean.get(), g_mean_, sizeof(A) * static_cast<size_t>(rows * H));
        for (int64_t r = 0; r < rows; ++r) {
            const A z = gaussians.at(iterations - 1, r).logit;
            const A a = A(1) / (A(1) + std::exp(-z)), complement = A(1) / (A(1) + std::exp(z));
            g_logit.get()[r] = static_cast<const A*>(g_out_activation)[r] * a * complement;
        }

        Competition<A> competition(o, windows, iterations, true);
        const A* activation = competition.begin(static_cast<const A*>(activation_));
        const auto adjoint_of = [&](int64_t t) {
            const int64_t x = t * size;
            const Quadratic<A> e{constant.get() + t * o.scalars_size(), gaussians.mean.get() + x, linear.get() + x,
                                 quadratic.get() + x};
            return EmAdjoint<A>{{gaussians.logits(t), activation, c.N, competition.shares(t)}, e, competition.means(t)};
        };
        const Moments<A> moments(o);
        Buffer<A> sums(o.state_rows * moments.row_size());
        for (int64_t t = iterations - 1; t >= 0; --t) {
            for (int64_t r = 0; r < rows; ++r) {
                const MStepGradient<A> g = m_step_backward(gaussians.at(t, r), g_mean.get() + r * H,
                                                           g_variance.get() + r * H, g_logit.get()[r], H, A(em_epsilon),
                                                           beta_u[r % J], static_cast<A>(inverse_temperatures[t]),
                                                           linears.get() + r * H, quadratics.get() + r * H);
                constants.get()[r] = g.constant;
                g_beta_u.get()[r % J] += g.g_beta_u;
                g_beta_a.get()[r % J] += g.g_beta_a;
            }
            o.pack(linears.get(), linear.get() + t * size);
            o.pack(quadratics.get(), quadratic.get() + t * size);
            o.pack_scalars(constants.get(), constant.get() + t * o.scalars_size());
            if (t == 0) break;
            const EmAdjoint<A> adjoint = adjoint_of(t);
            competition.set(t, adjoint.assignment.logits, &adjoint.e);
            reduce(o, EmAdjointSum<A>{adjoint, moments}, sums.get());
            for (int64_t r = 0; r < rows; ++r) {
                const A mass = moments.of(o, sums.get(), r / J, r % J, first.get(), second.get());
                g_logit.get()[r] = e_step_backward(gaussians.at(t - 1, r), mass, first.get(), second.get(), H,
                                                   g_mean.get() + r * H, g_variance.get() + r * H);
            }
        }
        if (g_beta_u_) std::memcpy(g_beta_u_, g_beta_u.get(), sizeof(A) * static_cast<size_t>(J));
        if (g_beta_a_) std::memcpy(g_beta_a_, g_beta_a.get(), sizeof(A) * static_cast<size_t>(J));
        if (!gradients.u && !gradients.weight && !g_activation_) return;

        A* g_activation = static_cast<A*>(g_activation_);
        Buffer<A> g_places(windows && g_activation ? c.B * c.N : 0);
        if (windows && g_activation) g_activation = g_places.get();
        if (g_activation) fill(g_activation, c.B * c.N, A(0));
        Buffer<EmAdjoint<A>> adjoints(iterations);
        for (int64_t t = 0; t < iterations; ++t) new (adjoints.get() + t) EmAdjoint<A>(adjoint_of(t));
        emit(o, EmGradient<A>{adjoints.get(), iterations, J, c.N, g_activation}, gradients, static_cast<A*>(nullptr));
        if (windows && g_activation) competition.add_places(g_activation, static_cast<A*>(g_activation_));
    });
    return valid ? status : Status::invalid_argument;
}

}  // namespace

Status em_routing(const Capsules& c, const void* activation, const void* beta_u, const void* beta_a,
                  std::span<const double> inverse_temperatures, void* mean, void* out_activation, void* state) {
    return route(c, activation, beta_u, beta_a, inverse_temperatures, nullptr, mean, out_activation, state);
}

Status em_routing_over_positions(const Capsules& c, const void* activation, const void* beta_u, const void* beta_a,
                                 std::span<const double> inverse_temperatures, int64_t windows, int64_t capsules,
                                 int64_t most, const void* places, void* mean, void* out_activation, void* state) {
    const Windows w{windows, capsules, most, static_cast<const int64_t*>(places)};
    return route(c, activation, beta_u, beta_a, inverse_temperatures, &w, mean, out_activation, state);
}

Status em_routing_backward(const Capsules& c, const void* activation, const void* beta_u,
                           std::span<const double> inverse_temperatures, const void* state, const void* g_mean,
                           const void* g_out_activation, void* g_u, void* g_weight, void* g_activation, void* g_beta_u,
                           void* g_beta_a) {
    return route_backward(c, activation, beta_u, inverse_temperatures, nullptr, state, g_mean, g_out_activation,
                          {g_u, g_weight}, g_activation, g_beta_u, g_beta_a);
}

Status em_routing_over_positions_backward(const Capsules& c, const void* activation, const void* beta_u,
                                          std::span<const double> inverse_temperatures, int64_t windows,
                                          int64_t capsules, int64_t most, const void* state, const void* g_mean,
                                          const void* g_out_activation, const void* places, void* g_u, void* g_weight,
                                          void* g_activation, void* g_beta_u, void* g_beta_a) {
    const Windows w{windows, capsules, most, static_cast<const int64_t*>(places)};
    return route_backward(c, activation, beta_u, inverse_temperatures, &w, state, g_mean, g_out_activation,
                          {g_u, g_weight}, g_activation, g_beta_u, g_beta_a);
}

}  // namespace capsops::cpu::CAPSOPS_ISA
