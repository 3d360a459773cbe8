// The couplings of attention routing (CardioCaps, eq. 4) on one tile: z_kd = Σ_j A_kj û_jd + a_k, and a softmax over k
// for every component d by itself, so the lanes stay components.
#pragma once

#include "stream.h"

namespace capsops::cpu::CAPSOPS_ISA {

// to_k += Σ_j mix_kj x_j for output capsules x, to [J, D] and mix [J, J].
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

    // Calls use(r, d, c [J]) with the couplings of every row of votes and vector of components. memory: [scratch_size].
    template <class Use> void for_each(const Tile<A>& t, A* memory, Use use) const {
        constexpr int n = Lanes<A>::count;
        Lanes<A>* c = reinterpret_cast<Lanes<A>*>(memory);
        A* z = memory + J * n;
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

// The same of two output capsules, whose couplings depend on z_1 − z_0 alone.
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

}  // namespace capsops::cpu::CAPSOPS_ISA
