// The table of operators for GPUs, and what CUDA says of itself.

#include "device.h"
#include "operators.h"

namespace capsops::cuda {

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
    .em_routing = nullptr,
    .em_routing_backward = nullptr,
    .probe = nullptr,
};

#if !defined(CAPSOPS_EMULATION)
const char* error() {
    return last_error;
}

int driver_version() {
    int version = 0;
    return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

int runtime_version() {
    return CUDART_VERSION;
}
#endif

}  // namespace capsops::cuda
