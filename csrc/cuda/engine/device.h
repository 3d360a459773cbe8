// What the kernels use of CUDA, or of its emulation on the host.
#pragma once

#if defined(CAPSOPS_EMULATION)
#include "emulation.h"
#else
#include <cuda_runtime.h>
#endif

#include "../../dtypes.h"
#include "../../operators.h"
#include "../../sizes.h"
#include "limits.h"

namespace capsops::cuda {

// Threads of a block.
constexpr int warp_size = 32, most_threads = 256;
// Shared memory that every GPU gives a block without being asked.
constexpr int64_t shared_bytes = 48 << 10;

constexpr int whole_warps(int64_t threads) {
    return static_cast<int>(ceil_div(at_least(threads, 1), warp_size) * warp_size);
}

#if defined(CAPSOPS_EMULATION)
inline void prefetch(const void*) {}

inline char* shared_memory() {
    return emulation::block.memory.get();
}

template <class... P, class... Q>
Status launch(void (*kernel)(P...), dim3 blocks, int threads, int64_t shared, const ExecutionContext& context,
              const Q&... arguments) {
    if (context.needed) return Status::ok;
    emulation::launch(kernel, context.threads > 1, blocks, dim3{static_cast<unsigned>(threads)},
                      static_cast<size_t>(shared), arguments...);
    return Status::ok;
}
#else
// Asks for the cache line at an address.
__device__ inline void prefetch(const void* address) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

__device__ inline char* shared_memory() {
    extern __shared__ __align__(16) char memory[];
    return memory;
}

// What CUDA said of the last launch in this thread that failed.
inline thread_local const char* last_error = "";

template <class... P, class... Q>
Status launch(void (*kernel)(P...), dim3 blocks, int threads, int64_t shared, const ExecutionContext& context,
              const Q&... arguments) {
    if (context.needed) return Status::ok;
    // This library has a CUDA runtime of its own, which takes the device from the driver: torch may not have told it.
    cudaError_t error = cudaSetDevice(context.device);
    cudaLaunchConfig_t config{};
    config.gridDim = blocks;
    config.blockDim = dim3{static_cast<unsigned>(threads)};
    config.dynamicSmemBytes = static_cast<size_t>(shared);
    config.stream = static_cast<cudaStream_t>(context.stream);
    if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, static_cast<P>(arguments)...);
    if (error == cudaSuccess) return Status::ok;
    last_error = cudaGetErrorString(error);
    cudaGetLastError();  // so that the next launch is not taken for a failed one
    return Status::launch_failed;
}
#endif

// A kernel over `count` independent numbers or rows.
constexpr int64_t most_blocks = int64_t{1} << 16;
inline dim3 blocks_for(int64_t count) {
    return dim3{static_cast<unsigned>(at_least(at_most(ceil_div(count, most_threads), most_blocks), 1))};
}
__device__ inline int64_t first_index() {
    return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}
__device__ inline int64_t index_stride() {
    return static_cast<int64_t>(gridDim.x) * blockDim.x;
}

template <class... P, class... Q>
Status launch_over(int64_t count, void (*kernel)(P...), const ExecutionContext& context, const Q&... arguments) {
    return launch(kernel, blocks_for(count), most_threads, 0, context, arguments...);
}

// The type that sums of a storage type are kept in.
template <class T> struct AccumulationOf {
    using type = float;
};
template <> struct AccumulationOf<double> {
    using type = double;
};
template <class T> using Accumulation = typename AccumulationOf<T>::type;

// Calls function.operator()<storage type>() and returns its status.
template <class Function> inline Status for_storage(Dtype dtype, Function function) {
    switch (dtype) {
        case Dtype::float32: return function.template operator()<float>();
        case Dtype::float64: return function.template operator()<double>();
        case Dtype::bfloat16: return function.template operator()<bfloat16>();
        case Dtype::float16: return function.template operator()<float16>();
    }
    return Status::unsupported;
}

// Calls function.operator()<accumulation type>() and returns its status.
template <class Function> inline Status for_accumulation(Dtype dtype, Function function) {
    return dtype == Dtype::float64 ? function.template operator()<double>() : function.template operator()<float>();
}

// Takes memory from the workspace of an operator, or counts what it would take.
class Workspace {
  public:
    explicit Workspace(const ExecutionContext& context) : context_(context) {}
    // What a part of an operator takes, for the next part to take again: the kernels of a stream run one after another.
    explicit Workspace(Workspace* whole)
        : context_(whole->context_), whole_(whole), begin_(whole->used_), used_(begin_), most_(begin_) {}
    ~Workspace() {
        if (whole_)
            whole_->most_ = at_least(whole_->most_, most_);
        else if (context_.needed)
            *context_.needed = most_;
    }
    Workspace(const Workspace&) = delete;

    template <class A> A* take(int64_t count) {
        const int64_t at = used_;
        used_ += ceil_div(count * static_cast<int64_t>(sizeof(A)), 256) * 256;
        most_ = at_least(most_, used_);
        if (context_.needed) return nullptr;
        spoil(at);
        return reinterpret_cast<A*>(static_cast<char*>(context_.workspace) + at);
    }
    // All that this part has taken is about to be written anew.
    void start_over() const {
        if (!context_.needed) spoil(begin_);
    }

  private:
    // Under emulation, so that numbers which are read before they are written are seen: NaN.
    void spoil([[maybe_unused]] int64_t from) const {
#if defined(CAPSOPS_EMULATION)
        if (used_ > from) std::memset(static_cast<char*>(context_.workspace) + from, 0xff, used_ - from);
#endif
    }

    const ExecutionContext& context_;
    Workspace* whole_ = nullptr;
    int64_t begin_ = 0, used_ = 0, most_ = 0;
};

// The first status that is not ok ends a sequence of launches.
#define CAPSOPS_TRY(call)                        \
    do {                                         \
        const Status status = call;              \
        if (status != Status::ok) return status; \
    } while (false)

}  // namespace capsops::cuda
