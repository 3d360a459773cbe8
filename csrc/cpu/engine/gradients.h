// Writes the gradients of u and W: from tiles, from votes in registers, and from panels.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <utility>

#include "panel.h"
#include "votes.h"

namespace capsops::cpu::CAPSOPS_ISA {

// Writes the gradients of one thread's pairs, with components in the lanes.
template <class A> struct GradientWriter {
    const Operands<A>& o;
    const CapsuleGradients& gradients;
    bool direct, nontemporal;  // whether a complete gradient of a matrix is written to its destination, and how
    A* g_weight;               // [K, J, D], the sum so far; for a shared matrix over the whole task
    A* g_u;                    // [lanes, K]

    // Pairs (b_r, i_r) that have one matrix, with u_r [K] and g [rows, J, D], or [rows, D] for one vote.
    void put(const Segment<A>& s, const A* const* u, const A* g, const int64_t* b, const int64_t* i) const {
        const int count = s.end - s.begin;
        if (o.c.votes_given) {
            for (int r = 0; r < count && gradients.u; ++r)
                o.store_votes_gradient(g + r * (o.c.one_vote ? o.D : o.JD), (b[r] * o.c.N + i[r]) * o.K, gradients.u);
            return;
        }
        if (gradients.u && count) put_u(s.weight, count, g, b, i);
        put_weight(s,
                   [&](A* out, bool add, bool nontemporal) { outer(u, g, count, o.K, o.JD, out, add, nontemporal); });
    }

    // Pairs (b_r, s.i) that have one matrix, with their gradients in registers. Overwrites g.
    template <int rows, int E>
    CAPSOPS_INLINE void put(const Segment<A>& s, const A* const* u, Votes<A, rows, E>& g, const int64_t* b) const {
        put_weight(s, [&](A* out, bool add, bool nontemporal)
                          __attribute__((always_inline)) { outer(u, g, o.K, out, add, nontemporal); });
        if (!gradients.u) return;
        A* out[rows];
        const auto offset = [&](int r) { return (b[r] * o.c.N + s.i) * o.K; };
        for (int r = 0; r < rows; ++r) out[r] = o.direct_u ? static_cast<A*>(gradients.u) + offset(r) : g_u + r * o.K;
        project(g, s.weight, o.K, out);
        if (o.direct_u) return;
        for (int r = 0; r < rows; ++r) write(out[r], o.K, gradients.u, o.c.dtype, offset(r));
    }

    void put_absent(int64_t b, int64_t i) const {
        if (!gradients.u) return;
        fill(g_u, o.K, A(0));
        write(g_u, o.K, gradients.u, o.c.dtype, (b * o.c.N + i) * o.K);
    }

    // All pairs with this matrix are masked.
    void put_nothing(int64_t i) const {
        if (!gradients.weight || o.shared()) return;
        fill(g_weight, o.gradient_size, A(0));
        o.store_weight_gradient(g_weight, i, gradients.weight);
    }

  private:
    // Calls sum(out, add, nontemporal): add to the numbers in out, or store them past the caches.
    template <class Sum> CAPSOPS_INLINE void put_weight(const Segment<A>& s, Sum sum) const {
        if (!gradients.weight) return;
        const bool whole = direct && s.first && s.last;
        A* out = whole ? static_cast<A*>(gradients.weight) + s.i * o.weight_size : g_weight;
        sum(out, o.shared() || !s.first, whole && nontemporal);
        if (s.last && !whole && !o.shared()) o.store_weight_gradient(g_weight, s.i, gradients.weight);
    }

    void put_u(const A* weight, int count, const A* g, const int64_t* b, const int64_t* i) const {
        constexpr int n = Tile<A>::size;
        const auto offset = [&](int r) { return (b[r] * o.c.N + i[r]) * o.K; };
        A* rows[n];
        for (int r = 0; r < count; ++r) rows[r] = o.direct_u ? static_cast<A*>(gradients.u) + offset(r) : g_u + r * o.K;
        // Transposing W is worth it for several items only.
        const bool several = count * 4 >= n;
        if (several && o.K == n)
            project<1>(g, o.JD, count, weight, o.JD, o.JD, rows);
        else if (several && 2 * o.K == n)
            project<2>(g, o.JD, count, weight, o.JD, o.JD, rows);
        else
            dots(g, o.JD, count, weight, o.JD, o.K, o.JD, 1, 0, [&](int64_t r, int64_t k, int64_t found, const A* x) {
                for (int64_t m = 0; m < found; ++m) rows[r][k + m] = x[m];
            });
        if (o.direct_u) return;
        for (int r = 0; r < count; ++r) write(rows[r], o.K, gradients.u, o.c.dtype, offset(r));
    }
};

// Gradients of at least this many bytes are evicted from every cache before they are read again.
constexpr int64_t nontemporal_bytes = int64_t{1} << 25;

// Asks for huge pages for large fresh memory: faulting in 4 KB at a time takes longer than computing the numbers.
inline void prefer_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] int64_t bytes) {
#if defined(MADV_HUGEPAGE)
    if (bytes < nontemporal_bytes) return;
    constexpr uintptr_t page = uintptr_t{1} << 21;
    const uintptr_t address = reinterpret_cast<uintptr_t>(memory);
    const uintptr_t begin = (address + page - 1) / page * page,
                    end = (address + static_cast<uintptr_t>(bytes)) / page * page;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Writes the gradients of one thread's panels.
template <class A> struct PanelWriter {
    const Operands<A>& o;
    const CapsuleGradients& gradients;
    bool direct, nontemporal;  // whether the gradient of a matrix is summed in its destination, and how it is written
    A* g_weight;  // [gradient_size] for a shared matrix, summed over the task; else [capsules, gradient_size]
    A* g_rows;    // [lanes, padded_X]

    // The gradients of capsule s of the panel, from its tile.
    void put(const Panel<A>& p, int64_t s, const Tile<A>& t) const {
        constexpr int n = Lanes<A>::count;
        const Capsules& c = o.c;
        if (c.votes_given) return;  // t.g_votes is a part of p.g_u
        const A* g = t.g_votes;
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

        A* out = direct ? static_cast<A*>(gradients.weight) + (p.i + s) * o.gradient_stride()
                        : g_weight + (o.shared() ? 0 : s * o.gradient_size);
        for (int64_t q = 0; q < c.rows; ++q) {
            const A* u[n];
            int slot[n], count = 0;  // rows of the items that are not masked
            for (int r = 0; r < p.items; ++r) {
                slot[r] = count;
                if (t.has(r)) u[count++] = p.rows[r] + s * o.K + q * c.K;
            }
            // Row q of the votes of every output capsule.
            const A* from = g + q * c.D * n;
            int64_t left = c.D;
            const auto next = [&] {
                if (left-- == 0) from += (o.H - c.D) * n, left = c.D - 1;
                return std::exchange(from, from + n);
            };
            to_rows<A>(o.X, next, [&](int r, int64_t begin, int64_t, Lanes<A> v) {
                if (r < p.items && t.has(r)) store(g_rows + slot[r] * o.padded_X + begin, v);
            });
            const bool alone = p.first && p.last && c.rows == 1;
            outer(u, g_rows, count, c.K, o.padded_X, out, o.shared() || !p.first || q > 0,
                  direct && alone && nontemporal);
        }
        if (p.last && !direct && !o.shared()) o.store_weight_gradient(out, p.i + s, gradients.weight);
    }

    // Writes g_u of the panel to its destination.
    void finish(const Panel<A>& p) const {
        if (!gradients.u) return;
        constexpr int n = Lanes<A>::count;
        clear_absent(o, p, p.g_u);
        const A* from = p.g_u;
        const auto next = [&] { return std::exchange(from, from + n); };
        to_rows<A>(p.capsules * o.K, next, [&](int r, int64_t begin, int64_t found, Lanes<A> v) {
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
