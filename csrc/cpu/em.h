// What EM routing (Hinton et al. 2018, procedure 1) needs of one tile: quadratic forms of the votes, and sums of the
// votes and their squares. Both run over x = û − shift, shift being a mean that is known, so that no digits are lost.
#pragma once

#include "stream.h"

namespace capsops::cpu::CAPSOPS_ISA {

// out_ij = constant_j + Σ_d (linear_jd x + quadratic_jd x²).
template <class A> struct Quadratic {
    const A* constant;   // [B, J]
    const A* shift;      // [B, J, D]
    const A* linear;     // [B, J, D], or null
    const A* quadratic;  // [B, J, D]

    void operator()(const Tile<A>& t, Lanes<A>* out /* [J] */) const {
        agreements(
            t,
            [&](int r, int64_t jd) {
                const int64_t state = t.b[r] * t.JD + jd;
                const Lanes<A> x = load(t.votes + r * t.JD + jd) - load(shift + state);
                const Lanes<A> slope = load(quadratic + state) * x;
                return linear ? (slope + load(linear + state)) * x : slope * x;
            },
            out);
        for (int r = 0; r < t.count; ++r)
            for (int64_t j = 0; j < t.J; ++j) out[j].v[r] += constant[t.b[r] * t.J + j];
    }
};

// Σ_i w_ij (1, x, x²): a row of the sums is first [J, D], second [J, D], mass [J] in whole vectors.
template <class A> struct Moments {
    int64_t J, JD;

    int64_t row_size() const { return 2 * JD + ceil_div(J, Lanes<A>::count) * Lanes<A>::count; }

    void add(const Tile<A>& t, const Lanes<A>* w, const A* shift, A* sums) const {
        for_each_vector(t, w, [&](int r, int64_t jd, Lanes<A> a) {
            A* first = sums + t.b[r] * row_size() + jd;
            const Lanes<A> x = load(t.votes + r * JD + jd) - load(shift + t.b[r] * JD + jd);
            const Lanes<A> weighted = a * x;
            store(first, load(first) + weighted);
            store(first + JD, load(first + JD) + weighted * x);
        });
        for (int r = 0; r < t.count; ++r)
            for (int64_t j = 0; j < J; ++j) sums[t.b[r] * row_size() + 2 * JD + j] += lane(w, j, r);
    }
};

// One iteration's weights: r_ij = softmax_j of the logits (equal in the first iteration), w_ij = r_ij activation_i.
template <class A> struct Assignment {
    Quadratic<A> logits;  // constant null: the first iteration
    const A* activation;  // [B, N]
    int64_t N;

    // r [J]; returns the activations of the items.
    Lanes<A> responsibilities(const Tile<A>& t, Lanes<A>* r) const {
        if (logits.constant) {
            logits(t, r);
            softmax(r, t.J, false);
        } else {
            for (int64_t j = 0; j < t.J; ++j) r[j] = Lanes<A>(A(1) / static_cast<A>(t.J));
        }
        Lanes<A> a = A(0);
        for (int m = 0; m < t.count; ++m) a.v[m] = activation[t.b[m] * N + t.i[m]];
        return a;
    }
};

// The state of all output capsules after each iteration, as the passes use it: D in whole vectors.
template <class A> struct States {
    int64_t rows, H, D;                   // rows = B·J
    Buffer<A> mean, quadratic, constant;  // [iterations, rows, D], twice, and [iterations, rows]
    const A* compact;                     // [iterations, rows, 3H + 2]

    States(int iterations, int64_t rows, int64_t H, int64_t D, const A* compact)
        : rows(rows),
          H(H),
          D(D),
          mean(iterations * rows * D),
          quadratic(iterations * rows * D),
          constant(iterations * rows),
          compact(compact) {}

    // Nothing is written through it where the state is a saved one.
    Gaussian<A> at(int t, int64_t row) const {
        A* state = const_cast<A*>(compact) + (t * rows + row) * (3 * H + 2);
        return {state, state + H, state + 2 * H, state[3 * H], state[3 * H + 1]};
    }

    // Reads iteration t of the compact state.
    void load_iteration(int t) {
        for (int64_t row = 0; row < rows; ++row) {
            const Gaussian<A> g = at(t, row);
            const int64_t x = (t * rows + row) * D;
            pad(g.mean, 1, H, D, mean.get() + x);
            fill(quadratic.get() + x, D, A(0));
            constant.get()[t * rows + row] = expect(g, H, quadratic.get() + x);
        }
    }

    // The logits of iteration t come from the state of the one before.
    Quadratic<A> logits(int t) const {
        if (t == 0) return {nullptr, nullptr, nullptr, nullptr};
        const int64_t x = (t - 1) * rows * D;
        return {constant.get() + (t - 1) * rows, mean.get() + x, nullptr, quadratic.get() + x};
    }
};

}  // namespace capsops::cpu::CAPSOPS_ISA
