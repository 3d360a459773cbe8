// The 16-bit storage types, and the conversion between storage and accumulation types.
#pragma once

#include <bit>
#include <cstdint>
#include <type_traits>

#include "host_device.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace capsops {
// Internal linkage: each instruction set has its own copy, so that the linker cannot mix them.
namespace {

struct bfloat16 {
    uint16_t bits;

    bfloat16() = default;
    CAPSOPS_HOST_DEVICE explicit bfloat16(float x) {
        const uint32_t word = std::bit_cast<uint32_t>(x);
        const bool nan = (word & 0x7fffffffu) > 0x7f800000u;
        // Round to nearest, ties to even; a NaN keeps its sign and stays quiet.
        bits = nan ? static_cast<uint16_t>((word >> 16) | 0x40u)
                   : static_cast<uint16_t>((word + 0x7fffu + ((word >> 16) & 1u)) >> 16);
    }
    CAPSOPS_HOST_DEVICE explicit operator float() const {
        return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
    }
};

struct float16 {
    uint16_t bits;

    float16() = default;
    CAPSOPS_HOST_DEVICE explicit float16(float x) {
        const uint32_t word = std::bit_cast<uint32_t>(x);
        const uint32_t magnitude = word & 0x7fffffffu;
        uint32_t half;
        if (magnitude > 0x7f800000u) {
            half = 0x7e00u;  // NaN
        } else if (magnitude >= 0x477ff000u) {
            half = 0x7c00u;  // rounds past the largest finite value
        } else if (magnitude >= 0x38800000u) {
            half = (magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
        } else {
            // Subnormal: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits.
            half = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
        }
        bits = static_cast<uint16_t>(((word >> 16) & 0x8000u) | half);
    }
    CAPSOPS_HOST_DEVICE explicit operator float() const {
        const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
        const uint32_t magnitude = bits & 0x7fffu;
        if (magnitude >= 0x7c00u) return std::bit_cast<float>(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
        if (magnitude >= 0x0400u) return std::bit_cast<float>(sign | ((magnitude << 13) + 0x38000000u));
        const float subnormal = static_cast<float>(magnitude) * 0x1p-24f;
        return sign ? -subnormal : subnormal;
    }
};

// Converts n numbers.
template <class From, class To> inline void convert(const From* from, int64_t n, To* to) {
    int64_t x = 0;
#if defined(__F16C__)
    if constexpr (std::is_same_v<From, float16>) {
        for (; x + 8 <= n; x += 8)
            _mm256_storeu_ps(to + x, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + x))));
    } else if constexpr (std::is_same_v<To, float16>) {
        for (; x + 8 <= n; x += 8)
            _mm_storeu_si128(reinterpret_cast<__m128i*>(to + x),
                             _mm256_cvtps_ph(_mm256_loadu_ps(from + x), _MM_FROUND_TO_NEAREST_INT));
    }
#endif
    for (; x < n; ++x) to[x] = static_cast<To>(from[x]);
}

}  // namespace
}  // namespace capsops
