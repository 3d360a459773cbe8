// A tile: as many pairs of a batch item and an input capsule as a vector has lanes, with their votes in the first-level
// cache. Logits and couplings are stored with the pairs in the lanes, [J, item], so that the softmax over J crosses no
// lanes. The layout says how votes are stored.
#pragma once

#include "products.h"

namespace capsops::cpu::CAPSOPS_ISA {

// What the lanes of a vector of votes hold.
//   components   one vote, [item, J, D] with D rounded up to whole vectors, zeros behind. Works for any batch, but
//                a short vote leaves lanes idle, and agreements have to cross lanes.
//   items        one component of the votes of neighbouring batch items, [J, H, item]. Only u and the gradients cross
//                lanes, when they are loaded and stored. Works for any dimension, but a small batch leaves lanes idle.
enum class Layout { components, items };

// A run of items in a tile that have the same transformation matrix.
template <class A> struct Segment {
    int begin, end;    // items; equal if the capsule is masked for all batch items
    int64_t i;         // the input capsule; the first one if the matrix is shared
    const A* weight;   // [K, J, D]
    bool first, last;  // whether it has the first, the last item with this matrix in the task
};

template <class A> struct Tile {
    // Not a setting: the code relies on size being the number of lanes.
    static constexpr int size = Lanes<A>::count;
    static constexpr int max_segments = 2 * size;

    Layout layout;
    int64_t K, J, D, JD;       // as in Operands
    int count = 0;             // items
    uint32_t absent = 0;       // bit r: item r is masked, and its votes are 0 (Layout::items)
    int64_t b[size], i[size];  // [count]
    const A* u[size];          // [count] of [K]
    A* votes;                  // [rows(), J, D]; [count, D] if one_vote
    A* g_votes;                // the same
    bool given = false;  // whether votes are given, and the capsules of an item follow one another (Layout::components)
    bool one_vote = false;  // whether all output capsules get the same vote (Layout::components)
    int segment_count = 0;
    Segment<A> segments[max_segments];

    bool has(int r) const { return !(absent >> r & 1); }

    // The number of rows of votes, and the row of a state for each of them.
    int rows() const { return layout == Layout::items ? 1 : count; }
    int64_t row(int r) const { return layout == Layout::items ? b[0] / size : b[r]; }
};

// ---- agreements, and sums of couplings times votes ----------------------------------------------------

// out[j], lane r: Σ_d term(own, row, jd) for item r; 0 for lanes without an item. term returns one vector, for number
// `own` of the tile's votes and number jd of row `row` of a state.
template <class A, class Term> inline void agreements(const Tile<A>& t, Term term, Lanes<A>* out /* [J] */) {
    constexpr int n = Tile<A>::size;
    const int64_t J = t.J, D = t.D, JD = t.JD;
    if (t.layout == Layout::items) {
        const int64_t row = t.row(0);
        for (int64_t j = 0; j < J; ++j) {
            constexpr int chains = 4;  // independent sums, because each addition waits for the one before
            Lanes<A> x[chains];
            for (int m = 0; m < chains; ++m) x[m] = A(0);
            int64_t jd = j * D;
            const int64_t end = jd + D;
            for (; jd + chains * n <= end; jd += chains * n)
#pragma GCC unroll 4
                for (int m = 0; m < chains; ++m) x[m] += term(jd + m * n, row, jd + m * n);
            for (; jd < end; jd += n) x[0] += term(jd, row, jd);
            out[j] = (x[0] + x[1]) + (x[2] + x[3]);
        }
        return;
    }
    for (int64_t j = 0; j < J; ++j) {
        Lanes<A> x[n];
        if (t.count == n && D == n) {
#pragma GCC unroll 16
            for (int r = 0; r < n; ++r) x[r] = term(r * JD + j * n, t.b[r], j * n);
        } else {
            for (int r = 0; r < n; ++r) {
                x[r] = Lanes<A>(A(0));
                if (r < t.count)
                    for (int64_t d = j * D; d < (j + 1) * D; d += n) x[r] += term(r * JD + d, t.b[r], d);
            }
        }
        out[j] = sums<n>(x);
    }
}

// agreements_with for one vote, whose vectors are loaded once for several output capsules.
template <class A>
[[gnu::noinline]] void agreements_of_one_vote(const Tile<A>& t, const A* x /* a state */, Lanes<A>* out) {
    constexpr int n = Tile<A>::size;
    for_each_group<4>(0, t.J, [&]<int outputs>(int64_t j) {
        Lanes<A> products[outputs][n];
        for (int r = 0; r < n; ++r) {
            Lanes<A> sum[outputs];
            for (auto& s : sum) s = A(0);
            if (r < t.count) {
                const A *vote = t.votes + r * t.D, *with = x + t.b[r] * t.JD + j * t.D;
                for (int64_t d = 0; d < t.D; d += n) {
                    const Lanes<A> v = load(vote + d);
#pragma GCC unroll 4
                    for (int m = 0; m < outputs; ++m) sum[m] += v * load(with + m * t.D + d);
                }
            }
            for (int m = 0; m < outputs; ++m) products[m][r] = sum[m];
        }
        for (int m = 0; m < outputs; ++m) out[j + m] = sums<n>(products[m]);
    });
}

// out[j], lane r: û_j · x_j.
template <class A> inline void agreements_with(const Tile<A>& t, const A* x /* a state */, Lanes<A>* out) {
    if (t.one_vote) return agreements_of_one_vote(t, x, out);
    const A* votes = t.votes;
    const int64_t JD = t.JD;
    agreements(
        t, [=](int64_t own, int64_t row, int64_t jd) { return load(votes + own) * load(x + row * JD + jd); }, out);
}

// Lane r of x[j].
template <class A> inline A lane(const Lanes<A>* x, int64_t j, int r) {
    return reinterpret_cast<const A*>(x + j)[r];
}

// Calls each(own, row, jd, coupling) for every vector of the tile's votes, with indices as in `agreements` and the
// coupling of its item and output capsule in all lanes.
template <class A, class Each> inline void for_each_vector(const Tile<A>& t, const Lanes<A>* c, Each each) {
    constexpr int n = Tile<A>::size;
    const bool items = t.layout == Layout::items;
    const int64_t J = t.J, D = t.D, JD = t.JD;
    const int rows = t.rows();
    for (int r = 0; r < rows; ++r) {
        const int64_t row = t.row(r);
        for (int64_t j = 0; j < J; ++j) {
            const Lanes<A> a = items ? c[j] : Lanes<A>(lane(c, j, r));
            for (int64_t d = j * D; d < (j + 1) * D; d += n) each(r * JD + d, row, d, a);
        }
    }
}

// A state with couplings that weigh its vectors.
template <class A> struct Term {
    const Lanes<A>* coupling;  // [J]
    const A* state;
};

// combine for one vote, whose gradient is the sum over the output capsules.
template <class A> [[gnu::noinline]] void combine_for_one_vote(const Tile<A>& t, const Term<A>* terms, int64_t count) {
    constexpr int n = Tile<A>::size;
    for (int r = 0; r < t.count; ++r)
        for_each_group<4>(0, t.D / n, [&]<int vectors>(int64_t begin) {
            Lanes<A> sum[vectors];
            for (auto& s : sum) s = A(0);
            for (int64_t m = 0; m < count; ++m)
                for (int64_t j = 0; j < t.J; ++j) {
                    const Lanes<A> a = lane(terms[m].coupling, j, r);
                    const A* x = terms[m].state + t.b[r] * t.JD + j * t.D + begin * n;
#pragma GCC unroll 4
                    for (int v = 0; v < vectors; ++v) sum[v] += a * load(x + v * n);
                }
#pragma GCC unroll 4
            for (int v = 0; v < vectors; ++v) store(t.g_votes + r * t.D + (begin + v) * n, sum[v]);
        });
}

// Writes the gradient of the votes as a sum of terms, coupling · state.
template <class A> inline void combine(const Tile<A>& t, const Term<A>* terms, int64_t count) {
    if (t.one_vote) return combine_for_one_vote(t, terms, count);
    constexpr int n = Tile<A>::size;
    const bool items = t.layout == Layout::items;
    const int64_t J = t.J, D = t.D, JD = t.JD;
    const int rows = t.rows();
    for (int r = 0; r < rows; ++r)
        for (int64_t j = 0; j < J; ++j) {
            const int64_t from = t.row(r) * JD + j * D;
            A* to = t.g_votes + r * JD + j * D;
            for_each_group<4>(0, D / n, [=]<int vectors>(int64_t begin) {
                Lanes<A> sum[vectors];
                for (int64_t m = 0; m < count; ++m) {
                    const Lanes<A> a = items ? terms[m].coupling[j] : Lanes<A>(lane(terms[m].coupling, j, r));
                    const A* x = terms[m].state + from + begin * n;
#pragma GCC unroll 4
                    for (int v = 0; v < vectors; ++v)
                        sum[v] = m == 0 ? a * load(x + v * n) : sum[v] + a * load(x + v * n);
                }
#pragma GCC unroll 4
                for (int v = 0; v < vectors; ++v) store(to + (begin + v) * n, sum[v]);
            });
        }
}

// add_coupled for votes that are given: an item's sums are in registers as long as its capsules follow one another in
// the tile.
template <class A> [[gnu::noinline]] void add_coupled_runs(const Tile<A>& t, const Lanes<A>* c, A* sum /* a state */) {
    constexpr int n = Tile<A>::size;
    const int64_t row_size = t.one_vote ? t.D : t.JD;
    for (int first = 0, end; first < t.count; first = end) {
        for (end = first + 1; end < t.count && t.b[end] == t.b[first];) ++end;
        for (int64_t j = 0; j < t.J; ++j) {
            const A* votes = t.votes + (t.one_vote ? 0 : j * t.D);
            for_each_group<8>(0, t.D / n, [&]<int vectors>(int64_t begin) {
                A* to = sum + t.b[first] * t.JD + j * t.D + begin * n;
                Lanes<A> own[vectors];
#pragma GCC unroll 8
                for (int v = 0; v < vectors; ++v) own[v] = load(to + v * n);
                for (int r = first; r < end; ++r) {
                    const Lanes<A> a = lane(c, j, r);
                    const A* vote = votes + r * row_size + begin * n;
#pragma GCC unroll 8
                    for (int v = 0; v < vectors; ++v) own[v] += a * load(vote + v * n);
                }
#pragma GCC unroll 8
                for (int v = 0; v < vectors; ++v) store(to + v * n, own[v]);
            });
        }
    }
}

// sum += c û.
template <class A> inline void add_coupled(const Tile<A>& t, const Lanes<A>* c, A* sum /* a state */) {
    if (t.given) return add_coupled_runs(t, c, sum);
    const A* votes = t.votes;
    const int64_t JD = t.JD;
    for_each_vector(t, c, [=](int64_t own, int64_t row, int64_t jd, Lanes<A> a) {
        add_to(sum + row * JD + jd, a * load(votes + own));
    });
}

}  // namespace capsops::cpu::CAPSOPS_ISA
