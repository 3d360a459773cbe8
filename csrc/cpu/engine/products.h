// Products of small matrices with their results in registers, for components in the lanes and for batch items in the
// lanes.
#pragma once

#include "../../sizes.h"
#include "simd.h"

namespace capsops::cpu::CAPSOPS_ISA {

// Rows and vectors of a result that are kept in registers at a time: two thirds of the registers.
constexpr int max_rows = CAPSOPS_VECTOR_BYTES == 64 ? 8 : 4, block_vectors = 2;
template <class A> constexpr int block_rows = Lanes<A>::count < max_rows ? Lanes<A>::count : max_rows;

// Calls use.operator()<n>(begin) for consecutive runs of n: most as long as they fit, then ever smaller powers of two.
template <int most, class Use> inline void for_each_group(int64_t begin, int64_t end, Use use) {
    for (; begin + most <= end; begin += most) use.template operator()<most>(begin);
    if constexpr (most > 1) for_each_group<most / 2>(begin, end, use);
}

// ---- components in the lanes ---------------------------------------------------------------------------

// sum_r += u_r W for R rows and V vectors of columns, in registers. stride: from one row of W to the next.
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

// out_r (+)= u_r W for R rows and V vectors of columns.
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

// out[r, k] = Σ_x a_r[x] b_k[x], for several rows of a and b at a time in registers, summed over `repeats` pairs of a
// and b that are `period` apart. Calls put(r, k, n, p) with n neighbouring results at p.
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

// out_r [K] = W [K, X] g_r [X] if K results fill a vector (P = 1) or half of one (P = 2). Squares of W are transposed,
// so that the K results lie in the lanes and no sum crosses lanes. With P = 2 the lanes hold pairs of columns, which
// are added at the end.
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
                for (int q = 0; q < R; ++q) sum[q] += broadcast<P>(row[q] + x, m) * Lanes<A>(w[m]);
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

// out[k, x] (+)= Σ_r u_r[k] g_r[x] for KB rows and V vectors of the result.
template <int KB, int V, class A>
inline void outer_block(const A* const* u, const A* g, int rows, int64_t k, int64_t x, A* out, int64_t stride, bool add,
                        bool nontemporal) {
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
            if (nontemporal)
                store_nontemporal(to, sum[q][v]);
            else
                store(to, add ? load(to) + sum[q][v] : sum[q][v]);
        }
}

// out [K, X] (+)= Σ_r u_r [K]ᵀ g_r [X], g [rows, X].
template <class A>
inline void outer(const A* const* u, const A* g, int rows, int64_t K, int64_t X, A* out, bool add, bool nontemporal) {
    constexpr int n = Lanes<A>::count, KB = block_rows<A>;
    int64_t x = 0;
    for (; x + block_vectors * n <= X; x += block_vectors * n) {
        int64_t k = 0;
        for (; k + KB <= K; k += KB) outer_block<KB, block_vectors>(u, g, rows, k, x, out, X, add, nontemporal);
        for (; k < K; ++k) outer_block<1, block_vectors>(u, g, rows, k, x, out, X, add, nontemporal);
    }
    for (; x < X; x += n) {
        int64_t k = 0;
        for (; k + KB <= K; k += KB) outer_block<KB, 1>(u, g, rows, k, x, out, X, add, nontemporal);
        for (; k < K; ++k) outer_block<1, 1>(u, g, rows, k, x, out, X, add, nontemporal);
    }
}

// ---- batch items in the lanes --------------------------------------------------------------------------

// Sums that are kept in registers at a time.
constexpr int panel_block = 8;

// out [X] (+)= Σ_k W[k, X] u_k, with u [K] and out in vectors of items. stride: from one row of W to the next.
template <bool add, class A>
inline void multiply_items(const A* u, const A* weight, int64_t K, int64_t stride, int64_t X, A* out) {
    constexpr int n = Lanes<A>::count;
    for_each_group<panel_block>(0, X, [&]<int width>(int64_t begin) {
        Lanes<A> sum[width];
        A* to = out + begin * n;
#pragma GCC unroll 8
        for (int x = 0; x < width; ++x) sum[x] = add ? load(to + x * n) : Lanes<A>(A(0));
        for (int64_t k = 0; k < K; ++k) {
            const Lanes<A> a = load(u + k * n);
#pragma GCC unroll 8
            for (int x = 0; x < width; ++x) sum[x] += Lanes<A>(weight[k * stride + begin + x]) * a;
        }
#pragma GCC unroll 8
        for (int x = 0; x < width; ++x) store(to + x * n, sum[x]);
    });
}

// out [K] = Σ_j W[K, j, D] g_j [D], in vectors of items. next: vectors from g_j to g_j+1.
template <class A>
inline void project_items(const A* g, const A* weight, int64_t K, int64_t J, int64_t D, int64_t next, A* out) {
    constexpr int n = Lanes<A>::count;
    for_each_group<panel_block>(0, K, [&]<int height>(int64_t begin) {
        Lanes<A> sum[height];
#pragma GCC unroll 8
        for (int k = 0; k < height; ++k) sum[k] = A(0);
        for (int64_t j = 0; j < J; ++j) {
            const A* w = weight + begin * J * D + j * D;
            for (int64_t d = 0; d < D; ++d) {
                const Lanes<A> a = load(g + (j * next + d) * n);
#pragma GCC unroll 8
                for (int k = 0; k < height; ++k) sum[k] += Lanes<A>(w[k * J * D + d]) * a;
            }
        }
#pragma GCC unroll 8
        for (int k = 0; k < height; ++k) store(out + (begin + k) * n, sum[k]);
    });
}

// ---- between rows of items and vectors of items ------------------------------------------------------

// x [X], in vectors of items, from rows[item] [X]; 0 for items beyond `items`.
template <class A> inline void from_rows(const A* const* rows, int items, int64_t X, A* x) {
    constexpr int n = Lanes<A>::count;
    for (int64_t begin = 0; begin < X; begin += n) {
        const int64_t found = at_most(n, X - begin);
        typename Lanes<A>::Vector v[n];
        for (int r = 0; r < n; ++r) {
            alignas(64) A part[n] = {};
            if (r < items && found < n) __builtin_memcpy(part, rows[r] + begin, sizeof(A) * static_cast<size_t>(found));
            v[r] = load(r < items && found == n ? rows[r] + begin : part).v;
        }
        transpose<n / 2, n, 1>(v);
        for (int64_t m = 0; m < found; ++m) store(x + (begin + m) * n, Lanes<A>(v[m]));
    }
}

// The reverse. next() returns the X vectors of items in their order. Calls put(item, begin, found, v): the components
// begin … begin + found − 1 of an item are the first lanes of v, and the others are 0.
template <class A, class Next, class Put> inline void to_rows(int64_t X, Next next, Put put) {
    constexpr int n = Lanes<A>::count;
    for (int64_t begin = 0; begin < X; begin += n) {
        const int64_t found = at_most(n, X - begin);
        typename Lanes<A>::Vector v[n];
        for (int m = 0; m < n; ++m) v[m] = m < found ? load(next()).v : Lanes<A>(A(0)).v;
        transpose<n / 2, n, 1>(v);
        for (int r = 0; r < n; ++r) put(r, begin, found, Lanes<A>(v[r]));
    }
}

}  // namespace capsops::cpu::CAPSOPS_ISA
