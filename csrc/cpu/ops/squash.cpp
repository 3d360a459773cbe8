// squash along contiguous rows, forward and backward; the formulas are in math/squash.h. Each row is read once,
// computed in the accumulation type and written once. Only s is saved for the gradient.

#include "../engine/stream.h"

namespace capsops::cpu::CAPSOPS_ISA {
namespace {

// Rows of one parallel task: enough to hide the cost of starting it.
constexpr int64_t rows_per_task = 1024;

// Calls row(index, scratch [3, dim]) for every row.
template <class A, class Row> void for_each_row(int64_t rows, int64_t dim, const ExecutionContext& context, Row row) {
    Buffer<A> scratch(3 * dim * context.threads);
    Watch watch(context);
#pragma omp parallel num_threads(context.threads) if (rows > rows_per_task)
    {
        A* const own = scratch.get() + 3 * dim * omp_get_thread_num();
        Steps steps(watch);
#pragma omp for schedule(static, rows_per_task) nowait
        for (int64_t r = 0; r < rows; ++r)
            if (!steps.stopped()) row(r, own);
    }
    watch.finish();
}

}  // namespace

Status squash(const ExecutionContext& context, const void* s, void* v, int64_t rows, int64_t dim, SquashKind kind,
              Dtype dtype) {
    return for_accumulation(dtype, [&]<class A>() {
        for_each_row<A>(rows, dim, context, [&](int64_t r, A* x) {
            read(s, dtype, r * dim, dim, x);
            squash_vector<A>(x, x + dim, dim, kind);
            write(x + dim, dim, v, dtype, r * dim);
        });
    });
}

Status squash_backward(const ExecutionContext& context, const void* g_v, const void* s, void* g_s, int64_t rows,
                       int64_t dim, SquashKind kind, Dtype dtype) {
    return for_accumulation(dtype, [&]<class A>() {
        for_each_row<A>(rows, dim, context, [&](int64_t r, A* x) {
            A *g = x + dim, *out = x + 2 * dim;
            read(s, dtype, r * dim, dim, x);
            read(g_v, dtype, r * dim, dim, g);
            squash_vector_backward<A>(g, x, out, dim, kind);
            write(out, dim, g_s, dtype, r * dim);
        });
    });
}

}  // namespace capsops::cpu::CAPSOPS_ISA
