// For functions that are compiled for the host and for GPUs.
#pragma once

#if defined(__CUDACC__)
#define CAPSOPS_HOST_DEVICE __host__ __device__
#define CAPSOPS_ALWAYS_INLINE __forceinline__
#else
#define CAPSOPS_HOST_DEVICE
#define CAPSOPS_ALWAYS_INLINE inline __attribute__((always_inline))
#endif
