// What the kernels use of CUDA or of its emulation on the host: launches, dispatch by dtype, the workspace.
#pragma once

#if defined(CAPSOPS_EMULATION)
#include "emulation.h"
#else
#include <cuda_runtime.h>
#endif

#include <string>

#include "../../dtypes.h"
#include "../../operators.h"
#include "../../sizes.h"
#include "limits.h"

namespace capsops::cuda {

// Threads of a warp, and at most of a block.
constexpr int warp_size = 32, max_threads = 256;
// Shared memory that a block gets on every GPU without opting in.
constexpr int64_t shared_bytes = 48 << 10;

constexpr int whole_warps(int64_t threads) {
    return static_cast<int>(ceil_div(at_least(threads, 1), warp_size) * warp_size);
}

// The bytes of a kernel's arguments of types P, each at a multiple of its alignment, as the kernel reads them.
template <class... P, class... Q> std::string argument_bytes(const Q&... arguments) {
    std::string bytes;
    const auto append = [&]<class X>(const X& x) {
        constexpr size_t alignment = alignof(X);
        bytes.resize((bytes.size() + alignment - 1) / alignment * alignment);
        bytes.append(reinterpret_cast<const char*>(&x), sizeof(X));
    };
    (append(static_cast<P>(arguments)), ...);
    return bytes;
}

// Whether a launch really takes place. A query for the launches records it instead, one for the workspace skips it.
template <class... P, class... Q>
bool runs(void (*kernel)(P...), dim3 blocks, int threads, int64_t shared, const ExecutionContext& context,
          const Q&... arguments) {
    if (context.launches)
        context.launches->push_back({.kernel = reinterpret_cast<const void*>(kernel),
                                     .grid = {blocks.x, blocks.y, blocks.z},
                                     .threads = static_cast<unsigned>(threads),
                                     .shared_bytes = shared,
                                     .arguments = argument_bytes<P...>(arguments...)});
    return !context.launches && !context.needed;
}

// Shared memory that a block may opt in to, at most `limits.shared`. The order of sums must not depend on it.
inline int64_t most_shared_bytes(const ExecutionContext& context) {
    int bytes = static_cast<int>(limits.shared);
#if !defined(CAPSOPS_EMULATION)
    // Without a GPU, as on those of compute capability 8.0 and 9.0.
    if (!context.launches && !context.needed)
        cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, context.device);
#endif
    return at_most(bytes, limits.shared);
}

#if defined(CAPSOPS_EMULATION)
inline void prefetch(const void*) {}

inline char* shared_memory() {
    return emulation::block.memory.get();
}

using SharedAddress = char*;
inline SharedAddress shared_address(void* x) {
    return static_cast<char*>(x);
}
inline void copy_async(SharedAddress to, const void* from, bool present = true) {
    emulation::copy_async(to, from, present);
}
inline void commit_copies() {
    emulation::commit_copies();
}
template <int groups> inline void wait_for_copies() {
    emulation::wait_for_copies(groups);
}
template <bool transposed, int count> inline void load_matrices(SharedAddress row, unsigned (&to)[count]) {
    emulation::load_matrices(row, transposed, count, to);
}
inline unsigned transpose(unsigned x) {
    return emulation::transpose(x);
}
inline unsigned pack(float first, float second) {
    return bfloat16(first).bits | static_cast<unsigned>(bfloat16(second).bits) << 16;
}
template <int n> inline void multiply_fragments(const unsigned (&a)[2 * n], const unsigned (&b)[n], float (&c)[4]) {
    emulation::multiply_fragments(a, b, c);
}

template <class... P, class... Q>
Status launch(void (*kernel)(P...), dim3 blocks, int threads, int64_t shared, const ExecutionContext& context,
              const Q&... arguments) {
    if (!runs(kernel, blocks, threads, shared, context, arguments...)) return Status::ok;
    emulation::launch(kernel, context.threads > 1, blocks, dim3{static_cast<unsigned>(threads)},
                      static_cast<size_t>(shared), arguments...);
    return Status::ok;
}
#else
// Prefetches the cache line at an address.
__device__ inline void prefetch(const void* address) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

__device__ inline char* shared_memory() {
    extern __shared__ __align__(16) char memory[];
    return memory;
}

// An address in shared memory, in bytes.
using SharedAddress = unsigned;
__device__ inline SharedAddress shared_address(const void* x) {
    return static_cast<unsigned>(__cvta_generic_to_shared(x));
}

// Copies 16 bytes to shared memory while the thread goes on. The thread has them after wait_for_copies(), the others
// after a barrier behind that. present: otherwise the copy is of zeros, and nothing is read. Needs compute
// capability 8.0.
__device__ inline void copy_async(SharedAddress to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ inline void copy_async(SharedAddress to, const void* from, bool present) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(present ? 16 : 0)
                 : "memory");
}
// Ends a group of copies.
__device__ inline void commit_copies() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits for all groups but the last `groups`.
template <int groups> __device__ inline void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(groups) : "memory");
}

// Matrices of 8 × 8 numbers of type bfloat16, for the tensor cores. A lane has numbers 2 t and 2 t + 1 of row g in a
// word, where g = lane / 4 and t = lane % 4; the first number is in the low half. Needs compute capability 8.0.

// Loads 1, 2 or 4 matrices from shared memory, or their transposes. A row has 16 bytes; row r of matrix m is at the
// address that lane 8 m + r gives.
template <bool transposed, int count> __device__ inline void load_matrices(SharedAddress row, unsigned (&to)[count]) {
    static_assert(count == 1 || count == 2 || count == 4);
    if constexpr (count == 1 && transposed)
        asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(to[0]) : "r"(row) : "memory");
    if constexpr (count == 1 && !transposed)
        asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(to[0]) : "r"(row) : "memory");
    if constexpr (count == 2 && transposed)
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                     : "=r"(to[0]), "=r"(to[1])
                     : "r"(row)
                     : "memory");
    if constexpr (count == 2 && !transposed)
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                     : "=r"(to[0]), "=r"(to[1])
                     : "r"(row)
                     : "memory");
    if constexpr (count == 4 && transposed)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                     : "r"(row)
                     : "memory");
    if constexpr (count == 4 && !transposed)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                     : "r"(row)
                     : "memory");
}
__device__ inline unsigned transpose(unsigned x) {
    unsigned to;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(to) : "r"(x));
    return to;
}
// Two numbers in a word, rounded to bfloat16.
__device__ inline unsigned pack(float first, float second) {
    unsigned word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
    return word;
}
// c += a b, with a [16, 8 n], b [8 n, 8] and c [16, 8] in float. a: for each 8 columns, the matrix of the first 8 rows
// and that of the last 8; b: the transpose of each 8 rows. c: numbers 2 t and 2 t + 1 of rows g and g + 8.
template <int n>
__device__ inline void multiply_fragments(const unsigned (&a)[2 * n], const unsigned (&b)[n], float (&c)[4]) {
    static_assert(n == 1 || n == 2);
    if constexpr (n == 1)
        asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(b[0]));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// What CUDA reported for the last failed launch of this thread.
inline thread_local const char* last_error = "";

template <class... P, class... Q>
Status launch(void (*kernel)(P...), dim3 blocks, int threads, int64_t shared, const ExecutionContext& context,
              const Q&... arguments) {
    if (!runs(kernel, blocks, threads, shared, context, arguments...)) return Status::ok;
    // This library links its own CUDA runtime, which does not know the device that torch selected.
    cudaError_t error = cudaSetDevice(context.device);
    if (error == cudaSuccess && shared > shared_bytes)
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    cudaLaunchConfig_t config{};
    config.gridDim = blocks;
    config.blockDim = dim3{static_cast<unsigned>(threads)};
    config.dynamicSmemBytes = static_cast<size_t>(shared);
    config.stream = static_cast<cudaStream_t>(context.stream);
    if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, static_cast<P>(arguments)...);
    if (error == cudaSuccess) return Status::ok;
    last_error = cudaGetErrorString(error);
    cudaGetLastError();  // so that the next launch does not report this error
    return Status::launch_failed;
}
#endif

// Grids for kernels over `count` independent numbers or rows.
constexpr int64_t max_blocks = int64_t{1} << 16;
inline dim3 blocks_for(int64_t count) {
    return dim3{static_cast<unsigned>(at_least(at_most(ceil_div(count, max_threads), max_blocks), 1))};
}
__device__ inline int64_t first_index() {
    return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}
__device__ inline int64_t index_stride() {
    return static_cast<int64_t>(gridDim.x) * blockDim.x;
}

template <class... P, class... Q>
Status launch_over(int64_t count, void (*kernel)(P...), const ExecutionContext& context, const Q&... arguments) {
    return launch(kernel, blocks_for(count), max_threads, 0, context, arguments...);
}

// The accumulation type of a storage type.
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

// Takes memory from the workspace of an operator, or in a size query counts how much it would take.
class Workspace {
  public:
    explicit Workspace(const ExecutionContext& context) : context_(context) {}
    // The memory of one part of an operator. The next part takes the same memory again, because the kernels of a stream
    // run one after another.
    explicit Workspace(Workspace* whole)
        : context_(whole->context_), whole_(whole), begin_(whole->used_), used_(begin_), peak_(begin_) {}
    ~Workspace() {
        if (whole_)
            whole_->peak_ = at_least(whole_->peak_, peak_);
        else if (context_.needed)
            *context_.needed = peak_;
    }
    Workspace(const Workspace&) = delete;

    template <class A> A* take(int64_t count) {
        const int64_t at = used_;
        used_ += ceil_div(count * static_cast<int64_t>(sizeof(A)), 256) * 256;
        peak_ = at_least(peak_, used_);
        if (context_.needed) return nullptr;
        spoil(at);
        return reinterpret_cast<A*>(static_cast<char*>(context_.workspace) + at);
    }
    // To call before all memory of this part is written anew.
    void start_over() const {
        if (!context_.needed) spoil(begin_);
    }

  private:
    // Under emulation: fills memory with NaN, so that a test sees numbers that are read before they are written.
    void spoil([[maybe_unused]] int64_t from) const {
#if defined(CAPSOPS_EMULATION)
        if (used_ > from) std::memset(static_cast<char*>(context_.workspace) + from, 0xff, used_ - from);
#endif
    }

    const ExecutionContext& context_;
    Workspace* whole_ = nullptr;
    int64_t begin_ = 0, used_ = 0, peak_ = 0;
};

// Returns the first status that is not ok.
#define CAPSOPS_TRY(call)                        \
    do {                                         \
        const Status status = call;              \
        if (status != Status::ok) return status; \
    } while (false)

}  // namespace capsops::cuda
