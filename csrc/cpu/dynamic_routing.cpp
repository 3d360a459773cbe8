// Routing by agreement (Sabour et al. 2017, procedure 1): one pass over u and W an iteration. Between the passes only
// V, the sum of the output capsules so far, is kept; the logits are recomputed from it. Saves s of every iteration,
// [iterations, B, J, D].

#include "dynamic.h"
#include "operators.h"

namespace capsops::cpu::CAPSOPS_ISA {
namespace {

template <class A> struct DynamicSum {
    Dynamic<A> dynamic;
    int64_t J, D;

    int64_t row_size() const { return J * D; }
    int64_t scratch_size() const { return J * Lanes<A>::count; }

    void accumulate(Tile<A>& t, A* sum, A* scratch) const {
        Lanes<A>* c = reinterpret_cast<Lanes<A>*>(scratch);
        dynamic.couplings(t, c);
        add_coupled(t, c, sum);
    }

    template <int rows, int E>
    CAPSOPS_INLINE void accumulate(const Votes<A, rows, E>& votes, const int64_t* b, A* sum) const {
        add_coupled(votes, dynamic.couplings(votes, b), b, sum);
    }
};

}  // namespace

template <class A> constexpr bool takes_registers<DynamicSum<A>> = true;

Status dynamic_routing(const Capsules& c, const void* bias, int64_t iterations, bool leaky, void* v, void* s) {
    if (iterations < 1) return Status::invalid_argument;
    return for_accumulation(c.dtype, [&]<class A>() {
        const Operands<A> o(c, best_layout<A>(c, true));
        const int64_t rows = c.B * o.J, size = rows * o.H;
        A* out = static_cast<A*>(v);
        Buffer<A> sum(o.state_size()), total(size), V(o.state_size());
        fill(total.get(), size, A(0));
        for (int64_t t = 0; t < iterations; ++t) {
            A* s_t = static_cast<A*>(s) + t * size;
            if (t == 0) {
                contract(o, sum.get());
                const A equal = equal_coupling<A>(o.J, leaky);
                for (int64_t x = 0; x < o.state_size(); ++x) sum.get()[x] *= equal;
            } else {
                o.pack(total.get(), V.get());
                reduce(o, DynamicSum<A>{{V.get(), leaky}, o.J, o.D}, sum.get());
            }
            o.unpack(sum.get(), s_t);
            if (bias)
                for (int64_t x = 0; x < size; ++x) s_t[x] += static_cast<const A*>(bias)[x % o.JH];
            squash_outputs(s_t, out, rows, o.H, SquashKind::sabour);
            for (int64_t x = 0; x < size; ++x) total.get()[x] += out[x];
        }
    });
}

}  // namespace capsops::cpu::CAPSOPS_ISA
