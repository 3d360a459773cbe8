// The streaming loops that every routing on the CPU runs through.
//
//   contract   out[b] = Σ_i û_bi                         one pass over u and W; nothing else is needed of the votes
//   reduce     out[b] = Σ_i policy(û_bi)                 one pass over u and W, nothing written but out
//   emit       g_u,bi = g_û,bi W_iᵀ;  g_W,i = Σ_b u_biᵀ g_û,bi     one pass that recomputes û and writes both
//
// A policy sees one tile (tile.h) at a time:
//
//   reducing   accumulate(tile, sum, scratch)     adds to sum [B, row_size()]
//   emitting   emit(tile, params, scratch)        writes tile.g_votes and adds to params [param_count()]
//
// and if it takes votes in registers (takes_registers), those of some batch items for two output capsules:
//
//   reducing   accumulate(votes, b, sum)
//   emitting   emit(votes, b, totals)             replaces the votes; totals() at the start of a block, and at its end
//                                                 add(totals, params)
//
// Two regimes share the loops. Many input capsules and a small batch: the blocks of capsules are the parallel tasks, a
// tile takes several capsules, and memory is the bound. Few capsules and a large batch: groups of batch items are tasks
// too, a tile is a part of one capsule's batch, and arithmetic is the bound.
//
// Blocks and groups depend on the shape alone. Every block has partial sums of its own, which are added in the order of
// the blocks, in double: so the result is bitwise the same for any number of threads, and no sum runs over more than
// one block's capsules in the accumulation type.
#pragma once

#include <omp.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "panel.h"
#include "votes.h"

namespace capsops::cpu::CAPSOPS_ISA {

// ---- parallel tasks ----------------------------------------------------------------------------------------

// Blocks of input capsules, and groups of batch items. From the shape alone.
struct Tasks {
    int64_t N, B;
    int64_t block_size, blocks, group_size, groups;

    // partial_size: numbers that a block keeps. grouped: whether the batch may be cut.
    Tasks(const Capsules& c, int64_t partial_size, bool grouped) : N(c.N), B(c.B) {
        constexpr int64_t most_blocks = 256, most_partial = int64_t{1} << 18, least_work = int64_t{1} << 15,
                          most_capsules = 1024;  // that a sum may run over where more blocks cost little
        const int64_t work = at_least(c.B, 1) * c.rows * c.K * c.J * c.D;  // of one input capsule
        const int64_t smallest = at_most(ceil_div(least_work, at_least(work, 1)), most_capsules);
        // A group is whole tiles of any instruction set.
        constexpr int64_t tile = 16, most_tasks = 64, enough = 8, cached = int64_t{1} << 18;
        int64_t fitting = at_least(most_partial / at_least(partial_size, 1), 1);
        // Where the groups are enough, and the matrices stay in a cache, partial sums would only cost.
        const int64_t matrices = c.weight_stride ? c.N * c.weight_stride : c.K * c.J * c.D;
        if (grouped && N <= most_capsules && ceil_div(B, tile) >= enough && matrices <= cached) fitting = 1;
        const int64_t wanted = at_least(at_most(ceil_div(N, smallest), at_most(most_blocks, fitting)), 1);
        block_size = at_least(ceil_div(N, wanted), 1);
        blocks = ceil_div(N, block_size);
        const int64_t cuts = grouped ? at_most(ceil_div(B, tile), ceil_div(most_tasks, at_least(blocks, 1))) : 1;
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

// out[x] = Σ_block partial[block, x] in the order of the blocks, in double.
template <class A>
inline void add_blocks(const A* partial, int64_t blocks, int64_t size, A* out, [[maybe_unused]] int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (blocks * size >= 65536)
    for (int64_t x = 0; x < size; ++x) {
        double sum = 0;
        for (int64_t block = 0; block < blocks; ++block) sum += static_cast<double>(partial[block * size + x]);
        out[x] = static_cast<A>(sum);
    }
}

// What one thread needs: offsets into its memory.
template <class A> struct Workspace {
    int64_t capsules;  // whose matrices a tile or a panel takes at a time
    int64_t weight, u, panel_u, panel_g_u, votes, g_rows, total;

    Workspace(const Operands<A>& o, bool gradients) {
        constexpr int64_t n = Tile<A>::size;
        const bool panels = o.layout == Layout::items;
        // The matrices of a tile stay in the second-level cache.
        capsules =
            panels ? panel_capsules(o) : at_least(at_most((int64_t{1} << 16) / at_least(o.weight_size, 1), n), 1);
        const int64_t rows = panels ? 1 : n, panel = panels ? capsules * o.K * n : 0;
        total = 0;
        weight = take(o.direct_weight ? 0 : capsules * o.weight_size);
        u = take(o.direct_u ? 0 : panels ? panel : n * ceil_div(o.K, n) * n);
        panel_u = take(panel);
        panel_g_u = take(gradients ? panel : 0);
        votes = take((gradients ? 2 : 1) * rows * o.JD);
        g_rows = take(gradients && panels ? o.c.rows * n * o.padded_X : 0);
    }

  private:
    int64_t take(int64_t numbers) {
        const int64_t begin = total;
        total += ceil_div(numbers, 16) * 16;
        return begin;
    }
};

// Adds the items (b, i), (b + 1, i) … to a tile. scratch: [lanes, K], where u has to be converted.
template <class A>
inline void load_items(const Operands<A>& o, Tile<A>& t, int64_t b, int64_t i, int count, A* scratch) {
    const int64_t stride = o.c.N * o.K, offset = b * stride + i * o.K;
    const int begin = t.count;
    for (int m = 0; m < count; ++m) t.b[begin + m] = b + m;
    for (int m = 0; m < count; ++m) t.i[begin + m] = i;
    for (int m = 0; m < count; ++m) t.u[begin + m] = o.load_u(offset + m * stride, o.K, scratch + (begin + m) * o.K);
    t.count = begin + count;
}

// Fills tiles with the pairs that are there, makes their votes if wanted, and calls visit(tile) for each. absent(b, i)
// is called for the pairs that are not there.
template <bool with_votes, class A, class Visit, class Absent>
inline void for_each_tile(const Operands<A>& o, const Tasks& tasks, int64_t task, A* memory, const Workspace<A>& w,
                          Visit visit, Absent absent) {
    Tile<A> t;
    t.layout = o.layout, t.K = o.K, t.J = o.J, t.D = o.D, t.JD = o.JD;
    t.votes = memory + w.votes;
    t.g_votes = t.votes + Tile<A>::size * o.JD;
    A* u_scratch = memory + w.u;
    const int64_t b0 = tasks.first_item(task), b1 = tasks.end_item(task);
    const int64_t i0 = tasks.first_capsule(task), i1 = tasks.end_capsule(task);

    const auto flush = [&] {
        if (with_votes) {
            A* rows[Tile<A>::size];
            for (int r = 0; r < t.count; ++r) rows[r] = t.votes + r * o.JD;
            for (int s = 0; s < t.segment_count; ++s) {
                const Segment<A>& g = t.segments[s];
                multiply<false>(t.u + g.begin, g.end - g.begin, g.weight, o.K, o.JD, o.JD, rows + g.begin);
            }
        }
        visit(t);
        t.count = t.segment_count = 0;
    };

    const bool shared = o.shared();
    const A* const shared_weight = shared ? o.load_weight(0, memory + w.weight) : nullptr;
    const auto open_segment = [&](int64_t i, const A* weight, bool first) {
        t.segments[t.segment_count++] = {t.count, t.count, i, weight, first, false};
    };
    int64_t matrices = 0;  // in this tile
    for (int64_t i = i0; i < i1; ++i) {
        const A* weight = shared_weight;
        bool open = shared && t.segment_count > 0, first = true;
        if (!shared) {
            if (matrices == w.capsules || t.segment_count == Tile<A>::most_segments) {
                flush();
                matrices = 0;
            }
            weight = o.load_weight(i, memory + w.weight + matrices++ * o.weight_size);
        }
        for (int64_t b = b0; b < b1;) {
            int64_t end = b1;  // of a run of pairs that are there
            if (const uint8_t* mask = o.c.mask) {
                if (!mask[b * o.c.N + i]) {
                    absent(b++, i);
                    continue;
                }
                for (end = b + 1; end < b1 && mask[end * o.c.N + i];) ++end;
            }
            if (!open) open_segment(i, weight, first);
            open = true;
            first = false;
            const int count = static_cast<int>(at_most(end - b, Tile<A>::size - t.count));
            load_items(o, t, b, i, count, u_scratch);
            b += count;
            t.segments[t.segment_count - 1].end = t.count;
            if (t.count < Tile<A>::size || b == b1) continue;
            flush();
            open = false;
            // The matrix in use is the first one of the next tile.
            if (!shared && !o.direct_weight && weight != memory + w.weight) {
                std::memcpy(memory + w.weight, weight, sizeof(A) * static_cast<size_t>(o.weight_size));
                weight = memory + w.weight;
            }
            matrices = 1;
        }
        if (!shared) {
            if (!open) open_segment(i, weight, first);
            t.segments[t.segment_count - 1].last = true;
        }
        if (t.count == Tile<A>::size) {
            flush();
            matrices = 0;
        }
    }
    if (t.count || t.segment_count) flush();
}

// Calls visit(panel) for every panel: for some capsules all batch items of the task, so that their matrices are read
// once.
template <class A, class Visit>
inline void for_each_panel(const Operands<A>& o, const Tasks& tasks, int64_t task, A* memory, const Workspace<A>& w,
                           Visit visit) {
    constexpr int n = Panel<A>::size;
    const int64_t b0 = tasks.first_item(task), b1 = tasks.end_item(task), end = tasks.end_capsule(task);
    Panel<A> p;
    p.u = memory + w.panel_u;
    p.g_u = memory + w.panel_g_u;
    p.weight = nullptr;
    p.weight_next = o.shared() ? 0 : o.weight_size;
    for (p.i = tasks.first_capsule(task); p.i < end; p.i += p.capsules) {
        p.capsules = at_most(w.capsules, end - p.i);
        if (!p.weight || !o.shared()) p.weight = o.load_weight(p.i, memory + w.weight);
        if (!o.direct_weight && !o.shared())
            for (int64_t s = 1; s < p.capsules; ++s) o.load_weight(p.i + s, memory + w.weight + s * o.weight_size);
        for (p.b = b0; p.b < b1; p.b += n) {
            p.items = static_cast<int>(at_most(n, b1 - p.b));
            p.first = p.b == b0;
            p.last = p.b + n >= b1;
            const int64_t X = p.capsules * o.K;
            for (int r = 0; r < p.items; ++r)
                p.rows[r] = o.load_u(((p.b + r) * o.c.N + p.i) * o.K, X, memory + w.u + r * X);
            from_rows(p.rows, p.items, X, p.u);
            clear_absent(o, p, p.u);
            visit(p);
        }
    }
}

// visit(tile, capsule of the panel) with the votes of every capsule of a panel.
template <class A, class Visit>
inline void for_each_tile_of(const Operands<A>& o, const Panel<A>& p, A* memory, const Workspace<A>& w, Visit visit) {
    Tile<A> t;
    t.layout = o.layout, t.K = o.K, t.J = o.J, t.D = o.D, t.JD = o.JD;
    t.votes = memory + w.votes;
    t.g_votes = t.votes + o.JD;
    t.count = p.items;
    for (int r = 0; r < p.items; ++r) t.b[r] = p.b + r;
    for (int64_t s = 0; s < p.capsules; ++s) {
        t.absent = 0;
        for (int r = 0; r < p.items; ++r) {
            t.i[r] = p.i + s;
            if (o.c.mask && !o.c.mask[t.b[r] * o.c.N + p.i + s]) t.absent |= uint32_t{1} << r;
        }
        multiply_capsule<false>(o, p.u + s * o.K * Panel<A>::size, p.weight + s * p.weight_next, t.votes);
        visit(t, s);
    }
}

// ---- votes in registers ------------------------------------------------------------------------------------

// Calls function.operator()<E>(), E the vectors of a vote, where votes can be kept in registers; else with 0.
template <class A, class Function> inline void for_vote_vectors(const Operands<A>& o, Function function) {
    if (o.layout == Layout::components && o.J == 2) switch (o.D / Lanes<A>::count) {
            case 1: return function.template operator()<1>();
            case 2: return function.template operator()<2>();
        }
    function.template operator()<0>();
}

template <class Policy> constexpr bool takes_registers = false;

// One input capsule and the batch items that it is there for.
template <class A> struct Rows {
    int64_t i;
    const A* weight;
    int count;
    const int64_t* b;   // [count]
    const A* const* u;  // [count], each [K]
};

// What one thread needs for them.
template <class A> class RowsMemory {
  public:
    RowsMemory(const Operands<A>& o, int threads)
        : o_(o),
          numbers_size_((o.direct_weight ? 0 : o.weight_size) + (o.direct_u ? 0 : o.c.B * o.K)),
          numbers_(numbers_size_ * threads),
          b_(o.c.B * threads),
          u_(o.c.B * threads) {}

    A* weight(int thread) const { return numbers_.get() + thread * numbers_size_; }
    A* u(int thread) const { return weight(thread) + (o_.direct_weight ? 0 : o_.weight_size); }
    int64_t* items(int thread) const { return b_.get() + thread * o_.c.B; }
    const A** pointers(int thread) const { return u_.get() + thread * o_.c.B; }

  private:
    const Operands<A>& o_;
    int64_t numbers_size_;
    Buffer<A> numbers_;
    Buffer<int64_t> b_;
    Buffer<const A*> u_;
};

// visit(rows) for every input capsule of a task, absent(b, i) for the pairs that are not there.
template <class A, class Visit, class Absent>
inline void for_each_capsule(const Operands<A>& o, const Tasks& tasks, int64_t task, const RowsMemory<A>& memory,
                             Visit visit, Absent absent) {
    const Capsules& c = o.c;
    const int thread = omp_get_thread_num();
    const int64_t b0 = tasks.first_item(task), b1 = tasks.end_item(task), end = tasks.end_capsule(task);
    const int64_t stride = c.N * o.K;
    A* converted = memory.u(thread);
    int64_t* items = memory.items(thread);
    const A** u = memory.pointers(thread);
    Rows<A> rows{0, nullptr, 0, items, u};
    for (int64_t i = tasks.first_capsule(task); i < end; ++i) {
        const bool first = rows.weight == nullptr;
        rows.i = i;
        if (first || !o.shared()) rows.weight = o.load_weight(i, memory.weight(thread));
        if (!c.mask && o.direct_u && !first) {
            for (int r = 0; r < rows.count; ++r) u[r] += o.K;
        } else {
            rows.count = 0;
            for (int64_t b = b0; b < b1; ++b) {
                if (c.mask && !c.mask[b * c.N + i]) {
                    absent(b, i);
                    continue;
                }
                items[rows.count] = b;
                u[rows.count++] = o.load_u(b * stride + i * o.K, o.K, converted + (b - b0) * o.K);
            }
        }
        visit(rows);
    }
}

// ---- the loops -----------------------------------------------------------------------------------------------

// out [rows, row_size] = Σ over the blocks of what run(task, sum, own) adds to sum; a row belongs to so many batch
// items. own: [memory_size], of one thread.
template <class A, class Run>
inline void sum_over_tasks(const Capsules& c, int64_t items, int64_t row_size, int64_t memory_size, A* out, Run run) {
    const int64_t size = ceil_div(c.B, items) * row_size;
    const Tasks tasks(c, size, true);
    Buffer<A> partial(tasks.blocks * size);
    memory_size = ceil_div(memory_size, 64) * 64;
    Buffer<A> memory(memory_size * c.threads);

#pragma omp parallel for schedule(dynamic) num_threads(c.threads) if (tasks.count() > 1)
    for (int64_t task = 0; task < tasks.count(); ++task) {
        A* sum = partial.get() + task / tasks.groups * size;
        const int64_t begin = tasks.first_item(task) / items, end = ceil_div(tasks.end_item(task), items);
        fill(sum + begin * row_size, (end - begin) * row_size, A(0));
        run(tasks, task, sum, memory.get() + omp_get_thread_num() * memory_size);
    }
    add_blocks(partial.get(), tasks.blocks, size, out, c.threads);
}

// visit(tile, sum [B, row_size], scratch [scratch_size]) for every tile.
template <bool with_votes, class A, class Visit>
inline void reduce_tiles(const Operands<A>& o, int64_t row_size, int64_t scratch_size, A* out, Visit visit) {
    const Workspace<A> w(o, false);
    sum_over_tasks(
        o.c, 1, row_size, w.total + scratch_size, out, [&](const Tasks& tasks, int64_t task, A* sum, A* own) {
            for_each_tile<with_votes>(
                o, tasks, task, own, w, [&](Tile<A>& t) { visit(t, sum, own + w.total); }, [](int64_t, int64_t) {});
        });
}

// visit(panel, sum [state_rows, row_size], own) for every panel.
template <class A, class Visit>
inline void reduce_panels(const Operands<A>& o, const Workspace<A>& w, int64_t row_size, int64_t scratch_size, A* out,
                          Visit visit) {
    sum_over_tasks(o.c, o.items, row_size, w.total + scratch_size, out,
                   [&](const Tasks& tasks, int64_t task, A* sum, A* own) {
                       for_each_panel(o, tasks, task, own, w, [&](const Panel<A>& p) { visit(p, sum, own); });
                   });
}

// Capsules that share a matrix: out[b] = (Σ_i u_bi) W.
template <class A> inline void contract_shared(const Capsules& c, A* out /* [B, J, H] */) {
    const Operands<A> o(c, Layout::components);
    const int64_t K = o.K;
    Buffer<A> sum(c.B * K), weight(o.direct_weight ? 0 : o.weight_size), state(o.state_size());
    sum_over_tasks(c, 1, K, K, sum.get(), [&](const Tasks& tasks, int64_t task, A* to, A* own) {
        for (int64_t b = tasks.first_item(task); b < tasks.end_item(task); ++b)
            for (int64_t i = tasks.first_capsule(task); i < tasks.end_capsule(task); ++i) {
                if (c.mask && !c.mask[b * c.N + i]) continue;
                const A* u = o.load_u((b * c.N + i) * K, K, own);
                for (int64_t k = 0; k < K; ++k) to[b * K + k] += u[k];
            }
    });
    const A* const matrix = o.load_weight(0, weight.get());
    for (int64_t b = 0; b < c.B; ++b) {
        const A* row = sum.get() + b * K;
        A* to = state.get() + b * o.JD;
        multiply<false>(&row, 1, matrix, K, o.JD, o.JD, &to);
    }
    o.unpack(state.get(), out);
}

// The components of neighbouring capsules, and the rows of their matrices, follow one another: one long product.
template <class A> inline void contract_rows(const Operands<A>& o, A* out) {
    const Capsules& c = o.c;
    const int64_t step = at_least((int64_t{1} << 12) / o.weight_size, 1);
    sum_over_tasks(c, 1, o.JD, 0, out, [&](const Tasks& tasks, int64_t task, A* sum, A*) {
        const A* u[Tile<A>::size];
        A* rows[Tile<A>::size];
        const int64_t end = tasks.end_capsule(task), end_item = tasks.end_item(task);
        for (int64_t i = tasks.first_capsule(task); i < end; i += step) {
            const A* weight = static_cast<const A*>(c.weight) + i * o.weight_size;
            const int64_t length = at_most(step, end - i) * o.K;
            for (int64_t b = tasks.first_item(task); b < end_item; b += Tile<A>::size) {
                const int count = static_cast<int>(at_most(Tile<A>::size, end_item - b));
                for (int r = 0; r < count; ++r) {
                    u[r] = static_cast<const A*>(c.u) + ((b + r) * c.N + i) * o.K;
                    rows[r] = sum + (b + r) * o.JD;
                }
                multiply<true>(u, count, weight, length, o.JD, o.JD, rows);
            }
        }
    });
}

template <class A> inline void contract_panels(const Operands<A>& o, A* out) {
    const Workspace<A> w(o, false);
    reduce_panels(o, w, o.JD, 0, out, [&](const Panel<A>& p, A* sum, A*) {
        A* to = sum + o.row(p.b) * o.JD;
        // One long product, as above.
        if (o.c.rows == 1) return multiply_items<true>(p.u, p.weight, p.capsules * o.K, o.X, o.X, to);
        for (int64_t s = 0; s < p.capsules; ++s)
            multiply_capsule<true>(o, p.u + s * o.K * Panel<A>::size, p.weight + s * p.weight_next, to);
    });
}

template <class A> inline void contract(const Operands<A>& o, A* out /* a state */) {
    const Capsules& c = o.c;
    if (o.shared()) {
        Buffer<A> sum(c.B * o.JH);
        contract_shared(c, sum.get());
        return o.pack(sum.get(), out);
    }
    if (o.layout == Layout::items) return contract_panels(o, out);
    if (o.direct_u && o.direct_weight && !c.mask) return contract_rows(o, out);
    reduce_tiles<false>(o, o.JD, 0, out, [&](Tile<A>& t, A* sum, A*) {
        A* rows[Tile<A>::size];
        for (int r = 0; r < t.count; ++r) rows[r] = sum + t.b[r] * o.JD;
        for (int s = 0; s < t.segment_count; ++s) {
            const Segment<A>& g = t.segments[s];
            multiply<true>(t.u + g.begin, g.end - g.begin, g.weight, o.K, o.JD, o.JD, rows + g.begin);
        }
    });
}

template <class A, class Policy>
inline void reduce(const Operands<A>& o, const Policy& policy, A* out /* [state_rows, policy.row_size()] */) {
    if (o.layout == Layout::items) {
        const Workspace<A> w(o, false);
        return reduce_panels(
            o, w, policy.row_size(), policy.scratch_size(), out, [&](const Panel<A>& p, A* sum, A* own) {
                for_each_tile_of(o, p, own, w, [&](Tile<A>& t, int64_t) { policy.accumulate(t, sum, own + w.total); });
            });
    }
    for_vote_vectors(o, [&]<int E>() {
        if constexpr (E > 0 && takes_registers<Policy>) {
            const RowsMemory<A> memory(o, o.c.threads);
            sum_over_tasks(o.c, 1, policy.row_size(), 0, out, [&](const Tasks& tasks, int64_t task, A* sum, A*) {
                const auto visit = [&](const Rows<A>& x) {
                    for_each_group<register_rows<A, E>>(0, x.count, [&]<int rows>(int r) {
                        const Votes<A, rows, E> votes(x.u + r, x.weight, o.K);
                        policy.accumulate(votes, x.b + r, sum);
                    });
                };
                for_each_capsule(o, tasks, task, memory, visit, [](int64_t, int64_t) {});
            });
        } else {
            reduce_tiles<true>(o, policy.row_size(), policy.scratch_size(), out,
                               [&](Tile<A>& t, A* sum, A* scratch) { policy.accumulate(t, sum, scratch); });
        }
    });
}

// Where one thread puts the gradients of the pairs that it has seen.
template <class A> struct GradientWriter {
    const Operands<A>& o;
    const CapsuleGradients& gradients;
    bool direct, past_caches;  // whether a gradient of W may be written where it belongs at once, and how
    A* g_weight;               // [K, J, D]: that of a shared matrix, summed over the task; of others, the sum so far
    A* g_u;                    // [lanes, K]

    // Pairs (b_r, i_r) of one matrix, u_r [K] and g [rows, J, D]. first, last: of this matrix in the task.
    void put(const Segment<A>& s, const A* const* u, const A* g, const int64_t* b, const int64_t* i) const {
        const int count = s.end - s.begin;
        if (gradients.u && count) put_u(s.weight, count, g, b, i);
        if (!gradients.weight) return;
        const bool whole = direct && s.first && s.last;
        A* out = whole ? static_cast<A*>(gradients.weight) + s.i * o.K * o.JD : g_weight;
        outer(u, g, count, o.K, o.JD, out, o.shared() || !s.first, whole && past_caches);
        finish(s, whole);
    }

    // Pairs (b_r, s.i) of one matrix, their gradients in registers, which are used up.
    template <int rows, int E>
    CAPSOPS_INLINE void put(const Segment<A>& s, const A* const* u, Votes<A, rows, E>& g, const int64_t* b) const {
        if (gradients.weight) {
            const bool whole = direct && s.first && s.last;
            A* out = whole ? static_cast<A*>(gradients.weight) + s.i * o.K * o.JD : g_weight;
            outer(u, g, o.K, out, o.shared() || !s.first, whole && past_caches);
            finish(s, whole);
        }
        if (!gradients.u) return;
        A* out[rows];
        const auto offset = [&](int r) { return (b[r] * o.c.N + s.i) * o.K; };
        for (int r = 0; r < rows; ++r) out[r] = o.direct_u ? static_cast<A*>(gradients.u) + offset(r) : g_u + r * o.K;
        project(g, s.weight, o.K, out);
        if (o.direct_u) return;
        for (int r = 0; r < rows; ++r) write(out[r], o.K, gradients.u, o.c.dtype, offset(r));
    }

    void put_absent(int64_t b, int64_t i) const {
        if (!gradients.u) return;
        fill(g_u, o.K, A(0));
        write(g_u, o.K, gradients.u, o.c.dtype, (b * o.c.N + i) * o.K);
    }

    // No pairs of this matrix.
    void put_nothing(int64_t i) const {
        if (!gradients.weight || o.shared()) return;
        fill(g_weight, o.K * o.JD, A(0));
        o.store_weight_gradient(g_weight, i, gradients.weight);
    }

  private:
    void finish(const Segment<A>& s, bool whole) const {
        if (s.last && !whole && !o.shared()) o.store_weight_gradient(g_weight, s.i, gradients.weight);
    }

    void put_u(const A* weight, int count, const A* g, const int64_t* b, const int64_t* i) const {
        constexpr int n = Tile<A>::size;
        const auto offset = [&](int r) { return (b[r] * o.c.N + i[r]) * o.K; };
        A* rows[n];
        for (int r = 0; r < count; ++r) rows[r] = o.direct_u ? static_cast<A*>(gradients.u) + offset(r) : g_u + r * o.K;
        // Transposing W pays for several items at once.
        const bool several = count * 4 >= n;
        if (several && o.K == n)
            project<1>(g, o.JD, count, weight, o.JD, o.JD, rows);
        else if (sizeof(A) == 4 && several && 2 * o.K == n)
            project<sizeof(A) == 4 ? 2 : 1>(g, o.JD, count, weight, o.JD, o.JD, rows);
        else
            dots(g, o.JD, count, weight, o.JD, o.K, o.JD, 1, 0, [&](int64_t r, int64_t k, int64_t found, const A* x) {
                for (int64_t m = 0; m < found; ++m) rows[r][k + m] = x[m];
            });
        if (o.direct_u) return;
        for (int r = 0; r < count; ++r) write(rows[r], o.K, gradients.u, o.c.dtype, offset(r));
    }
};

// Gradients of this many bytes are past every cache before anyone reads them.
constexpr int64_t streamed_bytes = int64_t{1} << 25;

// Fresh memory of that size comes in huge pages where the system gives them: to fault in 4 KB at a time takes longer
// than to compute what goes there.
inline void prefer_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] int64_t bytes) {
#if defined(MADV_HUGEPAGE)
    if (bytes < streamed_bytes) return;
    constexpr uintptr_t page = uintptr_t{1} << 21;
    const uintptr_t address = reinterpret_cast<uintptr_t>(memory);
    const uintptr_t begin = (address + page - 1) / page * page,
                    end = (address + static_cast<uintptr_t>(bytes)) / page * page;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

template <class A, class Policy>
inline void emit_tiles(const Operands<A>& o, const Tasks& tasks, int64_t task, const Policy& policy,
                       const Workspace<A>& w, A* own, A* scratch, A* params, const GradientWriter<A>& writer) {
    const auto visit = [&](Tile<A>& t) {
        policy.emit(t, params, scratch);
        for (int s = 0; s < t.segment_count; ++s) {
            const Segment<A>& g = t.segments[s];
            writer.put(g, t.u + g.begin, t.g_votes + g.begin * o.JD, t.b + g.begin, t.i + g.begin);
        }
    };
    for_each_tile<Policy::needs_votes>(o, tasks, task, own, w, visit,
                                       [&](int64_t b, int64_t i) { writer.put_absent(b, i); });
}

template <class A, class Policy>
inline void emit_panels(const Operands<A>& o, const Tasks& tasks, int64_t task, const Policy& policy,
                        const Workspace<A>& w, A* own, A* scratch, A* params, const PanelWriter<A>& writer) {
    for_each_panel(o, tasks, task, own, w, [&](const Panel<A>& p) {
        for_each_tile_of(o, p, own, w, [&](Tile<A>& t, int64_t s) {
            policy.emit(t, params, scratch);
            writer.put(p, s, t.g_votes);
        });
        writer.finish(p);
    });
}

template <int E, class A, class Policy>
inline void emit_rows(const Operands<A>& o, const Tasks& tasks, int64_t task, const Policy& policy,
                      const RowsMemory<A>& memory, A* params, const GradientWriter<A>& writer) {
    auto totals = policy.totals();
    const auto visit = [&](const Rows<A>& x) {
        if (x.count == 0) return writer.put_nothing(x.i);
        for_each_group<register_rows<A, E>>(0, x.count, [&]<int rows>(int r) {
            Votes<A, rows, E> votes(x.u + r, x.weight, o.K);
            policy.emit(votes, x.b + r, totals);
            writer.put({r, r + rows, x.i, x.weight, r == 0, r + rows == x.count}, x.u + r, votes, x.b + r);
        });
    };
    for_each_capsule(o, tasks, task, memory, visit, [&](int64_t b, int64_t i) { writer.put_absent(b, i); });
    policy.add(totals, params);
}

template <class A, class Policy>
inline void emit(const Operands<A>& o, const Policy& policy, const CapsuleGradients& gradients,
                 A* params /* [policy.param_count()] */) {
    const Capsules& c = o.c;
    const int64_t param_count = policy.param_count(), weight_size = o.gradient_size;
    const bool shared = o.shared() && gradients.weight;
    const int64_t shared_size = shared ? weight_size : 0;
    const Tasks tasks(c, param_count + shared_size, false);
    Buffer<A> param_partial(tasks.blocks * param_count), shared_partial(tasks.blocks * shared_size);
    const Workspace<A> w(o, true);
    const bool panels = o.layout == Layout::items;
    const int64_t scratch_size = ceil_div(policy.scratch_size(), 16) * 16;
    const int64_t weights_size = ceil_div((panels ? w.capsules : 1) * weight_size, 16) * 16;
    const int64_t memory_size = ceil_div(w.total + scratch_size + weights_size + Tile<A>::size * o.K, 64) * 64;
    Buffer<A> memory(memory_size * c.threads);
    const RowsMemory<A> rows_memory(o, c.threads);
    const bool direct = o.direct_gradient() && !shared;
    const int64_t number = size_of(c.dtype), weight_bytes = c.N * c.weight_stride * number;
    if (gradients.weight) prefer_huge_pages(gradients.weight, weight_bytes);
    if (gradients.u) prefer_huge_pages(gradients.u, c.B * c.N * o.K * number);
    const bool past_caches = direct && weight_bytes >= streamed_bytes &&
                             reinterpret_cast<uintptr_t>(gradients.weight) % CAPSOPS_VECTOR_BYTES == 0;

#pragma omp parallel for schedule(dynamic) num_threads(c.threads) if (tasks.count() > 1)
    for (int64_t task = 0; task < tasks.count(); ++task) {
        A* own = memory.get() + omp_get_thread_num() * memory_size;
        A* scratch = own + w.total;
        A* g_weight = shared ? shared_partial.get() + task * weight_size : scratch + scratch_size;
        A* sums = param_partial.get() + task * param_count;
        fill(sums, param_count, A(0));
        if (shared) fill(g_weight, weight_size, A(0));
        if (panels) {
            const PanelWriter<A> writer{o, gradients, direct, past_caches, g_weight, own + w.g_rows};
            emit_panels(o, tasks, task, policy, w, own, scratch, sums, writer);
        } else {
            const GradientWriter<A> writer{o,           gradients, direct,
                                           past_caches, g_weight,  scratch + scratch_size + weights_size};
            for_vote_vectors(o, [&]<int E>() {
                if constexpr (E > 0 && takes_registers<Policy>)
                    emit_rows<E>(o, tasks, task, policy, rows_memory, sums, writer);
                else
                    emit_tiles(o, tasks, task, policy, w, own, scratch, sums, writer);
            });
        }
        if (past_caches) end_streaming();
    }
    if (param_count) add_blocks(param_partial.get(), tasks.blocks, param_count, params, c.threads);
    if (shared) {
        add_blocks(shared_partial.get(), tasks.blocks, weight_size, memory.get(), 1);
        o.store_weight_gradient(memory.get(), 0, gradients.weight);
    }
}

// ---- output capsules -------------------------------------------------------------------------------------------

template <class A> inline SquashFactors<A> squash_factors(A n, SquashKind kind) {
    return kind == SquashKind::sabour ? squash_sabour(n) : squash_efficient(n);
}

// squash and its vector-Jacobian product over the B·J output capsules of a routing, [rows, D].
template <class A, class Factors>
inline void squash_outputs(const A* s, A* v, int64_t rows, int64_t D, Factors factors) {
    for (int64_t r = 0; r < rows; ++r) squash_vector(s + r * D, v + r * D, D, factors);
}

template <class A, class Factors>
inline void squash_outputs_backward(const A* g_v, const A* s, A* g_s, int64_t rows, int64_t D, Factors factors) {
    for (int64_t r = 0; r < rows; ++r) squash_vector_backward(g_v + r * D, s + r * D, g_s + r * D, D, factors);
}

}  // namespace capsops::cpu::CAPSOPS_ISA
