// A panel: as many neighbouring batch items as a vector has lanes, times some neighbouring input capsules. The items
// are in the lanes (Layout::items): a vector holds one component of all items, and a product broadcasts one number of W
// to all lanes.
#pragma once

#include "operands.h"

namespace capsops::cpu::CAPSOPS_ISA {

template <class A> struct Panel {
    static constexpr int size = Lanes<A>::count;

    int64_t i, capsules;  // input capsules i … i + capsules − 1
    int64_t b;            // the first batch item
    int items;            // number of items; the other lanes hold zeros
    bool first, last;     // whether it has the first, the last batch item of the task
    const A* weight;      // of capsule i
    int64_t weight_next;  // numbers from one capsule's matrix to the next
    const A* rows[size];  // u of each item, [capsules, K]
    A* u;                 // the same in vectors of items, with 0 for masked capsules
    A* g_u;               // as u
};

// Capsules of a panel: its u fits into the first-level cache, its matrices into the second.
template <class A> inline int64_t panel_capsules(const Operands<A>& o) {
    constexpr int64_t max_components = 128, max_weights = int64_t{1} << 15;
    const int64_t fitting = at_most(max_components / at_least(o.K, 1), max_weights / at_least(o.weight_size, 1));
    return at_least(at_most(fitting, o.c.N), 1);
}

// Sets x [capsules, K], in vectors of items, to 0 for masked capsules.
template <class A> inline void clear_absent(const Operands<A>& o, const Panel<A>& p, A* x) {
    if (!o.c.mask) return;
    for (int r = 0; r < p.items; ++r) {
        const uint8_t* mask = o.c.mask + (p.b + r) * o.c.N + p.i;
        for (int64_t s = 0; s < p.capsules; ++s)
            for (int64_t k = 0; !mask[s] && k < o.K; ++k) x[(s * o.K + k) * Panel<A>::size + r] = A(0);
    }
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

}  // namespace capsops::cpu::CAPSOPS_ISA
