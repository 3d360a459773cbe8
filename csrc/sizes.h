// Arithmetic of sizes.
#pragma once

#include <cstdint>

namespace capsops {
// One copy for every instruction set that includes this.
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
