// Who computes with a row of numbers.
#pragma once

#include <cstdint>

#include "../host_device.h"

namespace capsops {
// Internal linkage: each instruction set has its own copy, so that the linker cannot mix them.
namespace {

// One thread of execution. On GPUs several lanes share a row (csrc/cuda/engine/rows.cuh): each has the components
// first, first + step, … and calls largest() and sum() to join its number with those of the others.
struct OneLane {
    static constexpr int64_t first = 0, step = 1;
    template <class A> CAPSOPS_HOST_DEVICE A largest(A x) const { return x; }
    template <class A> CAPSOPS_HOST_DEVICE A sum(A x) const { return x; }
};

}  // namespace
}  // namespace capsops
