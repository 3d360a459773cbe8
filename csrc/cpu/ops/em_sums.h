// The parts of EM routing (Hinton et al. 2018, procedure 1) that run on one tile: quadratic forms of the votes, and
// sums of the votes and their squares. Both use x = û − shift, where shift is a known mean, to avoid cancellation.
#pragma once

#include <limits>
#include <span>

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

// The numbers of a tile's pairs, of numbers [B, N]; 0 for lanes without a pair.
template <class A> inline Lanes<A> of_pairs(const Tile<A>& t, const A* numbers, int64_t N) {
    Lanes<A> own = A(0);
    for (int m = 0; m < t.count; ++m)
        if (t.has(m)) own.v[m] = numbers[t.b[m] * N + t.i[m]];
    return own;
}

// The weights of one iteration: w_ij = r_ij activation_i with r_ij = softmax_j(logits), equal in the first iteration;
// times the share of the tile's window in an input capsule, where windows compete.
template <class A> struct Assignment {
    Quadratic<A> logits;  // null constant: the first iteration
    const A* activation;  // [B, N]
    int64_t N;
    const A* shares;  // [B, N], or null

    // Writes r [J] and returns the activations of the items.
    Lanes<A> responsibilities(const Tile<A>& t, Lanes<A>* r) const {
        if (logits.constant) {
            logits(t, r);
            softmax(r, t.J, false);
        } else {
            for (int64_t j = 0; j < t.J; ++j) r[j] = Lanes<A>(A(1) / static_cast<A>(t.J));
        }
        if (shares) {
            const Lanes<A> share = of_pairs(t, shares, N);
            for (int64_t j = 0; j < t.J; ++j) r[j] *= share;
        }
        return of_pairs(t, activation, N);
    }
};

// The largest logit z_j of every pair that exists, Σ_j exp(z_j − largest) and, if wanted, Σ_j softmax_j(z) e_j, as a
// policy for `emit`. The sum is kept apart from the largest logit, beside which it would lose digits.
template <class A> struct PairSums {
    static constexpr bool needs_votes = true, takes_registers = false;
    Quadratic<A> logits;
    const Quadratic<A>* e;  // or null
    int64_t J, N;
    A *largest, *sums, *means;  // [B, N]; means may be null if e is

    int64_t param_count() const { return 0; }
    int64_t scratch_size() const { return 2 * J * Lanes<A>::count; }

    void emit(Tile<A>& t, A*, A* scratch) const {
        Lanes<A>* z = reinterpret_cast<Lanes<A>*>(scratch);
        Lanes<A>* gradient = z + J;
        logits(t, z);
        Lanes<A> most = z[0], sum = A(0), mean = A(0);
        for (int64_t j = 1; j < J; ++j) most = max(most, z[j]);
        for (int64_t j = 0; j < J; ++j) sum += z[j] = exponential(z[j] - most);
        if (e) {
            (*e)(t, gradient);
            for (int64_t j = 0; j < J; ++j) mean += z[j] * gradient[j];
        }
        for (int m = 0; m < t.count; ++m) {
            if (!t.has(m)) continue;
            const int64_t pair = t.b[m] * N + t.i[m];
            largest[pair] = most.v[m], sums[pair] = sum.v[m];
            if (e) means[pair] = mean.v[m] / sum.v[m];
        }
    }
};

// What the responsibilities and their gradient take from other windows, where the output capsules of several windows
// compete: for every iteration and pair the share of the window in the input capsule, by which the softmax over its
// own output capsules is multiplied; and for the gradient Σ r e over the output capsules of all windows. The share of a
// place that no capsule has is 0. Without windows the numbers are null.
template <class A> class Competition {
  public:
    Competition(const Operands<A>& o, const Windows* windows, int64_t iterations, bool with_gradient)
        : o_(o),
          windows_(windows),
          pairs_(windows ? o.c.B * o.c.N : 0),
          own_largest_(pairs_),
          own_sums_(pairs_),
          own_means_(with_gradient ? pairs_ : 0),
          shares_(iterations * pairs_),
          means_(with_gradient ? iterations * pairs_ : 0),
          activations_(pairs_) {
        fill(shares_.get(), iterations * pairs_, A(0));
        if (with_gradient) fill(means_.get(), iterations * pairs_, A(0));
        // The logits of the first iteration are 0. Masked pairs keep this −∞, because no pass visits them.
        fill(own_sums_.get(), pairs_, static_cast<A>(o.J));
        for (int64_t x = 0; x < pairs_; ++x)
            own_largest_.get()[x] = !o.c.mask || o.c.mask[x] ? A(0) : -std::numeric_limits<A>::infinity();
    }

    // Null without windows.
    const A* shares(int64_t t) const { return windows_ ? shares_.get() + t * pairs_ : nullptr; }
    const A* means(int64_t t) const { return windows_ ? means_.get() + t * pairs_ : nullptr; }

    // Sets the shares of the first iteration, before any other. activation: [B / windows, capsules], or [B, N] without
    // windows. Returns those of the pairs, [B, N].
    const A* begin(const A* activation) {
        if (!windows_) return activation;
        join(nullptr, shares_.get(), nullptr);
        fill(activations_.get(), pairs_, A(0));
        for_capsules([&](int64_t x, int64_t base, std::span<const int64_t> places) {
            for (const int64_t place : places)
                if (place >= 0) activations_.get()[base + place] = activation[x];
        });
        return activations_.get();
    }

    // Sets the numbers of iteration t, in a pass over the votes. e: null if the means are not wanted.
    void set(int64_t t, const Quadratic<A>& logits, const Quadratic<A>* e) {
        if (!windows_) return;
        const PairSums<A> policy{logits, e, o_.J, o_.c.N, own_largest_.get(), own_sums_.get(), own_means_.get()};
        emit(o_, policy, CapsuleGradients{}, static_cast<A*>(nullptr));
        join(e ? own_means_.get() : nullptr, shares_.get() + t * pairs_, e ? means_.get() + t * pairs_ : nullptr);
    }

    // out [B / windows, capsules]: sums of numbers [B, N] over the places of a capsule.
    void add_places(const A* numbers, A* out) const {
        for_capsules([&](int64_t x, int64_t base, std::span<const int64_t> places) {
            A sum = 0;
            for (const int64_t place : places)
                if (place >= 0) sum += numbers[base + place];
            out[x] = sum;
        });
    }

  private:
    // Calls visit(x, base, places) for capsule x of all grids, with its places from pair `base` on.
    template <class Visit> void for_capsules(Visit visit) const {
        const Windows& w = *windows_;
        const int64_t count = o_.c.B / w.count * w.capsules;
        [[maybe_unused]] const int threads = o_.c.context.threads;
#pragma omp parallel for schedule(static) num_threads(threads) if (pairs_ >= 4096)
        for (int64_t x = 0; x < count; ++x)
            visit(x, x / w.capsules * w.count * o_.c.N,
                  std::span(w.places + x % w.capsules * w.most, static_cast<size_t>(w.most)));
    }

    // From the numbers of each place to those of all places of a capsule.
    void join(const A* own_means, A* shares, A* means) const {
        for_capsules([&](int64_t, int64_t base, std::span<const int64_t> places) {
            A* const own_shares = shares + base;
            A largest = -std::numeric_limits<A>::infinity(), sum = 0, mean = 0;
            for (const int64_t place : places)
                if (place >= 0) largest = max(largest, own_largest_.get()[base + place]);
            if (largest == -std::numeric_limits<A>::infinity()) return;
            for (const int64_t place : places) {
                if (place < 0) continue;
                const int64_t pair = base + place;
                own_shares[place] = own_sums_.get()[pair] * std::exp(own_largest_.get()[pair] - largest);
                sum += own_shares[place];
            }
            for (const int64_t place : places) {
                if (place < 0) continue;
                own_shares[place] /= sum;
                if (own_means && own_shares[place] > A(0)) mean += own_shares[place] * own_means[base + place];
            }
            for (const int64_t place : places)
                if (means && place >= 0) means[base + place] = mean;
        });
    }

    const Operands<A>& o_;
    const Windows* windows_;
    int64_t pairs_;
    Buffer<A> own_largest_, own_sums_, own_means_, shares_, means_, activations_;
};

// Whether every place exists and is that of one capsule.
inline bool valid_places(const Windows& w, int64_t N) {
    Buffer<uint8_t> taken(w.count * N);
    fill(taken.get(), w.count * N, uint8_t{0});
    for (int64_t x = 0; x < w.capsules * w.most; ++x) {
        const int64_t place = w.places[x];
        if (place < -1 || place >= w.count * N) return false;
        if (place >= 0 && taken.get()[place]++) return false;
    }
    return true;
}

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
