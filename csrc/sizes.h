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

}  // namespace
}  // namespace capsops
