// Whether a kernel can be called with what the bindings were given: sizes, strides, and pointers that are not null
// where there is something to read or write. The operators of Python check tensors and say what is wrong with them;
// this stops what would read or write outside of any memory. It cannot know how much memory lies behind a pointer.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "operators.h"

namespace capsops {

// More numbers than any machine has memory for. Every size that a kernel computes is a product that `fits`, times
// constants and the number of threads: within 64 bits.
constexpr int64_t most_numbers = int64_t{1} << 48;
constexpr int most_cpu_threads = 1 << 12;

// Whether all sizes, and their product even where one of them is 0, are at least 0 and fit.
inline bool fits(std::initializer_list<int64_t> sizes) {
    int64_t product = 1;
    for (const int64_t size : sizes) {
        if (size < 0) return false;
        if (__builtin_mul_overflow(product, size > 0 ? size : 1, &product) || product > most_numbers) return false;
    }
    return true;
}

// Whether a pointer to so many numbers can be followed.
inline bool points(const void* memory, std::initializer_list<int64_t> sizes) {
    for (const int64_t size : sizes)
        if (size == 0) return true;
    return memory != nullptr;
}

// Of capsules, where they may be strided: on the CPU.
inline bool can_run(const Place& place, const Capsules& c) {
    return place.device < 0 || (!c.strided && !c.own_gradients);
}

inline bool valid(const Place& place) {
    return place.threads >= 1 && place.threads <= most_cpu_threads;
}

inline bool valid(const Capsules& c) {
    if (c.K < 1 || c.J < 1 || c.D < 1 || c.rows < 1) return false;
    // u, W, a state, one matrix as a vector's of `rows` rows (operands.h), and the products of one input capsule.
    if (!fits({c.B, c.N, c.rows, c.K}) || !fits({c.N, c.K, c.J, c.D}) || !fits({c.B, c.J, c.rows, c.D}) ||
        !fits({c.K, c.rows, c.J, c.rows, c.D}) || !fits({c.J, c.J}) || !fits({c.N, c.J}) ||
        !fits({c.B, c.rows, c.K, c.J, c.D}))
        return false;
    if (c.strided) {
        if (!fits({c.N, c.weight_stride}) || !fits({c.K, c.strides[0]}) || !fits({c.J, c.strides[1]}) ||
            !fits({c.D, c.strides[2]}))
            return false;
    } else if (c.weight_stride != 0 && c.weight_stride != c.K * c.J * c.D) {
        return false;
    }
    return points(c.u, {c.B, c.N}) && points(c.weight, {c.weight_stride ? c.N : 1});
}

inline bool valid(const PrimaryCapsules& p) {
    if (p.K < 1 || !fits({p.B, p.outer, p.inner, p.K})) return false;
    const auto within = [](int64_t size, int64_t stride) { return stride >= 0 && fits({size, stride}); };
    return within(p.B, p.batch_stride) && within(p.outer, p.outer_stride) && within(p.inner, p.inner_stride) &&
           within(p.K, p.component_stride);
}

}  // namespace capsops
