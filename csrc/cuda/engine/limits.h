// How much GPU memory an operator takes besides its operands and results. The bound does not depend on the number of
// input capsules or iterations.
//
// With a the bytes of an accumulation number, and S = a · B · J · D the bytes of a state of the output capsules, it is
// at most
//
//   32 MB + 16 S
//   + 2 a · B · K        if the votes of one batch item do not fit into a block of threads (staged.cuh): u of one input
//                        capsule for all batch items
//   + 3 a · J · (J + 1)  in the same case, for the gradients of the parameters of attention routing
//   + 3 a · K · J · D    in the same case, for the gradient of a matrix that all input capsules share
//
// EM routing takes more, because it arranges its Gaussians for the threads of a row: about 6 S for each iteration of a
// gradient, of which the saved state is 3 S, with each number of threads rounded up to a power of 2.
#pragma once

#include <cstdint>

namespace capsops::cuda {

// Bytes, if not named otherwise. A limit is exceeded only if the smallest possible amount is larger.
struct Limits {
    int64_t sums = 24'000'000;                       // partial sums of the blocks of a pass
    int64_t tile = 12'000'000, pieces = 4'000'000;   // capsules with their votes or couplings; pieces of a sum
    int64_t states = 6'000'000, min_iterations = 4;  // of a gradient through all iterations: a group of iterations
    int64_t multiprocessors = 132;                   // of an H100
    int64_t shared = 160 << 10;                      // of shared memory for a block
    int64_t columns = 1 << 13;                       // of a product with few rows: a thread for each
    int64_t wide_items = 32;                         // batch items of ops/wide_agreement.cu
};

#if defined(CAPSOPS_EMULATION)
// Small, so that small shapes reach them. The test of workspace sizes sets the limits of a GPU instead.
inline Limits limits{8 << 10, 40 << 10, 8 << 10, 0, 2, 2, 12 << 10, 40, 8};
#else
constexpr Limits limits{};
#endif

}  // namespace capsops::cuda
