// Checks the arguments of the operators: sizes and strides must be in range, and a pointer must not be null if
// something is read or written there. Python checks tensors first and explains what is wrong with them; these checks
// only keep a kernel from touching memory outside of its operands. They cannot know how much memory a pointer has.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <span>

#include "operators.h"

namespace capsops {

// More numbers than any machine has memory for. Every size that a kernel computes is a product that `fits`, times
// constants and the number of threads, so it stays within 64 bits.
constexpr int64_t max_numbers = int64_t{1} << 48;
constexpr int max_cpu_threads = 1 << 12;

// Whether all sizes are at least 0 and their product, with 1 in place of 0, is at most max_numbers.
inline bool fits(std::initializer_list<int64_t> sizes) {
    int64_t product = 1;
    for (const int64_t size : sizes) {
        if (size < 0) return false;
        if (__builtin_mul_overflow(product, size > 0 ? size : 1, &product) || product > max_numbers) return false;
    }
    return true;
}

// Whether the pointers are non-null, or there are no numbers to point at.
inline bool given(std::initializer_list<const void*> pointers, std::initializer_list<int64_t> sizes) {
    for (const int64_t size : sizes)
        if (size == 0) return true;
    for (const void* pointer : pointers)
        if (!pointer) return false;
    return true;
}

inline bool valid(const ExecutionContext& context) {
    return context.threads >= 1 && context.threads <= max_cpu_threads;
}

inline bool valid(const Capsules& c) {
    if (!valid(c.context) || c.K < 1 || c.J < 1 || c.D < 1 || c.rows < 1) return false;
    // GPU kernels read contiguous matrices.
    if (c.context.device >= 0 && (c.strided || c.own_gradients)) return false;
    if (c.one_vote && !c.votes_given) return false;
    if (c.votes_given && (c.weight || c.K != 1 || c.rows != 1 || c.weight_stride != 0 || c.strided || c.own_gradients ||
                          !fits({c.B, c.N, c.J, c.D})))
        return false;
    // u; W; a state; one block diagonal matrix (operands.h); the products of one input capsule.
    if (!fits({c.B, c.N, c.rows, c.K}) || !fits({c.N, c.K, c.J, c.D}) || !fits({c.B, c.J, c.rows, c.D}) ||
        !fits({c.K, c.rows, c.J, c.rows, c.D}) || !fits({c.J, c.J}) || !fits({c.N, c.J}) ||
        !fits({c.B, c.rows, c.K, c.J, c.D}))
        return false;
    if (c.strided) {
        if (!fits({c.N, c.weight_stride}) || !fits({c.K, c.strides[0]}) || !fits({c.J, c.strides[1]}) ||
            !fits({c.D, c.strides[2]}))
            return false;
    } else if (c.weight_stride != 0 && c.weight_stride != c.K * c.J * c.D) {
        return false;
    }
    return given({c.u}, {c.B, c.N}) && (c.votes_given || given({c.weight}, {c.weight_stride ? c.N : 1}));
}

inline bool valid(const PrimaryCapsules& p) {
    if (!valid(p.context) || p.K < 1 || !fits({p.B, p.outer, p.inner, p.K})) return false;
    const auto within = [](int64_t size, int64_t stride) { return stride >= 0 && fits({size, stride}); };
    return within(p.B, p.batch_stride) && within(p.outer, p.outer_stride) && within(p.inner, p.inner_stride) &&
           within(p.K, p.component_stride);
}

// Checks the capsules and the number of routing iterations.
inline bool valid(const Capsules& c, int64_t iterations) {
    return valid(c) && iterations >= 1 && fits({iterations, c.B, c.J, c.rows, c.D});
}

// One check for each operator, with the parameters of its kernel. A parameter without a name is not checked: it is
// optional, or every value is valid. Gradients are always optional.
namespace checks {

inline bool squash(const ExecutionContext& context, const void* s, void* v, int64_t rows, int64_t dim, SquashKind,
                   Dtype) {
    return valid(context) && fits({rows, dim}) && given({s, v}, {rows, dim});
}
inline bool squash_backward(const ExecutionContext& context, const void* g_v, const void* s, void* g_s, int64_t rows,
                            int64_t dim, SquashKind, Dtype) {
    return valid(context) && fits({rows, dim}) && given({g_v, s, g_s}, {rows, dim});
}

inline bool primary_capsules(const PrimaryCapsules& p, const void* features, void* u) {
    return valid(p) && given({features, u}, {p.B, p.outer, p.inner});
}
inline bool primary_capsules_backward(const PrimaryCapsules& p, const void* g_u, const void* features,
                                      void* g_features) {
    return valid(p) && given({g_u, features, g_features}, {p.B, p.outer, p.inner});
}

inline bool affine_votes(const Capsules& c, void* votes) {
    return valid(c) && !c.votes_given && fits({c.B, c.N, c.J, c.rows, c.D}) && given({votes}, {c.B, c.N});
}
inline bool affine_votes_backward(const Capsules& c, const void* g_votes, void*, void*) {
    return valid(c) && !c.votes_given && fits({c.B, c.N, c.J, c.rows, c.D}) && given({g_votes}, {c.B, c.N});
}

inline bool attention_routing(const Capsules& c, const void* attn_weight, const void*, const void*, SquashKind, void* v,
                              void* s) {
    return valid(c) && !c.one_vote && attn_weight && given({v, s}, {c.B});
}
inline bool attention_routing_backward(const Capsules& c, const void* attn_weight, const void*, const void*, SquashKind,
                                       const void* s, const void* g_v, void*, void*, void*, void*, void*) {
    return valid(c) && !c.one_vote && attn_weight && given({s, g_v}, {c.B});
}

inline bool dynamic_routing(const Capsules& c, const void*, int64_t iterations, bool, SquashKind, void* v, void* s) {
    return valid(c, iterations) && given({v, s}, {c.B});
}
inline bool dynamic_routing_backward(const Capsules& c, int64_t iterations, bool, bool, SquashKind, const void* s,
                                     const void* g_v, void*, void*, void*) {
    return valid(c, iterations) && given({s, g_v}, {c.B});
}

inline bool routing_step(const Capsules& c, const void* state, void* s) {
    return valid(c) && given({state, s}, {c.B});
}
inline bool routing_step_backward(const Capsules& c, const void* state, const void* g_s, void*, void*, void*) {
    return valid(c) && given({state, g_s}, {c.B});
}

inline bool routing_step_with_logits(const Capsules& c, const void* state, const void*, const void*, void* s) {
    return valid(c) && fits({c.B, c.N, c.J}) && given({state, s}, {c.B});
}
inline bool routing_step_with_logits_backward(const Capsules& c, const void* state, const void*, const void*,
                                              const void* g_s, void*, void*, void*, void*, void*) {
    return valid(c) && fits({c.B, c.N, c.J}) && given({state, g_s}, {c.B});
}

inline bool dynamic_routing_with_logits(const Capsules& c, const void*, const void*, const void*, int64_t iterations,
                                        bool, SquashKind, void* v, void* s) {
    return valid(c, iterations) && fits({c.B, c.N, c.J}) && given({v, s}, {c.B});
}
inline bool dynamic_routing_with_logits_backward(const Capsules& c, const void*, const void*, int64_t iterations, bool,
                                                 bool, SquashKind, const void* s, const void* g_v, void*, void*, void*,
                                                 void*, void*) {
    return valid(c, iterations) && fits({c.B, c.N, c.J}) && given({s, g_v}, {c.B});
}

inline bool dynamic_routing_over_inputs(const Capsules& c, const void*, const void*, const void*, int64_t iterations,
                                        SquashKind, void* v, void* s, void* log_sums) {
    return valid(c, iterations) && fits({c.B, c.N, c.J}) && given({v, s, log_sums}, {c.B});
}
inline bool dynamic_routing_over_inputs_backward(const Capsules& c, const void*, const void*, const void*,
                                                 int64_t iterations, bool, SquashKind, const void* s,
                                                 const void* log_sums, const void* g_v, void*, void*, void*, void*,
                                                 void*) {
    return valid(c, iterations) && fits({c.B, c.N, c.J}) && given({s, log_sums, g_v}, {c.B});
}

inline bool routing_step_over_inputs(const Capsules& c, const void* state, const void*, const void*, void* s,
                                     void* total, void* log_sums) {
    return valid(c) && fits({c.B, c.N, c.J}) && given({state, s, total, log_sums}, {c.B});
}
inline bool routing_step_over_inputs_backward(const Capsules& c, const void* state, const void*, const void*,
                                              const void* total, const void* log_sums, const void* g_s, void*, void*,
                                              void*, void*, void*) {
    return valid(c) && fits({c.B, c.N, c.J}) && given({state, total, log_sums, g_s}, {c.B});
}

inline bool self_attention_routing(const Capsules& c, const void*, const void*, double, void* v, void* total, void* s) {
    return valid(c) && !c.one_vote && given({v, total, s}, {c.B});
}
inline bool self_attention_routing_backward(const Capsules& c, const void*, const void*, double, const void* total,
                                            const void* s, const void* g_v, void*, void*, void*, void*) {
    return valid(c) && !c.one_vote && given({total, s, g_v}, {c.B});
}

inline bool em_routing(const Capsules& c, const void* activation, const void* beta_u, const void* beta_a,
                       std::span<const double> inverse_temperatures, void* mean, void* out_activation, void* state) {
    return valid(c, static_cast<int64_t>(inverse_temperatures.size())) && !c.one_vote && beta_u && beta_a &&
           given({activation}, {c.B, c.N}) && given({mean, out_activation, state}, {c.B});
}
inline bool em_routing_backward(const Capsules& c, const void* activation, const void* beta_u,
                                std::span<const double> inverse_temperatures, const void* state, const void* g_mean,
                                const void* g_out_activation, void*, void*, void*, void*, void*) {
    return valid(c, static_cast<int64_t>(inverse_temperatures.size())) && !c.one_vote && beta_u &&
           given({activation}, {c.B, c.N}) && given({state, g_mean, g_out_activation}, {c.B});
}

// What the places are only the kernel can check.
inline bool valid(const Capsules& c, std::span<const double> inverse_temperatures, int64_t windows, int64_t capsules,
                  int64_t most, const void* activation, const void* places) {
    const auto iterations = static_cast<int64_t>(inverse_temperatures.size());
    return valid(c, iterations) && !c.one_vote && windows >= 1 && c.B % windows == 0 && fits({iterations, c.B, c.N}) &&
           fits({c.B, capsules, most}) && given({places}, {capsules, most}) && given({activation}, {c.B, capsules});
}
inline bool em_routing_over_positions(const Capsules& c, const void* activation, const void* beta_u, const void* beta_a,
                                      std::span<const double> inverse_temperatures, int64_t windows, int64_t capsules,
                                      int64_t most, const void* places, void* mean, void* out_activation, void* state) {
    return valid(c, inverse_temperatures, windows, capsules, most, activation, places) && beta_u && beta_a &&
           given({mean, out_activation, state}, {c.B});
}
inline bool em_routing_over_positions_backward(const Capsules& c, const void* activation, const void* beta_u,
                                               std::span<const double> inverse_temperatures, int64_t windows,
                                               int64_t capsules, int64_t most, const void* state, const void* g_mean,
                                               const void* g_out_activation, const void* places, void*, void*, void*,
                                               void*, void*) {
    return valid(c, inverse_temperatures, windows, capsules, most, activation, places) && beta_u &&
           given({state, g_mean, g_out_activation}, {c.B});
}

}  // namespace checks
}  // namespace capsops
