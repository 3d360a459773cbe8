// The table of operators of one instruction set.

#include "../../operators.h"

namespace capsops::cpu::CAPSOPS_ISA {

CAPSOPS_OPERATORS(CAPSOPS_DECLARE)
CAPSOPS_DECLARE(probe)

extern const Kernels kernels = {CAPSOPS_OPERATORS(CAPSOPS_ENTRY) CAPSOPS_ENTRY(probe)};

}  // namespace capsops::cpu::CAPSOPS_ISA
