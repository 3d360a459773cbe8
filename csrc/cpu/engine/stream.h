// The loops over the input capsules that every routing on the CPU uses.
//
//   contract   out[b] = Σ_i û_bi                                 one pass over u and W that forms no votes
//   reduce     out[b] = Σ_i policy(û_bi)                         one pass over u and W that writes only out
//   emit       g_u,bi = g_û,bi W_iᵀ;  g_W,i = Σ_b u_biᵀ g_û,bi   one pass that recomputes û and writes both
//
// What distinguishes the routings is in policies: ReducingPolicy and EmittingPolicy below.
//
// The loops serve two regimes. With many input capsules and a small batch, blocks of capsules are the parallel tasks, a
// tile holds several capsules, the lanes of a vector hold components of a vote, and memory is the bound. With few
// capsules and a large batch, groups of batch items are tasks too, a tile is a part of one capsule's batch, the lanes
// hold batch items (panel.h), and arithmetic is the bound.
//
// Results are bitwise the same for any number of threads: blocks and groups depend on the shape alone, every block has
// its own partial sums, and these are added in the order of the blocks, in double. So no sum in the accumulation type
// runs over more than one block of capsules.
#pragma once

#include <concepts>

#include "../../math/squash.h"
#include "gradients.h"
#include "traverse.h"

namespace capsops::cpu::CAPSOPS_ISA {

// What `reduce` needs: accumulate() adds the terms of one tile to sum [state_rows, row_size()]. A policy that takes
// votes in registers (votes.h) has a second accumulate(), for the votes of a few batch items b and two output capsules.
// Sums that do not begin at 0, or cannot be added as they are, have begin() and align() as PlainSums (tasks.h) has.
template <class P, class A>
concept ReducingPolicy = requires(const P& policy, Tile<A>& tile, A* sum, A* scratch /* [scratch_size()] */) {
    { policy.row_size() } -> std::same_as<int64_t>;
    { policy.scratch_size() } -> std::same_as<int64_t>;
    policy.accumulate(tile, sum, scratch);
    requires !P::takes_registers ||
                 requires(const Votes<A, 1, 1>& votes, const int64_t* b) { policy.accumulate(votes, b, sum); };
};

template <class A, ReducingPolicy<A> Policy> inline auto sums_of(const Policy& policy) {
    if constexpr (requires { &Policy::align; })
        return policy;
    else
        return PlainSums<A>{policy.row_size()};
}

// What `emit` needs: emit() writes tile.g_votes, from tile.votes if needs_votes, and adds to params [param_count()].
// A policy that takes votes in registers has a second emit(), which replaces votes by their gradients. It keeps its
// contributions to params in totals(params) of one block of capsules, which add() adds at the end of the block; if they
// do not fit into registers, totals(params) may refer to params instead.
template <class P, class A>
concept EmittingPolicy = requires(const P& policy, Tile<A>& tile, A* params, A* scratch /* [scratch_size()] */) {
    { P::needs_votes } -> std::convertible_to<bool>;
    { policy.param_count() } -> std::same_as<int64_t>;
    { policy.scratch_size() } -> std::same_as<int64_t>;
    policy.emit(tile, params, scratch);
    requires !P::takes_registers || requires(Votes<A, 1, 1>& votes, const int64_t* b) {
        { policy.totals(params) } -> std::same_as<typename P::Totals>;
        requires requires(typename P::Totals& totals) {
            policy.emit(votes, b, totals);
            policy.add(totals, params);
        };
    };
};

// Calls visit(tile, sum [B, row_size], scratch [scratch_size]) for every tile.
template <bool with_votes, class A, class Sums, class Visit>
inline void reduce_tiles(const Operands<A>& o, const Sums& sums, int64_t scratch_size, A* out, Visit visit) {
    const ThreadScratch<A> w(o, false);
    sum_over_tasks(o.c, 1, sums, w.total + scratch_size, out, [&](const Tasks& tasks, int64_t task, A* sum, A* own) {
        for_each_tile<with_votes>(
            o, tasks, task, own, w, [&](Tile<A>& t) { visit(t, sum, own + w.total); }, [](int64_t, int64_t) {});
    });
}

// Calls visit(panel, sum [state_rows, row_size], own) for every panel.
template <class A, class Sums, class Visit>
inline void reduce_panels(const Operands<A>& o, const ThreadScratch<A>& w, const Sums& sums, int64_t scratch_size,
                          A* out, Visit visit) {
    sum_over_tasks(o.c, o.items, sums, w.total + scratch_size, out,
                   [&](const Tasks& tasks, int64_t task, A* sum, A* own) {
                       for_each_panel(o, tasks, task, own, w, [&](const Panel<A>& p) { visit(p, sum, own); });
                   });
}

// For capsules that share a matrix: out[b] = (Σ_i u_bi) W. For votes that are given: their sum.
template <class A> inline void contract_shared(const Capsules& c, A* out /* [B, J, H] */) {
    const Operands<A> o(c, Layout::components);
    const int64_t K = o.K;
    Buffer<A> sum(c.B * K), weight(o.direct_weight ? 0 : o.weight_size), state(o.state_size());
    sum_over_tasks(c, 1, PlainSums<A>{K}, K, sum.get(), [&](const Tasks& tasks, int64_t task, A* to, A* own) {
        Steps steps(tasks.watch);
        for (int64_t b = tasks.first_item(task); b < tasks.end_item(task) && !steps.stopped(); ++b)
            for (int64_t i = tasks.first_capsule(task); i < tasks.end_capsule(task); ++i) {
                if (c.mask && !c.mask[b * c.N + i]) continue;
                const A* u = o.load_u((b * c.N + i) * K, K, own);
                for (int64_t k = 0; k < K; ++k) to[b * K + k] += u[k];
            }
    });
    if (c.votes_given) {
        std::memcpy(out, sum.get(), sizeof(A) * static_cast<size_t>(c.B * K));
        return;
    }
    const A* const matrix = o.load_weight(0, weight.get());
    Watch watch(c.context);
    Steps steps(watch);
    for (int64_t b = 0; b < c.B && !steps.stopped(); ++b) {
        const A* row = sum.get() + b * K;
        A* to = state.get() + b * o.JD;
        multiply<false>(&row, 1, matrix, K, o.JD, o.JD, &to);
    }
    watch.finish();
    o.unpack(state.get(), out);
}

// The components of neighbouring capsules are contiguous, and so are the rows of their matrices: one long product.
template <class A> inline void contract_rows(const Operands<A>& o, A* out) {
    const Capsules& c = o.c;
    const int64_t step = at_least((int64_t{1} << 12) / o.weight_size, 1);
    sum_over_tasks(c, 1, PlainSums<A>{o.JD}, 0, out, [&](const Tasks& tasks, int64_t task, A* sum, A*) {
        const A* u[Tile<A>::size];
        A* rows[Tile<A>::size];
        const int64_t end = tasks.end_capsule(task), end_item = tasks.end_item(task);
        Steps steps(tasks.watch);
        for (int64_t i = tasks.first_capsule(task); i < end && !steps.stopped(); i += step) {
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
    const ThreadScratch<A> w(o, false);
    reduce_panels(o, w, PlainSums<A>{o.JD}, 0, out, [&](const Panel<A>& p, A* sum, A*) {
        A* to = sum + o.row(p.b) * o.JD;
        // One long product, as in contract_rows.
        if (o.c.rows == 1) return multiply_items<true>(p.u, p.weight, p.capsules * o.K, o.X, o.X, to);
        for (int64_t s = 0; s < p.capsules; ++s)
            multiply_capsule<true>(o, p.u + s * o.K * Panel<A>::size, p.weight + s * p.weight_next, to);
    });
}

template <class A> inline void contract(const Operands<A>& o, A* out /* a state */) {
    const Capsules& c = o.c;
    if (c.weight_stride == 0) {
        Buffer<A> sum(c.B * o.JH);
        contract_shared(c, sum.get());
        return o.pack(sum.get(), out);
    }
    if (o.layout == Layout::items) return contract_panels(o, out);
    if (o.direct_u && o.direct_weight && !c.mask) return contract_rows(o, out);
    reduce_tiles<false>(o, PlainSums<A>{o.JD}, 0, out, [&](Tile<A>& t, A* sum, A*) {
        A* rows[Tile<A>::size];
        for (int r = 0; r < t.count; ++r) rows[r] = sum + t.b[r] * o.JD;
        for (int s = 0; s < t.segment_count; ++s) {
            const Segment<A>& g = t.segments[s];
            multiply<true>(t.u + g.begin, g.end - g.begin, g.weight, o.K, o.JD, o.JD, rows + g.begin);
        }
    });
}

template <class A, ReducingPolicy<A> Policy>
inline void reduce(const Operands<A>& o, const Policy& policy, A* out /* [state_rows, policy.row_size()] */) {
    const auto sums = sums_of<A>(policy);
    if (o.layout == Layout::items) {
        const ThreadScratch<A> w(o, false);
        return reduce_panels(o, w, sums, policy.scratch_size(), out, [&](const Panel<A>& p, A* sum, A* own) {
            for_each_tile_of(o, p, own, w, [&](Tile<A>& t, int64_t) { policy.accumulate(t, sum, own + w.total); });
        });
    }
    for_vote_vectors(o, [&]<int E>() {
        if constexpr (E > 0 && Policy::takes_registers) {
            const RowsMemory<A> memory(o, o.c.context.threads);
            sum_over_tasks(o.c, 1, sums, 0, out, [&](const Tasks& tasks, int64_t task, A* sum, A*) {
                const auto visit = [&](const Rows<A>& x) {
                    for_each_group<register_rows<A, E>>(0, x.count, [&]<int rows>(int64_t r) {
                        const Votes<A, rows, E> votes(x.u + r, x.weight, o.K);
                        policy.accumulate(votes, x.b + r, sum);
                    });
                };
                for_each_capsule(o, tasks, task, memory, visit, [](int64_t, int64_t) {});
            });
        } else {
            reduce_tiles<true>(o, sums, policy.scratch_size(), out,
                               [&](Tile<A>& t, A* sum, A* scratch) { policy.accumulate(t, sum, scratch); });
        }
    });
}

template <class A, class Policy>
inline void emit_tiles(const Operands<A>& o, const Tasks& tasks, int64_t task, const Policy& policy,
                       const ThreadScratch<A>& w, A* own, A* scratch, A* params, const GradientWriter<A>& writer) {
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
                        const ThreadScratch<A>& w, A* own, A* scratch, A* params, const PanelWriter<A>& writer) {
    for_each_panel(o, tasks, task, own, w, [&](const Panel<A>& p) {
        for_each_tile_of(o, p, own, w, [&](Tile<A>& t, int64_t s) {
            policy.emit(t, params, scratch);
            writer.put(p, s, t);
        });
        writer.finish(p);
    });
}

template <int E, class A, class Policy>
inline void emit_rows(const Operands<A>& o, const Tasks& tasks, int64_t task, const Policy& policy,
                      const RowsMemory<A>& memory, A* params, const GradientWriter<A>& writer) {
    auto totals = policy.totals(params);
    const auto visit = [&](const Rows<A>& x) {
        if (x.count == 0) return writer.put_nothing(x.i);
        for_each_group<register_rows<A, E>>(0, x.count, [&]<int rows>(int64_t r) {
            Votes<A, rows, E> votes(x.u + r, x.weight, o.K);
            policy.emit(votes, x.b + r, totals);
            writer.put({0, rows, x.i, x.weight, r == 0, r + rows == x.count}, x.u + r, votes, x.b + r);
        });
    };
    for_each_capsule(o, tasks, task, memory, visit, [&](int64_t b, int64_t i) { writer.put_absent(b, i); });
    policy.add(totals, params);
}

template <class A, EmittingPolicy<A> Policy>
inline void emit(const Operands<A>& o, const Policy& policy, const CapsuleGradients& gradients,
                 A* params /* [policy.param_count()] */) {
    const Capsules& c = o.c;
    const int64_t param_count = policy.param_count(), weight_size = o.gradient_size;
    const bool shared = o.shared() && gradients.weight && !c.votes_given;
    const int64_t shared_size = shared ? weight_size : 0;
    const Tasks tasks(c, param_count + shared_size, false);
    Buffer<A> param_partial(tasks.blocks * param_count), shared_partial(tasks.blocks * shared_size);
    const ThreadScratch<A> w(o, true);
    const bool panels = o.layout == Layout::items;
    const int64_t scratch_size = ceil_div(policy.scratch_size(), 16) * 16;
    const int64_t weights_size = ceil_div((panels ? w.capsules : 1) * weight_size, 16) * 16;
    const int64_t memory_size = ceil_div(w.total + scratch_size + weights_size + Tile<A>::size * o.K, 64) * 64;
    Buffer<A> memory(memory_size * c.context.threads);
    const RowsMemory<A> rows_memory(o, c.context.threads);
    const bool direct = o.direct_gradient() && !shared;
    const int64_t number = size_of(c.dtype), weight_bytes = c.N * o.gradient_stride() * number;
    if (gradients.weight) prefer_huge_pages(gradients.weight, weight_bytes);
    if (gradients.u) prefer_huge_pages(gradients.u, c.B * c.N * o.K * number);
    const bool nontemporal = direct && weight_bytes >= nontemporal_bytes &&
                             reinterpret_cast<uintptr_t>(gradients.weight) % CAPSOPS_VECTOR_BYTES == 0;

#pragma omp parallel for schedule(dynamic) num_threads(c.context.threads) if (tasks.count() > 1)
    for (int64_t task = 0; task < tasks.count(); ++task) {
        if (tasks.watch.stopped()) continue;
        A* own = memory.get() + omp_get_thread_num() * memory_size;
        A* scratch = own + w.total;
        A* g_weight = shared ? shared_partial.get() + task * weight_size : scratch + scratch_size;
        A* sums = param_partial.get() + task * param_count;
        fill(sums, param_count, A(0));
        if (shared) fill(g_weight, weight_size, A(0));
        if (panels) {
            const PanelWriter<A> writer{o, gradients, direct, nontemporal, g_weight, own + w.g_rows};
            emit_panels(o, tasks, task, policy, w, own, scratch, sums, writer);
        } else {
            const GradientWriter<A> writer{o,           gradients, direct,
                                           nontemporal, g_weight,  scratch + scratch_size + weights_size};
            for_vote_vectors(o, [&]<int E>() {
                if constexpr (E > 0 && Policy::takes_registers)
                    emit_rows<E>(o, tasks, task, policy, rows_memory, sums, writer);
                else
                    emit_tiles(o, tasks, task, policy, w, own, scratch, sums, writer);
            });
        }
        if (nontemporal) fence_nontemporal();
    }
    tasks.watch.finish();
    if (param_count) add_blocks(param_partial.get(), tasks.blocks, param_count, params, c.context.threads);
    if (shared) {
        add_blocks(shared_partial.get(), tasks.blocks, weight_size, memory.get(), 1);
        o.store_weight_gradient(memory.get(), 0, gradients.weight);
    }
}

// ---- output capsules -------------------------------------------------------------------------------------------

// squash and its vector-Jacobian product for the B·J output capsules of a routing, [rows, D].
template <class A> inline void squash_outputs(const A* s, A* v, int64_t rows, int64_t D, SquashKind kind) {
    for (int64_t r = 0; r < rows; ++r) squash_vector<A>(s + r * D, v + r * D, D, kind);
}

template <class A>
inline void squash_outputs_backward(const A* g_v, const A* s, A* g_s, int64_t rows, int64_t D, SquashKind kind) {
    for (int64_t r = 0; r < rows; ++r) squash_vector_backward<A>(g_v + r * D, s + r * D, g_s + r * D, D, kind);
}

}  // namespace capsops::cpu::CAPSOPS_ISA
