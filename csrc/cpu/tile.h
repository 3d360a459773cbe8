// A tile: as many (batch item, input capsule) pairs as a vector has lanes, with their votes in the first-level cache.
// Votes lie with the components d in the lanes, [item, J, D]; logits and couplings with the items in the lanes,
// [J, item], so that neither the products with W nor the softmax over J crosses lanes; agreements turn one into the
// other. D is rounded up to whole vectors throughout, with zeros behind the last component.
#pragma once

#include <type_traits>

#include "simd.h"

#include "../coupling.h"

namespace capsops::cpu::CAPSOPS_ISA {

// Rows and vectors of a product that are kept in registers at a time: two thirds of the registers there are.
constexpr int most_rows = CAPSOPS_VECTOR_BYTES == 64 ? 8 : 4, block_vectors = 2;
template <class A> constexpr int block_rows = Lanes<A>::count < most_rows ? Lanes<A>::count : most_rows;

// use.operator()<n>(begin) for runs of n from begin on, n as large as is left of `most`, a power of two.
template <int most, class Use> inline void for_each_group(int64_t begin, int64_t end, Use use) {
    for (; begin + most <= end; begin += most) use.template operator()<most>(begin);
    if constexpr (most > 1) for_each_group<most / 2>(begin, end, use);
}

// What the lanes of a vector hold. Components of one vote: any batch will do, but a short vote leaves lanes idle, and
// agreements have to cross them. Or one component of the votes of neighbouring batch items: nothing crosses lanes but
// u and the gradients, on their way in and out, and the dimensions do not matter.
enum class Layout { components, items };

// A run of items in a tile with the same transformation matrix.
template <class A> struct Segment {
    int begin, end;    // items; equal if the capsule is there for no batch item
    int64_t i;         // the input capsule; of shared matrices the first one
    const A* weight;   // [K, J, D]
    bool first, last;  // of this matrix in this block of capsules
};

template <class A> struct Tile {
    static constexpr int size = Lanes<A>::count;
    static constexpr int most_segments = 2 * size;

    Layout layout;
    int64_t K, J, D, JD;       // as in Operands
    int count = 0;             // items
    uint32_t absent = 0;       // bit r: item r is not there, and all of its votes are 0 (Layout::items)
    int64_t b[size], i[size];  // [count]
    const A* u[size];          // [count] of [K]
    A* votes;                  // [rows(), J, D]
    A* g_votes;                // [rows(), J, D]
    int segment_count = 0;
    Segment<A> segments[most_segments];

    bool has(int r) const { return !(absent >> r & 1); }

    // Rows of votes, and the row of a state that belongs to each.
    int rows() const { return layout == Layout::items ? 1 : count; }
    int64_t row(int r) const { return layout == Layout::items ? b[0] / size : b[r]; }
};

// ---- small products ----------------------------------------------------------------------------------

// sum_r += u_r W over R rows and V vectors of columns, in registers. stride: from one row of W to the next.
template <int R, int V, class A>
CAPSOPS_INLINE void add_product(const A* const* u, const A* weight, int64_t K, int64_t stride, Lanes<A> (&sum)[R][V]) {
    for (int64_t k = 0; k < K; ++k) {
        Lanes<A> w[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) w[v] = load(weight + k * stride + v * Lanes<A>::count);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const Lanes<A> a = u[r][k];
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) sum[r][v] += a * w[v];
        }
    }
}

// out_r (+)= u_r W over R rows and V vectors of columns.
template <int R, int V, bool add, class A>
inline void multiply_block(const A* const* u, const A* weight, int64_t K, int64_t stride, A* const* out, int64_t x) {
    constexpr int n = Lanes<A>::count;
    Lanes<A> sum[R][V];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) sum[r][v] = add ? load(out[r] + x + v * n) : Lanes<A>(A(0));
    add_product(u, weight + x, K, stride, sum);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) store(out[r] + x + v * n, sum[r][v]);
}

template <int V, bool add, class A>
inline void multiply_rows(const A* const* u, int rows, const A* weight, int64_t K, int64_t stride, A* const* out,
                          int64_t x) {
    constexpr bool narrow = V == 1 && 2 * block_rows<A> <= Lanes<A>::count;
    for_each_group<narrow ? 2 * block_rows<A> : block_rows<A>>(
        0, rows, [&]<int R>(int64_t r) { multiply_block<R, V, add>(u + r, weight, K, stride, out + r, x); });
}

// out_r [X] (+)= u_r [K] W [K, X], X a multiple of the vector. stride: from one row of W to the next.
template <bool add, class A>
inline void multiply(const A* const* u, int rows, const A* weight, int64_t K, int64_t X, int64_t stride,
                     A* const* out) {
    constexpr int n = Lanes<A>::count;
    int64_t x = 0;
    for (; x + block_vectors * n <= X; x += block_vectors * n)
        multiply_rows<block_vectors, add>(u, rows, weight, K, stride, out, x);
    for (; x < X; x += n) multiply_rows<1, add>(u, rows, weight, K, stride, out, x);
}

// out[r, k] = Σ_x a_r[x] b_k[x], several rows of `a` and of `b` at a time in registers; over `repeats` of them,
// `period` apart. put(r, k, n, p) takes n neighbouring results from p.
template <class A, class Put>
inline void dots(const A* a, int64_t a_stride, int64_t rows, const A* b, int64_t b_stride, int64_t columns, int64_t X,
                 int repeats, int64_t period, Put put) {
    constexpr int n = Lanes<A>::count, KB = n < 4 ? n : 4, RB = n / KB;
    for (int64_t r = 0; r < rows; r += RB) {
        const A* ar[RB];
#pragma GCC unroll 4
        for (int q = 0; q < RB; ++q) ar[q] = a + (r + q < rows ? r + q : rows - 1) * a_stride;
        for (int64_t k = 0; k < columns; k += KB) {
            const A* bk[KB];
#pragma GCC unroll 4
            for (int q = 0; q < KB; ++q) bk[q] = b + (k + q < columns ? k + q : columns - 1) * b_stride;
            Lanes<A> sum[n];
#pragma GCC unroll 16
            for (int m = 0; m < n; ++m) sum[m] = Lanes<A>(A(0));
            for (int repeat = 0; repeat < repeats; ++repeat)
                for (int64_t x = repeat * period; x < repeat * period + X; x += n) {
                    Lanes<A> bv[KB];
#pragma GCC unroll 4
                    for (int q = 0; q < KB; ++q) bv[q] = load(bk[q] + x);
#pragma GCC unroll 4
                    for (int p = 0; p < RB; ++p) {
                        const Lanes<A> av = load(ar[p] + x);
#pragma GCC unroll 4
                        for (int q = 0; q < KB; ++q) sum[p * KB + q] += av * bv[q];
                    }
                }
            alignas(64) A results[n];
            store(results, sums<n>(sum));
            const int64_t valid = columns - k < KB ? columns - k : KB;
            for (int p = 0; p < RB && r + p < rows; ++p) put(r + p, k, valid, results + p * KB);
        }
    }
}

// out_r [K] = W [K, X] g_r [X] where K fits a vector once (P = 1) or twice (P = 2): squares of W are transposed, so
// that the K results lie in the lanes and no sum crosses them. With P = 2 the lanes hold pairs of columns, which are
// added at the end.
template <int P, class A>
inline void project(const A* g, int64_t g_stride, int rows, const A* weight, int64_t stride, int64_t X, A* const* out) {
    constexpr int n = Lanes<A>::count, K = n / P, R = block_rows<A>;
    for (int r = 0; r < rows; r += R) {
        const A* row[R];
#pragma GCC unroll 8
        for (int q = 0; q < R; ++q) row[q] = g + (r + q < rows ? r + q : rows - 1) * g_stride;
        Lanes<A> sum[R];
#pragma GCC unroll 8
        for (int q = 0; q < R; ++q) sum[q] = Lanes<A>(A(0));
        for (int64_t x = 0; x < X; x += n) {
            typename Lanes<A>::Vector w[K];
#pragma GCC unroll 16
            for (int k = 0; k < K; ++k) w[k] = load(weight + k * stride + x).v;
            transpose<K / 2, K, P>(w);
#pragma GCC unroll 16
            for (int m = 0; m < K; ++m)
#pragma GCC unroll 8
                for (int q = 0; q < R; ++q) sum[q] += spread<P>(row[q] + x, m) * Lanes<A>(w[m]);
        }
        if constexpr (P == 1) {
#pragma GCC unroll 8
            for (int q = 0; q < R; ++q)
                if (r + q < rows) store(out[r + q], sum[q]);
        } else {
            alignas(64) A results[R][K];
#pragma GCC unroll 8
            for (int q = 0; q < R; q += 2) store(results[q], add_neighbours(sum[q], sum[q + 1]));
#pragma GCC unroll 8
            for (int q = 0; q < R; ++q)
                if (r + q < rows) __builtin_memcpy(out[r + q], results[q], sizeof(results[q]));
        }
    }
}

// out[k, x] (+)= Σ_r u_r[k] g_r[x] over KB rows and V vectors of the result.
template <int KB, int V, class A>
inline void outer_block(const A* const* u, const A* g, int rows, int64_t k, int64_t x, A* out, int64_t stride, bool add,
                        bool past_caches) {
    constexpr int n = Lanes<A>::count;
    Lanes<A> sum[KB][V];
#pragma GCC unroll 8
    for (int q = 0; q < KB; ++q)
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) sum[q][v] = Lanes<A>(A(0));
    for (int r = 0; r < rows; ++r) {
        Lanes<A> gv[V];
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) gv[v] = load(g + r * stride + x + v * n);
#pragma GCC unroll 8
        for (int q = 0; q < KB; ++q) {
            const Lanes<A> a = u[r][k + q];
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v) sum[q][v] += a * gv[v];
        }
    }
#pragma GCC unroll 8
    for (int q = 0; q < KB; ++q)
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) {
            A* to = out + (k + q) * stride + x + v * n;
            if (past_caches)
                stream(to, sum[q][v]);
            else
                store(to, add ? load(to) + sum[q][v] : sum[q][v]);
        }
}

// out [K, X] (+)= Σ_r u_r [K]ᵀ g_r [X], g [rows, X].
template <class A>
inline void outer(const A* const* u, const A* g, int rows, int64_t K, int64_t X, A* out, bool add, bool past_caches) {
    constexpr int n = Lanes<A>::count, KB = block_rows<A>;
    int64_t x = 0;
    for (; x + block_vectors * n <= X; x += block_vectors * n) {
        int64_t k = 0;
        for (; k + KB <= K; k += KB) outer_block<KB, block_vectors>(u, g, rows, k, x, out, X, add, past_caches);
        for (; k < K; ++k) outer_block<1, block_vectors>(u, g, rows, k, x, out, X, add, past_caches);
    }
    for (; x < X; x += n) {
        int64_t k = 0;
        for (; k + KB <= K; k += KB) outer_block<KB, 1>(u, g, rows, k, x, out, X, add, past_caches);
        for (; k < K; ++k) outer_block<1, 1>(u, g, rows, k, x, out, X, add, past_caches);
    }
}

// ---- what the couplings of a tile are made of ----------------------------------------------------------

// out[j], lane r: Σ_d term(own, row, jd) of item r, where term gives one vector, number `own` of the tile's votes and
// number jd of a row of a state; 0 for lanes without an item.
template <class A, class Term> inline void agreements(const Tile<A>& t, Term term, Lanes<A>* out /* [J] */) {
    constexpr int n = Tile<A>::size;
    const int64_t J = t.J, D = t.D, JD = t.JD;
    if (t.layout == Layout::items) {
        const int64_t row = t.row(0);
        for (int64_t j = 0; j < J; ++j) {
            constexpr int chains = 4;  // of additions, each of which waits for the one before
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

// û · x, for every output capsule.
template <class A> inline void agreements_with(const Tile<A>& t, const A* x /* a state */, Lanes<A>* out) {
    const A* votes = t.votes;
    const int64_t JD = t.JD;
    agreements(
        t, [=](int64_t own, int64_t row, int64_t jd) { return load(votes + own) * load(x + row * JD + jd); }, out);
}

// Lane r of x[j].
template <class A> inline A lane(const Lanes<A>* x, int64_t j, int r) {
    return reinterpret_cast<const A*>(x + j)[r];
}

// each(own, row, jd, coupling) for every vector of the tile's votes, as in agreements: the coupling of its items and
// output capsule in all lanes.
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

// A state, and a coupling for each of its vectors.
template <class A> struct Term {
    const Lanes<A>* coupling;  // [J]
    const A* state;
};

// The gradient of the votes as a sum of terms.
template <class A> inline void combine(const Tile<A>& t, const Term<A>* terms, int count) {
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
                for (int m = 0; m < count; ++m) {
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

// sum += c û.
template <class A> inline void add_coupled(const Tile<A>& t, const Lanes<A>* c, A* sum /* a state */) {
    const A* votes = t.votes;
    const int64_t JD = t.JD;
    for_each_vector(t, c, [=](int64_t own, int64_t row, int64_t jd, Lanes<A> a) {
        add_to(sum + row * JD + jd, a * load(votes + own));
    });
}

}  // namespace capsops::cpu::CAPSOPS_ISA
