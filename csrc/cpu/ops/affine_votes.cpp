// The votes û_bi = u_bi W_i as a tensor. For inspection only: the routings avoid this memory, [B, N, J, D].

#include "../engine/stream.h"

namespace capsops::cpu::CAPSOPS_ISA {
namespace {

// Writes the votes. It sums nothing.
template <class A> struct StoredVotes {
    static constexpr bool takes_registers = false;
    const Operands<A>& o;
    void* votes;  // [B, N, J, H] storage

    int64_t row_size() const { return 0; }
    int64_t scratch_size() const { return 0; }
    void accumulate(Tile<A>& t, A*, A*) const {
        for (int r = 0; r < t.count; ++r)
            for (int64_t j = 0; j < o.J; ++j)
                write(t.votes + r * o.JD + j * o.D, o.H, votes, o.c.dtype, ((t.b[r] * o.c.N + t.i[r]) * o.J + j) * o.H);
    }
};

// The gradient of the votes that the caller gave.
template <class A> struct StoredVoteGradient {
    static constexpr bool needs_votes = false, takes_registers = false;
    const Operands<A>& o;
    const void* g_votes;  // [B, N, J, H] storage

    int64_t param_count() const { return 0; }
    int64_t scratch_size() const { return 0; }
    void emit(Tile<A>& t, A*, A*) const {
        for (int r = 0; r < t.count; ++r)
            for (int64_t j = 0; j < o.J; ++j) {
                A* to = t.g_votes + r * o.JD + j * o.D;
                fill(to + o.H, o.D - o.H, A(0));
                read(g_votes, o.c.dtype, ((t.b[r] * o.c.N + t.i[r]) * o.J + j) * o.H, o.H, to);
            }
    }
};

}  // namespace

Status affine_votes(const Capsules& c, void* votes) {
    return for_accumulation(c.dtype, [&]<class A>() {
        const Operands<A> o(c, Layout::components);
        reduce(o, StoredVotes<A>{o, votes}, static_cast<A*>(nullptr));
    });
}

Status affine_votes_backward(const Capsules& c, const void* g_votes, void* g_u, void* g_weight) {
    return for_accumulation(c.dtype, [&]<class A>() {
        const Operands<A> o(c, Layout::components);
        emit(o, StoredVoteGradient<A>{o, g_votes}, {g_u, g_weight}, static_cast<A*>(nullptr));
    });
}

}  // namespace capsops::cpu::CAPSOPS_ISA
