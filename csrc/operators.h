// The whole seam between Python and the kernels: plain-data argument structs, and the table of operators that every
// set of kernels fills. No torch, pybind11 or CUDA header is included here or by any kernel.
//
// Symbols (as in the capsule literature): B batch, N input capsules, K their dimension, J output
// capsules, D their dimension; u input capsules, W transformation matrices, û_ij = u_i W_ij votes,
// c coupling coefficients, s = Σ_i c_ij û_ij, v = squash(s).
#pragma once

#include <cstdint>

namespace capsops {

enum class Dtype : int { float32, float64, bfloat16, float16 };

// "storage" is one of Dtype; "accumulation" is float64 for float64 and float32 for all others.

// invalid_argument: a size, a stride or a pointer that no caller with correct tensors passes; nothing was read or
// written. interrupted: Place::stop asked for it; the outputs are incomplete.
enum class Status : int { ok, out_of_memory, unsupported, launch_failed, invalid_argument, interrupted };

// Where an operator runs: on so many threads of the CPU, or on a GPU.
struct Place {
    int threads;                // of the CPU
    bool (*stop)() = nullptr;   // asked now and then, by the calling thread of the CPU alone: whether to give up
    int device = -1;            // index of the GPU; -1: the CPU
    void* stream = nullptr;     // cudaStream_t
    void* workspace = nullptr;  // memory of the GPU, aligned to 256 bytes
    int64_t* needed = nullptr;  // not null: nothing runs, and the bytes of workspace that it would take are put here

    Place(int threads) : threads(threads) {}
};

enum class SquashKind : int { sabour, efficient };

// Added to sums that divide, and to variances, in EM routing. capsops/dtypes.py has the same number.
constexpr double em_epsilon = 1e-8;

// What the votes û_bi = u_bi W_i are made of. With P = rows > 1 the capsules are matrices of P rows (Hinton et al.
// 2018): u_bi is [P, K], W_ij is [K, D], a vote [P, D].
struct Capsules {
    const void* u;        // [B, N, P, K] storage
    const void* weight;   // [N, K, J, D] storage, by weight_stride and strides
    const uint8_t* mask;  // [B, N], 0 = not there; null: all are there
    int64_t B, N, K, J, D;
    int64_t rows;           // P
    int64_t weight_stride;  // elements from one input capsule's matrix to the next; 0: all have the same
    Dtype dtype;            // storage of u and weight
    Place place;
    // What follows is for tensors that were expanded without a copy. CPU only: the kernels for GPUs take neither.
    //
    // Elements from one number of a matrix to the next along K, J and D. Not strided: J·D, D and 1.
    bool strided = false;
    int64_t strides[3] = {0, 0, 0};
    // Whether g_W is [N, K, J, D], a gradient for each input capsule, although all have the same matrix. Else the
    // gradient of such a matrix is [K, J, D], their sum.
    bool own_gradients = false;

    // Whether the input capsules share a matrix, and its gradient.
    bool shared() const { return weight_stride == 0 && !own_gradients; }
};

// Where the gradients of u and W go; null: not wanted, not computed.
struct CapsuleGradients {
    void* u;       // as Capsules::u
    void* weight;  // as Capsules::weight
};

// A convolution's output [B, C, H, W], read as capsules [B, outer, inner, K] (outer · inner = N) by strides in
// elements.
struct PrimaryCapsules {
    int64_t B, outer, inner, K;
    int64_t batch_stride, outer_stride, inner_stride, component_stride;
    SquashKind kind;
    Dtype dtype;
    Place place;
};

// What a machine can do: bytes read a second; bytes read and written; floating-point operations.
enum class Probe : int { read, copy, arithmetic };

// The operators. Gradients that are null are not wanted.
struct Kernels {
    // v = squash(s) along rows of length dim.
    Status (*squash)(const void* s,  // [rows, dim] storage
                     void* v,        // [rows, dim] storage
                     int64_t rows, int64_t dim, SquashKind kind, Dtype dtype, const Place& place);
    Status (*squash_backward)(const void* g_v,  // [rows, dim] storage
                              const void* s,    // [rows, dim] storage
                              void* g_s,        // [rows, dim] storage
                              int64_t rows, int64_t dim, SquashKind kind, Dtype dtype, const Place& place);

    Status (*primary_capsules)(const PrimaryCapsules& p,
                               const void* features,  // strided, storage
                               void* u);              // [B, outer, inner, K] storage
    Status (*primary_capsules_backward)(const PrimaryCapsules& p,
                                        const void* g_u,       // [B, outer, inner, K] storage
                                        const void* features,  // strided, storage
                                        void* g_features);     // with the strides of features, storage

    Status (*affine_votes)(const Capsules& c,
                           void* votes);  // [B, N, J, D] storage
    Status (*affine_votes_backward)(const Capsules& c,
                                    const void* g_votes,  // [B, N, J, D] storage
                                    const CapsuleGradients& gradients);

    Status (*attention_routing)(const Capsules& c,
                                const void* attn_weight,  // [J, J] accumulation
                                const void* attn_bias,    // [J] accumulation, or null
                                void* v,                  // [B, J, D] accumulation
                                void* s);                 // [B, J, D] accumulation
    Status (*attention_routing_backward)(const Capsules& c,
                                         const void* attn_weight,  // [J, J] accumulation
                                         const void* attn_bias,    // [J] accumulation, or null
                                         const void* s,            // [B, J, D] accumulation, from forward
                                         const void* g_v,          // [B, J, D] accumulation
                                         const CapsuleGradients& gradients,
                                         void* g_attn_weight,  // [J, J] accumulation
                                         void* g_attn_bias);   // [J] accumulation

    Status (*dynamic_routing)(const Capsules& c,
                              const void* bias,  // [J, D] accumulation, or null
                              int64_t iterations, bool leaky,
                              void* v,   // [B, J, D] accumulation
                              void* s);  // [iterations, B, J, D] accumulation, bias included
    Status (*dynamic_routing_backward)(const Capsules& c, int64_t iterations, bool leaky, bool detach,
                                       const void* s,    // [iterations, B, J, D] accumulation, from forward
                                       const void* g_v,  // [B, J, D] accumulation
                                       const CapsuleGradients& gradients,
                                       void* g_bias);  // [J, D] accumulation

    Status (*self_attention_routing)(const Capsules& c,
                                     const void* prior,  // [N, J] accumulation, or null
                                     double scale,
                                     void* v,      // [B, J, D] accumulation
                                     void* total,  // [B, J, D] accumulation, Σ_i û_ij
                                     void* s);     // [B, J, D] accumulation
    Status (*self_attention_routing_backward)(const Capsules& c,
                                              const void* prior,  // [N, J] accumulation, or null
                                              double scale,
                                              const void* total,  // [B, J, D] accumulation, from forward
                                              const void* s,      // [B, J, D] accumulation, from forward
                                              const void* g_v,    // [B, J, D] accumulation
                                              const CapsuleGradients& gradients,
                                              void* g_prior);  // [N, J] accumulation

    // H = P·D components of a vote; state of one output capsule: mean [H], what
    // rounding took from it [H], variance [H], mass, activation logit.
    Status (*em_routing)(const Capsules& c,
                         const void* activation,              // [B, N] accumulation
                         const void* beta_u,                  // [J] accumulation
                         const void* beta_a,                  // [J] accumulation
                         const double* inverse_temperatures,  // [iterations]
                         int64_t iterations,
                         void* mean,            // [B, J, H] accumulation
                         void* out_activation,  // [B, J] accumulation
                         void* state);          // [iterations, B, J, 3H + 2] accumulation
    Status (*em_routing_backward)(const Capsules& c,
                                  const void* activation,              // [B, N] accumulation
                                  const void* beta_u,                  // [J] accumulation
                                  const double* inverse_temperatures,  // [iterations]
                                  int64_t iterations,
                                  const void* state,             // as from forward
                                  const void* g_mean,            // [B, J, H] accumulation
                                  const void* g_out_activation,  // [B, J] accumulation
                                  const CapsuleGradients& gradients,
                                  void* g_activation,  // [B, N] accumulation
                                  void* g_beta_u,      // [J] accumulation
                                  void* g_beta_a);     // [J] accumulation

    // Measures once, over so many bytes, or steps of arithmetic.
    Status (*probe)(Probe what, int64_t size, int threads, double* rate);
};

namespace cuda {

// The kernels for GPUs; those of EM routing are null.
extern const Kernels kernels;

// What CUDA said of the last launch in this thread that failed.
const char* error();
// As CUDA writes them, 13000 for 13.0. The driver's is 0 where there is none.
int driver_version();
int runtime_version();

}  // namespace cuda

namespace cpu {

// The kernels of the best instruction set of this machine, or of the one that was asked for; for capsules like these,
// of the best for them.
const Kernels& kernels();
const Kernels& kernels(const Capsules& c);

const char* instruction_set();
// The instruction sets that were compiled and run here, best first, separated by spaces.
const char* instruction_sets();
// "auto": the best. False if it was not compiled or does not run here.
bool use_instruction_set(const char* name);

}  // namespace cpu
}  // namespace capsops
