// The loops over the input capsules: see stream.h.

#include "stream.h"

#include "traverse.h"

namespace capsops::cpu::CAPSOPS_ISA {
namespace {

// Calls visit(tile, sum [B, row_size], scratch [scratch_size]) for every tile.
template <class A, class Sums, class Visit>
inline void reduce_tiles(const Operands<A>& o, bool with_votes, const Sums& sums, int64_t scratch_size, A* out,
                         Visit visit) {
    const ThreadScratch<A> w(o, false);
    sum_over_tasks(o.c, 1, sums, w.total + scratch_size, out, [&](const Tasks& tasks, int64_t task, A* sum, A* own) {
        for_each_tile(
            o, with_votes, tasks, task, own, w, [&](Tile<A>& t) { visit(t, sum, own + w.total); },
            [](int64_t, int64_t) {});
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
        const int64_t copies = c.one_vote ? o.J : 1;
        for (int64_t b = 0; b < c.B; ++b)
            for (int64_t j = 0; j < copies; ++j, out += K)
                std::memcpy(out, sum.get() + b * K, sizeof(A) * static_cast<size_t>(K));
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

template <class A>
inline void emit_tiles(const Operands<A>& o, const Tasks& tasks, int64_t task, const Emission<A>& emission,
                       const ThreadScratch<A>& w, A* own, A* scratch, A* params, const GradientWriter<A>& writer) {
    const auto visit = [&](Tile<A>& t) {
        emission.emit(t, params, scratch);
        for (int s = 0; s < t.segment_count; ++s) {
            const Segment<A>& g = t.segments[s];
            writer.put(g, t.u + g.begin, t.g_votes + g.begin * o.JD, t.b + g.begin, t.i + g.begin);
        }
    };
    for_each_tile(o, emission.needs_votes, tasks, task, own, w, visit,
                  [&](int64_t b, int64_t i) { writer.put_absent(b, i); });
}

template <class A>
inline void emit_panels(const Operands<A>& o, const Tasks& tasks, int64_t task, const Emission<A>& emission,
                        const ThreadScratch<A>& w, A* own, A* scratch, A* params, const PanelWriter<A>& writer) {
    for_each_panel(o, tasks, task, own, w, [&](const Panel<A>& p) {
        for_each_tile_of(o, p, own, w, [&](Tile<A>& t, int64_t s) {
            emission.emit(t, params, scratch);
            writer.put(p, s, t);
        });
        writer.finish(p);
    });
}

}  // namespace

template <class A> void contract(const Operands<A>& o, A* out) {
    const Capsules& c = o.c;
    if (c.weight_stride == 0) {
        Buffer<A> sum(c.B * o.JH);
        contract_shared(c, sum.get());
        return o.pack(sum.get(), out);
    }
    if (o.layout == Layout::items) return contract_panels(o, out);
    if (o.direct_u && o.direct_weight && !c.mask) return contract_rows(o, out);
    reduce_tiles(o, false, PlainSums<A>{o.JD}, 0, out, [&](Tile<A>& t, A* sum, A*) {
        A* rows[Tile<A>::size];
        for (int r = 0; r < t.count; ++r) rows[r] = sum + t.b[r] * o.JD;
        for (int s = 0; s < t.segment_count; ++s) {
            const Segment<A>& g = t.segments[s];
            multiply<true>(t.u + g.begin, g.end - g.begin, g.weight, o.K, o.JD, o.JD, rows + g.begin);
        }
    });
}

template <class A> void reduce_by(const Operands<A>& o, const Reduction<A>& reduction, A* out) {
    if (o.layout == Layout::items) {
        const ThreadScratch<A> w(o, false);
        return reduce_panels(o, w, reduction, reduction.scratch_size(), out, [&](const Panel<A>& p, A* sum, A* own) {
            for_each_tile_of(o, p, own, w, [&](Tile<A>& t, int64_t) { reduction.accumulate(t, sum, own + w.total); });
        });
    }
    if (reduction.takes_registers && vote_vectors(o) > 0) {
        const RowsMemory<A> memory(o, o.c.context.threads);
        return sum_over_tasks(o.c, 1, reduction, 0, out, [&](const Tasks& tasks, int64_t task, A* sum, A*) {
            reduction.accumulate_rows(o, tasks, task, memory, sum);
        });
    }
    reduce_tiles(o, true, reduction, reduction.scratch_size(), out,
                 [&](Tile<A>& t, A* sum, A* scratch) { reduction.accumulate(t, sum, scratch); });
}

template <class A>
void emit_by(const Operands<A>& o, const Emission<A>& emission, const CapsuleGradients& gradients, A* params) {
    const Capsules& c = o.c;
    const int64_t param_count = emission.param_count(), weight_size = o.gradient_size;
    const bool shared = o.shared() && gradients.weight && !c.votes_given;
    const int64_t shared_size = shared ? weight_size : 0;
    // Where no sum over the batch is wanted, the batch may be split too.
    const Tasks tasks(c, param_count + shared_size, c.one_vote && param_count == 0);
    Buffer<A> param_partial(tasks.blocks * param_count), shared_partial(tasks.blocks * shared_size);
    const ThreadScratch<A> w(o, true);
    const bool panels = o.layout == Layout::items, rows = emission.takes_registers && vote_vectors(o) > 0;
    const int64_t scratch_size = ceil_div(emission.scratch_size(), 16) * 16;
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
            emit_panels(o, tasks, task, emission, w, own, scratch, sums, writer);
        } else {
            const GradientWriter<A> writer{o,           gradients, direct,
                                           nontemporal, g_weight,  scratch + scratch_size + weights_size};
            if (rows)
                emission.emit_rows(o, tasks, task, rows_memory, sums, writer);
            else
                emit_tiles(o, tasks, task, emission, w, own, scratch, sums, writer);
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

template void contract(const Operands<float>&, float*);
template void contract(const Operands<double>&, double*);
template void reduce_by(const Operands<float>&, const Reduction<float>&, float*);
template void reduce_by(const Operands<double>&, const Reduction<double>&, double*);
template void emit_by(const Operands<float>&, const Emission<float>&, const CapsuleGradients&, float*);
template void emit_by(const Operands<double>&, const Emission<double>&, const CapsuleGradients&, double*);

}  // namespace capsops::cpu::CAPSOPS_ISA
