// How much memory an operator takes on a GPU besides its operands and results: the same for any number of input
// capsules and of iterations. With a, the bytes of a number of the accumulation type, and S = a · B · J · D, those of a
// state of the output capsules, it is at most
//
//   32 MB + 16 S
//   + 2 a · B · K        where the votes of one batch item do not fit into a block of threads (staged.cuh): of one
//                        input capsule at least, all batch items are there together
//   + 3 a · J · (J + 1)  likewise, for the parameters of attention routing, when their gradients are wanted
//   + 3 a · K · J · D    likewise, for a matrix that all input capsules share, when its gradient is wanted
#pragma once

#include <cstdint>

namespace capsops::cuda {

// Bytes; each of these is exceeded only where the least that there must be is more.
struct Limits {
    int64_t sums = 24'000'000;                         // what the blocks of a pass leave to be added up
    int64_t tile = 12'000'000, pieces = 4'000'000;     // of staged.cuh: capsules with their votes; pieces of each sum
    int64_t states = 6'000'000, least_iterations = 4;  // of a gradient through all iterations: those kept together
};

#if defined(CAPSOPS_EMULATION)
// So that small shapes meet them. A test of the sizes sets those of a GPU.
inline Limits limits{8 << 10, 40 << 10, 8 << 10, 0, 2};
#else
constexpr Limits limits{};
#endif

}  // namespace capsops::cuda
