// The table of operators for GPUs, and the versions and errors that CUDA reports.

#include "device.h"

namespace capsops::cuda {

CAPSOPS_OPERATORS(CAPSOPS_DECLARE)

extern const Kernels kernels = {CAPSOPS_OPERATORS(CAPSOPS_ENTRY) CAPSOPS_NO_ENTRY(probe)};

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
