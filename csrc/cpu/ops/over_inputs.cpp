// Routing by agreement with the softmax over the input capsules: c_ij = exp(b_ij) / Z_j with b_ij = û_ij · V_j +
// logits_ij and Z_j = Σ_i exp(b_ij). Each iteration is one pass: Z and the sum S_j = Σ_i exp(b_ij) û_ij are computed
// together, and s = S / Z. log Z of every iteration is saved beside s.
//
// The gradient of b is δ_ij = c_ij (e_ij − Σ_k c_kj e_kj) with e_ij = û_ij · g_s,j. Its mean needs no pass of its own:
// Σ_k c_kj e_kj = (Σ_k c_kj û_kj) · g_s,j, where the sum is s without the bias. Everything else is as with the softmax
// over the output capsules.

#include <cmath>

#include "couplings.h"

namespace capsops::cpu::CAPSOPS_ISA {
namespace {

// reduce: Z = Σ_i exp(b_ij − m) and S = Σ_i w_i exp(b_ij − m) û_ij for every output capsule, with a number m that keeps
// the exponentials in range: at first the first logit; where a logit is larger by more than `slack`, that logit takes
// its place, and the sums are multiplied to match. (Were m always the largest logit, that would happen far more often.)
//
// The sums are a state S, then m and Z as scalars (Operands::scalars_size).
template <class A> struct OnlineSum {
    static constexpr bool takes_registers = false;
    static constexpr A slack = 16;
    Couplings<A> couplings;
    int64_t state_rows, J, D, items;  // as in Operands

    int64_t scalars_size() const { return state_rows * J * items; }
    int64_t m() const { return state_rows * J * D; }
    int64_t Z() const { return m() + scalars_size(); }

    int64_t row_size() const { return J * (D + 2 * items); }
    int64_t scratch_size() const { return J * Lanes<A>::count; }

    void begin(A* sum, int64_t first, int64_t end) const {
        const int64_t rows = end - first, scalars = J * items;
        fill(sum + first * J * D, rows * J * D, A(0));
        fill(sum + m() + first * scalars, rows * scalars, std::numeric_limits<A>::lowest());
        fill(sum + Z() + first * scalars, rows * scalars, A(0));
    }

    void accumulate(Tile<A>& t, A* sum, A* scratch) const {
        Lanes<A>* c = reinterpret_cast<Lanes<A>*>(scratch);
        const bool some_removed = couplings.add_up(t, c);
        if (t.layout == Layout::items)
            weigh_items(t, sum, c, some_removed);
        else
            weigh_components(t, sum, c, some_removed);
        couplings.weigh(t, c);
        add_coupled(t, c, sum);
    }

    // Gives all blocks the largest m, in the first block; the others then have 0.
    void align(A* partial, int64_t blocks, [[maybe_unused]] int threads) const {
        if (blocks < 2) return;
        const int64_t size = state_rows * row_size();
#pragma omp parallel for schedule(static) num_threads(threads) if (blocks * size >= 65536)
        for (int64_t x = 0; x < scalars_size(); ++x) {
            A largest = partial[m() + x];
            for (int64_t block = 1; block < blocks; ++block) largest = max(partial[block * size + m() + x], largest);
            for (int64_t block = 0; block < blocks; ++block) {
                A* sum = partial + block * size;
                multiply(sum, x, std::exp(sum[m() + x] - largest));
                sum[m() + x] = block == 0 ? largest : A(0);
            }
        }
    }

    // Multiplies S and Z of scalar x.
    void multiply(A* sum, int64_t x, A factor) const {
        sum[Z() + x] *= factor;
        A* S = sum + x / items * D;
        for (int64_t d = x % items; d < D; d += items) S[d] *= factor;
    }

  private:
    // In place: b becomes exp(b − m), which is added to Z.
    void weigh_items(const Tile<A>& t, A* sum, Lanes<A>* b, bool some_removed) const {
        constexpr int n = Lanes<A>::count;
        const int64_t row = t.row(0) * J;
        A *m_row = sum + m() + row * n, *Z_row = sum + Z() + row * n;
        // NaN is never larger.
        Lanes<A> excess = std::numeric_limits<A>::lowest();
        for (int64_t j = 0; j < J; ++j) excess = max(b[j] - load(m_row + j * n), excess);
        bool moves = false;
        for (int r = 0; r < n; ++r) moves |= excess.v[r] > slack;
        for (int64_t j = 0; moves && j < J; ++j) {
            const Lanes<A> old = load(m_row + j * n), limit = old + Lanes<A>(slack);
            const Lanes<A> next = b[j].v > limit.v ? b[j].v : old.v;
            const Lanes<A> factor = exponential(old - next);
            store(m_row + j * n, next);
            store(Z_row + j * n, factor * load(Z_row + j * n));
            A* S = sum + (row + j) * D;
            for (int64_t d = 0; d < D; d += n) store(S + d, factor * load(S + d));
        }
        for (int64_t j = 0; j < J; ++j) b[j] = exponential(b[j] - load(m_row + j * n));
        if (some_removed) couplings.clear(t, b);
        for (int64_t j = 0; j < J; ++j) add_to(Z_row + j * n, b[j]);
    }

    // The same. Several pairs may have one batch item: m is settled before it is used.
    void weigh_components(const Tile<A>& t, A* sum, Lanes<A>* b, bool some_removed) const {
        const auto for_each = [&](auto each) {
            for (int r = 0; r < t.count; ++r)
                for (int64_t j = 0; j < J; ++j) each(b[j].v[r], t.b[r] * J + j);
        };
        A *m_of = sum + m(), *Z_of = sum + Z();
        for_each([&](A x, int64_t at) {
            if (!(x > m_of[at] + slack)) return;
            multiply(sum, at, std::exp(m_of[at] - x));
            m_of[at] = x;
        });
        for (int64_t j = 0; j < J; ++j)
            for (int r = 0; r < t.count; ++r) b[j].v[r] -= m_of[t.b[r] * J + j];
        for (int64_t j = 0; j < J; ++j) b[j] = exponential(b[j]);
        if (some_removed) couplings.clear(t, b);
        for_each([&](A x, int64_t at) { Z_of[at] += x; });
    }
};

// Writes s = Σ_i c_ij û_ij, a state, and log Z; both are 0 where an output capsule has no pairs.
template <class A>
void sum_over_inputs(const Operands<A>& o, const Couplings<A>& couplings, A* s, A* log_sums /* [B, J] */) {
    const int64_t B = o.c.B, J = o.J;
    const auto scalar = [&](int64_t b, int64_t j) { return (o.row(b) * J + j) * o.items + b % o.items; };
    if (!couplings.V && !couplings.logits && !couplings.input_weight) {
        // Equal couplings.
        contract(o, s);
        for (int64_t b = 0; b < B; ++b) {
            int64_t count = o.c.N;
            if (o.c.mask) {
                count = 0;
                for (int64_t i = 0; i < o.c.N; ++i) count += o.c.mask[b * o.c.N + i] != 0;
            }
            const A equal = count ? A(1) / static_cast<A>(count) : A(0);
            for (int64_t j = 0; j < J; ++j) {
                A* to = s + scalar(b, j) / o.items * o.D;
                for (int64_t d = b % o.items; d < o.D; d += o.items) to[d] *= equal;
                log_sums[b * J + j] = count ? std::log(static_cast<A>(count)) : A(0);
            }
        }
        return;
    }
    const OnlineSum<A> policy{couplings, o.state_rows, J, o.D, o.items};
    Buffer<A> sums(o.state_rows * policy.row_size());
    reduce(o, policy, sums.get());
    for (int64_t b = 0; b < B; ++b)
        for (int64_t j = 0; j < J; ++j) {
            const int64_t x = scalar(b, j);
            const A Z = sums.get()[policy.Z() + x];
            const bool none = Z == 0;
            log_sums[b * J + j] = none ? A(0) : sums.get()[policy.m() + x] + std::log(Z);
            policy.multiply(sums.get(), x, none ? A(0) : 1 / Z);
        }
    std::memcpy(s, sums.get(), sizeof(A) * static_cast<size_t>(o.state_size()));
}

// Writes the means of e, (s − bias) · g_s, as scalars.
template <class A>
void pack_means(const Operands<A>& o, const A* s /* [B, J, H] */, const A* bias /* [J, H], or null */,
                const A* g_s /* [B, J, H] */, A* means) {
    Buffer<A> compact(o.c.B * o.J);
    for (int64_t x = 0; x < o.c.B * o.J; ++x) {
        A sum = 0;
        for (int64_t h = 0; h < o.H; ++h)
            sum += (s[x * o.H + h] - (bias ? bias[x % o.J * o.H + h] : A(0))) * g_s[x * o.H + h];
        compact.get()[x] = sum;
    }
    o.pack_scalars(compact.get(), means);
}

}  // namespace

Status dynamic_routing_over_inputs(const Capsules& c, const void* logits, const void* input_weight, const void* bias,
                                   int64_t iterations, SquashKind kind, void* v, void* s, void* log_sums) {
    return for_accumulation(c.dtype, [&]<class A>() {
        const Operands<A> o(c, best_layout<A, OnlineSum<A>>(c));
        route(o, static_cast<const A*>(bias), iterations, kind, static_cast<A*>(v), static_cast<A*>(s),
              [&](int64_t t, const A* V, A* sum) {
                  const Couplings<A> couplings{
                      V, static_cast<const A*>(logits), static_cast<const A*>(input_weight), c.N, o.J, false};
                  sum_over_inputs(o, couplings, sum, static_cast<A*>(log_sums) + t * c.B * o.J);
              });
    });
}

Status dynamic_routing_over_inputs_backward(const Capsules& c, const void* logits, const void* input_weight,
                                            const void* bias, int64_t iterations, bool detach, SquashKind kind,
                                            const void* s_, const void* log_sums_, const void* g_v, void* g_u,
                                            void* g_weight, void* g_logits, void* g_input_weight, void* g_bias) {
    return for_accumulation(c.dtype, [&]<class A>() {
        const Operands<A> o(c, best_layout<A, CoupledSum<A>, CoupledGradient<A>>(c));
        const A* s = static_cast<const A*>(s_);
        const int64_t scalars = o.scalars_size(), compact = c.B * o.JH;
        Buffer<A> log_sums(iterations * scalars), means(iterations * scalars);
        for (int64_t t = 0; t < iterations; ++t)
            o.pack_scalars(static_cast<const A*>(log_sums_) + t * c.B * o.J, log_sums.get() + t * scalars);
        const auto pack_means_of = [&](int64_t t, const A* g_s /* [iterations, B, J, H] */) {
            pack_means(o, s + t * compact, static_cast<const A*>(bias), g_s + t * compact, means.get() + t * scalars);
        };
        Couplings<A> couplings{nullptr,
                               static_cast<const A*>(logits),
                               static_cast<const A*>(input_weight),
                               c.N,
                               o.J,
                               false,
                               log_sums.get(),
                               means.get()};
        const RouteGradients<A> route(o, iterations, s, static_cast<const A*>(g_v), detach, kind,
                                      [&](int64_t t, const A* V, const A* g_s, const A* g_s_compact, A* H) {
                                          pack_means_of(t, g_s_compact);
                                          Couplings<A> own = couplings;
                                          own.V = V, own.log_sums += t * scalars, own.means += t * scalars;
                                          CoupledPasses<A>::reduce(o, CoupledSum<A>{own, g_s, o.D}, H);
                                      });
        if (!detach) pack_means_of(0, route.g_s_compact.get());
        coupled_route_backward(o, couplings, route, {{g_u, g_weight}, g_logits, g_input_weight}, g_bias);
    });
}

Status routing_step_over_inputs(const Capsules& c, const void* state, const void* logits, const void* input_weight,
                                void* s, void* total, void* log_sums) {
    return for_accumulation(c.dtype, [&]<class A>() {
        const Operands<A> o(c, best_layout<A, OnlineSum<A>>(c));
        Buffer<A> V(o.state_size()), sum(o.state_size());
        o.pack(static_cast<const A*>(state), V.get());
        const Couplings<A> couplings{
            V.get(), static_cast<const A*>(logits), static_cast<const A*>(input_weight), c.N, o.J, false};
        sum_over_inputs(o, couplings, sum.get(), static_cast<A*>(log_sums));
        o.unpack(sum.get(), static_cast<A*>(s));
        std::memcpy(total, s, sizeof(A) * static_cast<size_t>(c.B * o.JH));
    });
}

Status routing_step_over_inputs_backward(const Capsules& c, const void* state, const void* logits,
                                         const void* input_weight, const void* total, const void* log_sums_,
                                         const void* g_s_, void* g_u, void* g_weight, void* g_state, void* g_logits,
                                         void* g_input_weight) {
    return for_accumulation(c.dtype, [&]<class A>() {
        const Operands<A> o(c, best_layout<A, CoupledSum<A>, CoupledGradient<A>>(c));
        Buffer<A> V(o.state_size()), g_s(o.state_size()), log_sums(o.scalars_size()), means(o.scalars_size());
        o.pack(static_cast<const A*>(state), V.get());
        o.pack(static_cast<const A*>(g_s_), g_s.get());
        o.pack_scalars(static_cast<const A*>(log_sums_), log_sums.get());
        pack_means(o, static_cast<const A*>(total), static_cast<const A*>(nullptr), static_cast<const A*>(g_s_),
                   means.get());
        const Couplings<A> couplings{V.get(),
                                     static_cast<const A*>(logits),
                                     static_cast<const A*>(input_weight),
                                     c.N,
                                     o.J,
                                     false,
                                     log_sums.get(),
                                     means.get()};
        coupled_step_backward(o, couplings, g_s.get(), {{g_u, g_weight}, g_logits, g_input_weight}, g_state);
    });
}

}  // namespace capsops::cpu::CAPSOPS_ISA
