// The batch of a routing with several passes in blocks, each on one thread with all of its passes.
//
// Votes that are given are read in every pass. The votes of a block stay in the second-level cache from one pass to the
// next, so that memory is read once. Votes that are made need no blocks: their matrices are read once a pass for all
// items, and are what costs memory traffic.
#pragma once

#include "tasks.h"

namespace capsops::cpu::CAPSOPS_ISA {

// A part of the batch.
struct Block {
    Capsules c;
    int64_t number, first;  // among the blocks; its first item

    // The block's part of numbers [B, N] and [B, N, J] of the whole batch; null if x is null.
    template <class A> A* of_capsules(A* x) const { return x ? x + first * c.N : nullptr; }
    template <class A> A* of_pairs(A* x) const { return x ? x + first * c.N * c.J : nullptr; }
};

// Of a batch item, where they are given.
inline int64_t bytes_of_votes(const Capsules& c) {
    return c.N * c.numbers_of_votes() * size_of(c.dtype);
}

// Items of a block. They depend on the shape alone, so that results are the same for any number of threads.
template <class A> inline int64_t items_of_block(const Capsules& c) {
    constexpr int64_t cached = int64_t{1} << 19 /* bytes */, largest = 4 * cached, enough = 16 /* blocks */;
    if (!c.votes_given || c.B < enough || !votes_fill_lanes(c, Lanes<A>::count)) return at_least(c.B, 1);
    const int64_t bytes = bytes_of_votes(c);
    return bytes > largest ? c.B : at_least(at_most(cached / at_least(bytes, 1), c.B / enough), 1);
}

// Calls run(block) for every block. It may throw as an operator may.
template <class A, class Run> inline void for_each_block(const Capsules& c, Run run) {
    const int64_t items = items_of_block<A>(c);
    if (items >= c.B) return run(Block{c, 0, 0});
    std::atomic<Status> status{Status::ok};
#pragma omp parallel for schedule(dynamic) num_threads(c.context.threads)
    for (int64_t number = 0; number < ceil_div(c.B, items); ++number) {
        if (status.load(std::memory_order_relaxed) != Status::ok) continue;
        Block block{c, number, number * items};
        Capsules& part = block.c;
        part.B = at_most(items, c.B - block.first);
        part.u = static_cast<const char*>(c.u) + block.first * bytes_of_votes(c);
        if (c.mask) part.mask = c.mask + block.first * c.N;
        part.context.threads = 1;
        part.context.alone = true;
        if (omp_get_thread_num() != 0) part.context.stop = nullptr;  // only the calling thread may poll it
        const Status ended = for_accumulation(c.dtype, [&]<class>() { run(block); });
        if (ended != Status::ok) status.store(ended, std::memory_order_relaxed);
    }
    if (status == Status::out_of_memory) throw std::bad_alloc();
    if (status == Status::interrupted) throw Interrupted();
    throw_if_stopped(c.context);  // the calling thread may have had no block
}

// For what has the batch behind the iterations: calls each(place, part, size) for every iteration, where numbers
// part … part + size − 1 of the block's [iterations, items, row] have the place in [iterations, B, row].
template <class Each>
inline void for_each_part(const Block& block, int64_t B, int64_t iterations, int64_t row, Each each) {
    const int64_t size = block.c.B * row;
    for (int64_t t = 0; t < iterations; ++t) each((t * B + block.first) * row, t * size, static_cast<size_t>(size));
}

}  // namespace capsops::cpu::CAPSOPS_ISA
