// The couplings of routing by agreement (Sabour et al. 2017, procedure 1) for one tile. The logits b_ij = û_ij · V_j
// are not stored; V is the sum of the output capsules of all earlier iterations.
#pragma once

#include "../../math/softmax.h"
#include "../engine/stream.h"

namespace capsops::cpu::CAPSOPS_ISA {

template <class A> struct Dynamic {
    const A* V;  // [B, J, D]
    bool leaky;

    void couplings(const Tile<A>& t, Lanes<A>* c /* [J] */) const {
        agreements_with(t, V, c);
        softmax(c, t.J, leaky);
    }

    // For votes in registers: couplings in the lanes of their agreements, where the other output capsule is `rows`
    // lanes away.
    template <int rows, int E>
    CAPSOPS_INLINE Lanes<A> couplings(const Votes<A, rows, E>& votes, const int64_t* b) const {
        const Lanes<A> logits = agreements_with(votes, V, b);
        Lanes<A> c[2] = {logits, flipped<rows>(logits)};
        softmax(c, 2, leaky);
        return c[0];
    }
};

// The gradient of one iteration: e_j = û_j · g_s,j;  δ_j = c_j (e_j − Σ_k c_k e_k).
template <class A> struct DynamicAdjoint {
    Dynamic<A> dynamic;
    const A* g_s;  // [B, J, D]

    void couplings(const Tile<A>& t, Lanes<A>* c, Lanes<A>* delta) const {
        dynamic.couplings(t, c);
        agreements_with(t, g_s, delta);
        softmax_backward(c, delta, t.J);
    }

    template <int rows, int E>
    CAPSOPS_INLINE void couplings(const Votes<A, rows, E>& votes, const int64_t* b, Lanes<A>* c,
                                  Lanes<A>* delta) const {
        const Lanes<A> own = dynamic.couplings(votes, b), e = agreements_with(votes, g_s, b);
        const Lanes<A> both[2] = {own, flipped<rows>(own)};
        Lanes<A> gradient[2] = {e, flipped<rows>(e)};
        softmax_backward(both, gradient, 2);
        *c = own, *delta = gradient[0];
    }
};

}  // namespace capsops::cpu::CAPSOPS_ISA
