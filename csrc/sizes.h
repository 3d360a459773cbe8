// Arithmetic of sizes.
#pragma once

#include <cstdint>

namespace capsops {
// Internal linkage: each instruction set has its own copy, so that the linker cannot mix them.
namespace {

constexpr int64_t at_most(int64_t a, int64_t b) {
    return a < b ? a : b;
}
constexpr int64_t at_least(int64_t a, int64_t b) {
    return a > b ? a : b;
}
constexpr int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}
// The smallest power of 2 that is at least `a`.
constexpr int64_t power_of_two(int64_t a) {
    int64_t power = 1;
    while (power < a) power *= 2;
    return power;
}

}  // namespace
}  // namespace capsops
