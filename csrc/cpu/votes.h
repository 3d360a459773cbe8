// Two output capsules, as of a classifier of two classes: the votes of several batch items fit into the registers, and
// never leave them, nor do their gradients.
#pragma once

#include "operands.h"

namespace capsops::cpu::CAPSOPS_ISA {

// How many batch items, where a vote is E vectors long; their agreements fit one vector.
template <class A, int E> constexpr int register_rows = at_least(at_most(block_rows<A>, Lanes<A>::count / 2) / E, 1);

// The votes [2, E vectors] of `rows` batch items.
template <class A, int rows, int E> struct Votes {
    Lanes<A> of[rows][2 * E];

    Votes() {
        for (auto& row : of)
            for (auto& x : row) x = Lanes<A>(A(0));
    }
    Votes(const A* const* u, const A* weight, int64_t K) : Votes() {
        add_product(u, weight, K, 2 * E * Lanes<A>::count, of);
    }
};

// Lane j · rows + r (counted round): û_rj · x_b(r),j.
template <class A, int rows, int E>
CAPSOPS_INLINE Lanes<A> agreements_with(const Votes<A, rows, E>& votes, const A* x /* [B, J, D] */, const int64_t* b) {
    constexpr int n = Lanes<A>::count;
    Lanes<A> products[2 * rows];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
            const A* with = x + (b[r] * 2 + j) * E * n;
            Lanes<A> sum = votes.of[r][j * E] * load(with);
#pragma GCC unroll 4
            for (int e = 1; e < E; ++e) sum += votes.of[r][j * E + e] * load(with + e * n);
            products[j * rows + r] = sum;
        }
    return sums<2 * rows>(products);
}

// each(r, v, c) for every vector v of the votes: the coupling of its item and output capsule in all lanes.
template <class A, int rows, int E, class Each>
CAPSOPS_INLINE void for_each_vector(const Votes<A, rows, E>&, Lanes<A> couplings, Each each) {
    alignas(64) A c[Lanes<A>::count];
    store(c, couplings);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < 2 * E; ++v) each(r, v, Lanes<A>(c[v / E * rows + r]));
}

// sum_b(r) += c_rj û_rj.
template <class A, int rows, int E>
CAPSOPS_INLINE void add_coupled(const Votes<A, rows, E>& votes, Lanes<A> c, const int64_t* b, A* sum /* [B, J, D] */) {
    constexpr int n = Lanes<A>::count;
    for_each_vector(votes, c, [&](int r, int v, Lanes<A> a) __attribute__((always_inline)) {
        add_to(sum + (b[r] * 2 * E + v) * n, a * votes.of[r][v]);
    });
}

// ---- gradients --------------------------------------------------------------------------------------------

// out [K, 2 E vectors] (+)= Σ_r u_r [K]ᵀ g_r.
template <class A, int rows, int E>
CAPSOPS_INLINE void outer(const A* const* u, const Votes<A, rows, E>& g, int64_t K, A* out, bool add,
                          bool past_caches) {
    constexpr int n = Lanes<A>::count;
    for (int64_t k = 0; k < K; ++k) {
        Lanes<A> sum[2 * E];
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
            const Lanes<A> a = u[r][k];
#pragma GCC unroll 4
            for (int v = 0; v < 2 * E; ++v) sum[v] = r == 0 ? a * g.of[r][v] : sum[v] + a * g.of[r][v];
        }
#pragma GCC unroll 4
        for (int v = 0; v < 2 * E; ++v) {
            A* to = out + (k * 2 * E + v) * n;
            if (past_caches)
                stream(to, sum[v]);
            else
                store(to, add ? load(to) + sum[v] : sum[v]);
        }
    }
}

// out_r [K] = W [K, 2 E vectors] g_r. The components of the items are transposed, in units of as many as lanes / rows,
// so that a product needs one number or unit of W in all lanes. g is used up.
template <class A, int rows, int E>
CAPSOPS_INLINE void project(Votes<A, rows, E>& g, const A* weight, int64_t K, A* const* out) {
    constexpr int n = Lanes<A>::count, X = 2 * E * n, unit = n / rows, most = 8, C = unit < most ? unit : most;
#pragma GCC unroll 4
    for (int v = 0; v < 2 * E; ++v) {
        typename Lanes<A>::Vector x[rows];
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) x[r] = g.of[r][v].v;
        transpose<rows / 2, rows, unit>(x);
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) g.of[r][v] = x[r];
    }
    for (int64_t k = 0; k < K; k += most) {
        Lanes<A> sum[most];
#pragma GCC unroll 8
        for (int q = 0; q < most; ++q) {
            const A* w = weight + (k + q < K ? k + q : K - 1) * X;
            sum[q] = A(0);
#pragma GCC unroll 4
            for (int v = 0; v < 2 * E; ++v)
#pragma GCC unroll 8
                for (int m = 0; m < rows; ++m) sum[q] += spread<unit>(w + v * n, m) * g.of[m][v];
        }
        // Lane r · unit + p of sum q: a part of the result for item r and component k + q.
        alignas(64) A results[most / C][n];
#pragma GCC unroll 8
        for (int q = 0; q < most; q += C) {
            if constexpr (unit > 1)
                store(results[q / C], fold_all<unit / 2, C>(sum + q));
            else
                store(results[q / C], sum[q]);
        }
        const int64_t found = at_most(most, K - k);
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
            if (found == most) {
#pragma GCC unroll 8
                for (int q = 0; q < most; q += C)
                    __builtin_memcpy(out[r] + k + q, results[q / C] + r * unit, sizeof(A) * C);
            } else {
                for (int q = 0; q < found; ++q) out[r][k + q] = results[q / C][r * unit + q % C];
            }
        }
    }
}

}  // namespace capsops::cpu::CAPSOPS_ISA
