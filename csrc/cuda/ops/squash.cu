// squash along contiguous rows, forward and backward; the formulas are in math/squash.h. Some lanes for each row.

#include "../engine/rows.cuh"

namespace capsops::cuda {

Status squash(const ExecutionContext& context, const void* s, void* v, int64_t rows, int64_t dim, SquashKind kind,
              Dtype dtype) {
    return for_storage(dtype, [&]<class T>() {
        const Workspace w(context);
        if (rows * dim == 0) return Status::ok;
        return launch_over_rows(rows, dim, squash_rows<T>, context, static_cast<const T*>(s), static_cast<T*>(v), rows,
                                dim, kind);
    });
}

Status squash_backward(const ExecutionContext& context, const void* g_v, const void* s, void* g_s, int64_t rows,
                       int64_t dim, SquashKind kind, Dtype dtype) {
    return for_storage(dtype, [&]<class T>() {
        const Workspace w(context);
        if (rows * dim == 0) return Status::ok;
        return launch_over_rows(rows, dim, squash_rows_backward<T>, context, static_cast<const T*>(g_v),
                                static_cast<const T*>(s), static_cast<T*>(g_s), rows, dim, kind);
    });
}

}  // namespace capsops::cuda
