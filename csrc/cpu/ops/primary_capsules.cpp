// Primary capsules: squash, and the change from the convolution's layout to [B, N, K], in one pass over memory in each
// direction. A chunk of neighbouring capsules is processed at a time, so that both sides are accessed in whole cache
// lines for any layout.

#include "../engine/stream.h"

namespace capsops::cpu::CAPSOPS_ISA {
namespace {

constexpr int64_t chunk = 64;  // capsules at a time

// Calls each(offset in features, offset in capsules, count, scratch [3, chunk, K]) for every chunk of neighbouring
// capsules.
template <class A, class Each> void for_each_chunk(const PrimaryCapsules& p, Each each) {
    const int64_t chunks = ceil_div(p.inner, chunk), scratch_size = 3 * chunk * p.K;
    Buffer<A> scratch(scratch_size * p.context.threads);
    const int64_t tasks = p.B * p.outer * chunks;
    Watch watch(p.context);
#pragma omp parallel for schedule(static) num_threads(p.context.threads) if (tasks * p.K >= 256)
    for (int64_t task = 0; task < tasks; ++task) {
        if (Steps(watch).stopped()) continue;
        const int64_t begin = task % chunks * chunk, row = task / chunks;
        const int64_t offset = row / p.outer * p.batch_stride + row % p.outer * p.outer_stride + begin * p.inner_stride;
        each(offset, (row * p.inner + begin) * p.K, at_most(chunk, p.inner - begin),
             scratch.get() + omp_get_thread_num() * scratch_size);
    }
    watch.finish();
}

// Calls move(index in features, index in [count, K]) for the components of `count` capsules, in the order of memory.
template <class A, class Move> void for_each_component(const PrimaryCapsules& p, int64_t count, Move move) {
    if (p.component_stride == 1) {
        for (int64_t n = 0; n < count; ++n)
            for (int64_t k = 0; k < p.K; ++k) move(n * p.inner_stride + k, n * p.K + k);
    } else {
        for (int64_t k = 0; k < p.K; ++k)
            for (int64_t n = 0; n < count; ++n) move(n * p.inner_stride + k * p.component_stride, n * p.K + k);
    }
}

}  // namespace

Status primary_capsules(const PrimaryCapsules& p, const void* features, void* u) {
    return for_accumulation(p.dtype, [&]<class A>() {
        for_storage<A>(p.dtype, [&]<class T>() {
            for_each_chunk<A>(p, [&](int64_t from, int64_t to, int64_t count, A* s) {
                const T* x = static_cast<const T*>(features) + from;
                for_each_component<A>(p, count, [&](int64_t a, int64_t b) { s[b] = static_cast<A>(x[a]); });
                A* v = s + chunk * p.K;
                for (int64_t n = 0; n < count; ++n) squash_vector<A>(s + n * p.K, v + n * p.K, p.K, p.kind);
                convert(v, count * p.K, static_cast<T*>(u) + to);
            });
        });
    });
}

Status primary_capsules_backward(const PrimaryCapsules& p, const void* g_u, const void* features, void* g_features) {
    return for_accumulation(p.dtype, [&]<class A>() {
        for_storage<A>(p.dtype, [&]<class T>() {
            for_each_chunk<A>(p, [&](int64_t from, int64_t to, int64_t count, A* s) {
                const T* x = static_cast<const T*>(features) + from;
                A *g = s + chunk * p.K, *out = g + chunk * p.K;
                for_each_component<A>(p, count, [&](int64_t a, int64_t b) { s[b] = static_cast<A>(x[a]); });
                convert(static_cast<const T*>(g_u) + to, count * p.K, g);
                for (int64_t n = 0; n < count; ++n)
                    squash_vector_backward<A>(g + n * p.K, s + n * p.K, out + n * p.K, p.K, p.kind);
                T* y = static_cast<T*>(g_features) + from;
                for_each_component<A>(p, count, [&](int64_t a, int64_t b) { y[a] = static_cast<T>(out[b]); });
            });
        });
    });
}

}  // namespace capsops::cpu::CAPSOPS_ISA
