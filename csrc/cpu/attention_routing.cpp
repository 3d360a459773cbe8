// v = squash(Σ_i c_i · û_i) with c = softmax over the output capsules of a 1×1 convolution of the votes (CardioCaps,
// eq. 4): one pass over u and W. Saves s [B, J, D] and nothing else.

#include "attention.h"
#include "operators.h"

namespace capsops::cpu::CAPSOPS_ISA {
namespace {

template <class A> struct AttentionSum {
    Attention<A> attention;
    PairAttention<A> pair;
    int64_t D;

    int64_t row_size() const { return attention.J * D; }
    int64_t scratch_size() const { return attention.scratch_size(D); }

    void accumulate(Tile<A>& t, A* sum, A* scratch) const {
        attention.for_each(t, scratch, [&](int r, int64_t d, const Lanes<A>* c) {
            A* to = sum + t.row(r) * t.JD + d;
            const A* votes = t.votes + r * t.JD + d;
            for (int64_t j = 0; j < t.J; ++j) add_to(to + j * D, c[j] * load(votes + j * D));
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

template <class A> constexpr bool takes_registers<AttentionSum<A>> = true;

Status attention_routing(const Capsules& c, const void* attn_weight, const void* attn_bias, void* v, void* s) {
    return for_accumulation(c.dtype, [&]<class A>() {
        const Operands<A> o(c, best_layout<A>(c, true));
        const Attention<A> attention{static_cast<const A*>(attn_weight), static_cast<const A*>(attn_bias), o.J};
        Buffer<A> sum(o.state_size());
        reduce(o, AttentionSum<A>{attention, PairAttention<A>(attention), o.D}, sum.get());
        o.unpack(sum.get(), static_cast<A*>(s));
        squash_outputs(static_cast<const A*>(s), static_cast<A*>(v), c.B * o.J, o.H, SquashKind::sabour);
    });
}

}  // namespace capsops::cpu::CAPSOPS_ISA
