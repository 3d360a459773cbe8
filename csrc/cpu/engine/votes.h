// Votes in registers, for two output capsules, as in a classifier of two classes. The votes of several batch items fit
// into registers; neither they nor their gradients go through memory.
#pragma once

#include "tasks.h"

namespace capsops::cpu::CAPSOPS_ISA {

// Batch items whose votes are in registers at a time, where a vote is E vectors long. Their agreements fit into one
// vector.
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

// Lane l, with l mod (2 · rows) = j · rows + r: û_rj · x_b(r),j.
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

// Calls each(r, v, c) for every vector v of the votes of item r, with the coupling of its item and output capsule in
// all lanes.
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
                          bool nontemporal) {
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
            if (nontemporal)
                store_nontemporal(to, sum[v]);
            else
                store(to, add ? load(to) + sum[v] : sum[v]);
        }
    }
}

// out_r [K] = W [K, 2 E vectors] g_r. The components of the items are transposed in units of lanes / rows, so that a
// product broadcasts one number or unit of W to all lanes. Overwrites g.
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
                for (int m = 0; m < rows; ++m) sum[q] += broadcast<unit>(w + v * n, m) * g.of[m][v];
        }
        // Lane r · unit + p of sum q: one part of the result for item r and component k + q.
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

// ---- the capsules of a task ------------------------------------------------------------------------------

// The vectors of a vote if votes fit into registers, else 0.
template <class A> inline int64_t vote_vectors(const Operands<A>& o) {
    const int64_t vectors = o.D / Lanes<A>::count;
    return o.layout == Layout::components && o.J == 2 && !o.c.votes_given && vectors <= max_vote_vectors ? vectors : 0;
}

// Calls function.operator()<E>() with E = vote_vectors(o), which is not 0.
template <class A, class Function> inline void for_vote_vectors(const Operands<A>& o, Function function) {
    static_assert(max_vote_vectors == 2);
    if (vote_vectors(o) == 1) return function.template operator()<1>();
    function.template operator()<2>();
}

// One input capsule and the batch items for which it is not masked.
template <class A> struct Rows {
    int64_t i;
    const A* weight;
    int64_t count;
    const int64_t* b;   // [count]
    const A* const* u;  // [count], each [K]
};

// The scratch memory of all threads for Rows.
template <class A> class RowsMemory {
  public:
    RowsMemory(const Operands<A>& o, int threads)
        : o_(o),
          numbers_size_((o.direct_weight ? 0 : o.weight_size) + (o.direct_u ? 0 : o.c.B * o.K)),
          numbers_(numbers_size_ * threads),
          b_(o.c.B * threads),
          u_(o.c.B * threads) {}

    A* weight(int thread) const { return numbers_.get() + thread * numbers_size_; }
    A* u(int thread) const { return weight(thread) + (o_.direct_weight ? 0 : o_.weight_size); }
    int64_t* items(int thread) const { return b_.get() + thread * o_.c.B; }
    const A** pointers(int thread) const { return u_.get() + thread * o_.c.B; }

  private:
    const Operands<A>& o_;
    int64_t numbers_size_;
    Buffer<A> numbers_;
    Buffer<int64_t> b_;
    Buffer<const A*> u_;
};

// Calls visit(rows) for every input capsule of a task, and absent(b, i) for the masked pairs.
template <class A, class Visit, class Absent>
inline void for_each_capsule(const Operands<A>& o, const Tasks& tasks, int64_t task, const RowsMemory<A>& memory,
                             Visit visit, Absent absent) {
    const Capsules& c = o.c;
    const int thread = omp_get_thread_num();
    const int64_t b0 = tasks.first_item(task), b1 = tasks.end_item(task), end = tasks.end_capsule(task);
    const int64_t stride = c.N * o.K;
    A* converted = memory.u(thread);
    int64_t* items = memory.items(thread);
    const A** u = memory.pointers(thread);
    Rows<A> rows{0, nullptr, 0, items, u};
    Steps steps(tasks.watch);
    for (int64_t i = tasks.first_capsule(task); i < end && !steps.stopped(); ++i) {
        const bool first = rows.weight == nullptr;
        rows.i = i;
        if (first || !o.shared()) rows.weight = o.load_weight(i, memory.weight(thread));
        if (!c.mask && o.direct_u && !first) {
            for (int64_t r = 0; r < rows.count; ++r) u[r] += o.K;
        } else {
            rows.count = 0;
            for (int64_t b = b0; b < b1; ++b) {
                if (c.mask && !c.mask[b * c.N + i]) {
                    absent(b, i);
                    continue;
                }
                items[rows.count] = b;
                u[rows.count++] = o.load_u(b * stride + i * o.K, o.K, converted + (b - b0) * o.K);
            }
        }
        visit(rows);
    }
}

}  // namespace capsops::cpu::CAPSOPS_ISA
