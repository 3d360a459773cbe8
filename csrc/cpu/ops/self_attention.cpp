// Self-attention routing (Mazzia et al. 2021, Efficient-CapsNet, eq. 5 to 7), without the N×N Gram matrix of the votes.
//
// The published form sums the rows of that matrix. With T_j = Σ_i û_ij this is
//
//   l_ij = scale û_ij · T_j;   c_ij = softmax_j(l_ij) + prior_ij;   s_j = Σ_i c_ij û_ij;   v = squash(s)
//
// in two passes over u and W. The gradient also takes two passes. With p the softmax without the prior, e = û · g_s and
// δ = p (e − Σ_j p e):
//
//   H_j = Σ_i δ_ij û_ij;   g_û = (p + prior) g_s + scale (δ T + H);   g_prior = Σ_b e
//
// With weights of the input capsules, s_j = Σ_i w_i c_ij û_ij; T does not contain them. Then e is multiplied by w_i
// and so is p + prior, and g_w,i = Σ_j c_ij e_ij without the weight.

#include <algorithm>

#include "dynamic.h"
#include "input_weights.h"

namespace capsops::cpu::CAPSOPS_ISA {
namespace {

template <class A> struct SelfAttention {
    static constexpr bool takes_registers = false;
    const A* T;      // scale · T, a state
    const A* prior;  // [N, J], or null
    InputWeights<A> weights;
    int64_t J, D;

    int64_t row_size() const { return J * D; }
    int64_t scratch_size() const { return J * Lanes<A>::count; }

    void add_prior(const Tile<A>& t, Lanes<A>* c) const {
        if (!prior) return;
        if (t.layout == Layout::items) {
            for (int64_t j = 0; j < J; ++j) c[j] += Lanes<A>(prior[t.i[0] * J + j]);
            return;
        }
        for (int64_t j = 0; j < J; ++j)
            for (int r = 0; r < t.count; ++r) c[j].v[r] += prior[t.i[r] * J + j];
    }

    void accumulate(Tile<A>& t, A* sum, A* scratch) const {
        Lanes<A>* c = reinterpret_cast<Lanes<A>*>(scratch);
        Dynamic<A>{T, false}.couplings(t, c);
        add_prior(t, c);
        weights.weigh(t, c);
        add_coupled(t, c, sum);
    }
};

// The sum of dynamic routing with the weights of the input capsules, for votes in tiles alone.
template <class A> struct SelfAttentionAdjoint {
    static constexpr bool takes_registers = false;
    AdjointSum<A> sum;
    InputWeights<A> weights;

    int64_t row_size() const { return sum.row_size(); }
    int64_t scratch_size() const { return sum.scratch_size(); }

    void accumulate(Tile<A>& t, A* H, A* scratch) const {
        Lanes<A>* c = reinterpret_cast<Lanes<A>*>(scratch);
        Lanes<A>* delta = c + sum.J;
        sum.adjoint.couplings(t, c, delta);
        weights.weigh(t, delta);
        add_coupled(t, delta, H);
    }
};

template <class A> struct SelfAttentionGradient {
    static constexpr bool needs_votes = true, takes_registers = false;
    SelfAttention<A> attention;
    const A* g_s;       // a state
    const A* H;         // scale · H, a state
    A* g_prior;         // [N, J], zeros to which it adds; or null
    A* g_input_weight;  // [B, N], the same

    int64_t param_count() const { return 0; }
    int64_t scratch_size() const { return 3 * attention.J * Lanes<A>::count; }

    void emit(Tile<A>& t, A*, A* scratch) const {
        const int64_t J = attention.J;
        Lanes<A>* c = reinterpret_cast<Lanes<A>*>(scratch);
        Lanes<A>* delta = c + J;
        Lanes<A>* ones = delta + J;
        Dynamic<A>{attention.T, false}.couplings(t, c);
        agreements_with(t, g_s, delta);
        if (g_input_weight) {
            Lanes<A>* const with_prior = ones;  // whose own numbers are written below
            std::copy_n(c, J, with_prior);
            attention.add_prior(t, with_prior);
            attention.weights.add_gradient(t, with_prior, delta, g_input_weight);
        }
        attention.weights.weigh(t, delta);
        if (g_prior && t.layout == Layout::items) {
            for (int64_t j = 0; j < J; ++j) g_prior[t.i[0] * J + j] += total(delta[j]);
        } else if (g_prior) {
            for (int r = 0; r < t.count; ++r)
                for (int64_t j = 0; j < J; ++j) g_prior[t.i[r] * J + j] += lane(delta, j, r);
        }
        softmax_backward(c, delta, J);
        attention.add_prior(t, c);
        attention.weights.weigh(t, c);
        for (int64_t j = 0; j < J; ++j) ones[j] = A(1);
        const Term<A> terms[] = {{c, g_s}, {ones, H}, {delta, attention.T}};
        combine(t, terms, 3);
    }
};

template <class A> void multiply_all(A* x, int64_t size, A scale) {
    for (int64_t m = 0; m < size; ++m) x[m] *= scale;
}

}  // namespace

Status self_attention_routing(const Capsules& c, const void* prior, const void* input_weight, double scale, void* v,
                              void* total, void* s) {
    return for_accumulation(c.dtype, [&]<class A>() {
        const Operands<A> o(c, best_layout<A, SelfAttention<A>>(c));
        Buffer<A> sum(o.state_size()), T(o.state_size());
        contract(o, T.get());
        o.unpack(T.get(), static_cast<A*>(total));
        multiply_all(T.get(), o.state_size(), static_cast<A>(scale));
        const InputWeights<A> weights{static_cast<const A*>(input_weight), c.N};
        reduce(o, SelfAttention<A>{T.get(), static_cast<const A*>(prior), weights, o.J, o.D}, sum.get());
        o.unpack(sum.get(), static_cast<A*>(s));
        squash_outputs(static_cast<const A*>(s), static_cast<A*>(v), c.B * o.J, o.H, SquashKind::efficient);
    });
}

Status self_attention_routing_backward(const Capsules& c, const void* prior, const void* input_weight, double scale_,
                                       const void* total, const void* s, const void* g_v, void* g_u, void* g_weight,
                                       void* g_prior, void* g_input_weight) {
    return for_accumulation(c.dtype, [&]<class A>() {
        const Operands<A> o(c, best_layout<A, SelfAttentionAdjoint<A>, SelfAttentionGradient<A>>(c));
        const A scale = static_cast<A>(scale_);
        const int64_t rows = c.B * o.J, size = o.state_size();
        Buffer<A> T(size), g_s(rows * o.H), g_s_packed(size), H(size);
        o.pack(static_cast<const A*>(total), T.get());
        multiply_all(T.get(), size, scale);
        squash_outputs_backward(static_cast<const A*>(g_v), static_cast<const A*>(s), g_s.get(), rows, o.H,
                                SquashKind::efficient);
        o.pack(g_s.get(), g_s_packed.get());
        const InputWeights<A> weights{static_cast<const A*>(input_weight), c.N};
        reduce(o, SelfAttentionAdjoint<A>{{{{T.get(), false}, g_s_packed.get()}, o.J, o.D}, weights}, H.get());
        multiply_all(H.get(), size, scale);
        if (g_prior) fill(static_cast<A*>(g_prior), c.N * o.J, A(0));
        if (g_input_weight) fill(static_cast<A*>(g_input_weight), c.B * c.N, A(0));  // masked capsules have none
        const SelfAttentionGradient<A> policy{{T.get(), static_cast<const A*>(prior), weights, o.J, o.D},
                                              g_s_packed.get(),
                                              H.get(),
                                              static_cast<A*>(g_prior),
                                              static_cast<A*>(g_input_weight)};
        emit(o, policy, {g_u, g_weight}, static_cast<A*>(nullptr));
    });
}

}  // namespace capsops::cpu::CAPSOPS_ISA
