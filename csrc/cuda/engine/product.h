// Matrix products, for votes that are in memory (staged.cuh).
#pragma once

#include "device.h"

namespace capsops::cuda {

// The offsets of an index: `stride` from one number to the next, and `outer` from one run of `inner` numbers to the
// next.
struct Axis {
    int64_t stride, inner = INT64_MAX, outer = 0;

    __device__ int64_t offset(int64_t x) const {
        return x < inner ? x * stride : x / inner * outer + x % inner * stride;
    }
};

struct Factor {
    const void* x;      // null: all ones
    Axis outer, depth;  // index m of the left factor or n of the right one; index k
    int64_t batch = 0;  // offset from z to z + 1
};

// out[z, m, n] = bias[m] + Σ_k left[z, m, k] right[z, k, n]. The left factor, the bias and the sums have the
// accumulation type, and so has at least one of the right factor and out.
struct Product {
    Factor left, right;
    void* out;
    Dtype right_type, out_type;
    Axis row, column;              // of out
    int64_t batch = 0, piece = 0;  // of out: offsets from z to z + 1, and from one piece of the sums to the next
    int64_t rows, columns, depth, batches = 1, pieces = 1;
    const void* bias = nullptr;  // [rows], or null
    bool add = false;            // whether to add to out
};

Status multiply_matrices(const Product& p, const ExecutionContext& context);

template <class A> constexpr Dtype dtype_of = sizeof(A) == 8 ? Dtype::float64 : Dtype::float32;

// Rows or columns of a result for each thread, and blocks along them.
constexpr int per_thread(int64_t count) {
    return count <= 16 ? 1 : 4;
}
constexpr int64_t blocks_along(int64_t count) {
    return ceil_div(count, 16 * per_thread(count));
}

// Pieces of a sum: enough for a few hundred blocks, but none short.
constexpr int64_t pieces_for(int64_t blocks, int64_t depth) {
    return at_least(at_most(ceil_div(512, at_least(blocks, 1)), depth / 64), 1);
}

}  // namespace capsops::cuda
