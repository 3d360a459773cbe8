// Primary capsules: squash, and the change from the convolution's layout to [B, N, K], in one pass over memory in each
// direction. A thread for each capsule, neighbouring capsules in neighbouring threads.

#include "../engine/rows.cuh"

namespace capsops::cuda {
namespace {

// The offset of capsule n in the features.
__device__ inline int64_t offset_of(const PrimaryCapsules& p, int64_t n) {
    const int64_t row = n / p.inner;
    return row / p.outer * p.batch_stride + row % p.outer * p.outer_stride + n % p.inner * p.inner_stride;
}

template <class T> __global__ void forward(PrimaryCapsules p, const T* features, T* u) {
    for (int64_t n = first_index(); n < p.B * p.outer * p.inner; n += index_stride())
        squash_vector<Accumulation<T>>(Row<const T>{features + offset_of(p, n), p.component_stride},
                                       Row<T>{u + n * p.K}, p.K, p.kind);
}

template <class T> __global__ void backward(PrimaryCapsules p, const T* g_u, const T* features, T* g_features) {
    for (int64_t n = first_index(); n < p.B * p.outer * p.inner; n += index_stride()) {
        const int64_t offset = offset_of(p, n);
        squash_vector_backward<Accumulation<T>>(Row<const T>{g_u + n * p.K},
                                                Row<const T>{features + offset, p.component_stride},
                                                Row<T>{g_features + offset, p.component_stride}, p.K, p.kind);
    }
}

}  // namespace

Status primary_capsules(const PrimaryCapsules& p, const void* features, void* u) {
    return for_storage(p.dtype, [&]<class T>() {
        const Workspace w(p.context);
        return launch_over(p.B * p.outer * p.inner, forward<T>, p.context, p, static_cast<const T*>(features),
                           static_cast<T*>(u));
    });
}

Status primary_capsules_backward(const PrimaryCapsules& p, const void* g_u, const void* features, void* g_features) {
    return for_storage(p.dtype, [&]<class T>() {
        const Workspace w(p.context);
        return launch_over(p.B * p.outer * p.inner, backward<T>, p.context, p, static_cast<const T*>(g_u),
                           static_cast<const T*>(features), static_cast<T*>(g_features));
    });
}

}  // namespace capsops::cuda
