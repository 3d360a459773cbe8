// Whether the lanes of a vector hold batch items (tile.h). The loops and the choice of the instruction set share this
// rule.
#pragma once

#include "../../operators.h"

namespace capsops::cpu {
// Internal linkage: each instruction set has its own copy, so that the linker cannot mix them.
namespace {

// Whether at most a third of the lanes would be idle, because the batch is too small or because of the mask.
inline bool batch_fills_lanes(const Capsules& c, int64_t lanes) {
    const int64_t all = (c.B + lanes - 1) / lanes * lanes;
    if (3 * c.B < 2 * all || all == 0) return false;
    if (!c.mask) return true;
    int64_t present = 0;
    for (int64_t x = 0; x < c.B * c.N; ++x) present += c.mask[x] != 0;
    return 3 * present >= 2 * all * c.N;
}

// Whether at most a quarter of the lanes would be idle if they hold the components of votes that are given. One vote
// for all output capsules is always better so: it is read once for all of them.
inline bool votes_fill_lanes(const Capsules& c, int64_t lanes) {
    const int64_t H = c.rows * c.D;
    return c.one_vote || 4 * H >= 3 * ((H + lanes - 1) / lanes * lanes);
}

}  // namespace
}  // namespace capsops::cpu
