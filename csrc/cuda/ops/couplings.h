// The passes of routing by agreement with logits b_ij = û_ij · x_j + logits_ij, part of which is given, and with a
// softmax over the output capsules or over the input capsules. csrc/cpu/ops/couplings.h has the formulas. Pointers are
// to numbers of the accumulation type.
#pragma once

#include "../engine/device.h"

namespace capsops::cuda {

// What the passes take besides the votes.
struct CoupledTerms {
    const void* logits;        // [B, N, J]; null: all are 0
    const void* input_weight;  // [B, N]; null: all are 1
    bool leaky = false;        // over the output capsules only
    // For the gradient of the softmax over the input capsules, [iterations, B, J] both: log Σ_i exp b_ij, and
    // Σ_i c_ij e_ij with e = w û · g_s. Null: the softmax is over the output capsules.
    const void* log_sums = nullptr;
    const void* means = nullptr;
};

// out [B, J, D] = Σ_i w_i c_ij û_ij. x [B, J, D]; null: all its numbers are 0.
Status sum_coupled(const Capsules& c, const CoupledTerms& terms, const void* x, Workspace& w, void* out);

// The same with the softmax over the input capsules, and log Σ_i exp b_ij. Both are 0 where an output capsule has no
// pairs.
Status sum_over_inputs(const Capsules& c, const CoupledTerms& terms, const void* x, Workspace& w, void* out,
                       void* log_sums /* [B, J] */);

// out [B, J, D] = Σ_i δ_ij û_ij, δ the gradient of b. y: the gradient of the sum.
Status sum_coupled_adjoint(const Capsules& c, const CoupledTerms& terms, const void* x /* [B, J, D] */,
                           const void* y /* [B, J, D] */, Workspace& w, void* out);

// means [rows] = (s − bias) · g_s.
Status write_means(const Capsules& c, const void* s /* [rows, D] */, const void* bias /* [J, D], or null */,
                   const void* g_s /* [rows, D] */, int64_t rows, void* means);

// Where the gradients go, each or null.
struct CoupledGradients {
    CapsuleGradients capsules;
    void* logits;        // [B, N, J]
    void* input_weight;  // [B, N]
};

// The gradients of the votes Σ_t [w c^t g^t + δ^t x^t] over iterations, of the logits Σ_t δ^t and of the weights
// Σ_t Σ_j c^t e^t.
struct CoupledGradientTerms {
    CoupledTerms terms;
    const void* x;  // [iterations, B, J, D]
    const void* g;  // [iterations, B, J, D], the gradients of the sums
    int64_t iterations;
    bool zero_first;    // whether x of the first of these iterations is 0
    bool detach;        // leaves out δ
    bool more = false;  // adds to the numbers in the gradients
};
Status emit_coupled(const Capsules& c, const CoupledGradientTerms& terms, const CoupledGradients& gradients,
                    Workspace& w);

}  // namespace capsops::cuda
