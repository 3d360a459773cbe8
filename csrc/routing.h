// The whole seam between Python and the kernels: plain-data argument structs and launch prototypes.
// No torch, pybind11 or CUDA header is included here or by any kernel.
//
// Symbols (as in the capsule literature): B batch, N input capsules, K their dimension, J output
// capsules, D their dimension; u input capsules, W transformation matrices, û_ij = u_i W_ij votes,
// c coupling coefficients, s = Σ_i c_ij û_ij, v = squash(s).
#pragma once

#include <cstdint>

namespace capsops {

enum class Dtype : int { float32, float64, bfloat16, float16 };

// "storage" is one of Dtype; "accumulation" is float64 for float64 and float32 for all others.

enum class Status : int { ok, out_of_memory, unsupported };

enum class SquashKind : int { sabour, efficient };

// What the votes û_bi = u_bi W_i are made of.
struct Capsules {
    const void* u;        // [B, N, K] storage
    const void* weight;   // [N, K, J, D] storage; [K, J, D] if weight_stride is 0
    const uint8_t* mask;  // [B, N], 0 = not there; null: all are there
    int64_t B, N, K, J, D;
    int64_t weight_stride;  // elements from one input capsule's matrix to the next: K·J·D, or 0 if shared
    Dtype dtype;            // storage of u and weight
    int threads;
};

// Where the gradients of u and W go; null: not wanted, not computed.
struct CapsuleGradients {
    void* u;       // [B, N, K] storage
    void* weight;  // as Capsules::weight, storage
};

namespace cpu {

// v = squash(s) along rows of length dim.
Status squash(const void* s,  // [rows, dim] storage
              void* v,        // [rows, dim] storage
              int64_t rows, int64_t dim, SquashKind kind, Dtype dtype, int threads);

Status squash_backward(const void* g_v,  // [rows, dim] storage
                       const void* s,    // [rows, dim] storage
                       void* g_s,        // [rows, dim] storage
                       int64_t rows, int64_t dim, SquashKind kind, Dtype dtype, int threads);

Status affine_votes(const Capsules& capsules,
                    void* votes);  // [B, N, J, D] storage

Status affine_votes_backward(const Capsules& capsules,
                             const void* g_votes,  // [B, N, J, D] storage
                             const CapsuleGradients& gradients);

Status attention_routing(const Capsules& capsules,
                         const void* attn_weight,  // [J, J] accumulation
                         const void* attn_bias,    // [J] accumulation, or null
                         void* v,                  // [B, J, D] accumulation
                         void* s);                 // [B, J, D] accumulation

Status attention_routing_backward(const Capsules& capsules,
                                  const void* attn_weight,  // [J, J] accumulation
                                  const void* attn_bias,    // [J] accumulation, or null
                                  const void* s,            // [B, J, D] accumulation, from forward
                                  const void* g_v,          // [B, J, D] accumulation
                                  const CapsuleGradients& gradients,
                                  void* g_attn_weight,  // [J, J] accumulation, or null
                                  void* g_attn_bias);   // [J] accumulation, or null

Status dynamic_routing(const Capsules& capsules,
                       const void* bias,  // [J, D] accumulation, or null
                       int iterations, bool leaky,
                       void* v,   // [B, J, D] accumulation
                       void* s);  // [iterations, B, J, D] accumulation, bias included

Status dynamic_routing_backward(const Capsules& capsules, int iterations, bool leaky, bool detach,
                                const void* s,    // [iterations, B, J, D] accumulation, from forward
                                const void* g_v,  // [B, J, D] accumulation
                                const CapsuleGradients& gradients,
                                void* g_bias);  // [J, D] accumulation, or null

}  // namespace cpu
}  // namespace capsops
