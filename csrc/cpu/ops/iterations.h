// The iterations of routing by agreement, and a single one, around the passes that its forms differ in.
#pragma once

#include "../engine/blocks.h"
#include "../engine/stream.h"

namespace capsops::cpu::CAPSOPS_ISA {

// Forward. reduce(t, V, sum) writes Σ_i c_ij û_ij of iteration t to sum, a state. V is a state too, the sum of the
// output capsules of all earlier iterations; null in the first iteration.
template <class A, class Reduce>
inline void route(const Operands<A>& o, const A* bias /* [J, H], or null */, int64_t iterations, SquashKind kind,
                  A* v /* [B, J, H] */, A* s /* [iterations, B, J, H] */, Reduce reduce) {
    const int64_t rows = o.c.B * o.J, size = rows * o.H;
    Buffer<A> sum(o.state_size()), total(size), V(o.state_size());
    fill(total.get(), size, A(0));
    for (int64_t t = 0; t < iterations; ++t) {
        A* s_t = s + t * size;
        if (t > 0) o.pack(total.get(), V.get());
        reduce(t, t > 0 ? V.get() : nullptr, sum.get());
        o.unpack(sum.get(), s_t);
        if (bias)
            for (int64_t x = 0; x < size; ++x) s_t[x] += bias[x % o.JH];
        squash_outputs(s_t, v, rows, o.H, kind);
        for (int64_t x = 0; x < size; ++x) total.get()[x] += v[x];
    }
}

// Backward: V^t and the gradient of s^t for every iteration t. With detach only that of the last one is computed.
template <class A> struct RouteGradients {
    const Operands<A>& o;
    const int64_t iterations, compact /* numbers of [B, J, H] */;
    const bool detach;
    Buffer<A> V;            // [iterations, a state]: the sum of v over the iterations before
    Buffer<A> g_s;          // [iterations, a state]
    Buffer<A> g_s_compact;  // the same, [iterations, B, J, H]

    // adjoint(t, V^t, g_s^t, g_s_compact, H) writes H^t = Σ_i δ^t_ij û_ij, the gradient of V^t, to H, a state. It is
    // called for the iterations from the last one to the second, because g_s^{t−1} depends on H^t.
    template <class Adjoint>
    RouteGradients(const Operands<A>& o, int64_t iterations, const A* s /* [iterations, B, J, H] */,
                   const A* g_v /* [B, J, H] */, bool detach, SquashKind kind, Adjoint adjoint)
        : o(o),
          iterations(iterations),
          compact(o.c.B * o.JH),
          detach(detach),
          V(iterations * o.state_size()),
          g_s(iterations * o.state_size()),
          g_s_compact(iterations * compact) {
        const int64_t rows = o.c.B * o.J, size = o.state_size(), last = iterations - 1;
        Buffer<A> v(compact), total(compact);
        fill(V.get(), size, A(0));
        fill(total.get(), compact, A(0));
        for (int64_t t = 1; t < iterations; ++t) {
            throw_if_stopped(o.c.context);
            squash_outputs(s + (t - 1) * compact, v.get(), rows, o.H, kind);
            for (int64_t x = 0; x < compact; ++x) total.get()[x] += v.get()[x];
            o.pack(total.get(), V.get() + t * size);
        }

        const auto through_squash = [&](const A* g_v, int64_t t) {
            A* g = g_s_compact.get() + t * compact;
            squash_outputs_backward(g_v, s + t * compact, g, rows, o.H, kind);
            o.pack(g, g_s.get() + t * size);
        };
        through_squash(g_v, last);
        if (detach) return;
        Buffer<A> sum(size), H(compact), g_V(compact);
        fill(g_V.get(), compact, A(0));
        for (int64_t t = last; t > 0; --t) {
            adjoint(t, V.get() + t * size, g_s.get() + t * size, g_s_compact.get(), sum.get());
            o.unpack(sum.get(), H.get());
            for (int64_t x = 0; x < compact; ++x) g_V.get()[x] += H.get()[x];
            through_squash(g_V.get(), t - 1);
        }
    }

    // The gradient of a bias that every s has.
    void sum_over_batch(A* g_bias /* [J, H] */) const {
        fill(g_bias, o.JH, A(0));
        for (int64_t x = (detach ? iterations - 1 : 0) * compact; x < iterations * compact; ++x)
            g_bias[x % o.JH] += g_s_compact.get()[x];
    }
};

// Forward in blocks: run(block, v, s) is `route` for a block, with its part of v [B, J, H] and of s [iterations, B, J,
// H].
template <class A, class Run> inline void route_in_blocks(const Capsules& c, int64_t iterations, A* v, A* s, Run run) {
    const int64_t row = c.J * c.rows * c.D;
    for_each_block<A>(c, [&](const Block& block) {
        if (block.c.B == c.B) return run(block, v, s);
        Buffer<A> own(iterations * block.c.B * row);
        run(block, v + block.first * row, own.get());
        for_each_part(block, c.B, iterations, row, [&](int64_t place, int64_t part, size_t size) {
            std::memcpy(s + place, own.get() + part, size * sizeof(A));
        });
    });
}

// Backward in blocks: run(block, s, g_v, gradients, g_bias) with the block's parts.
template <class A, class Run>
inline void route_in_blocks_backward(const Capsules& c, int64_t iterations, const A* s, const A* g_v,
                                     const CapsuleGradients& gradients, A* g_bias, Run run) {
    const int64_t row = c.J * c.rows * c.D, blocks = ceil_div(c.B, items_of_block<A>(c));
    Buffer<A> partial(g_bias ? blocks * row : 0);
    for_each_block<A>(c, [&](const Block& block) {
        if (block.c.B == c.B) return run(block, s, g_v, gradients, g_bias);
        Buffer<A> own(iterations * block.c.B * row);
        for_each_part(block, c.B, iterations, row, [&](int64_t place, int64_t part, size_t size) {
            std::memcpy(own.get() + part, s + place, size * sizeof(A));
        });
        CapsuleGradients parts{nullptr, nullptr};
        if (gradients.u) parts.u = static_cast<char*>(gradients.u) + block.first * bytes_of_votes(c);
        run(block, own.get(), g_v + block.first * row, parts, g_bias ? partial.get() + block.number * row : nullptr);
    });
    if (g_bias && blocks > 1) add_blocks(partial.get(), blocks, row, g_bias, 1);
}

// The gradient of one iteration whose V is given. reduce(g_V) writes that of V, a state; emit(size, g_V) writes the
// others, and that of V too if size is not 0.
//
// All come from one emitting pass, unless the state is large: the emitting pass does not split the batch among threads,
// so partial sums of a large state would leave it with too few blocks, and a reducing pass comes before it.
template <class A, class Reduce, class Emit>
inline void step_backward(const Operands<A>& o, void* g_state /* [B, J, H], or null */, bool emits, Reduce reduce,
                          Emit emit) {
    // The numbers of a state of which at least eight blocks may hold a partial sum each (Tasks in tasks.h).
    constexpr int64_t most_with_gradients = int64_t{1} << 15;
    const int64_t size = o.state_size();
    const bool one_pass = g_state && emits && size <= most_with_gradients;
    Buffer<A> g_V(g_state ? size : 0);
    if (g_state && !one_pass) reduce(g_V.get());
    if (emits) emit(one_pass ? size : 0, g_V.get());
    if (g_state) o.unpack(g_V.get(), static_cast<A*>(g_state));
}

}  // namespace capsops::cpu::CAPSOPS_ISA
