// The part of CUDA that the kernels use, on the host: for tests on machines without a GPU.
//
// Blocks run one after another. The threads of a block are fibers; each runs until a barrier, and continues when all
// threads have reached it. Even blocks run their threads in ascending order, odd blocks in descending order. A
// parameter reverses this. A race then changes the results. Shared memory is a heap allocation of exactly the requested
// size, filled with NaN: AddressSanitizer sees accesses outside of it, and a number that is read before it is written
// spoils the result.
#pragma once

#include <ucontext.h>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

namespace emulation {

enum class State { runs, waits_for_warp, waits_for_block, done };

// Where a thread of control continues. Not ucontext_t: swapcontext makes two system calls, which took half of the time.
using Point = void* [5];  // of __builtin_setjmp

// Hidden from AddressSanitizer, which would take a jump for the end of a stack.
#define CAPSOPS_SWITCHES __attribute__((noinline, no_sanitize_address)) inline

CAPSOPS_SWITCHES void jump(Point& to) {
    __builtin_longjmp(to, 1);
}

// A copy of 16 bytes to shared memory that is not finished.
struct Copy {
    char* to;
    const char* from;
    int group;
    bool present;  // otherwise zeros are copied
};

struct Fiber {
    Point point;
    bool started = false;
    std::unique_ptr<char[]> stack;
    dim3 index;
    State state;
    const void* shown;  // to the other threads of its warp
    std::vector<Copy> copies;
    int groups;  // of copies, that were committed
    void* fake_stack;
};

constexpr size_t stack_size = size_t{1} << 16;
constexpr int warp = 32;

struct Block {
    std::vector<std::unique_ptr<Fiber>> fibers;  // as many as the largest block so far has threads
    int threads = 0;
    dim3 index, blocks, size;
    std::unique_ptr<char[]> memory;
    std::function<void()> kernel;
    Fiber* current = nullptr;
    Point scheduler;
    void* scheduler_fake_stack = nullptr;
    const void* scheduler_stack = nullptr;
    size_t scheduler_stack_size = 0;
};
inline Block block;

[[noreturn]] inline void fail(const char* what) {
    std::fprintf(stderr, "CUDA emulation: block %u, thread %u: %s\n", block.index.x,
                 block.current ? block.current->index.x : 0, what);
    std::abort();
}

CAPSOPS_SWITCHES void to_scheduler() {
    Fiber* volatile self = block.current;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&self->fake_stack, block.scheduler_stack, block.scheduler_stack_size);
#endif
    if (!__builtin_setjmp(self->point)) jump(block.scheduler);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(self->fake_stack, nullptr, nullptr);
#endif
}

inline void wait(State for_others) {
    block.current->state = for_others;
    to_scheduler();
}

// Returns read(of), where of(lane) is what that thread of the warp shows; `own` is what this one shows.
template <class X, class Read> auto with_warp(const X& own, Read read) {
    block.current->shown = &own;
    wait(State::waits_for_warp);
    const unsigned first = block.current->index.x / warp * warp;
    const auto result = read(
        [&](unsigned lane) -> const X& { return *static_cast<const X*>(block.fibers[first + lane % warp]->shown); });
    wait(State::waits_for_warp);
    return result;
}

// Until the thread waits for a copy, its destination is NaN.
inline void copy_async(char* to, const void* from, bool present) {
    if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 16) fail("a copy is not aligned");
    std::memset(to, 0xff, 16);
    block.current->copies.push_back({to, static_cast<const char*>(from), block.current->groups, present});
}
inline void commit_copies() {
    ++block.current->groups;
}
inline void wait_for_copies(int groups) {
    Fiber& own = *block.current;
    std::erase_if(own.copies, [&](const Copy& copy) {
        const bool finished = copy.group < own.groups - groups;
        if (finished && copy.present)
            std::memcpy(copy.to, copy.from, 16);
        else if (finished)
            std::memset(copy.to, 0, 16);
        return finished;
    });
}

// Number x of the two in a word.
inline uint16_t half(unsigned word, unsigned x) {
    return static_cast<uint16_t>(word >> (16 * x));
}
inline float bfloat16_at(unsigned word, unsigned x) {
    const unsigned bits = word >> (16 * x) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline void load_matrices(char* row, bool transposed, int count, unsigned* to) {
    const unsigned lane = block.current->index.x % warp, g = lane / 4, t = lane % 4;
    if (reinterpret_cast<uintptr_t>(row) % 16) fail("the row of a matrix is not aligned");
    with_warp(row, [&](auto row_of) {
        for (int m = 0; m < count; ++m) {
            const auto number = [&](unsigned r, unsigned column) {
                uint16_t x;
                std::memcpy(&x, row_of(8 * m + r) + 2 * column, 2);
                return static_cast<unsigned>(x);
            };
            to[m] = transposed ? number(2 * t, g) | number(2 * t + 1, g) << 16
                               : number(g, 2 * t) | number(g, 2 * t + 1) << 16;
        }
        return 0;
    });
}

inline unsigned transpose(unsigned x) {
    const unsigned lane = block.current->index.x % warp, g = lane / 4, t = lane % 4;
    return with_warp(x, [&](auto of) {
        const auto number = [&](unsigned r) { return static_cast<unsigned>(half(of(4 * r + g / 2), g % 2)); };
        return number(2 * t) | number(2 * t + 1) << 16;
    });
}

template <int n> void multiply_fragments(const unsigned (&a)[2 * n], const unsigned (&b)[n], float (&c)[4]) {
    struct Operands {
        const unsigned *a, *b;
    };
    const unsigned lane = block.current->index.x % warp, g = lane / 4, t = lane % 4;
    with_warp(Operands{a, b}, [&](auto of) {
        for (unsigned x = 0; x < 4; ++x)
            for (unsigned k = 0; k < 8 * n; ++k) {
                const unsigned column = 2 * t + x % 2, word = k % 8 / 2;
                const float left = bfloat16_at(of(4 * g + word).a[k / 8 * 2 + x / 2], k % 2);
                c[x] += left * bfloat16_at(of(4 * column + word).b[k / 8], k % 2);
            }
        return 0;
    });
}

inline void run_fiber() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &block.scheduler_stack, &block.scheduler_stack_size);
#endif
    // Each turn of the loop is a thread of another block.
    for (;;) {
        block.kernel();
        block.current->state = State::done;
        to_scheduler();
    }
}

CAPSOPS_SWITCHES void start(Fiber& fiber) {
    fiber.started = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = fiber.stack.get();
    context.uc_stack.ss_size = stack_size;
    context.uc_link = nullptr;
    makecontext(&context, run_fiber, 0);
    setcontext(&context);
}

CAPSOPS_SWITCHES void resume(Fiber& fiber) {
    block.current = &fiber;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&block.scheduler_fake_stack, fiber.stack.get(), stack_size);
#endif
    if (!__builtin_setjmp(block.scheduler)) {
        if (block.current->started) jump(block.current->point);
        start(*block.current);
    }
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(block.scheduler_fake_stack, nullptr, nullptr);
#endif
    block.current = nullptr;
}

// Lets threads continue if all of them wait for each other; else returns false.
inline bool release(int first, int count, State waiting) {
    for (int t = first; t < first + count; ++t)
        if (block.fibers[t]->state != waiting) return false;
    for (int t = first; t < first + count; ++t) block.fibers[t]->state = State::runs;
    return true;
}

// Each warp runs as far as it can before the next one starts, which reveals what a warp does too early.
inline void run_warp(int first, bool backward) {
    do {
        for (int m = 0; m < warp; ++m) {
            Fiber& fiber = *block.fibers[first + (backward ? warp - 1 - m : m)];
            if (fiber.state == State::runs) resume(fiber);
        }
    } while (release(first, warp, State::waits_for_warp));
}

inline void run_block(bool backward) {
    for (int t = 0; t < block.threads; ++t) {
        if (static_cast<size_t>(t) == block.fibers.size()) {
            block.fibers.push_back(std::make_unique<Fiber>());
            block.fibers[t]->stack.reset(new char[stack_size]);
        }
        Fiber& fiber = *block.fibers[t];
        fiber.index.x = t;
        fiber.state = State::runs;
        fiber.copies.clear();
        fiber.groups = 0;
    }
    do {
        for (int first = 0; first < block.threads; first += warp)
            run_warp(backward ? block.threads - warp - first : first, backward);
        if (block.fibers[0]->state == State::done) break;
    } while (release(0, block.threads, State::waits_for_block));
    for (int t = 0; t < block.threads; ++t)
        if (block.fibers[t]->state != State::done) fail("not all threads reach a barrier");
}

// order: 0, or 1 to reverse the order of the threads.
template <class Kernel, class... Arguments>
void launch(Kernel kernel, int order, dim3 blocks, dim3 threads, size_t memory, const Arguments&... arguments) {
    if (threads.x % warp || threads.y * threads.z != 1) fail("a block is not whole warps");
    block.threads = threads.x;
    block.size = threads;
    block.blocks = blocks;
    block.kernel = [&] { kernel(arguments...); };
    for (block.index.z = 0; block.index.z < blocks.z; ++block.index.z)
        for (block.index.y = 0; block.index.y < blocks.y; ++block.index.y)
            for (block.index.x = 0; block.index.x < blocks.x; ++block.index.x) {
                block.memory.reset(new char[memory]);
                std::memset(block.memory.get(), 0xff, memory);
                run_block((block.index.x + block.index.y + order) % 2);
            }
}

}  // namespace emulation

#define threadIdx (emulation::block.current->index)
#define blockIdx (emulation::block.index)
#define blockDim (emulation::block.size)
#define gridDim (emulation::block.blocks)

inline void __syncthreads() {
    emulation::wait(emulation::State::waits_for_block);
}

inline void __syncwarp() {
    emulation::wait(emulation::State::waits_for_warp);
}

template <class X> X __shfl_sync(unsigned, X x, int lane) {
    return emulation::with_warp(x, [&](auto of) { return of(static_cast<unsigned>(lane)); });
}

template <class X> X __shfl_xor_sync(unsigned mask, X x, int lane_mask) {
    return __shfl_sync(mask, x, static_cast<int>(threadIdx.x % 32) ^ lane_mask);
}
