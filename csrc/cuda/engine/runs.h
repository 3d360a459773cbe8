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
// step: capsules that a block takes at once. blocks: with the same run. bytes: the partial sums of a block. wanted: how
// many blocks there should be; there are not many more, so that all of them run at once.
inline Runs cut_runs(int64_t N, int64_t step, int64_t blocks, int64_t bytes, int64_t wanted) {
    const int64_t steps = ceil_div(N, step), fitting = limits.sums / at_least(blocks * bytes, 1);
    const int64_t count = at_least(at_most(at_most(wanted / blocks, fitting), steps), 1);
    const int64_t length = ceil_div(steps, count) * step;
    return {length, ceil_div(N, at_least(length, 1))};
}

}  // namespace capsops::cuda
