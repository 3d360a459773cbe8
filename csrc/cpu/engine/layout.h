// When the lanes of a vector hold batch items (tile.h): the one rule for the loops and for the choice between
// instruction sets.
#pragma once

#include "../../operators.h"

namespace capsops::cpu {
// One copy for every instruction set that includes this.
namespace {

// Whether at most a third of the lanes would be idle, for want of batch items or by the mask.
inline bool batch_fills_lanes(const Capsules& c, int64_t lanes) {
    const int64_t all = (c.B + lanes - 1) / lanes * lanes;
    if (3 * c.B < 2 * all || all == 0) return false;
    if (!c.mask) return true;
    int64_t there = 0;
    for (int64_t x = 0; x < c.B * c.N; ++x) there += c.mask[x] != 0;
    return 3 * there >= 2 * all * c.N;
}

}  // namespace
}  // namespace capsops::cpu
