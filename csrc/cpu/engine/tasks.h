// The parallel tasks of one pass over the input capsules, and sums over them.
#pragma once

#include <omp.h>

#include "operands.h"

namespace capsops::cpu::CAPSOPS_ISA {

// Tasks are pairs of a block of input capsules and a group of batch items. They depend on the shape alone, so that sums
// have one order for any number of threads.
struct Tasks {
    int64_t N, B;
    int64_t block_size, blocks, group_size, groups;
    mutable Watch watch;

    // partial_size: numbers that a block sums. grouped: whether the batch may be split.
    Tasks(const Capsules& c, int64_t partial_size, bool grouped) : N(c.N), B(c.B), watch(c.context) {
        constexpr int64_t max_blocks = 256, max_partial = int64_t{1} << 18, min_work = int64_t{1} << 15,
                          max_capsules = 1024;                             // in one sum of a small problem
        const int64_t work = at_least(c.B, 1) * c.rows * c.K * c.J * c.D;  // multiplications for one input capsule
        const int64_t smallest = at_most(ceil_div(min_work, at_least(work, 1)), max_capsules);
        // A group consists of whole tiles, for any instruction set.
        constexpr int64_t tile = 16, max_tasks = 64, enough = 8, cached = int64_t{1} << 18;
        int64_t fitting = at_least(max_partial / at_least(partial_size, 1), 1);
        // If there are enough groups, and the matrices fit into a cache, partial sums would only cost time.
        const int64_t matrices = c.weight_stride ? c.N * c.weight_stride : c.K * c.J * c.D;
        if (grouped && N <= max_capsules && ceil_div(B, tile) >= enough && matrices <= cached) fitting = 1;
        int64_t wanted = at_most(ceil_div(N, smallest), at_most(max_blocks, fitting));
        if (c.context.alone) {  // as few as sums of a limited length allow
            wanted = ceil_div(N, max_capsules);
            grouped = false;
        }
        wanted = at_least(wanted, 1);
        block_size = at_least(ceil_div(N, wanted), 1);
        blocks = ceil_div(N, block_size);
        const int64_t cuts = grouped ? at_most(ceil_div(B, tile), ceil_div(max_tasks, at_least(blocks, 1))) : 1;
        group_size = at_least(ceil_div(ceil_div(B, tile), at_least(cuts, 1)) * tile, 1);
        groups = ceil_div(B, group_size);
        if (!grouped) group_size = B, groups = 1;
    }
    int64_t count() const { return blocks * groups; }
    int64_t first_capsule(int64_t task) const { return task / groups * block_size; }
    int64_t end_capsule(int64_t task) const { return at_most(first_capsule(task) + block_size, N); }
    int64_t first_item(int64_t task) const { return task % groups * group_size; }
    int64_t end_item(int64_t task) const { return at_most(first_item(task) + group_size, B); }
};

// out[x] = Σ_block partial[block, x], in the order of the blocks, in double.
template <class A>
inline void add_blocks(const A* partial, int64_t blocks, int64_t size, A* out, [[maybe_unused]] int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (blocks * size >= 65536)
    for (int64_t x = 0; x < size; ++x) {
        double sum = 0;
        for (int64_t block = 0; block < blocks; ++block) sum += static_cast<double>(partial[block * size + x]);
        out[x] = static_cast<A>(sum);
    }
}

// The sums of a block, [rows, row_size()], that begin at 0 and are added as they are. Others have two functions of
// their own: begin() writes what rows first … end − 1 begin with; align() makes the sums [blocks, rows · row_size()] of
// all blocks such that they can be added.
template <class A> struct PlainSums {
    int64_t size;  // of a row

    int64_t row_size() const { return size; }
    void begin(A* sum, int64_t first, int64_t end) const { fill(sum + first * size, (end - first) * size, A(0)); }
    void align(A*, int64_t /* blocks */, int /* threads */) const {}
};

// out [rows, row_size] = Σ over the blocks of what run(tasks, task, sum, own) adds to sum. One row stands for `items`
// batch items. own [memory_size] is scratch memory of the thread.
template <class A, class Sums, class Run>
inline void sum_over_tasks(const Capsules& c, int64_t items, const Sums& sums, int64_t memory_size, A* out, Run run) {
    const int64_t size = ceil_div(c.B, items) * sums.row_size();
    const Tasks tasks(c, size, true);
    Buffer<A> partial(tasks.blocks * size);
    memory_size = ceil_div(memory_size, 64) * 64;
    Buffer<A> memory(memory_size * c.context.threads);

#pragma omp parallel for schedule(dynamic) num_threads(c.context.threads) if (tasks.count() > 1)
    for (int64_t task = 0; task < tasks.count(); ++task) {
        if (tasks.watch.stopped()) continue;
        A* sum = partial.get() + task / tasks.groups * size;
        sums.begin(sum, tasks.first_item(task) / items, ceil_div(tasks.end_item(task), items));
        run(tasks, task, sum, memory.get() + omp_get_thread_num() * memory_size);
    }
    tasks.watch.finish();
    sums.align(partial.get(), tasks.blocks, c.context.threads);
    add_blocks(partial.get(), tasks.blocks, size, out, c.context.threads);
}

}  // namespace capsops::cpu::CAPSOPS_ISA
