// The operators for GPUs, as in the table of csrc/operators.h.
#pragma once

#include "../../operators.h"

namespace capsops::cuda {

Status squash(const void* s, void* v, int64_t rows, int64_t dim, SquashKind kind, Dtype dtype, const Place& place);
Status squash_backward(const void* g_v, const void* s, void* g_s, int64_t rows, int64_t dim, SquashKind kind,
                       Dtype dtype, const Place& place);
Status primary_capsules(const PrimaryCapsules& p, const void* features, void* u);
Status primary_capsules_backward(const PrimaryCapsules& p, const void* g_u, const void* features, void* g_features);
Status affine_votes(const Capsules& c, void* votes);
Status affine_votes_backward(const Capsules& c, const void* g_votes, const CapsuleGradients& gradients);
Status attention_routing(const Capsules& c, const void* attn_weight, const void* attn_bias, void* v, void* s);
Status attention_routing_backward(const Capsules& c, const void* attn_weight, const void* attn_bias, const void* s,
                                  const void* g_v, const CapsuleGradients& gradients, void* g_attn_weight,
                                  void* g_attn_bias);
Status dynamic_routing(const Capsules& c, const void* bias, int64_t iterations, bool leaky, void* v, void* s);
Status dynamic_routing_backward(const Capsules& c, int64_t iterations, bool leaky, bool detach, const void* s,
                                const void* g_v, const CapsuleGradients& gradients, void* g_bias);
Status self_attention_routing(const Capsules& c, const void* prior, double scale, void* v, void* total, void* s);
Status self_attention_routing_backward(const Capsules& c, const void* prior, double scale, const void* total,
                                       const void* s, const void* g_v, const CapsuleGradients& gradients,
                                       void* g_prior);

}  // namespace capsops::cuda
