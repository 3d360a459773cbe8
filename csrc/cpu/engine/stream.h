// The loops over the input capsules that every routing on the CPU uses.
//
//   contract   out[b] = Σ_i û_bi                                 one pass over u and W that forms no votes
//   reduce     out[b] = Σ_i policy(û_bi)                         one pass over u and W that writes only out
//   emit       g_u,bi = g_û,bi W_iᵀ;  g_W,i = Σ_b u_biᵀ g_û,bi   one pass that recomputes û and writes both
//
// What distinguishes the routings is in policies: ReducingPolicy and EmittingPolicy below. The loops are compiled once,
// in stream.cpp, and call a policy once for each tile, through Reduction and Emission. Only the loops with votes in
// registers (votes.h) are compiled for each policy, because there the compiler has to see both.
//
// The loops serve two regimes. With many input capsules and a small batch, blocks of capsules are the parallel tasks, a
// tile holds several capsules, the lanes of a vector hold components of a vote, and memory is the bound. With few
// capsules and a large batch, groups of batch items are tasks too, a tile is a part of one capsule's batch, the lanes
// hold batch items (panel.h), and arithmetic is the bound.
//
// Votes that are given have neither matrices nor products; a routing of several passes takes their batch in blocks that
// a cache holds (blocks.h).
//
// Results are bitwise the same for any number of threads: blocks and groups depend on the shape alone, every block has
// its own partial sums, and these are added in the order of the blocks, in double. So no sum in the accumulation type
// runs over more than one block of capsules.
#pragma once

#include <concepts>

#include "../../math/squash.h"
#include "gradients.h"

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

// ---- a policy as the loops see it ---------------------------------------------------------------------------------
//
// ReductionBy and EmissionBy call a copy of the policy, because the compiler keeps the members of a local variable in
// registers. Those of any other policy it would have to read again after each number that the policy stores.

template <class A> struct Reduction {
    const bool takes_registers;

    virtual int64_t row_size() const = 0;
    virtual int64_t scratch_size() const = 0;
    // As PlainSums has them.
    virtual void begin(A* sum, int64_t first, int64_t end) const = 0;
    virtual void align(A* partial, int64_t blocks, int threads) const = 0;
    virtual void accumulate(Tile<A>& tile, A* sum, A* scratch) const = 0;
    // Accumulates the votes of a task in registers.
    virtual void accumulate_rows(const Operands<A>& o, const Tasks& tasks, int64_t task, const RowsMemory<A>& memory,
                                 A* sum) const = 0;

  protected:
    explicit Reduction(bool takes_registers) : takes_registers(takes_registers) {}
    ~Reduction() = default;
};

template <class A, ReducingPolicy<A> Policy> class ReductionBy final : public Reduction<A> {
  public:
    explicit ReductionBy(const Policy& policy)
        : Reduction<A>(Policy::takes_registers), policy_(policy), sums_(sums_of<A>(policy)) {}

    int64_t row_size() const override { return policy_.row_size(); }
    int64_t scratch_size() const override { return policy_.scratch_size(); }
    void begin(A* sum, int64_t first, int64_t end) const override { sums_.begin(sum, first, end); }
    void align(A* partial, int64_t blocks, int threads) const override { sums_.align(partial, blocks, threads); }
    void accumulate(Tile<A>& tile, A* sum, A* scratch) const override {
        const Policy policy = policy_;
        policy.accumulate(tile, sum, scratch);
    }

    void accumulate_rows(const Operands<A>& o, const Tasks& tasks, int64_t task, const RowsMemory<A>& memory,
                         A* sum) const override {
        if constexpr (Policy::takes_registers)
            for_vote_vectors(o, [&]<int E>() {
                const Policy policy = policy_;
                const auto visit = [&](const Rows<A>& x) {
                    for_each_group<register_rows<A, E>>(0, x.count, [&]<int rows>(int64_t r) {
                        const Votes<A, rows, E> votes(x.u + r, x.weight, o.K);
                        policy.accumulate(votes, x.b + r, sum);
                    });
                };
                for_each_capsule(o, tasks, task, memory, visit, [](int64_t, int64_t) {});
            });
    }

  private:
    const Policy& policy_;
    const decltype(sums_of<A>(std::declval<const Policy&>())) sums_;
};

template <class A> struct Emission {
    const bool needs_votes, takes_registers;

    virtual int64_t param_count() const = 0;
    virtual int64_t scratch_size() const = 0;
    virtual void emit(Tile<A>& tile, A* params, A* scratch) const = 0;
    // Emits for the votes of a task in registers.
    virtual void emit_rows(const Operands<A>& o, const Tasks& tasks, int64_t task, const RowsMemory<A>& memory,
                           A* params, const GradientWriter<A>& writer) const = 0;

  protected:
    Emission(bool needs_votes, bool takes_registers) : needs_votes(needs_votes), takes_registers(takes_registers) {}
    ~Emission() = default;
};

template <class A, EmittingPolicy<A> Policy> class EmissionBy final : public Emission<A> {
  public:
    explicit EmissionBy(const Policy& policy)
        : Emission<A>(Policy::needs_votes, Policy::takes_registers), policy_(policy) {}

    int64_t param_count() const override { return policy_.param_count(); }
    int64_t scratch_size() const override { return policy_.scratch_size(); }
    void emit(Tile<A>& tile, A* params, A* scratch) const override {
        const Policy policy = policy_;
        policy.emit(tile, params, scratch);
    }

    void emit_rows(const Operands<A>& o, const Tasks& tasks, int64_t task, const RowsMemory<A>& memory, A* params,
                   const GradientWriter<A>& writer) const override {
        if constexpr (Policy::takes_registers)
            for_vote_vectors(o, [&]<int E>() {
                const Policy policy = policy_;
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
            });
    }

  private:
    const Policy& policy_;
};

// ---- the loops ----------------------------------------------------------------------------------------------------

template <class A> void contract(const Operands<A>& o, A* out /* a state */);
template <class A>
void reduce_by(const Operands<A>& o, const Reduction<A>& reduction, A* out /* [state_rows, row_size()] */);
template <class A>
void emit_by(const Operands<A>& o, const Emission<A>& emission, const CapsuleGradients& gradients,
             A* params /* [param_count()] */);

template <class A, ReducingPolicy<A> Policy> inline void reduce(const Operands<A>& o, const Policy& policy, A* out) {
    reduce_by(o, ReductionBy<A, Policy>(policy), out);
}

template <class A, EmittingPolicy<A> Policy>
inline void emit(const Operands<A>& o, const Policy& policy, const CapsuleGradients& gradients, A* params) {
    emit_by(o, EmissionBy<A, Policy>(policy), gradients, params);
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
