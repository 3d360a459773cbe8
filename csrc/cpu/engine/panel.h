// A panel: as many neighbouring batch items as a vector has lanes, and some neighbouring input capsules. The items lie
// in the lanes (Layout::items): a vector is one component of all of them, and a product needs one number of W in all
// lanes.
#pragma once

#include "operands.h"

namespace capsops::cpu::CAPSOPS_ISA {

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

// x [capsules, K] in vectors of items: 0 where a capsule is not there.
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
