// Products of matrices, for votes that are in memory (staged.cuh).
#pragma once

#include "device.h"

namespace capsops::cuda {

// Where the numbers of one index are: `stride` apart, and after `inner` of them the next `outer` from the first.
struct Axis {
    int64_t stride, inner = INT64_MAX, outer = 0;

    __device__ int64_t offset(int64_t x) const {
        return x < inner ? x * stride : x / inner * outer + x % inner * stride;
    }
};

struct Factor {
    const void* x;      // null: all ones
    Axis outer, depth;  // m of the left factor, n of the right one; k
    int64_t batch = 0;  // from z to z + 1
};

// out[z, m, n] = bias[m] + Σ_k left[z, m, k] right[z, k, n]. The left factor, the bias and the sums are of the
// accumulation type, and so is the right factor or out, or both.
struct Product {
    Factor left, right;
    void* out;
    Dtype right_type, out_type;
    Axis row, column;              // of out
    int64_t batch = 0, piece = 0;  // of out: from z to z + 1, and from a piece of the sums to the next
    int64_t rows, columns, depth, batches = 1, pieces = 1;
    const void* bias = nullptr;  // [rows], or null
    bool add = false;            // to what out has
};

Status multiply_matrices(const Product& p, const ExecutionContext& context);

template <class A> constexpr Dtype dtype_of = sizeof(A) == 8 ? Dtype::float64 : Dtype::float32;

// Of the rows or columns of a result, how many a thread has, and how many blocks there are along them.
constexpr int per_thread(int64_t count) {
    return count <= 16 ? 1 : 4;
}
constexpr int64_t blocks_along(int64_t count) {
    return ceil_div(count, 16 * per_thread(count));
}

// So that there are some hundred blocks, and no piece is short.
constexpr int64_t pieces_for(int64_t blocks, int64_t depth) {
    return at_least(at_most(ceil_div(512, at_least(blocks, 1)), depth / 64), 1);
}

}  // namespace capsops::cuda
