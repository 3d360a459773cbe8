// Makes the tiles of a task: capsule after capsule with components in the lanes, or as panels with batch items in the
// lanes.
#pragma once

#include "panel.h"
#include "tasks.h"

namespace capsops::cpu::CAPSOPS_ISA {

// The scratch memory of one thread, as offsets into it.
template <class A> struct ThreadScratch {
    int64_t capsules;  // whose matrices are loaded for a tile or a panel
    int64_t weight, u, panel_u, panel_g_u, votes, g_rows, total;

    ThreadScratch(const Operands<A>& o, bool gradients) {
        constexpr int64_t n = Tile<A>::size;
        const bool panels = o.layout == Layout::items;
        // The matrices of a tile fit into the second-level cache, unless a full tile needs more.
        const int64_t fitting = (int64_t{1} << 16) / at_least(o.weight_size, 1), full = ceil_div(n, at_least(o.c.B, 1));
        capsules = panels ? panel_capsules(o) : at_most(at_least(fitting, full), n);
        const int64_t rows = panels ? 1 : n, panel = panels ? capsules * o.K * n : 0;
        total = 0;
        weight = take(o.direct_weight ? 0 : capsules * o.weight_size);
        u = take(o.direct_u ? 0 : panels ? panel : n * ceil_div(o.K, n) * n);
        panel_u = take(panel);
        panel_g_u = take(gradients ? panel : 0);
        votes = take((gradients ? 2 : 1) * rows * o.JD);
        g_rows = take(gradients && panels ? n * o.padded_X : 0);
    }

  private:
    int64_t take(int64_t numbers) {
        const int64_t begin = total;
        total += ceil_div(numbers, 16) * 16;
        return begin;
    }
};

// Adds the items (b, i) … (b + count − 1, i) to a tile. Converts u to scratch [lanes, K] if necessary.
template <class A>
inline void load_items(const Operands<A>& o, Tile<A>& t, int64_t b, int64_t i, int count, A* scratch) {
    const int64_t stride = o.c.N * o.K, offset = b * stride + i * o.K;
    const int begin = t.count;
    for (int m = 0; m < count; ++m) t.b[begin + m] = b + m;
    for (int m = 0; m < count; ++m) t.i[begin + m] = i;
    for (int m = 0; m < count; ++m) t.u[begin + m] = o.load_u(offset + m * stride, o.K, scratch + (begin + m) * o.K);
    t.count = begin + count;
}

// for_each_tile for votes that are given. There are no matrices to read once, so the capsules of one batch item come
// before the next item, whose states then stay in the first-level cache.
template <class A, class Visit, class Absent>
inline void for_each_tile_of_given_votes(const Operands<A>& o, const Tasks& tasks, int64_t task, Tile<A>& t,
                                         A* u_scratch, Visit visit, Absent absent) {
    const bool whole = o.D == o.H;              // whether no zeros stand behind a vote
    const bool in_place = whole && o.direct_u;  // then they are read where they are, if they are neighbours
    const int64_t row_size = o.c.one_vote ? o.D : o.JD;
    A* const own = t.votes;
    const auto flush = [&] {
        t.segments[0] = {0, t.count, t.i[0], nullptr, true, true};
        t.segment_count = 1;
        visit(t);
        t.count = 0;
    };
    Steps steps(tasks.watch);
    for (int64_t b = tasks.first_item(task); b < tasks.end_item(task) && !steps.stopped(); ++b)
        for (int64_t i = tasks.first_capsule(task); i < tasks.end_capsule(task); ++i) {
            if (o.c.mask && !o.c.mask[b * o.c.N + i]) {
                if (in_place && t.count) flush();
                absent(b, i);
                continue;
            }
            load_items(o, t, b, i, 1, whole ? own : u_scratch);
            if (!whole)
                o.pad_votes(t.u[t.count - 1], own + (t.count - 1) * row_size);
            else if (in_place && t.count == 1)
                t.votes = const_cast<A*>(t.u[0]);  // policies only read them
            if (t.count == Tile<A>::size || (in_place && i + 1 == tasks.end_capsule(task))) flush();
        }
    if (t.count) flush();
}

// Calls visit(tile) for tiles of the pairs (b, i) that are not masked, with their votes if with_votes, and absent(b, i)
// for the masked pairs.
template <class A, class Visit, class Absent>
inline void for_each_tile(const Operands<A>& o, bool with_votes, const Tasks& tasks, int64_t task, A* memory,
                          const ThreadScratch<A>& w, Visit visit, Absent absent) {
    Tile<A> t;
    t.layout = o.layout, t.K = o.K, t.J = o.J, t.D = o.D, t.JD = o.JD;
    t.votes = memory + w.votes;
    t.g_votes = t.votes + Tile<A>::size * o.JD;
    A* u_scratch = memory + w.u;
    t.given = o.c.votes_given, t.one_vote = o.c.one_vote;
    if (o.c.votes_given) return for_each_tile_of_given_votes(o, tasks, task, t, u_scratch, visit, absent);
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
    Steps steps(tasks.watch);
    for (int64_t i = i0; i < i1; ++i) {
        const A* weight = shared_weight;
        bool open = shared && t.segment_count > 0, first = true;
        if (!shared) {
            if (matrices == w.capsules || t.segment_count == Tile<A>::max_segments) {
                flush();
                matrices = 0;
            }
            weight = o.load_weight(i, memory + w.weight + matrices++ * o.weight_size);
        }
        for (int64_t b = b0; b < b1;) {
            int64_t end = b1;  // of a run of pairs that are not masked
            if (const uint8_t* mask = o.c.mask) {
                if (!mask[b * o.c.N + i]) {
                    absent(b++, i);
                    continue;
                }
                for (end = b + 1; end < b1 && mask[end * o.c.N + i];) ++end;
            }
            if (steps.stopped()) return;
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
            // The current matrix becomes the first one of the next tile.
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

// Calls visit(panel) for every panel. All batch items of the task come before the next capsules, so that matrices are
// read once.
template <class A, class Visit>
inline void for_each_panel(const Operands<A>& o, const Tasks& tasks, int64_t task, A* memory, const ThreadScratch<A>& w,
                           Visit visit) {
    constexpr int n = Panel<A>::size;
    const int64_t b0 = tasks.first_item(task), b1 = tasks.end_item(task), end = tasks.end_capsule(task);
    Panel<A> p;
    p.u = memory + w.panel_u;
    p.g_u = memory + w.panel_g_u;
    p.weight = nullptr;
    p.weight_next = o.direct_weight || o.shared() ? o.c.weight_stride : o.weight_size;
    Steps steps(tasks.watch);
    for (p.i = tasks.first_capsule(task); p.i < end; p.i += p.capsules) {
        p.capsules = at_most(w.capsules, end - p.i);
        if (!p.weight || !o.shared()) p.weight = o.load_weight(p.i, memory + w.weight);
        if (!o.direct_weight && !o.shared())
            for (int64_t s = 1; s < p.capsules; ++s) o.load_weight(p.i + s, memory + w.weight + s * o.weight_size);
        for (p.b = b0; p.b < b1; p.b += n) {
            if (steps.stopped()) return;
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

// Calls visit(tile, s) with the votes of each capsule s of a panel.
template <class A, class Visit>
inline void for_each_tile_of(const Operands<A>& o, const Panel<A>& p, A* memory, const ThreadScratch<A>& w,
                             Visit visit) {
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
            if (o.c.mask && !o.c.mask[t.b[r] * o.c.N + t.i[r]]) t.absent |= uint32_t{1} << r;
        }
        if (o.c.votes_given) {
            t.votes = p.u + s * o.K * Panel<A>::size;
            t.g_votes = p.g_u + s * o.K * Panel<A>::size;
        } else {
            multiply_capsule<false>(o, p.u + s * o.K * Panel<A>::size, p.weight + s * p.weight_next, t.votes);
        }
        visit(t, s);
    }
}

}  // namespace capsops::cpu::CAPSOPS_ISA
