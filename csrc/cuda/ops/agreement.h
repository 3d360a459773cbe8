// The passes over the input capsules that dynamic and self-attention routing share. Pointers are to numbers of the
// accumulation type.
#pragma once

#include "../engine/device.h"

namespace capsops::cuda {

// out [B, J, D] = coupling · Σ_i û_ij.
Status sum_votes(const Capsules& c, double coupling, Workspace& w, void* out);

// out [B, J, D] = Σ_i c_ij û_ij with c = softmax_j(û · x) + prior.
Status sum_agreeing(const Capsules& c,
                    const void* x,      // [B, J, D]
                    const void* prior,  // [N, J], or null
                    bool leaky, Workspace& w, void* out);

// out [B, J, D] = Σ_i δ_ij û_ij with δ = c (e − Σ_k c_k e_k), c as above without the prior and e = û · y.
Status sum_adjoint(const Capsules& c,
                   const void* x,  // [B, J, D]
                   const void* y,  // [B, J, D]
                   bool leaky, Workspace& w, void* out);

// The gradient of the votes, Σ_t [c^t g^t + δ^t x^t] over iterations, and of u, W and prior.
struct AgreementTerms {
    const void* x;  // [iterations, B, J, D], the states of the logits
    const void* g;  // [iterations, B, J, D], the gradients of the sums
    int64_t iterations;
    bool equal_first;  // whether the first of these iterations has equal couplings
    bool leaky;
    bool detach;                  // leaves out δ
    bool more = false;            // adds to the numbers in the gradients of u and W
    const void* prior = nullptr;  // [N, J], or null
    const void* rest = nullptr;   // [B, J, D], added to the gradient of the votes; or null
    void* g_prior = nullptr;      // [N, J], or null
};
Status emit_agreement(const Capsules& c, const AgreementTerms& terms, const CapsuleGradients& gradients, Workspace& w);

}  // namespace capsops::cuda
