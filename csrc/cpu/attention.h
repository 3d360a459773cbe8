// The couplings of attention routing (CardioCaps, eq. 4) on one tile: z_kd = Σ_j A_kj û_jd + a_k, and a softmax over k
// for every component d by itself, so the lanes stay components.
#pragma once

#include "stream.h"

namespace capsops::cpu::CAPSOPS_ISA {

// to_k += Σ_j mix_kj x_j for output capsules x, to [J, D] and mix [J, J].
template <class A> inline void add_mixed(const A* mix, int64_t J, int64_t D, const A* x, A* to) {
    constexpr int most = 16;
    const A* rows[most];
    A* out[most];
    for (int64_t k = 0; k < J; k += most) {
        const int count = static_cast<int>(at_most(most, J - k));
        for (int m = 0; m < count; ++m) rows[m] = mix + (k + m) * J, out[m] = to + (k + m) * D;
        multiply<true>(rows, count, x, J, D, D, out);
    }
}

template <class A> struct Attention {
    const A* weight;  // [J, J]
    const A* bias;    // [J], or null
    int64_t J;

    // Calls use(r, d, c [J]) with the couplings of every item and vector of components. count: J where it is known to
    // the compiler, so that nothing leaves the registers; else 0, and memory [J, lanes + D].
    template <int count, class Use> void for_each(const Tile<A>& t, A* memory, Use use) const {
        constexpr int n = Lanes<A>::count;
        if constexpr (count > 0) {
            Lanes<A> w[count][count], a[count];
#pragma GCC unroll 4
            for (int k = 0; k < count; ++k) {
                a[k] = bias ? bias[k] : A(0);
#pragma GCC unroll 4
                for (int j = 0; j < count; ++j) w[k][j] = weight[k * count + j];
            }
            for (int r = 0; r < t.count; ++r)
                for (int64_t d = 0; d < t.D; d += n) {
                    Lanes<A> c[count];
#pragma GCC unroll 4
                    for (int k = 0; k < count; ++k) {
                        c[k] = a[k];
#pragma GCC unroll 4
                        for (int j = 0; j < count; ++j) c[k] += w[k][j] * load(t.votes + r * t.JD + j * t.D + d);
                    }
                    softmax(c, count, false);
                    use(r, d, c);
                }
        } else {
            Lanes<A>* c = reinterpret_cast<Lanes<A>*>(memory);
            A* z = memory + J * n;
            for (int r = 0; r < t.count; ++r) {
                for (int64_t k = 0; k < J; ++k) fill(z + k * t.D, t.D, bias ? bias[k] : A(0));
                add_mixed(weight, J, t.D, t.votes + r * t.JD, z);
                for (int64_t d = 0; d < t.D; d += n) {
                    for (int64_t k = 0; k < J; ++k) c[k] = load(z + k * t.D + d);
                    softmax(c, J, false);
                    use(r, d, c);
                }
            }
        }
    }

    int64_t scratch_size(int64_t D) const { return J * (Lanes<A>::count + D); }
};

// Calls function.operator()<J>() with J = 2 for the compiler to see, else with 0.
template <class Function> inline void for_output_capsules(int64_t J, Function function) {
    if (J == 2)
        function.template operator()<2>();
    else
        function.template operator()<0>();
}

}  // namespace capsops::cpu::CAPSOPS_ISA
