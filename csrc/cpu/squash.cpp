// squash along contiguous rows, forward and backward; the formulas are in coupling.h. Each row is read once,
// computed in the accumulation type and written once; nothing is saved but s.

#include "stream.h"

namespace capsops::cpu {
namespace {

// Rows of one parallel task; enough to hide the cost of handing it out.
constexpr int64_t rows_per_task = 1024;

// row(index, scratch [3, dim]) for every row.
template <class A, class Row> void for_each_row(int64_t rows, int64_t dim, int threads, Row row) {
    Buffer<A> scratch(3 * dim * threads);
#pragma omp parallel for schedule(static, rows_per_task) num_threads(threads) if (rows > rows_per_task)
    for (int64_t r = 0; r < rows; ++r) row(r, scratch.get() + 3 * dim * omp_get_thread_num());
}

template <class T, class A> void load(const void* from, int64_t row, int64_t dim, A* to) {
    const T* x = static_cast<const T*>(from) + row * dim;
    for (int64_t d = 0; d < dim; ++d) to[d] = static_cast<A>(x[d]);
}

template <class T, class A> void store(const A* from, void* to, int64_t row, int64_t dim) {
    T* x = static_cast<T*>(to) + row * dim;
    for (int64_t d = 0; d < dim; ++d) x[d] = T(from[d]);
}

template <class A> SquashFactors<A> factors(A n, SquashKind kind) {
    return kind == SquashKind::sabour ? squash_sabour(n) : squash_efficient(n);
}

}  // namespace

Status squash(const void* s, void* v, int64_t rows, int64_t dim, SquashKind kind, Dtype dtype, int threads) {
    return for_dtype(dtype, [&]<class T>() {
        using A = accumulation_t<T>;
        for_each_row<A>(rows, dim, threads, [&](int64_t r, A* x) {
            load<T>(s, r, dim, x);
            squash_vector(x, x + dim, dim, [&](A n) { return factors(n, kind); });
            store<T>(x + dim, v, r, dim);
        });
    });
}

Status squash_backward(const void* g_v, const void* s, void* g_s, int64_t rows, int64_t dim, SquashKind kind,
                       Dtype dtype, int threads) {
    return for_dtype(dtype, [&]<class T>() {
        using A = accumulation_t<T>;
        for_each_row<A>(rows, dim, threads, [&](int64_t r, A* x) {
            A *g = x + dim, *out = x + 2 * dim;
            load<T>(s, r, dim, x);
            load<T>(g_v, r, dim, g);
            squash_vector_backward(g, x, out, dim, [&](A n) { return factors(n, kind); });
            store<T>(out, g_s, r, dim);
        });
    });
}

}  // namespace capsops::cpu
