// v = squash(Σ_i c_i · û_i) with c = softmax over the output capsules of a 1×1 convolution of the votes (CardioCaps,
// eq. 4): one pass over u and W. Saves s [B, J, D] and nothing else.

#include "attention.h"
#include "operators.h"

namespace capsops::cpu::CAPSOPS_ISA {
namespace {

template <class A, int count> struct AttentionSum {
    Attention<A> attention;
    int64_t D;

    int64_t row_size() const { return attention.J * D; }
    int64_t scratch_size() const { return attention.scratch_size(D); }

    void accumulate(Tile<A>& t, A* sum, A* scratch) const {
        attention.template for_each<count>(t, scratch, [&](int r, int64_t d, const Lanes<A>* c) {
            A* to = sum + t.b[r] * t.JD + d;
            const A* votes = t.votes + r * t.JD + d;
            for (int64_t j = 0; j < (count ? count : t.J); ++j)
                store(to + j * t.D, load(to + j * t.D) + c[j] * load(votes + j * t.D));
        });
    }
};

}  // namespace

Status attention_routing(const Capsules& c, const void* attn_weight, const void* attn_bias, void* v, void* s) {
    return for_accumulation(c.dtype, [&]<class A>() {
        const Operands<A> o(c);
        const Attention<A> attention{static_cast<const A*>(attn_weight), static_cast<const A*>(attn_bias), o.J};
        Buffer<A> sum(c.B * o.JD);
        for_output_capsules(o.J, [&]<int count>() { reduce(o, AttentionSum<A, count>{attention, o.D}, sum.get()); });
        unpad(sum.get(), c.B * o.J, o.H, o.D, static_cast<A*>(s));
        squash_outputs(static_cast<const A*>(s), static_cast<A*>(v), c.B * o.J, o.H, squash_sabour<A>);
    });
}

}  // namespace capsops::cpu::CAPSOPS_ISA
