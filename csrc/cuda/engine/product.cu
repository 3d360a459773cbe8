// Matrix products, by one of two kernels.
//
// Few rows and many columns: reading the right factor is the limit. A thread has a column, with all its rows.
//
// Else, grid: a block for 64 × 64 entries of a result, a thread for 4 × 4 of them; 16 instead of 64 if there are at
// most 16 rows or columns. A block steps along k by 16 through shared memory. If the result alone makes too few blocks,
// the sums are split into pieces, each with its own result, which the caller adds in their order.

#include "product.h"

namespace capsops::cuda {
namespace {

constexpr int depth_step = 16;

// A factor in shared memory, [depth_step, 16 · per] plus padding against bank conflicts, and the part that a thread
// loads.
template <int per, class A, class T> struct Share {
    static constexpr int width = 16 * per + 4;
    const T* x;
    Axis depth;
    bool along_depth;  // whether neighbouring threads read along k or along the other index
    int m, k;
    int64_t at[per];
    bool in[per];
    A fetched[per];

    __device__ Share(const Factor& f, int64_t z, int64_t first, int64_t count)
        : x(static_cast<const T*>(f.x)), depth(f.depth), along_depth(f.depth.stride == 1) {
        const int t = static_cast<int>(threadIdx.x);
        m = along_depth ? t / depth_step : t % (16 * per);
        k = along_depth ? t % depth_step : t / (16 * per);
#pragma unroll
        for (int e = 0; e < per; ++e) {
            const int64_t own = first + m + (along_depth ? 16 * e : 0);
            in[e] = own < count;
            at[e] = z * f.batch + f.outer.offset(own);
        }
    }
    // Loads the thread's part of a step.
    __device__ void fetch(int64_t first, int64_t end) {
#pragma unroll
        for (int e = 0; e < per; ++e) {
            const int64_t own = first + k + (along_depth ? 0 : depth_step / per * e);
            fetched[e] = A(0);
            if (in[e] && own < end) fetched[e] = x ? static_cast<A>(x[at[e] + depth.offset(own)]) : A(1);
        }
    }
    // Writes it to shared memory.
    __device__ void put(A* to) const {
#pragma unroll
        for (int e = 0; e < per; ++e) {
            const int own_m = m + (along_depth ? 16 * e : 0), own_k = k + (along_depth ? 0 : depth_step / per * e);
            to[own_k * width + own_m] = fetched[e];
        }
    }
};

template <int per_row, int per_column, class A, class R, class O>
__global__ void __launch_bounds__(max_threads, sizeof(A) == 8 ? 1 : 2) product_kernel(Product p) {
    using Left = Share<per_row, A, A>;
    using Right = Share<per_column, A, R>;
    struct alignas(per_row == 4 ? 16 : sizeof(A)) Rows {
        A x[per_row];
    };
    A* const left = reinterpret_cast<A*>(shared_memory());
    A* const right = left + depth_step * Left::width;
    const int64_t across = blocks_along(p.columns), down = blocks_along(p.rows), block = blockIdx.x / across;
    const int64_t first_column = blockIdx.x % across * 16 * per_column, first_row = block % down * 16 * per_row;
    const int64_t z = block / down % p.batches, piece = block / down / p.batches;
    const int64_t length = ceil_div(p.depth, p.pieces), end = at_most((piece + 1) * length, p.depth);
    Left own_left(p.left, z, first_row, p.rows);
    Right own_right(p.right, z, first_column, p.columns);
    const int r0 = static_cast<int>(threadIdx.x) / 16 * per_row, c0 = static_cast<int>(threadIdx.x) % 16;
    A sum[per_row][per_column] = {};
    own_left.fetch(piece * length, end), own_right.fetch(piece * length, end);
    for (int64_t first = piece * length; first < end; first += depth_step) {
        own_left.put(left), own_right.put(right);
        __syncthreads();
        // The loads of the next step take their time while this one is computed.
        own_left.fetch(first + depth_step, end), own_right.fetch(first + depth_step, end);
#pragma unroll 4
        for (int k = 0; k < depth_step; ++k) {
            const Rows rows = *reinterpret_cast<const Rows*>(left + k * Left::width + r0);
#pragma unroll
            for (int c = 0; c < per_column; ++c) {
                const A x = right[k * Right::width + c0 + 16 * c];
#pragma unroll
                for (int r = 0; r < per_row; ++r) sum[r][c] += rows.x[r] * x;
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int r = 0; r < per_row; ++r) {
#pragma unroll
        for (int c = 0; c < per_column; ++c) {
            const int64_t m = first_row + r0 + r, n = first_column + c0 + 16 * c;
            if (m >= p.rows || n >= p.columns) continue;
            O& to = static_cast<O*>(p.out)[z * p.batch + piece * p.piece + p.row.offset(m) + p.column.offset(n)];
            const A before = p.bias ? static_cast<const A*>(p.bias)[m] : p.add ? static_cast<A>(to) : A(0);
            to = static_cast<O>(before + sum[r][c]);
        }
    }
}

// A thread for each column of each product; all rows in registers. At most `rows` rows, and all axes but that of the
// columns are single runs.
template <int rows, class A, class R, class O> __global__ void few_rows_kernel(Product p) {
    const R* const right = static_cast<const R*>(p.right.x);
    const A *const left = static_cast<const A*>(p.left.x), *const bias = static_cast<const A*>(p.bias);
    for (int64_t x = first_index(); x < p.batches * p.columns; x += index_stride()) {
        const int64_t z = x / p.columns, n = x % p.columns;
        const R* from = right + z * p.right.batch + p.right.outer.offset(n);
        const A* factors = left + z * p.left.batch;
        A sum[rows] = {};
#pragma unroll 4
        for (int64_t k = 0; k < p.depth; ++k, from += p.right.depth.stride, factors += p.left.depth.stride) {
            const A number = static_cast<A>(*from);
#pragma unroll
            for (int m = 0; m < rows; ++m)
                if (m < p.rows) sum[m] += factors[m * p.left.outer.stride] * number;
        }
        O* const out = static_cast<O*>(p.out) + z * p.batch + p.column.offset(n);
#pragma unroll
        for (int m = 0; m < rows; ++m) {
            if (m >= p.rows) continue;
            O& to = out[m * p.row.stride];
            const A before = bias ? bias[m] : p.add ? static_cast<A>(to) : A(0);
            to = static_cast<O>(before + sum[m]);
        }
    }
}

// Whether few_rows_kernel takes a product. Depends on the shape alone, so that sums have one order.
bool has_few_rows(const Product& p) {
    constexpr int64_t most_rows = 16;
    const auto single = [](const Axis& axis) { return axis.inner == INT64_MAX; };
    return p.rows <= most_rows && p.batches * p.columns >= limits.columns && p.pieces == 1 && p.left.x && p.right.x &&
           single(p.left.outer) && single(p.left.depth) && single(p.right.depth) && single(p.row);
}

template <class A, class R, class O> Status launch_product(const Product& p, const ExecutionContext& context) {
    if (has_few_rows(p)) {
        const int64_t columns = p.batches * p.columns;
        if (p.rows <= 4) return launch_over(columns, few_rows_kernel<4, A, R, O>, context, p);
        return launch_over(columns, few_rows_kernel<16, A, R, O>, context, p);
    }
    const auto run = [&]<int per_row, int per_column>() {
        constexpr int64_t width = Share<per_row, A, A>::width + Share<per_column, A, R>::width;
        const int64_t blocks = blocks_along(p.columns) * blocks_along(p.rows) * p.batches * p.pieces;
        return launch(product_kernel<per_row, per_column, A, R, O>, dim3{static_cast<unsigned>(blocks)}, max_threads,
                      depth_step * width * static_cast<int64_t>(sizeof(A)), context, p);
    };
    if (per_thread(p.rows) == 1)
        return per_thread(p.columns) == 1 ? run.template operator()<1, 1>() : run.template operator()<1, 4>();
    return per_thread(p.columns) == 1 ? run.template operator()<4, 1>() : run.template operator()<4, 4>();
}

}  // namespace

Status multiply_matrices(const Product& p, const ExecutionContext& context) {
    if (p.rows * p.columns * p.batches == 0) return Status::ok;
    if (p.right_type == p.out_type)
        return p.out_type == Dtype::float64 ? launch_product<double, double, double>(p, context)
                                            : launch_product<float, float, float>(p, context);
    if (p.right_type == Dtype::bfloat16) return launch_product<float, bfloat16, float>(p, context);
    if (p.right_type == Dtype::float16) return launch_product<float, float16, float>(p, context);
    return p.out_type == Dtype::bfloat16 ? launch_product<float, float, bfloat16>(p, context)
                                         : launch_product<float, float, float16>(p, context);
}

}  // namespace capsops::cuda
