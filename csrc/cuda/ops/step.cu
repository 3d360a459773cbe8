// One pass of routing by agreement with a state that is given, by the passes of dynamic routing, or with logits too, by
// those of couplings.h. The gradient is that of csrc/cpu/ops/step.cpp.

#include "agreement.h"
#include "couplings.h"

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

Status routing_step_with_logits(const Capsules& c, const void* state, const void* logits, const void* input_weight,
                                void* s) {
    Workspace w(c.context);
    return sum_coupled(c, {logits, input_weight}, state, w, s);
}

Status routing_step_with_logits_backward(const Capsules& c, const void* state, const void* logits,
                                         const void* input_weight, const void* g_s, void* g_u, void* g_weight,
                                         void* g_state, void* g_logits, void* g_input_weight) {
    const CoupledTerms given{logits, input_weight};
    Workspace w(c.context);
    if (g_state) CAPSOPS_TRY(sum_coupled_adjoint(c, given, state, g_s, w, g_state));
    return emit_coupled(c, {given, state, g_s, 1, false, false}, {{g_u, g_weight}, g_logits, g_input_weight}, w);
}

}  // namespace capsops::cuda
