// Kernels for the output capsules between the passes over the input capsules: a thread for each row or number.
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

// v = squash(s), rows of length dim.
template <class T> __global__ void squash_rows(const T* s, T* v, int64_t rows, int64_t dim, SquashKind kind) {
    for (int64_t r = first_index(); r < rows; r += index_stride())
        squash_vector<Accumulation<T>>(Row<const T>{s + r * dim}, Row<T>{v + r * dim}, dim, kind);
}

template <class T>
__global__ void squash_rows_backward(const T* g_v, const T* s, T* g_s, int64_t rows, int64_t dim, SquashKind kind) {
    for (int64_t r = first_index(); r < rows; r += index_stride())
        squash_vector_backward<Accumulation<T>>(Row<const T>{g_v + r * dim}, Row<const T>{s + r * dim},
                                                Row<T>{g_s + r * dim}, dim, kind);
}

template <class A> __global__ void multiply(const A* x, A by, A* to, int64_t size) {
    for (int64_t m = first_index(); m < size; m += index_stride()) to[m] = by * x[m];
}

// to[x] = Σ over `count` rows of x [count, size], in double. more: adds to the numbers in `to`.
template <class X, class A>
__global__ void add_rows(const X* x, int64_t count, int64_t stride, int64_t size, A* to, bool more) {
    for (int64_t m = first_index(); m < size; m += index_stride()) {
        double sum = more ? static_cast<double>(to[m]) : 0;
        for (int64_t row = 0; row < count; ++row) sum += static_cast<double>(x[row * stride + m]);
        to[m] = static_cast<A>(sum);
    }
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
