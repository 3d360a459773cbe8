// The operands as the loops see them, independent of storage type and shape.
#pragma once

#include <cstring>
#include <new>

#include "../../dtypes.h"
#include "../../operators.h"
#include "layout.h"
#include "tile.h"
#include "watch.h"

namespace capsops::cpu::CAPSOPS_ISA {

// Uninitialised memory, aligned to a cache line. Throws std::bad_alloc if there is too little memory, or if the size is
// negative or does not fit into 64 bits; for_accumulation maps that to Status::out_of_memory. Never allocate inside an
// OpenMP region: exceptions cannot leave it.
template <class A> class Buffer {
  public:
    explicit Buffer(int64_t size) : data_(static_cast<A*>(::operator new(bytes(size), line))) {}
    ~Buffer() { ::operator delete(data_, line); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    A* get() const { return data_; }

  private:
    static constexpr std::align_val_t line{64};

    static size_t bytes(int64_t size) {
        int64_t count;
        if (size < 0 || __builtin_mul_overflow(at_least(size, 1), static_cast<int64_t>(sizeof(A)), &count))
            throw std::bad_alloc();
        return static_cast<size_t>(count);
    }

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

// Calls function.operator()<storage type>() for a dtype that accumulates in A.
template <class A, class Function> inline void for_storage(Dtype dtype, Function function) {
    if (dtype == DtypeOf<A>::value) return function.template operator()<A>();
    if constexpr (sizeof(A) == sizeof(float)) {
        if (dtype == Dtype::bfloat16) return function.template operator()<bfloat16>();
        return function.template operator()<float16>();
    }
}

// Converts n numbers from x + offset, and to it. Not inlined: the loops, for three types of storage, would stand in a
// hundred places of each routing and make up a third of its code.
template <class A> [[gnu::noinline]] void read(const void* x, Dtype dtype, int64_t offset, int64_t n, A* to) {
    for_storage<A>(dtype, [&]<class T>() { convert(static_cast<const T*>(x) + offset, n, to); });
}
template <class A> [[gnu::noinline]] void write(const A* from, int64_t n, void* x, Dtype dtype, int64_t offset) {
    for_storage<A>(dtype, [&]<class T>() { convert(from, n, static_cast<T*>(x) + offset); });
}

// Calls function.operator()<accumulation type>(), and maps lack of memory and interruption to a status.
template <class Function> inline Status for_accumulation(Dtype dtype, Function function) {
    try {
        if (dtype == Dtype::float64)
            function.template operator()<double>();
        else
            function.template operator()<float>();
        return Status::ok;
    } catch (const std::bad_alloc&) {
        return Status::out_of_memory;
    } catch (const Interrupted&) {
        return Status::interrupted;
    }
}

// ---- the operands ----------------------------------------------------------------------------------------

// The longest vote, in vectors, that fits into registers (votes.h).
constexpr int64_t max_vote_vectors = 2;

// The layout for an operator with these policies. Policies that take the votes of two output capsules in registers
// (votes.h) need components in the lanes. Votes that are given lie in memory in that way, so that nothing is
// transposed, unless they are so short that many lanes would be idle.
template <class A, class... Policies> inline Layout best_layout(const Capsules& c) {
    constexpr int64_t n = Lanes<A>::count;
    const bool in_registers = (Policies::takes_registers && ...) && !c.votes_given;
    const int64_t H = c.rows * c.D;
    if (in_registers && c.J == 2 && ceil_div(H, n) <= max_vote_vectors && 4 * H >= 3 * n) return Layout::components;
    const bool as_they_lie = c.votes_given && votes_fill_lanes(c, n);
    return batch_fills_lanes(c, n) && !as_they_lie ? Layout::items : Layout::components;
}

// The operands in the accumulation type A, with the vote of an output capsule padded to whole vectors. If the lanes
// hold components, H is rounded up to whole vectors with zeros behind, and matrices of P rows are treated as vectors of
// P·K and P·D components, for which W becomes block diagonal. Votes that are given are read as u, with K = J·H (H if
// all output capsules get the same vote), and a matrix has no numbers.
//
// A state is a tensor [B, J, H] in that layout: [state_rows, J, D].
template <class A> struct Operands {
    static constexpr int lanes = Lanes<A>::count;

    const Capsules& c;
    Layout layout;
    int64_t items;        // batch items in one row of a state
    int64_t K, J, H, JH;  // P·K components of u (more if it is the votes); H = P·D components of a vote
    int64_t D, JD;        // numbers of one vote and of one row of votes, with padding
    int64_t X, padded_X;  // J·D numbers of one row of W; rounded up to whole vectors
    int64_t state_rows;
    int64_t weight_size;           // numbers of one matrix
    int64_t gradient_size;         // numbers of its gradient, with rows of whole vectors
    bool direct_u, direct_weight;  // whether they can be read without conversion

    Operands(const Capsules& c, Layout layout)
        : c(c),
          layout(layout),
          items(layout == Layout::items ? lanes : 1),
          K(c.votes_given ? c.numbers_of_votes() : c.rows * c.K),
          J(c.J),
          H(c.rows * c.D),
          JH(J * H),
          D(layout == Layout::items ? H * lanes : ceil_div(H, lanes) * lanes),
          JD(J * D),
          X(c.J * c.D),
          padded_X(ceil_div(X, lanes) * lanes),
          state_rows(ceil_div(c.B, items)),
          weight_size(c.votes_given             ? 0
                      : layout == Layout::items ? c.K * X
                                                : K * JD),
          gradient_size(c.votes_given             ? 0
                        : layout == Layout::items ? c.K * padded_X
                                                  : K * JD),
          direct_u(c.dtype == DtypeOf<A>::value),
          direct_weight(c.votes_given ||
                        (direct_u && !c.strided && (layout == Layout::items || (c.rows == 1 && D == c.D)))) {}

    bool shared() const { return c.shared(); }
    // Numbers from the gradient of one input capsule's matrix to the next.
    int64_t gradient_stride() const { return shared() ? 0 : c.K * X; }
    // Whether the gradient of a matrix can be summed in its destination.
    bool direct_gradient() const { return direct_weight && gradient_size == c.K * X; }

    // ---- states ----
    int64_t state_size() const { return state_rows * JD; }
    // Component h of output capsule j of item b is number offset(b, j) + h · items of row(b).
    int64_t row(int64_t b) const { return b / items; }
    int64_t offset(int64_t b, int64_t j) const { return j * D + b % items; }

    void pack(const A* from /* [B, J, H] */, A* to) const {
        fill(to, state_size(), A(0));
        for (int64_t b = 0; b < c.B; ++b)
            for (int64_t j = 0; j < J; ++j, from += H) {
                A* x = to + row(b) * JD + offset(b, j);
                for (int64_t h = 0; h < H; ++h) x[h * items] = from[h];
            }
    }
    void unpack(const A* from, A* to /* [B, J, H] */) const {
        for (int64_t b = 0; b < c.B; ++b)
            for (int64_t j = 0; j < J; ++j, to += H) {
                const A* x = from + row(b) * JD + offset(b, j);
                for (int64_t h = 0; h < H; ++h) to[h] = x[h * items];
            }
    }

    // One number for each output capsule: [state_rows, J, items].
    int64_t scalars_size() const { return state_rows * J * items; }
    void pack_scalars(const A* from /* [B, J] */, A* to) const {
        fill(to, scalars_size(), A(0));
        for (int64_t b = 0; b < c.B; ++b)
            for (int64_t j = 0; j < J; ++j) to[(row(b) * J + j) * items + b % items] = from[b * J + j];
    }

    // ---- u and W ----
    // n numbers of u from an offset on, converted to scratch [n] if necessary.
    const A* load_u(int64_t offset, int64_t n, A* scratch) const {
        if (direct_u) return static_cast<const A*>(c.u) + offset;
        read(c.u, c.dtype, offset, n, scratch);
        return scratch;
    }

    const A* load_weight(int64_t i, A* scratch) const {
        if (direct_weight) return static_cast<const A*>(c.weight) + i * c.weight_stride;
        if (weight_size == c.K * X && !c.strided) {
            read(c.weight, c.dtype, i * c.weight_stride, weight_size, scratch);
            return scratch;
        }
        if (weight_size == c.K * X) {
            for (int64_t k = 0; k < c.K; ++k)
                for (int64_t j = 0; j < J; ++j) load_row(i, k, j, scratch + (k * J + j) * c.D);
            return scratch;
        }
        fill(scratch, weight_size, A(0));
        for (int64_t k = 0; k < c.K; ++k)
            for (int64_t j = 0; j < J; ++j) {
                A* to = scratch + k * JD + j * D;
                load_row(i, k, j, to);
                for (int64_t p = 1; p < c.rows; ++p)
                    for (int64_t d = 0; d < c.D; ++d) to[p * (c.K * JD + c.D) + d] = to[d];
            }
        return scratch;
    }

    // Row k of matrix i for output capsule j: [D].
    void load_row(int64_t i, int64_t k, int64_t j, A* to) const {
        if (!c.strided) return read(c.weight, c.dtype, i * c.weight_stride + (k * J + j) * c.D, c.D, to);
        const int64_t offset = i * c.weight_stride + k * c.strides[0] + j * c.strides[1], step = c.strides[2];
        if (step == 1) return read(c.weight, c.dtype, offset, c.D, to);
        for_storage<A>(c.dtype, [&]<class T>() {
            const T* from = static_cast<const T*>(c.weight) + offset;
            for (int64_t d = 0; d < c.D; ++d) to[d] = static_cast<A>(from[d * step]);
        });
    }

    // ---- votes that are given, with components in the lanes ----
    // from [J, H] as a row of votes [J, D]: zeros are behind each vote. One vote: [H] as [D].
    void pad_votes(const A* from, A* to) const {
        for (const A* const end = from + K; from < end; from += H, to += D) {
            std::memcpy(to, from, sizeof(A) * static_cast<size_t>(H));
            fill(to + H, D - H, A(0));
        }
    }

    // Writes a row of their gradients, in the same form, to number `offset` of its destination.
    void store_votes_gradient(const A* from, int64_t offset, void* gradient) const {
        if (D == H) return write(from, K, gradient, c.dtype, offset);
        for (int64_t k = 0; k < K; k += H, from += D) write(from, H, gradient, c.dtype, offset + k);
    }

    // Writes the gradient of one matrix to its destination. Overwrites `from` [gradient_size] if capsules have rows.
    void store_weight_gradient(A* from, int64_t i, void* gradient) const {
        const int64_t offset = i * gradient_stride();
        if (layout == Layout::items) {
            for (int64_t k = 0; k < c.K; ++k) write(from + k * padded_X, X, gradient, c.dtype, offset + k * X);
            return;
        }
        for (int64_t k = 0; k < c.K; ++k)
            for (int64_t j = 0; j < J; ++j) {
                A* sum = from + k * JD + j * D;
                for (int64_t p = 1; p < c.rows; ++p)
                    for (int64_t d = 0; d < c.D; ++d) sum[d] += sum[p * (c.K * JD + c.D) + d];
                write(sum, c.D, gradient, c.dtype, offset + (k * J + j) * c.D);
            }
    }
};

}  // namespace capsops::cpu::CAPSOPS_ISA
