// The capsules as the loops see them, whatever their storage type and shape.
#pragma once

#include <cstring>
#include <new>

#include "../dtypes.h"
#include "../routing.h"
#include "tile.h"

namespace capsops::cpu::CAPSOPS_ISA {

constexpr int64_t at_most(int64_t a, int64_t b) {
    return a < b ? a : b;
}
constexpr int64_t at_least(int64_t a, int64_t b) {
    return a > b ? a : b;
}
constexpr int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

// Uninitialised memory on a cache line. Its lack is a std::bad_alloc, which becomes a status: so none is taken inside a
// parallel region.
template <class A> class Buffer {
  public:
    explicit Buffer(int64_t size)
        : data_(static_cast<A*>(::operator new(sizeof(A) * static_cast<size_t>(at_least(size, 1)), line))) {}
    ~Buffer() { ::operator delete(data_, line); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    A* get() const { return data_; }

  private:
    static constexpr std::align_val_t line{64};
    A* data_;
};

template <class A> inline void fill(A* x, int64_t n, A value) {
    for (int64_t m = 0; m < n; ++m) x[m] = value;
}

// ---- storage types -------------------------------------------------------------------------------------

template <class T> struct DtypeOf;
template <> struct DtypeOf<float> {
    static constexpr Dtype value = Dtype::float32;
};
template <> struct DtypeOf<double> {
    static constexpr Dtype value = Dtype::float64;
};

inline int64_t size_of(Dtype dtype) {
    return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2;
}

// Calls function.operator()<storage type>() for a dtype whose sums are kept in A.
template <class A, class Function> inline void for_storage(Dtype dtype, Function function) {
    if (dtype == DtypeOf<A>::value) return function.template operator()<A>();
    if constexpr (sizeof(A) == sizeof(float)) {
        if (dtype == Dtype::bfloat16) return function.template operator()<bfloat16>();
        return function.template operator()<float16>();
    }
}

// n numbers of storage type from x[offset], and back.
template <class A> inline void read(const void* x, Dtype dtype, int64_t offset, int64_t n, A* to) {
    for_storage<A>(dtype, [&]<class T>() { convert(static_cast<const T*>(x) + offset, n, to); });
}
template <class A> inline void write(const A* from, int64_t n, void* x, Dtype dtype, int64_t offset) {
    for_storage<A>(dtype, [&]<class T>() { convert(from, n, static_cast<T*>(x) + offset); });
}

// Calls function.operator()<accumulation type>() for a dtype, and turns a lack of memory into a status.
template <class Function> inline Status for_accumulation(Dtype dtype, Function function) {
    try {
        if (dtype == Dtype::float64)
            function.template operator()<double>();
        else
            function.template operator()<float>();
        return Status::ok;
    } catch (const std::bad_alloc&) {
        return Status::out_of_memory;
    }
}

// ---- the operands ----------------------------------------------------------------------------------------

// The capsules as the tiles see them: in the accumulation type A, D rounded up to whole vectors, and matrices of P rows
// as vectors of P·K and P·D components, for which W becomes block diagonal.
template <class A> struct Operands {
    static constexpr int lanes = Lanes<A>::count;

    const Capsules& c;
    int64_t K, J, H, D, JD;  // H = P·D components of a vote; D from here on is H rounded up
    bool direct_u, direct_weight;
    int64_t slots;  // transformation matrices in one tile

    explicit Operands(const Capsules& c)
        : c(c),
          K(c.rows * c.K),
          J(c.J),
          H(c.rows * c.D),
          D(ceil_div(H, lanes) * lanes),
          JD(J * D),
          direct_u(c.dtype == DtypeOf<A>::value),
          direct_weight(direct_u && c.rows == 1 && D == c.D),
          // As many as stay in the second-level cache.
          slots(at_least(at_most((int64_t{1} << 16) / at_least(K * JD, 1), lanes), 1)) {}

    bool shared() const { return c.weight_stride == 0; }

    // u from this offset on, [K]; scratch [K]: where it has to be converted.
    const A* load_u(int64_t offset, A* scratch) const {
        if (direct_u) return static_cast<const A*>(c.u) + offset;
        read(c.u, c.dtype, offset, K, scratch);
        return scratch;
    }

    // Adds the items (b, i), (b + 1, i) … to a tile. scratch: [lanes, K], where u has to be converted.
    void load_items(Tile<A>& t, int64_t b, int64_t i, int count, A* scratch) const {
        const int64_t stride = c.N * K, offset = b * stride + i * K;
        const int begin = t.count;
        for (int m = 0; m < count; ++m) t.b[begin + m] = b + m;
        for (int m = 0; m < count; ++m) t.i[begin + m] = i;
        for (int m = 0; m < count; ++m) t.u[begin + m] = load_u(offset + m * stride, scratch + (begin + m) * K);
        t.count = begin + count;
    }

    const A* load_weight(int64_t i, A* scratch) const {
        if (direct_weight) return static_cast<const A*>(c.weight) + i * c.weight_stride;
        if (c.rows == 1 && D == c.D) {
            read(c.weight, c.dtype, i * c.weight_stride, K * JD, scratch);
            return scratch;
        }
        fill(scratch, K * JD, A(0));
        for (int64_t k = 0; k < c.K; ++k)
            for (int64_t j = 0; j < J; ++j) {
                A* to = scratch + k * JD + j * D;
                read(c.weight, c.dtype, i * c.weight_stride + (k * J + j) * c.D, c.D, to);
                for (int64_t p = 1; p < c.rows; ++p)
                    for (int64_t d = 0; d < c.D; ++d) to[p * (c.K * JD + c.D) + d] = to[d];
            }
        return scratch;
    }

    // The gradient of one matrix [K, J, D] to where it belongs; `from` changes if capsules have rows.
    void store_weight_gradient(A* from, int64_t i, void* gradient) const {
        for (int64_t k = 0; k < c.K; ++k)
            for (int64_t j = 0; j < J; ++j) {
                A* sum = from + k * JD + j * D;
                for (int64_t p = 1; p < c.rows; ++p)
                    for (int64_t d = 0; d < c.D; ++d) sum[d] += sum[p * (c.K * JD + c.D) + d];
                write(sum, c.D, gradient, c.dtype, i * c.weight_stride + (k * J + j) * c.D);
            }
    }
};

// [rows, H] as [rows, D], with zeros behind, and back.
template <class A> inline void pad(const A* from, int64_t rows, int64_t H, int64_t D, A* to) {
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t d = 0; d < D; ++d) to[r * D + d] = d < H ? from[r * H + d] : A(0);
}
template <class A> inline void unpad(const A* from, int64_t rows, int64_t H, int64_t D, A* to) {
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t d = 0; d < H; ++d) to[r * H + d] = from[r * D + d];
}

}  // namespace capsops::cpu::CAPSOPS_ISA
