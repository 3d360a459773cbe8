// How the input capsules are divided into runs, one for each block of threads.
#pragma once

#include "../../sizes.h"
#include "limits.h"

namespace capsops::cuda {

struct Runs {
    int64_t length = 0, count = 0;  // capsules of a run; runs
};

// Depends on the shape alone, so that sums have one order.
//
// step: capsules that a block takes at once. blocks: with the same run. bytes: the partial sums of a block.
inline Runs cut_runs(int64_t N, int64_t step, int64_t blocks, int64_t bytes) {
    // Twice as many blocks as wanted, if these have enough to do.
    constexpr int64_t enough_steps = 8;
    const int64_t steps = ceil_div(N, step), wanted = ceil_div(limits.blocks, blocks);
    const int64_t many = at_least(wanted, at_most(2 * wanted, steps / enough_steps));
    const int64_t fitting = limits.sums / at_least(blocks * bytes, 1);
    const int64_t length = ceil_div(steps, at_least(at_most(at_most(many, fitting), steps), 1)) * step;
    return {length, ceil_div(N, at_least(length, 1))};
}

}  // namespace capsops::cuda
