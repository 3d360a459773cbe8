// Attention routing (CardioCaps, eq. 4): v = squash(Σ_i c_i · û_i), where c is the softmax over the output capsules of
// a 1×1 convolution of the votes, z_kd = Σ_j A_kj û_jd + a_k. Every component d has couplings of its own, so the lanes
// stay components. One pass over u and W; only s [B, J, D] is saved.
//
// The gradient takes one pass that recomputes votes and couplings, and writes g_u and g_W. For every batch item, input
// capsule and component d:
//
//   q_j = g_s,j û_j;   dz_j = c_j (q_j − Σ_k c_k q_k);   g_û,j = c_j g_s,j + Σ_k A_kj dz_k
//   g_A,kj = Σ dz_k û_j;   g_a,k = Σ dz_k                over items, capsules and components
//
// For two output capsules dz_1 = −dz_0.
//
// With weights of the input capsules, s = Σ_i w_i c_i · û_i, g_s is multiplied by w_i, and g_w,i = Σ_jd c_j q_j without
// the weight.

#include "../../math/softmax.h"
#include "../engine/stream.h"
#include "input_weights.h"

namespace capsops::cpu::CAPSOPS_ISA {
namespace {

// to_k += Σ_j mix_kj x_j, for output capsules x and to [J, D], and mix [J, J].
template <class A> inline void add_mixed(const A* mix, int64_t J, int64_t D, const A* x, A* to) {
    constexpr int most = 16;
    const A* rows[most];
    A* out[most];
    for (int64_t k = 0; k < J; k += most) {
        const int count = static_cast<int>(at_most(most, J - k));
        for (int m = 0; m < count; ++m) rows[m] = mix + (k + m) * J, out[m] = to + (k + m) * D;
        multiply<true>(rows, count, x, J, D, D, out);
    }
}

template <class A> struct Attention {
    const A* weight;  // [J, J]
    const A* bias;    // [J], or null
    int64_t J;

    // Calls use(r, d, c [J]) with the couplings of every row r of votes and vector d of components.
    template <class Use> void for_each(const Tile<A>& t, A* scratch, Use use) const {
        constexpr int n = Lanes<A>::count;
        Lanes<A>* c = reinterpret_cast<Lanes<A>*>(scratch);
        A* z = scratch + J * n;
        for (int r = 0; r < t.rows(); ++r) {
            for (int64_t k = 0; k < J; ++k) fill(z + k * t.D, t.D, bias ? bias[k] : A(0));
            add_mixed(weight, J, t.D, t.votes + r * t.JD, z);
            for (int64_t d = 0; d < t.D; d += n) {
                for (int64_t k = 0; k < J; ++k) c[k] = load(z + k * t.D + d);
                softmax(c, J, false);
                use(r, d, c);
            }
        }
    }

    int64_t scratch_size(int64_t D) const { return J * (Lanes<A>::count + D); }
};

// The weights of the input capsules of a tile, by which numbers of row r of votes are multiplied; all are 1 unless
// weighed.
template <class A, bool weighed> struct RowWeights {
    RowWeights(const Tile<A>&, const InputWeights<A>&) {}
    Lanes<A> times(int, const Lanes<A>& x) const { return x; }
};
template <class A> struct RowWeights<A, true> {
    const bool items;
    const Lanes<A> w;

    RowWeights(const Tile<A>& t, const InputWeights<A>& weights) : items(t.layout == Layout::items), w(weights.of(t)) {}
    Lanes<A> times(int r, const Lanes<A>& x) const { return (items ? w : Lanes<A>(w.v[r])) * x; }
};

// The same for two output capsules, whose couplings depend only on z_1 − z_0.
template <class A> struct PairAttention {
    A weight[2], bias;

    explicit PairAttention(const Attention<A>& a)
        : weight{a.J == 2 ? a.weight[2] - a.weight[0] : A(0), a.J == 2 ? a.weight[3] - a.weight[1] : A(0)},
          bias(a.J == 2 && a.bias ? a.bias[1] - a.bias[0] : A(0)) {}

    // The couplings of one vector of components.
    CAPSOPS_INLINE void couplings(Lanes<A> vote_0, Lanes<A> vote_1, Lanes<A>* c /* [2] */) const {
        c[0] = A(0);
        c[1] = Lanes<A>(weight[0]) * vote_0 + (Lanes<A>(weight[1]) * vote_1 + Lanes<A>(bias));
        softmax(c, 2, false);
    }
};

}  // namespace

namespace {

// weighed: whether the input capsules have weights. Then votes are in tiles alone.
template <class A, bool weighed> struct AttentionSum {
    static constexpr bool takes_registers = !weighed;
    Attention<A> attention;
    PairAttention<A> pair;
    InputWeights<A> weights;
    int64_t D;

    int64_t row_size() const { return attention.J * D; }
    int64_t scratch_size() const { return attention.scratch_size(D); }

    void accumulate(Tile<A>& t, A* sum, A* scratch) const {
        const RowWeights<A, weighed> w(t, weights);
        attention.for_each(t, scratch, [&](int r, int64_t d, const Lanes<A>* c) {
            A* to = sum + t.row(r) * t.JD + d;
            const A* votes = t.votes + r * t.JD + d;
            for (int64_t j = 0; j < t.J; ++j) add_to(to + j * D, w.times(r, c[j]) * load(votes + j * D));
        });
    }

    template <int rows, int E>
    CAPSOPS_INLINE void accumulate(const Votes<A, rows, E>& votes, const int64_t* b, A* sum) const {
        constexpr int n = Lanes<A>::count;
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
            for (int e = 0; e < E; ++e) {
                A* to = sum + b[r] * 2 * E * n + e * n;
                Lanes<A> c[2];
                pair.couplings(votes.of[r][e], votes.of[r][E + e], c);
                add_to(to, c[0] * votes.of[r][e]);
                add_to(to + E * n, c[1] * votes.of[r][E + e]);
            }
    }
};

}  // namespace

Status attention_routing(const Capsules& c, const void* attn_weight, const void* attn_bias, const void* input_weight,
                         SquashKind kind, void* v, void* s) {
    return for_accumulation(c.dtype, [&]<class A>() {
        const auto run = [&]<bool weighed>() {
            using Policy = AttentionSum<A, weighed>;
            const Operands<A> o(c, best_layout<A, Policy>(c));
            const Attention<A> attention{static_cast<const A*>(attn_weight), static_cast<const A*>(attn_bias), o.J};
            const InputWeights<A> weights{static_cast<const A*>(input_weight), c.N};
            Buffer<A> sum(o.state_size());
            reduce(o, Policy{attention, PairAttention<A>(attention), weights, o.D}, sum.get());
            o.unpack(sum.get(), static_cast<A*>(s));
            squash_outputs(static_cast<const A*>(s), static_cast<A*>(v), c.B * o.J, o.H, kind);
        };
        input_weight ? run.template operator()<true>() : run.template operator()<false>();
    });
}

namespace {

// weighed: as in AttentionSum.
template <class A, bool weighed> struct AttentionGradient {
    static constexpr bool needs_votes = true, takes_registers = !weighed;
    Attention<A> attention;
    PairAttention<A> pair;
    InputWeights<A> weights;
    A* g_input_weight;    // [B, N], zeros to which it adds; or null
    const A* transposed;  // Aᵀ [J, J]
    const A* g_s;         // a state
    int64_t D;
    int64_t rows;  // of votes in a tile
    bool wants_params;

    int64_t param_count() const { return wants_params ? attention.J * (attention.J + 1) : 0; }  // g_A [J, J], g_a [J]
    int64_t scratch_size() const { return attention.scratch_size(D) + attention.J * D * rows; }

    void emit(Tile<A>& t, A* params, A* scratch) const {
        const int64_t J = attention.J;
        A* all_dz = scratch + attention.scratch_size(D);  // [rows, J, D]
        const RowWeights<A, weighed> w(t, weights);
        Lanes<A> of_weight[weighed ? Tile<A>::size : 1];
        for (Lanes<A>& x : of_weight) x = A(0);
        attention.for_each(t, scratch, [&](int r, int64_t d, const Lanes<A>* c) {
            const A* votes = t.votes + r * t.JD + d;
            const A* g = g_s + t.row(r) * t.JD + d;
            A* dz = all_dz + r * t.JD + d;
            Lanes<A> mean = A(0);
            for (int64_t j = 0; j < J; ++j) {
                const Lanes<A> q = load(g + j * D) * load(votes + j * D);
                store(dz + j * D, q);
                store(t.g_votes + r * t.JD + j * D + d, w.times(r, c[j]) * load(g + j * D));
                mean += c[j] * q;
            }
            for (int64_t j = 0; j < J; ++j) store(dz + j * D, w.times(r, c[j]) * (load(dz + j * D) - mean));
            if constexpr (weighed) of_weight[r] += mean;
        });
        if constexpr (weighed)
            if (g_input_weight) add_weight_gradient(t, of_weight);
        for (int r = 0; r < t.rows(); ++r) add_mixed(transposed, J, D, all_dz + r * t.JD, t.g_votes + r * t.JD);
        if (!wants_params) return;
        dots(all_dz, D, J, t.votes, D, J, D, t.rows(), t.JD, [&](int64_t k, int64_t j, int64_t found, const A* x) {
            for (int64_t m = 0; m < found; ++m) params[k * J + j + m] += x[m];
        });
        for (int64_t k = 0; k < J; ++k) {
            KahanSum<A> sum;
            for (int r = 0; r < t.rows(); ++r)
                for (int64_t d = 0; d < D; d += Lanes<A>::count) sum += load(all_dz + r * t.JD + k * D + d);
            params[J * J + k] += sum.total();
        }
    }

    // of_weight: Σ_j c_j q_j of the rows of votes, to be summed over the components.
    void add_weight_gradient(const Tile<A>& t, Lanes<A>* of_weight) const {
        if (t.layout == Layout::items) return weights.add(t, of_weight[0], g_input_weight);
        Lanes<A> sums = A(0);
        for (int r = 0; r < t.count; ++r) sums.v[r] = total(of_weight[r]);
        weights.add(t, sums, g_input_weight);
    }

    // Sums of dz_1 û_0, dz_1 û_1 and dz_1.
    struct Totals {
        KahanSum<A> of[3];
    };
    Totals totals(A*) const { return {}; }

    template <int rows, int E>
    CAPSOPS_INLINE void emit(Votes<A, rows, E>& votes, const int64_t* b, Totals& totals) const {
        constexpr int n = Lanes<A>::count;
        Lanes<A> sum[3] = {A(0), A(0), A(0)};
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
            for (int e = 0; e < E; ++e) {
                const Lanes<A> vote_0 = votes.of[r][e], vote_1 = votes.of[r][E + e];
                const A* g = g_s + b[r] * 2 * E * n + e * n;
                const Lanes<A> g_0 = load(g), g_1 = load(g + E * n);
                Lanes<A> c[2];
                pair.couplings(vote_0, vote_1, c);
                const Lanes<A> dz = c[0] * c[1] * (g_1 * vote_1 - g_0 * vote_0);
                votes.of[r][e] = c[0] * g_0 + Lanes<A>(pair.weight[0]) * dz;
                votes.of[r][E + e] = c[1] * g_1 + Lanes<A>(pair.weight[1]) * dz;
                sum[0] += dz * vote_0;
                sum[1] += dz * vote_1;
                sum[2] += dz;
            }
        for (int m = 0; m < 3; ++m) totals.of[m] += sum[m];
    }

    void add(const Totals& totals, A* params) const {
        if (!wants_params) return;
        const A x[3] = {totals.of[0].total(), totals.of[1].total(), totals.of[2].total()};
        const A all[6] = {-x[0], -x[1], x[0], x[1], -x[2], x[2]};
        for (int m = 0; m < 6; ++m) params[m] += all[m];
    }
};

}  // namespace

Status attention_routing_backward(const Capsules& c, const void* attn_weight, const void* attn_bias,
                                  const void* input_weight, SquashKind kind, const void* s, const void* g_v, void* g_u,
                                  void* g_weight, void* g_attn_weight, void* g_attn_bias, void* g_input_weight) {
    return for_accumulation(c.dtype, [&]<class A>() {
        const auto run = [&]<bool weighed>() {
            using Policy = AttentionGradient<A, weighed>;
            const Operands<A> o(c, best_layout<A, Policy>(c));
            const int64_t rows = c.B * o.J, J = o.J;
            const A* weight = static_cast<const A*>(attn_weight);
            Buffer<A> g_s(rows * o.H), packed(o.state_size()), transposed(J * J);
            squash_outputs_backward(static_cast<const A*>(g_v), static_cast<const A*>(s), g_s.get(), rows, o.H, kind);
            o.pack(g_s.get(), packed.get());
            for (int64_t k = 0; k < J; ++k)
                for (int64_t j = 0; j < J; ++j) transposed.get()[j * J + k] = weight[k * J + j];
            // Masked capsules have no gradient.
            if (g_input_weight) fill(static_cast<A*>(g_input_weight), c.B * c.N, A(0));

            const Attention<A> attention{weight, static_cast<const A*>(attn_bias), J};
            Buffer<A> params(J * (J + 1));
            const Policy policy{attention,
                                PairAttention<A>(attention),
                                {static_cast<const A*>(input_weight), c.N},
                                static_cast<A*>(g_input_weight),
                                transposed.get(),
                                packed.get(),
                                o.D,
                                o.layout == Layout::items ? 1 : Tile<A>::size,
                                g_attn_weight || g_attn_bias};
            emit(o, policy, {g_u, g_weight}, params.get());
            const A* g_bias = params.get() + J * J;
            if (g_attn_weight) std::memcpy(g_attn_weight, params.get(), sizeof(A) * static_cast<size_t>(J * J));
            if (g_attn_bias) std::memcpy(g_attn_bias, g_bias, sizeof(A) * static_cast<size_t>(J));
        };
        input_weight ? run.template operator()<true>() : run.template operator()<false>();
    });
}

}  // namespace capsops::cpu::CAPSOPS_ISA
