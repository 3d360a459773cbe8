// Kernels for the output capsules between the passes over the input capsules: some lanes for each row, a thread for
// each number.
#pragma once

#include "../../math/squash.h"
#include "device.h"

namespace capsops::cuda {

// A row of numbers of storage type T that is read and written in the accumulation type.
template <class T> struct Row {
    T* x;
    int64_t stride = 1;

    struct Number {
        T* x;
        __device__ void operator=(Accumulation<std::remove_const_t<T>> value) const { *x = static_cast<T>(value); }
        __device__ operator Accumulation<std::remove_const_t<T>>() const {
            return static_cast<Accumulation<std::remove_const_t<T>>>(*x);
        }
    };
    __device__ Number operator[](int64_t d) const { return {x + d * stride}; }
};

// The lanes of a warp that share a row: a power of 2.
struct RowLanes {
    int64_t first, step;

    template <class A> __device__ A largest(A x) const {
        for (int bit = 1; bit < step; bit *= 2) x = larger(x, __shfl_xor_sync(~0u, x, bit));
        return x;
    }
    template <class A> __device__ A sum(A x) const {
        for (int bit = 1; bit < step; bit *= 2) x += __shfl_xor_sync(~0u, x, bit);
        return x;
    }
};

// Calls body(row, lanes) for each row. All lanes of a warp call it together; those without a row have no components.
template <class Body> __device__ inline void for_rows(int64_t rows, int lanes, Body body) {
    constexpr int64_t no_component = int64_t{1} << 62;
    const int64_t of_warp = warp_size / lanes, stride = index_stride() / warp_size * of_warp;
    for (int64_t begin = first_index() / warp_size * of_warp; begin < rows; begin += stride) {
        const int64_t row = begin + threadIdx.x % warp_size / static_cast<unsigned>(lanes);
        body(row, RowLanes{row < rows ? threadIdx.x % static_cast<unsigned>(lanes) : no_component, lanes});
    }
}

// Launches a kernel that calls for_rows: the number of lanes is its last argument.
template <class... P, class... Q>
Status launch_over_rows(int64_t rows, int64_t dim, void (*kernel)(P...), const ExecutionContext& context,
                        const Q&... arguments) {
    const int lanes = static_cast<int>(at_most(power_of_two(dim), warp_size));
    return launch_over(rows * lanes, kernel, context, arguments..., lanes);
}

// v = squash(s), rows of length dim.
template <class T>
__global__ void squash_rows(const T* s, T* v, int64_t rows, int64_t dim, SquashKind kind, int lanes) {
    for_rows(rows, lanes, [&](int64_t r, const RowLanes& own) {
        squash_vector<Accumulation<T>>(Row<const T>{s + r * dim}, Row<T>{v + r * dim}, dim, kind, own);
    });
}

template <class T>
__global__ void squash_rows_backward(const T* g_v, const T* s, T* g_s, int64_t rows, int64_t dim, SquashKind kind,
                                     int lanes) {
    for_rows(rows, lanes, [&](int64_t r, const RowLanes& own) {
        squash_vector_backward<Accumulation<T>>(Row<const T>{g_v + r * dim}, Row<const T>{s + r * dim},
                                                Row<T>{g_s + r * dim}, dim, kind, own);
    });
}

template <class A> __global__ void multiply(const A* x, A by, A* to, int64_t size) {
    for (int64_t m = first_index(); m < size; m += index_stride()) to[m] = by * x[m];
}

// to[m] = Σ over `count` rows of x [count, stride], in double, for m < size. more: adds to the numbers in `to`. `lanes`
// threads of a block, a power of 2, share a column: each adds up every lanes-th row.
template <class X, class T>
__global__ void add_rows_kernel(const X* x, int64_t count, int64_t stride, int64_t size, T* to, bool more, int lanes) {
    double* const sums = reinterpret_cast<double*>(shared_memory());
    const int columns = static_cast<int>(blockDim.x) / lanes, t = static_cast<int>(threadIdx.x);
    const int lane = t / columns;
    for (int64_t first = static_cast<int64_t>(blockIdx.x) * columns; first < size;
         first += static_cast<int64_t>(gridDim.x) * columns) {
        const int64_t m = first + t % columns;
        double sum = 0;
        if (m < size) {
#pragma unroll 4
            for (int64_t row = lane; row < count; row += lanes) sum += static_cast<double>(x[row * stride + m]);
        }
        for (int others = lanes / 2; others > 0; others /= 2) {
            sums[t] = sum;
            __syncthreads();
            if (lane < others) sum += sums[t + others * columns];
            __syncthreads();
        }
        if (lane > 0 || m >= size) continue;
        if (more) sum += static_cast<double>(static_cast<Accumulation<T>>(to[m]));
        to[m] = static_cast<T>(static_cast<Accumulation<T>>(sum));
    }
}

template <class X, class T>
Status add_rows(const X* x, int64_t count, int64_t stride, int64_t size, T* to, bool more,
                const ExecutionContext& context) {
    // More lanes for a column as long as each has some rows and the GPU has threads to spare. Neighbouring threads read
    // at least four columns, if there are so many.
    constexpr int64_t some_rows = 4, threads = 132 * 2048;
    const int most_lanes = size < 64 ? max_threads : max_threads / 4;
    if (size == 0) return Status::ok;
    int lanes = 1;
    while (lanes < most_lanes && lanes * some_rows < count && lanes * size < threads) lanes *= 2;
    const int64_t blocks = at_most(ceil_div(size, max_threads / lanes), max_blocks);
    return launch(add_rows_kernel<X, T>, dim3{static_cast<unsigned>(blocks)}, max_threads,
                  max_threads * static_cast<int64_t>(sizeof(double)), context, x, count, stride, size, to, more, lanes);
}

// to[x] += Σ over `count` rows of x [count, size], in double.
template <class A> __global__ void add_to_total(const A* x, int64_t count, int64_t size, double* to) {
    for (int64_t m = first_index(); m < size; m += index_stride()) {
        double sum = to[m];
        for (int64_t row = 0; row < count; ++row) sum += static_cast<double>(x[row * size + m]);
        to[m] = sum;
    }
}

// more: adds to the numbers in `to`.
template <class From, class To> __global__ void copy_numbers(const From* from, To* to, int64_t size, bool more) {
    for (int64_t m = first_index(); m < size; m += index_stride()) {
        const From before = more ? static_cast<From>(static_cast<Accumulation<To>>(to[m])) : From(0);
        to[m] = static_cast<To>(before + from[m]);
    }
}

template <class T> __global__ void write_zeros(T* to, int64_t size) {
    for (int64_t m = first_index(); m < size; m += index_stride()) to[m] = static_cast<T>(Accumulation<T>(0));
}

}  // namespace capsops::cuda
