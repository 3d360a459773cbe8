// The passes of agreement.h for many output capsules and few batch items (wide_agreement.cu). Pointers are to numbers
// of the accumulation type.
#pragma once

#include "agreement.h"

namespace capsops::cuda {

// The couplings of a pass: c = softmax_j(û · x) + prior or, if adjoint, δ = c (e − Σ_k c_k e_k) with e = û · y.
struct WideCouplings {
    bool adjoint;
    const void* x;      // [B, J, D]
    const void* y;      // [B, J, D], if adjoint
    const void* prior;  // [N, J], or null
    bool leaky;
};

// out [B, J, D] = Σ_i c û. couplings: null if all are `equal`.
Status sum_wide(const Capsules& c, const WideCouplings* couplings, double equal, Workspace& w, void* out);
// As emit_agreement.
Status emit_wide(const Capsules& c, const AgreementTerms& terms, const CapsuleGradients& gradients, Workspace& w);

}  // namespace capsops::cuda
