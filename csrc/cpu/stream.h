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
// Two regimes share the loops. Many input capsules and a small batch: the blocks of capsules are the parallel tasks, a
// tile takes several capsules, and memory is the bound. Few capsules and a large batch: groups of batch items are tasks
// too, a tile is a part of one capsule's batch, and arithmetic is the bound.
//
// Blocks and groups depend on the shape alone. Every block has partial sums of its own, which are added in the order of
// the blocks, in double: so the result is bitwise the same for any number of threads, and no sum runs over more than
// one block's capsules in the accumulation type.
#pragma once

#include <cstring>
#include <new>

#include <omp.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../dtypes.h"
#include "../routing.h"
#include "tile.h"

namespace capsops::cpu::CAPSOPS_ISA {

inline int64_t at_most(int64_t a, int64_t b) {
    return a < b ? a : b;
}
inline int64_t at_least(int64_t a, int64_t b) {
    return a > b ? a : b;
}
inline int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

// Uninitialised memory on a cache line. Its lack is a std::bad_alloc, which becomes a status: so none is taken inside a
// parallel region.
template <class A> class Buffer {
  public:
    explicit Buffer(int64_t size)
        : data_(static_cast<A*>(::operator new(sizeof(A) * static_cast<size_t>(at_least(size, 1)), line))) {}
    ~Buffer() { ::operator delete(data_, line); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    A* get() const { return data_; }

  private:
    static constexpr std::align_val_t line{64};
    A* data_;
};

template <class A> inline void fill(A* x, int64_t n, A value) {
    for (int64_t m = 0; m < n; ++m) x[m] = value;
}

// ---- storage types -------------------------------------------------------------------------------------

template <class T> struct DtypeOf;
template <> struct DtypeOf<float> {
    static constexpr Dtype value = Dtype::float32;
};
template <> struct DtypeOf<double> {
    static constexpr Dtype value = Dtype::float64;
};

// Calls function.operator()<storage type>() for a dtype whose sums are kept in A.
template <class A, class Function> inline void for_storage(Dtype dtype, Function function) {
    if (dtype == DtypeOf<A>::value) return function.template operator()<A>();
    if constexpr (sizeof(A) == sizeof(float)) {
        if (dtype == Dtype::bfloat16) return function.template operator()<bfloat16>();
        return function.template operator()<float16>();
    }
}

// n numbers of storage type from x[offset], and back.
template <class A> inline void read(const void* x, Dtype dtype, int64_t offset, int64_t n, A* to) {
    for_storage<A>(dtype, [&]<class T>() { convert(static_cast<const T*>(x) + offset, n, to); });
}
template <class A> inline void write(const A* from, int64_t n, void* x, Dtype dtype, int64_t offset) {
    for_storage<A>(dtype, [&]<class T>() { convert(from, n, static_cast<T*>(x) + offset); });
}

// Calls function.operator()<accumulation type>() for a dtype, and turns a lack of memory into a status.
template <class Function> inline Status for_accumulation(Dtype dtype, Function function) {
    try {
        if (dtype == Dtype::float64)
            function.template operator()<double>();
        else
            function.template operator()<float>();
        return Status::ok;
    } catch (const std::bad_alloc&) {
        return Status::out_of_memory;
    }
}

// ---- the operands ----------------------------------------------------------------------------------------

// The capsules as the tiles see them: in the accumulation type A, D rounded up to whole vectors, and matrices of P rows
// as vectors of P·K and P·D components, for which W becomes block diagonal.
template <class A> struct Operands {
    static constexpr int lanes = Lanes<A>::count;

    const Capsules& c;
    int64_t K, J, H, D, JD;  // H = P·D components of a vote; D from here on is H rounded up
    bool direct_u, direct_weight;
    int64_t slots;  // transformation matrices in one tile

    explicit Operands(const Capsules& c)
        : c(c),
          K(c.rows * c.K),
          J(c.J),
          H(c.rows * c.D),
          D(ceil_div(H, lanes) * lanes),
          JD(J * D),
          direct_u(c.dtype == DtypeOf<A>::value),
          direct_weight(direct_u && c.rows == 1 && D == c.D),
          // As many as stay in the second-level cache.
          slots(at_least(at_most((int64_t{1} << 16) / at_least(K * JD, 1), lanes), 1)) {}

    bool shared() const { return c.weight_stride == 0; }

    // Adds the items (b, i), (b + 1, i) … to a tile. scratch: [lanes, K], where u has to be converted.
    void load_items(Tile<A>& t, int64_t b, int64_t i, int count, A* scratch) const {
        const int64_t stride = c.N * K, offset = b * stride + i * K;
        const int begin = t.count;
        for (int m = 0; m < count; ++m) t.b[begin + m] = b + m;
        for (int m = 0; m < count; ++m) t.i[begin + m] = i;
        if (direct_u) {
            const A* u = static_cast<const A*>(c.u) + offset;
            for (int m = 0; m < count; ++m) t.u[begin + m] = u + m * stride;
        } else {
            for (int m = 0; m < count; ++m) {
                t.u[begin + m] = scratch + (begin + m) * K;
                read(c.u, c.dtype, offset + m * stride, K, scratch + (begin + m) * K);
            }
        }
        t.count = begin + count;
    }

    const A* load_weight(int64_t i, A* scratch) const {
        if (direct_weight) return static_cast<const A*>(c.weight) + i * c.weight_stride;
        if (c.rows == 1 && D == c.D) {
            read(c.weight, c.dtype, i * c.weight_stride, K * JD, scratch);
            return scratch;
        }
        fill(scratch, K * JD, A(0));
        for (int64_t k = 0; k < c.K; ++k)
            for (int64_t j = 0; j < J; ++j) {
                A* to = scratch + k * JD + j * D;
                read(c.weight, c.dtype, i * c.weight_stride + (k * J + j) * c.D, c.D, to);
                for (int64_t p = 1; p < c.rows; ++p)
                    for (int64_t d = 0; d < c.D; ++d) to[p * (c.K * JD + c.D) + d] = to[d];
            }
        return scratch;
    }

    // The gradient of one matrix [K, J, D] to where it belongs; `from` changes if capsules have rows.
    void store_weight_gradient(A* from, int64_t i, void* gradient) const {
        for (int64_t k = 0; k < c.K; ++k)
            for (int64_t j = 0; j < J; ++j) {
                A* sum = from + k * JD + j * D;
                for (int64_t p = 1; p < c.rows; ++p)
                    for (int64_t d = 0; d < c.D; ++d) sum[d] += sum[p * (c.K * JD + c.D) + d];
                write(sum, c.D, gradient, c.dtype, i * c.weight_stride + (k * J + j) * c.D);
            }
    }
};

// [rows, H] as [rows, D], with zeros behind, and back.
template <class A> inline void pad(const A* from, int64_t rows, int64_t H, int64_t D, A* to) {
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t d = 0; d < D; ++d) to[r * D + d] = d < H ? from[r * H + d] : A(0);
}
template <class A> inline void unpad(const A* from, int64_t rows, int64_t H, int64_t D, A* to) {
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t d = 0; d < H; ++d) to[r * H + d] = from[r * D + d];
}

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
        const int64_t fitting = at_least(most_partial / at_least(partial_size, 1), 1);
        const int64_t wanted = at_least(at_most(ceil_div(N, smallest), at_most(most_blocks, fitting)), 1);
        block_size = at_least(ceil_div(N, wanted), 1);
        blocks = ceil_div(N, block_size);
        // A group is whole tiles of any instruction set.
        constexpr int64_t tile = 16, most_tasks = 64;
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

// What one thread needs besides its tile.
template <class A> struct Workspace {
    int64_t weight, u, votes, total;  // offsets

    Workspace(const Operands<A>& o, bool gradients) {
        weight = 0;
        u = weight + (o.direct_weight ? 0 : o.slots * o.K * o.JD);
        votes = u + (o.direct_u ? 0 : Tile<A>::size * ceil_div(o.K, Tile<A>::size) * Tile<A>::size);
        total = votes + (gradients ? 2 : 1) * Tile<A>::size * o.JD;
    }
};

// Fills tiles with the pairs that are there, makes their votes if wanted, and calls visit(tile) for each. absent(b, i)
// is called for the pairs that are not there.
template <bool with_votes, class A, class Visit, class Absent>
inline void for_each_tile(const Operands<A>& o, const Tasks& tasks, int64_t task, A* memory, const Workspace<A>& w,
                          Visit visit, Absent absent) {
    Tile<A> t;
    t.K = o.K, t.J = o.J, t.D = o.D, t.JD = o.JD;
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
            if (matrices == o.slots || t.segment_count == Tile<A>::most_segments) {
                flush();
                matrices = 0;
            }
            weight = o.load_weight(i, memory + w.weight + matrices++ * o.K * o.JD);
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
            o.load_items(t, b, i, count, u_scratch);
            b += count;
            t.segments[t.segment_count - 1].end = t.count;
            if (t.count < Tile<A>::size || b == b1) continue;
            flush();
            open = false;
            // The matrix in use is the first one of the next tile.
            if (!shared && !o.direct_weight && weight != memory + w.weight) {
                std::memcpy(memory + w.weight, weight, sizeof(A) * static_cast<size_t>(o.K * o.JD));
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

// ---- the loops -----------------------------------------------------------------------------------------------

// out[b] = Σ_i contribution of tile to row b; visit(tile, sum, scratch).
template <bool with_votes, class A, class Visit>
inline void reduce_tiles(const Operands<A>& o, int64_t row_size, int64_t scratch_size, A* out, Visit visit) {
    const Capsules& c = o.c;
    const int64_t size = c.B * row_size;
    const Tasks tasks(c, size, true);
    Buffer<A> partial(tasks.blocks * size);
    const Workspace<A> w(o, false);
    const int64_t memory_size = ceil_div(w.total + scratch_size, 64) * 64;
    Buffer<A> memory(memory_size * c.threads);

#pragma omp parallel for schedule(dynamic) num_threads(c.threads) if (tasks.count() > 1)
    for (int64_t task = 0; task < tasks.count(); ++task) {
        A* own = memory.get() + omp_get_thread_num() * memory_size;
        A* sum = partial.get() + task / tasks.groups * size;
        const int64_t begin = tasks.first_item(task);
        fill(sum + begin * row_size, (tasks.end_item(task) - begin) * row_size, A(0));
        for_each_tile<with_votes>(
            o, tasks, task, own, w, [&](Tile<A>& t) { visit(t, sum, own + w.total); }, [](int64_t, int64_t) {});
    }
    add_blocks(partial.get(), tasks.blocks, size, out, c.threads);
}

template <class A> inline void contract(const Operands<A>& o, A* out /* [B, J, D] */) {
    reduce_tiles<false>(o, o.JD, 0, out, [&](Tile<A>& t, A* sum, A*) {
        A* rows[Tile<A>::size];
        for (int r = 0; r < t.count; ++r) rows[r] = sum + t.b[r] * o.JD;
        for (int s = 0; s < t.segment_count; ++s) {
            const Segment<A>& g = t.segments[s];
            // Rows of one product must differ: a shared matrix may meet the same batch item twice in a tile.
            int begin = g.begin;
            while (begin < g.end) {
                int end = begin + 1;
                while (end < g.end && t.i[end] == t.i[begin]) ++end;
                multiply<true>(t.u + begin, end - begin, g.weight, o.K, o.JD, o.JD, rows + begin);
                begin = end;
            }
        }
    });
}

template <class A, class Policy>
inline void reduce(const Operands<A>& o, const Policy& policy, A* out /* [B, policy.row_size()] */) {
    reduce_tiles<true>(o, policy.row_size(), policy.scratch_size(), out,
                       [&](Tile<A>& t, A* sum, A* scratch) { policy.accumulate(t, sum, scratch); });
}

// g_u of one segment. scratch: [lanes, K].
template <class A>
inline void project_to_u(const Operands<A>& o, const Tile<A>& t, const Segment<A>& s, void* g_u, A* scratch) {
    constexpr int n = Tile<A>::size;
    const int count = s.end - s.begin;
    const A* g = t.g_votes + s.begin * o.JD;
    const auto offset = [&](int r) { return (t.b[s.begin + r] * o.c.N + t.i[s.begin + r]) * o.K; };
    A* rows[n];
    for (int r = 0; r < count; ++r) rows[r] = o.direct_u ? static_cast<A*>(g_u) + offset(r) : scratch + r * o.K;
    // Transposing W pays for several items at once.
    const bool several = count * 4 >= n;
    const auto cross_lanes = [&] {
        dots(g, o.JD, count, s.weight, o.JD, o.K, o.JD, [&](int64_t r, int64_t k, int64_t found, const A* x) {
            for (int64_t m = 0; m < found; ++m) rows[r][k + m] = x[m];
        });
    };
    if (several && o.K == n) {
        project<1>(g, o.JD, count, s.weight, o.JD, o.JD, rows);
    } else if constexpr (sizeof(A) == 4) {
        if (several && 2 * o.K == n)
            project<2>(g, o.JD, count, s.weight, o.JD, o.JD, rows);
        else
            cross_lanes();
    } else {
        cross_lanes();
    }
    if (o.direct_u) return;
    for (int r = 0; r < count; ++r) write(rows[r], o.K, g_u, o.c.dtype, offset(r));
}

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
inline void emit(const Operands<A>& o, const Policy& policy, const CapsuleGradients& gradients,
                 A* params /* [policy.param_count()] */) {
    const Capsules& c = o.c;
    const int64_t KJD = o.K * o.JD, param_count = policy.param_count();
    const bool shared = o.shared() && gradients.weight;
    const int64_t shared_size = shared ? KJD : 0;
    const Tasks tasks(c, param_count + shared_size, false);
    Buffer<A> param_partial(tasks.blocks * param_count), shared_partial(tasks.blocks * shared_size);
    const Workspace<A> w(o, true);
    const int64_t scratch_size = ceil_div(policy.scratch_size(), 64) * 64;
    const int64_t memory_size = ceil_div(w.total + scratch_size + KJD + Tile<A>::size * o.K, 64) * 64;
    Buffer<A> memory(memory_size * c.threads);
    const bool direct = o.direct_weight && !shared;
    const int64_t number = c.dtype == Dtype::float64 ? 8 : c.dtype == Dtype::float32 ? 4 : 2;
    const int64_t weight_bytes = c.N * c.weight_stride * number;
    if (gradients.weight) prefer_huge_pages(gradients.weight, weight_bytes);
    if (gradients.u) prefer_huge_pages(gradients.u, c.B * c.N * o.K * number);
    const bool past_caches = direct && weight_bytes >= streamed_bytes &&
                             reinterpret_cast<uintptr_t>(gradients.weight) % CAPSOPS_VECTOR_BYTES == 0;

#pragma omp parallel for schedule(dynamic) num_threads(c.threads) if (tasks.count() > 1)
    for (int64_t task = 0; task < tasks.count(); ++task) {
        A* own = memory.get() + omp_get_thread_num() * memory_size;
        A* scratch = own + ceil_div(w.total, 16) * 16;
        A* g_weight = shared ? shared_partial.get() + task * KJD : scratch + scratch_size;
        A* g_u = scratch + scratch_size + KJD;
        A* sums = param_partial.get() + task * param_count;
        fill(sums, param_count, A(0));
        if (shared) fill(g_weight, KJD, A(0));

        const auto visit = [&](Tile<A>& t) {
            policy.emit(t, sums, scratch);
            const A* rows[Tile<A>::size];
            for (int r = 0; r < t.count; ++r) rows[r] = t.g_votes + r * o.JD;
            for (int s = 0; s < t.segment_count; ++s) {
                const Segment<A>& g = t.segments[s];
                const int count = g.end - g.begin;
                if (gradients.u && count) project_to_u(o, t, g, gradients.u, g_u);
                if (!gradients.weight) continue;
                const bool whole = direct && g.first && g.last;
                A* out = whole ? static_cast<A*>(gradients.weight) + g.i * KJD : g_weight;
                outer(t.u + g.begin, rows + g.begin, count, o.K, o.JD, out, shared || !g.first, whole && past_caches);
                if (g.last && !whole && !shared) o.store_weight_gradient(g_weight, g.i, gradients.weight);
            }
        };
        const auto absent = [&](int64_t b, int64_t i) {
            if (!gradients.u) return;
            fill(g_u, o.K, A(0));
            write(g_u, o.K, gradients.u, c.dtype, (b * c.N + i) * o.K);
        };
        for_each_tile<Policy::needs_votes>(o, tasks, task, own, w, visit, absent);
        if (past_caches) end_streaming();
    }
    if (param_count) add_blocks(param_partial.get(), tasks.blocks, param_count, params, c.threads);
    if (shared) {
        add_blocks(shared_partial.get(), tasks.blocks, KJD, memory.get(), 1);
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
