// The parts of EM routing (Hinton et al. 2018, procedure 1) that run on one tile: quadratic forms of the votes, and
// sums of the votes and their squares. Both use x = û − shift, where shift is a known mean, to avoid cancellation.
#pragma once

#include "../../math/em.h"
#include "../../math/softmax.h"
#include "../engine/stream.h"

namespace capsops::cpu::CAPSOPS_ISA {

// out_ij = constant_j + Σ_d (linear_jd x + quadratic_jd x²).
template <class A> struct Quadratic {
    const A* constant;   // [state_rows, J, items]
    const A* shift;      // a state
    const A* linear;     // a state, or null
    const A* quadratic;  // a state

    void operator()(const Tile<A>& t, Lanes<A>* out /* [J] */) const {
        const A* votes = t.votes;
        const int64_t J = t.J, JD = t.JD;
        agreements(
            t,
            [=, q = *this](int64_t own, int64_t row, int64_t jd) {
                const int64_t state = row * JD + jd;
                const Lanes<A> x = load(votes + own) - load(q.shift + state);
                const Lanes<A> slope = load(q.quadratic + state) * x;
                return q.linear ? (slope + load(q.linear + state)) * x : slope * x;
            },
            out);
        if (t.layout == Layout::items) {
            for (int64_t j = 0; j < J; ++j) out[j] += load(constant + (t.row(0) * J + j) * Tile<A>::size);
            return;
        }
        for (int r = 0; r < t.count; ++r)
            for (int64_t j = 0; j < J; ++j) out[j].v[r] += constant[t.b[r] * J + j];
    }
};

// Sums Σ_i w_ij (1, x, x²). A row of sums consists of a state's row for x, one for x², and the masses [J, items] in
// whole vectors.
template <class A> struct Moments {
    int64_t J, JD, items;

    explicit Moments(const Operands<A>& o) : J(o.J), JD(o.JD), items(o.items) {}

    int64_t row_size() const { return 2 * JD + ceil_div(J * items, Lanes<A>::count) * Lanes<A>::count; }

    void add(const Tile<A>& t, const Lanes<A>* w, const A* shift, A* sums) const {
        const A* votes = t.votes;
        const int64_t size = row_size();
        for_each_vector(t, w, [=, JD = JD](int64_t own, int64_t row, int64_t jd, Lanes<A> a) {
            A* first = sums + row * size + jd;
            const Lanes<A> x = load(votes + own) - load(shift + row * JD + jd);
            const Lanes<A> weighted = a * x;
            add_to(first, weighted);
            add_to(first + JD, weighted * x);
        });
        if (t.layout == Layout::items) {
            A* mass = sums + t.row(0) * size + 2 * JD;
            for (int64_t j = 0; j < J; ++j) add_to(mass + j * items, w[j]);
            return;
        }
        for (int r = 0; r < t.count; ++r)
            for (int64_t j = 0; j < J; ++j) sums[t.b[r] * size + 2 * JD + j] += lane(w, j, r);
    }

    // The sums of output capsule (b, j): writes first [H] and second [H], and returns the mass.
    A of(const Operands<A>& o, const A* sums, int64_t b, int64_t j, A* first, A* second) const {
        const A* row = sums + o.row(b) * row_size();
        const A* x = row + o.offset(b, j);
        for (int64_t h = 0; h < o.H; ++h) {
            first[h] = x[h * items];
            second[h] = x[JD + h * items];
        }
        return row[2 * JD + j * items + b % items];
    }
};

// The weights of one iteration: w_ij = r_ij activation_i with r_ij = softmax_j(logits), equal in the first iteration.
template <class A> struct Assignment {
    Quadratic<A> logits;  // null constant: the first iteration
    const A* activation;  // [B, N]
    int64_t N;

    // Writes r [J] and returns the activations of the items.
    Lanes<A> responsibilities(const Tile<A>& t, Lanes<A>* r) const {
        if (logits.constant) {
            logits(t, r);
            softmax(r, t.J, false);
        } else {
            for (int64_t j = 0; j < t.J; ++j) r[j] = Lanes<A>(A(1) / static_cast<A>(t.J));
        }
        Lanes<A> a = A(0);
        for (int m = 0; m < t.count; ++m)
            if (t.has(m)) a.v[m] = activation[t.b[m] * N + t.i[m]];
        return a;
    }
};

// The Gaussians of all output capsules after each iteration, in the saved form and in the form that the passes read.
template <class A> struct Gaussians {
    const Operands<A>& o;
    int64_t rows;                         // B·J
    Buffer<A> mean, quadratic, constant;  // [iterations] of states, states, and scalars
    const A* saved;                       // [iterations, rows, 3H + 2]

    Gaussians(const Operands<A>& o, int64_t iterations, const A* saved)
        : o(o),
          rows(o.c.B * o.J),
          mean(iterations * o.state_size()),
          quadratic(iterations * o.state_size()),
          constant(iterations * o.scalars_size()),
          saved(saved) {}

    // A view of saved numbers. The backward pass only reads it.
    Gaussian<A> at(int64_t t, int64_t row) const {
        const int64_t H = o.H;
        A* g = const_cast<A*>(saved) + (t * rows + row) * (3 * H + 2);
        return {g, g + H, g + 2 * H, g[3 * H], g[3 * H + 1]};
    }

    // Prepares iteration t for the passes, from its saved numbers.
    void load_iteration(int64_t t) {
        const int64_t H = o.H;
        Buffer<A> means(rows * H), quadratics(rows * H), constants(rows);
        for (int64_t row = 0; row < rows; ++row) {
            const Gaussian<A> g = at(t, row);
            std::memcpy(means.get() + row * H, g.mean, sizeof(A) * static_cast<size_t>(H));
            constants.get()[row] = e_step_constant(g, H);
            for (int64_t h = 0; h < H; ++h) quadratics.get()[row * H + h] = e_step_quadratic(g.variance[h]);
        }
        o.pack(means.get(), mean.get() + t * o.state_size());
        o.pack(quadratics.get(), quadratic.get() + t * o.state_size());
        o.pack_scalars(constants.get(), constant.get() + t * o.scalars_size());
    }

    // The logits of iteration t, from the Gaussians of iteration t − 1.
    Quadratic<A> logits(int64_t t) const {
        if (t == 0) return {nullptr, nullptr, nullptr, nullptr};
        const int64_t x = (t - 1) * o.state_size();
        return {constant.get() + (t - 1) * o.scalars_size(), mean.get() + x, nullptr, quadratic.get() + x};
    }
};

}  // namespace capsops::cpu::CAPSOPS_ISA
