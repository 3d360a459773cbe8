// Weights w_i of the input capsules, by which their couplings are multiplied: s_j = Σ_i w_i c_ij û_ij.
#pragma once

#include "../engine/tile.h"

namespace capsops::cpu::CAPSOPS_ISA {

template <class A> struct InputWeights {
    const A* all;  // [B, N]; null: all are 1
    int64_t N;

    // Lane r: the weight of item r, where there are weights; 0 if it is masked, whatever its weight is.
    Lanes<A> of(const Tile<A>& t) const {
        Lanes<A> w = A(0);
        for (int r = 0; r < t.count; ++r)
            if (t.has(r)) w.v[r] = all[t.b[r] * N + t.i[r]];
        return w;
    }

    // Multiplies x, numbers of the pairs, by the weights of their input capsules.
    void weigh(const Tile<A>& t, Lanes<A>* x /* [J] */) const {
        if (!all) return;
        const Lanes<A> w = of(t);
        for (int64_t j = 0; j < t.J; ++j) x[j] *= w;
    }

    // Adds the gradient of the weights, Σ_j c_ij e_ij, to to [B, N], with e = û · g_s.
    void add_gradient(const Tile<A>& t, const Lanes<A>* c, const Lanes<A>* e, A* to) const {
        Lanes<A> sum = c[0] * e[0];
        for (int64_t j = 1; j < t.J; ++j) sum += c[j] * e[j];
        add(t, sum, to);
    }

    // Adds lane r of x to the number of item r in to [B, N].
    void add(const Tile<A>& t, const Lanes<A>& x, A* to) const {
        for (int r = 0; r < t.count; ++r)
            if (t.has(r)) to[t.b[r] * N + t.i[r]] += x.v[r];
    }
};

}  // namespace capsops::cpu::CAPSOPS_ISA
