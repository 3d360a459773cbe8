// A vector register as a number: Lanes<A> holds as many A as fit into a register. The code uses the vector extensions
// of GCC and Clang, so that one source serves every instruction set. CMakeLists.txt compiles it once for each, where
// CAPSOPS_ISA is the namespace and CAPSOPS_VECTOR_BYTES the width of a register.
#pragma once

#include <cstdint>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// Always inlined, because a call would spill the vector registers that are live across it.
#define CAPSOPS_INLINE inline __attribute__((always_inline))

namespace capsops::cpu::CAPSOPS_ISA {

// The vector types. They are written out for each number, because a type that depends on a template parameter loses its
// attributes.
template <class A> struct Register;
template <> struct Register<float> {
    typedef float Vector __attribute__((vector_size(CAPSOPS_VECTOR_BYTES)));
    typedef float Unaligned __attribute__((vector_size(CAPSOPS_VECTOR_BYTES), aligned(4)));
    typedef int32_t Bits __attribute__((vector_size(CAPSOPS_VECTOR_BYTES)));
};
template <> struct Register<double> {
    typedef double Vector __attribute__((vector_size(CAPSOPS_VECTOR_BYTES)));
    typedef double Unaligned __attribute__((vector_size(CAPSOPS_VECTOR_BYTES), aligned(8)));
    typedef int64_t Bits __attribute__((vector_size(CAPSOPS_VECTOR_BYTES)));
};

template <class A> struct Lanes {
    static constexpr int count = CAPSOPS_VECTOR_BYTES / sizeof(A);
    using Vector = typename Register<A>::Vector;
    using Unaligned = typename Register<A>::Unaligned;
    using Bits = typename Register<A>::Bits;

    Vector v;

    Lanes() = default;
    CAPSOPS_INLINE Lanes(A x) : v(x - Vector{}) {}  // x + 0 would turn −0 into 0
    CAPSOPS_INLINE Lanes(Vector x) : v(x) {}

    CAPSOPS_INLINE Lanes& operator+=(Lanes x) { return v += x.v, *this; }
    CAPSOPS_INLINE Lanes& operator*=(Lanes x) { return v *= x.v, *this; }
    friend CAPSOPS_INLINE Lanes operator-(Lanes a) { return -a.v; }
    friend CAPSOPS_INLINE Lanes operator+(Lanes a, Lanes b) { return a.v + b.v; }
    friend CAPSOPS_INLINE Lanes operator-(Lanes a, Lanes b) { return a.v - b.v; }
    friend CAPSOPS_INLINE Lanes operator*(Lanes a, Lanes b) { return a.v * b.v; }
    friend CAPSOPS_INLINE Lanes operator/(Lanes a, Lanes b) { return a.v / b.v; }
    // The maximum and the minimum; b where a is NaN.
    friend CAPSOPS_INLINE Lanes max(Lanes a, Lanes b) {
#if CAPSOPS_VECTOR_BYTES == 64
        // One instruction; the comparison takes two.
        if constexpr (sizeof(A) == 4) return Vector(_mm512_max_ps(__m512(a.v), __m512(b.v)));
#endif
        return a.v > b.v ? a.v : b.v;
    }
    friend CAPSOPS_INLINE Lanes min(Lanes a, Lanes b) {
#if CAPSOPS_VECTOR_BYTES == 64
        if constexpr (sizeof(A) == 4) return Vector(_mm512_min_ps(__m512(a.v), __m512(b.v)));
#endif
        return a.v < b.v ? a.v : b.v;
    }
    friend CAPSOPS_INLINE Lanes reciprocal(Lanes x) {
#if CAPSOPS_VECTOR_BYTES == 64
        if constexpr (sizeof(A) == 4) {
            // 14 bits, and 28 after one Newton step: half the time of a division.
            const Lanes y = Vector(_mm512_rcp14_ps(__m512(x.v)));
            return y * (Lanes(A(2)) - x * y);
        }
#endif
        return Lanes(A(1)) / x;
    }
    friend CAPSOPS_INLINE Lanes exponential(Lanes x) { return exponential_of(x); }
};

// A Kahan sum: keeps what rounding takes from the sum.
template <class A> struct KahanSum {
    Lanes<A> sum = A(0), compensation = A(0);

    CAPSOPS_INLINE KahanSum& operator+=(Lanes<A> x) {
        x = x - compensation;
        const Lanes<A> next = sum + x;
        compensation = (next - sum) - x;
        sum = next;
        return *this;
    }
    // The sum over the lanes.
    A total() const {
        double all = 0;
        for (int l = 0; l < Lanes<A>::count; ++l)
            all += static_cast<double>(sum.v[l]) - static_cast<double>(compensation.v[l]);
        return static_cast<A>(all);
    }
};

template <class A> CAPSOPS_INLINE Lanes<A> load(const A* p) {
    return static_cast<typename Lanes<A>::Vector>(*reinterpret_cast<const typename Lanes<A>::Unaligned*>(p));
}

template <class A> CAPSOPS_INLINE void store(A* p, Lanes<A> x) {
    *reinterpret_cast<typename Lanes<A>::Unaligned*>(p) = x.v;
}

template <class A> CAPSOPS_INLINE void add_to(A* p, Lanes<A> x) {
    store(p, load(p) + x);
}

// Stores without bringing the line into the caches. p is aligned to the vector.
template <class A> CAPSOPS_INLINE void store_nontemporal(A* p, Lanes<A> x) {
#if CAPSOPS_VECTOR_BYTES == 64
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), reinterpret_cast<__m512i>(x.v));
#elif CAPSOPS_VECTOR_BYTES == 32
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(x.v));
#elif defined(__x86_64__)
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), reinterpret_cast<__m128i>(x.v));
#else
    store(p, x);
#endif
}

// Orders non-temporal stores before all later stores.
inline void fence_nontemporal() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

// e^x = 2^n 2^r with |r| ≤ 1/2. x is clamped so that the result and its reciprocal are normal numbers. 2^r is the
// polynomial of this degree with the least relative error that is exact at 0: 9.1e-8, or 1.6e-7 with rounding.
CAPSOPS_INLINE Lanes<float> exponential_of(Lanes<float> x) {
    using Bits = Lanes<float>::Bits;
    x = min(Lanes<float>(80.0f), max(Lanes<float>(-86.0f), x));
    // Adding 1.5 · 2²³ rounds to an integer and leaves it in the low bits.
    const Lanes<float> shifted = x * 1.44269504f + 12582912.0f;
    const Lanes<float> r = x * 1.44269504f - (shifted - 12582912.0f);
    Lanes<float> p = 1.326472731e-3f;
    for (float c : {9.671512991e-3f, 5.550733581e-2f, 0.2402224243f, 0.6931470037f, 1.0f}) p = p * r + c;
    // Adds n to the exponent.
    const Bits power = reinterpret_cast<Bits>(p.v) + (reinterpret_cast<Bits>(shifted.v) << 23);
    return reinterpret_cast<Lanes<float>::Vector>(power);
}

CAPSOPS_INLINE Lanes<double> exponential_of(Lanes<double> x) {
    using Bits = Lanes<double>::Bits;
    x = min(Lanes<double>(700.0), max(Lanes<double>(-708.0), x));
    const Lanes<double> shifted = x * 1.4426950408889634 + 6755399441055744.0;
    const Lanes<double> n = shifted - 6755399441055744.0;
    const Lanes<double> r = (x - n * 0.693145751953125) - n * 1.42860682030941723212e-6;
    Lanes<double> p = 1.0 / 6227020800.0;
    for (double inverse_factorial : {1 / 479001600.0, 1 / 39916800.0, 1 / 3628800.0, 1 / 362880.0, 1 / 40320.0,
                                     1 / 5040.0, 1 / 720.0, 1 / 120.0, 1 / 24.0, 1 / 6.0, 0.5, 1.0, 1.0})
        p = p * r + inverse_factorial;
    const Bits power = (reinterpret_cast<Bits>(shifted.v) << 52) + 0x3ff0000000000000;
    return p * Lanes<double>(reinterpret_cast<Lanes<double>::Vector>(power));
}

// Transposes a square of units of `unit` lanes: swaps unit l of x[m] with unit m of x[l]. V holds as many units as
// there are x.
template <int bit, class V, int... l> CAPSOPS_INLINE void exchange(V& a, V& b, std::integer_sequence<int, l...>) {
    constexpr int n = sizeof...(l);
    const V low = __builtin_shufflevector(a, b, ((l & bit) ? n + (l ^ bit) : l)...);
    b = __builtin_shufflevector(a, b, ((l & bit) ? n + l : (l ^ bit))...);
    a = low;
}

template <int h, int units, int unit, class V> CAPSOPS_INLINE void transpose(V* x) {
    constexpr auto lanes = std::make_integer_sequence<int, units * unit>();
    if constexpr (h > 0) {
#pragma GCC unroll 16
        for (int m = 0; m < units; ++m)
            if (!(m & h)) exchange<h * unit>(x[m], x[m + h], lanes);
        transpose<h / 2, units, unit>(x);
    }
}

// Copies unit m of the vector at p to all units.
template <int unit, class A, int... l>
CAPSOPS_INLINE Lanes<A> broadcast(const A* p, int m, std::integer_sequence<int, l...>) {
    if constexpr (unit == 1) {
        return p[m];
    } else if constexpr (unit * sizeof(A) == sizeof(double)) {
        double pair;
        __builtin_memcpy(&pair, p + m * unit, sizeof(pair));
        return reinterpret_cast<typename Lanes<A>::Vector>(pair - Register<double>::Vector{});
    } else {
#if defined(__clang__)  // has no __builtin_shuffle
        return typename Lanes<A>::Vector{p[m * unit + l % unit]...};
#else
        typename Lanes<A>::Bits indices = {(l % unit)...};
        return __builtin_shuffle(load(p).v, indices + m * unit);
#endif
    }
}
template <int unit, class A> CAPSOPS_INLINE Lanes<A> broadcast(const A* p, int m) {
    return broadcast<unit>(p, m, std::make_integer_sequence<int, Lanes<A>::count>());
}

// Lane l holds a_l + a_m where bit h of l is 0, and b_l + b_m where it is 1, with m = l and bit h flipped.
template <int h, class A, int... l>
CAPSOPS_INLINE Lanes<A> fold(Lanes<A> a, Lanes<A> b, std::integer_sequence<int, l...>) {
    constexpr int n = Lanes<A>::count;
    const typename Lanes<A>::Vector kept = __builtin_shufflevector(a.v, b.v, ((l & h) ? n + l : l)...);
    const typename Lanes<A>::Vector moved = __builtin_shufflevector(a.v, b.v, ((l & h) ? n + (l ^ h) : (l ^ h))...);
    return kept + moved;
}

template <int h, int count, class A> CAPSOPS_INLINE Lanes<A> fold_all(Lanes<A>* x) {
    constexpr auto lanes = std::make_integer_sequence<int, Lanes<A>::count>();
    constexpr bool enough = h < count;
#pragma GCC unroll 16
    for (int m = 0; m < (enough ? h : count); ++m) x[m] = fold<h>(x[m], x[enough ? m + h : m], lanes);
    if constexpr (h > 1)
        return fold_all<h / 2, count>(x);
    else
        return x[0];
}

// Lane l holds the sum over the lanes of x[l mod count], for count a power of two. Overwrites x [count].
template <int count, class A> CAPSOPS_INLINE Lanes<A> sums(Lanes<A>* x) {
    static_assert(count <= Lanes<A>::count);
    return fold_all<Lanes<A>::count / 2, count>(x);
}

// The sum over the lanes of x.
template <class A> CAPSOPS_INLINE A total(Lanes<A> x) {
    return sums<1>(&x).v[0];
}

// Lane l of the result is lane l of x with bit h of l flipped.
template <int h, class A, int... l> CAPSOPS_INLINE Lanes<A> flipped(Lanes<A> x, std::integer_sequence<int, l...>) {
    return __builtin_shufflevector(x.v, x.v, (l ^ h)...);
}
template <int h, class A> CAPSOPS_INLINE Lanes<A> flipped(Lanes<A> x) {
    return flipped<h>(x, std::make_integer_sequence<int, Lanes<A>::count>());
}

// Sums of neighbouring lanes: first those of a, then those of b.
template <class A, int... l>
CAPSOPS_INLINE Lanes<A> add_neighbours(Lanes<A> a, Lanes<A> b, std::integer_sequence<int, l...>) {
    return __builtin_shufflevector(a.v, b.v, (2 * l)...) + __builtin_shufflevector(a.v, b.v, (2 * l + 1)...);
}
template <class A> CAPSOPS_INLINE Lanes<A> add_neighbours(Lanes<A> a, Lanes<A> b) {
    return add_neighbours(a, b, std::make_integer_sequence<int, Lanes<A>::count>());
}

}  // namespace capsops::cpu::CAPSOPS_ISA
