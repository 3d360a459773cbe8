// The table of operators of one instruction set.

#include "operators.h"

namespace capsops::cpu::CAPSOPS_ISA {

extern const Kernels kernels = {
    .squash = squash,
    .squash_backward = squash_backward,
    .primary_capsules = primary_capsules,
    .primary_capsules_backward = primary_capsules_backward,
    .affine_votes = affine_votes,
    .affine_votes_backward = affine_votes_backward,
    .attention_routing = attention_routing,
    .attention_routing_backward = attention_routing_backward,
    .dynamic_routing = dynamic_routing,
    .dynamic_routing_backward = dynamic_routing_backward,
    .self_attention_routing = self_attention_routing,
    .self_attention_routing_backward = self_attention_routing_backward,
    .em_routing = em_routing,
    .em_routing_backward = em_routing_backward,
    .probe = probe,
};

}  // namespace capsops::cpu::CAPSOPS_ISA
