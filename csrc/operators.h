// The interface between Python and the kernels: plain argument structs and the table of operators. No torch, pybind11
// or CUDA header is included here, and no torch or pybind11 header by a kernel.
//
// Symbols, as in the capsule literature: B batch size, N input capsules, K their dimension, J output capsules, D their
// dimension; u input capsules, W transformation matrices, û_ij = u_i W_ij votes, c coupling coefficients, s = Σ_i c_ij
// û_ij, v = squash(s).
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

namespace capsops {

enum class Dtype : int { float32, float64, bfloat16, float16 };

// In the comments below, "storage" is one of Dtype, and "accumulation" is float64 for float64 and float32 otherwise.

// unsupported       the table has no kernel for the operator, or the kernel does not take these operands
// invalid_argument  a size, stride or pointer that no valid tensor has; nothing was read or written
// interrupted       ExecutionContext::stop returned true; the outputs are incomplete
enum class Status : int { ok, out_of_memory, unsupported, launch_failed, invalid_argument, interrupted };

// A launch of a GPU kernel.
struct Launch {
    const void* kernel;  // the address of its function on the host
    unsigned grid[3], threads;
    int64_t shared_bytes;   // dynamic shared memory
    std::string arguments;  // their bytes, laid out as the kernel reads them
};

// Where an operator runs: on some threads of the CPU, or on a GPU.
struct ExecutionContext {
    int threads;                // of the CPU
    bool (*stop)() = nullptr;   // polled by the calling CPU thread; true ends the operator early
    int device = -1;            // index of the GPU; -1: the CPU
    void* stream = nullptr;     // cudaStream_t
    void* workspace = nullptr;  // GPU memory, aligned to 256 bytes
    int64_t* needed = nullptr;  // if non-null, a size query: nothing runs, the required workspace size is written here
    std::vector<Launch>* launches = nullptr;  // if non-null: nothing runs, the launches are appended here

    bool alone = false;  // whether other threads are busy with other batch items, so that no pass is divided

    ExecutionContext(int threads) : threads(threads) {}
};

// What makes an output capsule v from its total input s. The operators that only squash take the first two.
enum class SquashKind : int { sabour, efficient, none, layer_norm };

// Added to divisors and variances in EM routing. EM_EPSILON in capsops/backends/reference.py is the same number.
constexpr double em_epsilon = 1e-8;

// The operands of the votes û_bi = u_bi W_i. With P = rows > 1 capsules are matrices of P rows (Hinton et al. 2018):
// u_bi is [P, K], W_ij is [K, D] and a vote is [P, D]. If votes_given, u is the votes themselves.
struct Capsules {
    const void* u;        // [B, N, P, K] storage
    const void* weight;   // [N, K, J, D] storage, by weight_stride and strides
    const uint8_t* mask;  // [B, N], 0 = absent; null: all are present
    int64_t B, N, K, J, D;
    int64_t rows;           // P
    int64_t weight_stride;  // elements from one input capsule's matrix to the next; 0: one matrix for all
    Dtype dtype;            // storage of u and weight
    ExecutionContext context;
    // For weights that were expanded without a copy. CPU only: GPU kernels take neither of the next three.
    //
    // If strided, elements between neighbours along K, J and D; otherwise these are J·D, D and 1.
    bool strided = false;
    int64_t strides[3] = {0, 0, 0};
    // Whether the gradient of one common matrix is still [N, K, J, D], one for each input capsule, instead of their
    // sum [K, J, D].
    bool own_gradients = false;
    // Whether u is the votes [B, N, J, D], made by something else. Then weight is null, its gradient is not written,
    // and K, P and weight_stride are 1, 1 and 0.
    bool votes_given = false;
    // Whether these votes are [B, N, 1, D], the same for all output capsules. For dynamic routing and a routing step.
    bool one_vote = false;

    // Of one input capsule, if they are given.
    int64_t numbers_of_votes() const { return (one_vote ? 1 : J) * D; }
    // Whether the input capsules share one matrix and its gradient.
    bool shared() const { return weight_stride == 0 && !own_gradients; }
};

// The windows of a grid, whose output capsules compete for an input capsule that lies in several of them. The items of
// Capsules are the windows, those of one grid in a row. A place is an input capsule of a window: n + N · its window.
struct Windows {
    int64_t count;          // of a grid: Capsules::B is a multiple of it
    int64_t capsules;       // of a grid
    int64_t most;           // places of a capsule
    const int64_t* places;  // [capsules, most]: where each capsule of the grid lies; -1: nowhere. Each place once
};

// Destinations of the gradients of u and W. Null: not wanted, not computed.
struct CapsuleGradients {
    void* u;       // as Capsules::u
    void* weight;  // as Capsules::weight
};

// The output of a convolution, [B, C, H, W], read as capsules [B, outer, inner, K] (outer · inner = N) by strides in
// elements.
struct PrimaryCapsules {
    int64_t B, outer, inner, K;
    int64_t batch_stride, outer_stride, inner_stride, component_stride;
    SquashKind kind;
    Dtype dtype;
    ExecutionContext context;
};

// What a benchmark measures of the machine: bytes read a second, bytes read and written, floating-point operations.
enum class Probe : int { read, copy, arithmetic };

// The kernels of one backend. A null pointer: the backend has no kernel for the operator.
//
// H = P·D is the size of a vote. An output named g_… is a gradient, and null if it is not wanted.
struct Kernels {
    // v = squash(s) along rows of length dim.
    Status (*squash)(const ExecutionContext& context,
                     const void* s,  // [rows, dim] storage
                     void* v,        // [rows, dim] storage
                     int64_t rows, int64_t dim, SquashKind kind, Dtype dtype);
    Status (*squash_backward)(const ExecutionContext& context,
                              const void* g_v,  // [rows, dim] storage
                              const void* s,    // [rows, dim] storage
                              void* g_s,        // [rows, dim] storage
                              int64_t rows, int64_t dim, SquashKind kind, Dtype dtype);

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
                                    void* g_u,            // as Capsules::u
                                    void* g_weight);      // as Capsules::weight, here and below

    Status (*attention_routing)(const Capsules& c,
                                const void* attn_weight,   // [J, J] accumulation
                                const void* attn_bias,     // [J] accumulation, or null
                                const void* input_weight,  // [B, N] accumulation, or null
                                SquashKind kind,
                                void* v,   // [B, J, D] accumulation
                                void* s);  // [B, J, D] accumulation
    Status (*attention_routing_backward)(const Capsules& c,
                                         const void* attn_weight,   // [J, J] accumulation
                                         const void* attn_bias,     // [J] accumulation, or null
                                         const void* input_weight,  // [B, N] accumulation, or null
                                         SquashKind kind,
                                         const void* s,    // [B, J, D] accumulation, from forward
                                         const void* g_v,  // [B, J, D] accumulation
                                         void* g_u, void* g_weight,
                                         void* g_attn_weight,    // [J, J] accumulation
                                         void* g_attn_bias,      // [J] accumulation
                                         void* g_input_weight);  // [B, N] accumulation

    Status (*dynamic_routing)(const Capsules& c,
                              const void* bias,  // [J, D] accumulation, or null
                              int64_t iterations, bool leaky, SquashKind kind,
                              void* v,   // [B, J, D] accumulation
                              void* s);  // [iterations, B, J, D] accumulation, bias included
    Status (*dynamic_routing_backward)(const Capsules& c, int64_t iterations, bool leaky, bool detach, SquashKind kind,
                                       const void* s,    // [iterations, B, J, D] accumulation, from forward
                                       const void* g_v,  // [B, J, D] accumulation
                                       void* g_u, void* g_weight,
                                       void* g_bias);  // [J, D] accumulation

    Status (*routing_step)(const Capsules& c,
                           const void* state,  // [B, J, D] accumulation
                           void* s);           // [B, J, D] accumulation
    Status (*routing_step_backward)(const Capsules& c,
                                    const void* state,  // [B, J, D] accumulation
                                    const void* g_s,    // [B, J, D] accumulation
                                    void* g_u, void* g_weight,
                                    void* g_state);  // [B, J, D] accumulation

    Status (*self_attention_routing)(const Capsules& c,
                                     const void* prior,         // [N, J] accumulation, or null
                                     const void* input_weight,  // [B, N] accumulation, or null
                                     double scale,
                                     void* v,      // [B, J, D] accumulation
                                     void* total,  // [B, J, D] accumulation, Σ_i û_ij
                                     void* s);     // [B, J, D] accumulation
    Status (*self_attention_routing_backward)(const Capsules& c,
                                              const void* prior,         // [N, J] accumulation, or null
                                              const void* input_weight,  // [B, N] accumulation, or null
                                              double scale,
                                              const void* total,  // [B, J, D] accumulation, from forward
                                              const void* s,      // [B, J, D] accumulation, from forward
                                              const void* g_v,    // [B, J, D] accumulation
                                              void* g_u, void* g_weight,
                                              void* g_prior,          // [N, J] accumulation
                                              void* g_input_weight);  // [B, N] accumulation

    // The state of one output capsule: mean [H], its rounding error [H], variance [H], mass and the activation's logit.
    // One iteration for each inverse temperature.
    Status (*em_routing)(const Capsules& c,
                         const void* activation,  // [B, N] accumulation
                         const void* beta_u,      // [J] accumulation
                         const void* beta_a,      // [J] accumulation
                         std::span<const double> inverse_temperatures,
                         void* mean,            // [B, J, H] accumulation
                         void* out_activation,  // [B, J] accumulation
                         void* state);          // [iterations, B, J, 3H + 2] accumulation
    Status (*em_routing_backward)(const Capsules& c,
                                  const void* activation,  // [B, N] accumulation
                                  const void* beta_u,      // [J] accumulation
                                  std::span<const double> inverse_temperatures,
                                  const void* state,             // from forward
                                  const void* g_mean,            // [B, J, H] accumulation
                                  const void* g_out_activation,  // [B, J] accumulation
                                  void* g_u, void* g_weight,
                                  void* g_activation,  // [B, N] accumulation
                                  void* g_beta_u,      // [J] accumulation
                                  void* g_beta_a);     // [J] accumulation
    // The output capsules of all windows of a grid compete for an input capsule. windows, capsules, most and places are
    // the members of Windows. activation and its gradient: [B / windows, capsules]; the rest as in em_routing.
    Status (*em_routing_over_positions)(const Capsules& c, const void* activation, const void* beta_u,
                                        const void* beta_a, std::span<const double> inverse_temperatures,
                                        int64_t windows, int64_t capsules, int64_t most, const void* places, void* mean,
                                        void* out_activation, void* state);
    Status (*em_routing_over_positions_backward)(const Capsules& c, const void* activation, const void* beta_u,
                                                 std::span<const double> inverse_temperatures, int64_t windows,
                                                 int64_t capsules, int64_t most, const void* state, const void* g_mean,
                                                 const void* g_out_activation, const void* places, void* g_u,
                                                 void* g_weight, void* g_activation, void* g_beta_u, void* g_beta_a);

    Status (*routing_step_with_logits)(const Capsules& c,
                                       const void* state,         // [B, J, D] accumulation
                                       const void* logits,        // [B, N, J] accumulation, or null
                                       const void* input_weight,  // [B, N] accumulation, or null
                                       void* s);                  // [B, J, D] accumulation
    Status (*routing_step_with_logits_backward)(const Capsules& c,
                                                const void* state,         // [B, J, D] accumulation
                                                const void* logits,        // [B, N, J] accumulation, or null
                                                const void* input_weight,  // [B, N] accumulation, or null
                                                const void* g_s,           // [B, J, D] accumulation
                                                void* g_u, void* g_weight,
                                                void* g_state,          // [B, J, D] accumulation
                                                void* g_logits,         // [B, N, J] accumulation
                                                void* g_input_weight);  // [B, N] accumulation

    Status (*dynamic_routing_with_logits)(const Capsules& c,
                                          const void* logits,        // [B, N, J] accumulation, or null
                                          const void* input_weight,  // [B, N] accumulation, or null
                                          const void* bias,          // [J, D] accumulation, or null
                                          int64_t iterations, bool leaky, SquashKind kind,
                                          void* v,   // [B, J, D] accumulation
                                          void* s);  // [iterations, B, J, D] accumulation, bias included
    Status (*dynamic_routing_with_logits_backward)(const Capsules& c,
                                                   const void* logits,        // [B, N, J] accumulation, or null
                                                   const void* input_weight,  // [B, N] accumulation, or null
                                                   int64_t iterations, bool leaky, bool detach, SquashKind kind,
                                                   const void* s,    // [iterations, B, J, D] accumulation, from forward
                                                   const void* g_v,  // [B, J, D] accumulation
                                                   void* g_u, void* g_weight,
                                                   void* g_logits,        // [B, N, J] accumulation
                                                   void* g_input_weight,  // [B, N] accumulation
                                                   void* g_bias);         // [J, D] accumulation

    // The same two operators with the softmax over the input capsules. log_sums: log Σ_i exp(b_ij), b the logits.
    Status (*dynamic_routing_over_inputs)(const Capsules& c,
                                          const void* logits,        // [B, N, J] accumulation, or null
                                          const void* input_weight,  // [B, N] accumulation, or null
                                          const void* bias,          // [J, D] accumulation, or null
                                          int64_t iterations, SquashKind kind,
                                          void* v,          // [B, J, D] accumulation
                                          void* s,          // [iterations, B, J, D] accumulation, bias included
                                          void* log_sums);  // [iterations, B, J] accumulation
    Status (*dynamic_routing_over_inputs_backward)(const Capsules& c,
                                                   const void* logits,        // [B, N, J] accumulation, or null
                                                   const void* input_weight,  // [B, N] accumulation, or null
                                                   const void* bias,          // [J, D] accumulation, or null
                                                   int64_t iterations, bool detach, SquashKind kind,
                                                   const void* s,         // from forward
                                                   const void* log_sums,  // from forward
                                                   const void* g_v,       // [B, J, D] accumulation
                                                   void* g_u, void* g_weight,
                                                   void* g_logits,        // [B, N, J] accumulation
                                                   void* g_input_weight,  // [B, N] accumulation
                                                   void* g_bias);         // [J, D] accumulation

    Status (*routing_step_over_inputs)(const Capsules& c,
                                       const void* state,         // [B, J, D] accumulation
                                       const void* logits,        // [B, N, J] accumulation, or null
                                       const void* input_weight,  // [B, N] accumulation, or null
                                       void* s,                   // [B, J, D] accumulation
                                       void* total,               // the same again: s may be rounded, this is saved
                                       void* log_sums);           // [B, J] accumulation
    Status (*routing_step_over_inputs_backward)(const Capsules& c,
                                                const void* state,         // [B, J, D] accumulation
                                                const void* logits,        // [B, N, J] accumulation, or null
                                                const void* input_weight,  // [B, N] accumulation, or null
                                                const void* total,         // from forward
                                                const void* log_sums,      // from forward
                                                const void* g_s,           // [B, J, D] accumulation
                                                void* g_u, void* g_weight,
                                                void* g_state,          // [B, J, D] accumulation
                                                void* g_logits,         // [B, N, J] accumulation
                                                void* g_input_weight);  // [B, N] accumulation

    // Measures one pass over `size` bytes, or `size` steps of arithmetic. Not an operator.
    Status (*probe)(Probe what, int64_t size, int threads, double* rate);
};

// The operators, in the order of Kernels. Declarations, tables and Python bindings are made from this list.
#define CAPSOPS_OPERATORS(X)                \
    X(squash)                               \
    X(squash_backward)                      \
    X(primary_capsules)                     \
    X(primary_capsules_backward)            \
    X(affine_votes)                         \
    X(affine_votes_backward)                \
    X(attention_routing)                    \
    X(attention_routing_backward)           \
    X(dynamic_routing)                      \
    X(dynamic_routing_backward)             \
    X(routing_step)                         \
    X(routing_step_backward)                \
    X(self_attention_routing)               \
    X(self_attention_routing_backward)      \
    X(em_routing)                           \
    X(em_routing_backward)                  \
    X(em_routing_over_positions)            \
    X(em_routing_over_positions_backward)   \
    X(routing_step_with_logits)             \
    X(routing_step_with_logits_backward)    \
    X(dynamic_routing_with_logits)          \
    X(dynamic_routing_with_logits_backward) \
    X(dynamic_routing_over_inputs)          \
    X(dynamic_routing_over_inputs_backward) \
    X(routing_step_over_inputs)             \
    X(routing_step_over_inputs_backward)

// For use with the list: the declaration of a kernel, and its entry in a table.
#define CAPSOPS_DECLARE(op) std::remove_pointer_t<decltype(Kernels::op)> op;
#define CAPSOPS_ENTRY(op) .op = op,
#define CAPSOPS_NO_ENTRY(op) .op = nullptr,

namespace cuda {

extern const Kernels kernels;

// What CUDA reported for the last failed launch of this thread.
const char* error();
// In CUDA's own form: 13000 is version 13.0. The driver's version is 0 if there is no driver.
int driver_version();
int runtime_version();

}  // namespace cuda

namespace cpu {

// The kernels of the best instruction set of this machine, or of the selected one. With capsules: of the best
// instruction set for their shape.
const Kernels& kernels();
const Kernels& kernels(const Capsules& c);

const char* instruction_set();
// The compiled instruction sets that run on this machine, best first, separated by spaces.
const char* instruction_sets();
// Selects one; "auto": the best. Returns false if it was not compiled or does not run on this machine.
bool use_instruction_set(const char* name);

}  // namespace cpu
}  // namespace capsops
