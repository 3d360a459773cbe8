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
    const A* shift;  // [B, J, D]

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
                  const double* inverse_temperatures, int iterations, void* mean_, void* out_activation, void* state) {
    return for_accumulation(c.dtype, [&]<class A>() {
        const Operands<A> o(c);
        const int64_t rows = c.B * o.J, J = o.J;
        const A* beta_u = static_cast<const A*>(beta_u_);
        const A* beta_a = static_cast<const A*>(beta_a_);
        const Moments<A> moments{J, o.JD};
        const int64_t row = moments.row_size();
        States<A> states(iterations, rows, o.H, o.D, static_cast<const A*>(state));
        Buffer<A> sums(c.B * row), shift(rows * o.D);
        fill(shift.get(), rows * o.D, A(0));

        const auto maximise_all = [&](int t) {
            bool precise = true;
            for (int64_t b = 0; b < c.B; ++b)
                for (int64_t j = 0; j < J; ++j) {
                    const A* first = sums.get() + b * row + j * o.D;
                    Gaussian<A> g = states.at(t, b * J + j);
                    precise &= maximise(g, sums.get()[b * row + 2 * o.JD + j], first, first + o.JD,
                                        shift.get() + (b * J + j) * o.D, o.H, A(em_epsilon), beta_u[j], beta_a[j],
                                        static_cast<A>(inverse_temperatures[t]));
                    g.mean[3 * o.H] = g.mass;
                    g.mean[3 * o.H + 1] = g.logit;
                }
            states.load_iteration(t);
            std::memcpy(shift.get(), states.mean.get() + t * rows * o.D, sizeof(A) * static_cast<size_t>(rows * o.D));
            return precise;
        };
        for (int t = 0; t < iterations; ++t) {
            const EmSum<A> policy{{states.logits(t), static_cast<const A*>(activation), c.N}, moments, shift.get()};
            for (int pass = 0; pass < 2; ++pass) {
                reduce(o, policy, sums.get());
                const bool precise = maximise_all(t);
                if (t > 0 && precise) break;
            }
        }
        for (int64_t r = 0; r < rows; ++r) {
            const Gaussian<A> g = states.at(iterations - 1, r);
            std::memcpy(static_cast<A*>(mean_) + r * o.H, g.mean, sizeof(A) * static_cast<size_t>(o.H));
            static_cast<A*>(out_activation)[r] = A(1) / (A(1) + std::exp(-g.logit));
        }
    });
}

}  // namespace capsops::cpu::CAPSOPS_ISA
