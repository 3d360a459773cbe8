// A panel: as many neighbouring batch items as a vector has lanes, and some neighbouring input capsules. The items lie
// in the lanes (Layout::items): a vector is one component of all of them, and a product needs one number of W in all
// lanes.
#pragma once

#include "operands.h"

namespace capsops::cpu::CAPSOPS_ISA {

// ---- small products ----------------------------------------------------------------------------------

// Sums that are kept in registers at a time.
constexpr int panel_block = 8;

// out [X] (+)= Σ_k W[k, X] u_k for u [K] and out in vectors of items. stride: from one row of W to the next.
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

// out [K] = Σ_j W[K, j, D] g_j [D], in vectors of items. `next` vectors lie between g_j and g_j+1.
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

// x [X] vectors of items = rows[item] [X], and zeros for items beyond `items`.
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

// put(item, begin, found, v): components begin … begin + found − 1 of an item lie in the first lanes of v, zeros
// behind. Component m of all items is at vector(m).
template <class A, class From, class Put> inline void to_rows(int64_t X, From vector, Put put) {
    constexpr int n = Lanes<A>::count;
    for (int64_t begin = 0; begin < X; begin += n) {
        const int64_t found = at_most(n, X - begin);
        typename Lanes<A>::Vector v[n];
        for (int m = 0; m < n; ++m) v[m] = m < found ? load(vector(begin + m)).v : Lanes<A>(A(0)).v;
        transpose<n / 2, n, 1>(v);
        for (int r = 0; r < n; ++r) put(r, begin, found, Lanes<A>(v[r]));
    }
}

// ---- the panel -----------------------------------------------------------------------------------------

template <class A> struct Panel {
    static constexpr int size = Lanes<A>::count;

    int64_t i, capsules;  // the input capsules i … i + capsules − 1
    int64_t b;            // the first batch item
    int items;            // of them; the lanes behind hold zeros
    bool first, last;     // of the task's batch items
    const A* weight;      // of capsule i
    int64_t weight_next;  // numbers to the matrix of the next capsule
    const A* rows[size];  // u of each item, [capsules, K]
    A* u;                 // the same in vectors of items, with 0 where a capsule is not there
    A* g_u;               // as u
};

// How many capsules a panel takes: a panel of u stays in the first-level cache, its matrices in the second.
template <class A> inline int64_t panel_capsules(const Operands<A>& o) {
    constexpr int64_t most_components = 128, most_weights = int64_t{1} << 15;
    const int64_t fitting = at_most(most_components / at_least(o.K, 1), most_weights / at_least(o.weight_size, 1));
    return at_least(at_most(fitting, o.c.N), 1);
}

// each(capsule of the panel, item of the panel) for the pairs that are not there.
template <class A, class Each> inline void for_each_absent(const Operands<A>& o, const Panel<A>& p, Each each) {
    if (!o.c.mask) return;
    for (int r = 0; r < p.items; ++r) {
        const uint8_t* mask = o.c.mask + (p.b + r) * o.c.N + p.i;
        for (int64_t s = 0; s < p.capsules; ++s)
            if (!mask[s]) each(s, r);
    }
}

// x [capsules, K] in vectors of items, with 0 where a capsule is not there.
template <class A> inline void clear_absent(const Operands<A>& o, const Panel<A>& p, A* x) {
    for_each_absent(o, p, [&](int64_t s, int r) {
        for (int64_t k = 0; k < o.K; ++k) x[(s * o.K + k) * Panel<A>::size + r] = A(0);
    });
}

// out [J, H] (+)= u W for one capsule, in vectors of items.
template <bool add, class A> inline void multiply_capsule(const Operands<A>& o, const A* u, const A* weight, A* out) {
    constexpr int n = Lanes<A>::count;
    const Capsules& c = o.c;
    if (c.rows == 1) return multiply_items<add>(u, weight, c.K, o.X, o.X, out);
    for (int64_t p = 0; p < c.rows; ++p)
        for (int64_t j = 0; j < c.J; ++j)
            multiply_items<add>(u + p * c.K * n, weight + j * c.D, c.K, o.X, c.D, out + (j * o.H + p * c.D) * n);
}

// Where one thread puts the gradients of the panels that it has seen.
template <class A> struct PanelWriter {
    const Operands<A>& o;
    const CapsuleGradients& gradients;
    bool direct, past_caches;  // whether a gradient of W may be summed where it belongs, and how it is written there
    A* g_weight;               // [gradient_size] of a shared matrix, summed over the task; of others [capsules of it]
    A* g_rows;                 // [P·lanes, padded_X]

    // The gradient of the votes [J, H] of capsule s of the panel, in vectors of items.
    void put(const Panel<A>& p, int64_t s, const A* g) const {
        constexpr int n = Lanes<A>::count;
        const Capsules& c = o.c;
        if (gradients.u) {
            const A* weight = p.weight + s * p.weight_next;
            A* to = p.g_u + s * o.K * n;
            if (c.rows == 1)
                project_items(g, weight, c.K, 1, o.X, o.X, to);
            else
                for (int64_t q = 0; q < c.rows; ++q)
                    project_items(g + q * c.D * n, weight, c.K, c.J, c.D, o.H, to + q * c.K * n);
        }
        if (!gradients.weight) return;

        const A* u[n];
        const bool whole = direct && p.first && p.last;
        A* out = direct ? static_cast<A*>(gradients.weight) + (p.i + s) * o.c.weight_stride
                        : g_weight + (o.shared() ? 0 : s * o.gradient_size);
        for (int64_t q = 0; q < c.rows; ++q) {
            int slot[n], count = 0;
            for (int r = 0; r < p.items; ++r) {
                slot[r] = count;
                if (c.mask && !c.mask[(p.b + r) * c.N + p.i + s]) {
                    slot[r] = -1;
                    continue;
                }
                u[count++] = p.rows[r] + s * o.K + q * c.K;
            }
            const auto vector = [&](int64_t x) {
                return g + (c.rows == 1 ? x : x / c.D * o.H + q * c.D + x % c.D) * n;
            };
            to_rows<A>(o.X, vector, [&](int r, int64_t begin, int64_t, Lanes<A> v) {
                if (r < p.items && slot[r] >= 0) store(g_rows + slot[r] * o.padded_X + begin, v);
            });
            outer(u, g_rows, count, c.K, o.padded_X, out, o.shared() || !p.first || q > 0,
                  whole && past_caches && c.rows == 1);
        }
        if (p.last && !direct && !o.shared()) o.store_weight_gradient(out, p.i + s, gradients.weight);
    }

    // g_u of the panel to where it belongs.
    void finish(const Panel<A>& p) const {
        if (!gradients.u) return;
        constexpr int n = Lanes<A>::count;
        clear_absent(o, p, p.g_u);
        const auto vector = [&](int64_t x) { return p.g_u + x * n; };
        to_rows<A>(p.capsules * o.K, vector, [&](int r, int64_t begin, int64_t found, Lanes<A> v) {
            if (r >= p.items) return;
            const int64_t offset = ((p.b + r) * o.c.N + p.i) * o.K + begin;
            if (o.direct_u && found == n) return store(static_cast<A*>(gradients.u) + offset, v);
            alignas(64) A part[n];
            store(part, v);
            write(part, found, gradients.u, o.c.dtype, offset);
        });
    }
};

}  // namespace capsops::cpu::CAPSOPS_ISA
