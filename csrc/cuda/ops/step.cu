// One pass of routing by agreement with a state that is given, by the passes of dynamic routing. The gradient is that
// of csrc/cpu/ops/step.cpp.

#include "agreement.h"

namespace capsops::cuda {

Status routing_step(const Capsules& c, const void* state, void* s) {
    Workspace w(c.context);
    return sum_agreeing(c, state, nullptr, false, w, s);
}

Status routing_step_backward(const Capsules& c, const void* state, const void* g_s, void* g_u, void* g_weight,
                             void* g_state) {
    Workspace w(c.context);
    if (g_state) CAPSOPS_TRY(sum_adjoint(c, state, g_s, false, w, g_state));
    if (!g_u && !g_weight) return Status::ok;
    const AgreementTerms terms{
        .x = state, .g = g_s, .iterations = 1, .equal_first = false, .leaky = false, .detach = false};
    return emit_agreement(c, terms, {g_u, g_weight}, w);
}

}  // namespace capsops::cuda
