// EM routing (Hinton et al. 2018, procedure 1): every iteration is one pass that recomputes the votes, assigns them by
// the Gaussians of the iteration before (E-step) and sums w, w x and w x² (M-step). The first iteration knows no mean
// to shift by, and takes two passes; so does one whose means moved far. Saves the Gaussians of every iteration.

#include "em.h"
#include "operators.h"

namespace capsops::cpu::CAPSOPS_ISA {
namespace {

template <class A> struct EmSum {
    Assignment<A> assignment;
    Moments<A> moments;
    const A* shift;  // a state

    int64_t row_size() const { return moments.row_size(); }
    int64_t scratch_size() const { return moments.J * Lanes<A>::count; }

    void accumulate(Tile<A>& t, A* sums, A* scratch) const {
        Lanes<A>* w = reinterpret_cast<Lanes<A>*>(scratch);
        const Lanes<A> a = assignment.responsibilities(t, w);
        for (int64_t j = 0; j < t.J; ++j) w[j] *= a;
        moments.add(t, w, shift, sums);
    }
};

}  // namespace

Status em_routing(const Capsules& c, const void* activation, const void* beta_u_, const void* beta_a_,
                  const double* inverse_temperatures, int64_t iterations, void* mean_, void* out_activation,
                  void* state) {
    if (iterations < 1) return Status::invalid_argument;
    return for_accumulation(c.dtype, [&]<class A>() {
        const Operands<A> o(c, best_layout<A>(c, false));
        const int64_t J = o.J, size = o.state_size();
        const A* beta_u = static_cast<const A*>(beta_u_);
        const A* beta_a = static_cast<const A*>(beta_a_);
        const Moments<A> moments(o);
        Gaussians<A> gaussians(o, iterations, static_cast<const A*>(state));
        Buffer<A> sums(o.state_rows * moments.row_size()), first(o.H), second(o.H);
        Buffer<A> shift(c.B * o.JH), packed_shift(size);
        fill(shift.get(), c.B * o.JH, A(0));
        fill(packed_shift.get(), size, A(0));

        const auto maximise_all = [&](int64_t t) {
            bool precise = true;
            for (int64_t b = 0; b < c.B; ++b)
                for (int64_t j = 0; j < J; ++j) {
                    A* own_shift = shift.get() + (b * J + j) * o.H;
                    const A mass = moments.of(o, sums.get(), b, j, first.get(), second.get());
                    Gaussian<A> g = gaussians.at(t, b * J + j);
                    precise &= maximise(g, mass, first.get(), second.get(), own_shift, o.H, A(em_epsilon), beta_u[j],
                                        beta_a[j], static_cast<A>(inverse_temperatures[t]));
                    g.mean[3 * o.H] = g.mass;
                    g.mean[3 * o.H + 1] = g.logit;
                    std::memcpy(own_shift, g.mean, sizeof(A) * static_cast<size_t>(o.H));
                }
            gaussians.load_iteration(t);
            std::memcpy(packed_shift.get(), gaussians.mean.get() + t * size, sizeof(A) * static_cast<size_t>(size));
            return precise;
        };
        for (int64_t t = 0; t < iterations; ++t) {
            const EmSum<A> policy{
                {gaussians.logits(t), static_cast<const A*>(activation), c.N}, moments, packed_shift.get()};
            for (int pass = 0; pass < 2; ++pass) {
                reduce(o, policy, sums.get());
                const bool precise = maximise_all(t);
                if (t > 0 && precise) break;
            }
        }
        for (int64_t r = 0; r < gaussians.rows; ++r) {
            const Gaussian<A> g = gaussians.at(iterations - 1, r);
            std::memcpy(static_cast<A*>(mean_) + r * o.H, g.mean, sizeof(A) * static_cast<size_t>(o.H));
            static_cast<A*>(out_activation)[r] = A(1) / (A(1) + std::exp(-g.logit));
        }
    });
}

}  // namespace capsops::cpu::CAPSOPS_ISA
