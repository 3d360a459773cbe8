// Where the loops that emit gradients write them.
#pragma once

#include "device.h"

namespace capsops::cuda {

// Destinations of gradients. more: adds to the numbers in u and weight.
template <class T> struct GradientsOf {
    T* u;       // [B, N, K], or null
    T* weight;  // as the matrices, or null
    // Sums of g_W over tiles: [blocks, K, J, D] of a shared matrix; [splits, N, K, J, D] if there are several splits;
    // else [blocks, teams, K, J, D], or null if a tile is the whole batch.
    Accumulation<T>* sums;
    bool more;

    __device__ void write(T& to, Accumulation<T> x) const {
        to = static_cast<T>(more ? static_cast<Accumulation<T>>(to) + x : x);
    }
};

}  // namespace capsops::cuda
