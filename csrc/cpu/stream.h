// The streaming loops that every routing on the CPU runs through.
//
//   reduce   out[b] = Σ_i policy(û_bi)              one pass over u and W, nothing written but out
//   emit     g_u,bi = g_û,bi W_iᵀ;  g_W,i = Σ_b u_biᵀ g_û,bi     one pass that recomputes û and writes both
//
// Input capsules are cut into blocks whose number depends on the shape alone. A block belongs to one thread and has
// partial sums of its own; those are added in the order of the blocks. The result is therefore bitwise the same for
// any number of threads, and no sum runs over more than one block's capsules in the accumulation type.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>

#include <omp.h>

#include "../coupling.h"
#include "../dtypes.h"
#include "../routing.h"

namespace capsops::cpu {

// Uninitialised memory that a status, not an exception in a parallel region, reports the lack of.
template <class A> class Buffer {
  public:
    explicit Buffer(int64_t size) : data_(new A[static_cast<size_t>(std::max<int64_t>(size, 1))]) {}
    A* get() const { return data_.get(); }

  private:
    std::unique_ptr<A[]> data_;
};

class Blocks {
  public:
    // partial_size: numbers that each block keeps.
    Blocks(int64_t capsules, int64_t partial_size) : capsules_(capsules) {
        constexpr int64_t smallest = 32, most = 256, most_partial = int64_t{1} << 21;
        const int64_t fitting = std::max<int64_t>(most_partial / std::max<int64_t>(partial_size, 1), 8);
        const int64_t wanted = std::min({(capsules + smallest - 1) / smallest, most, fitting});
        size_ = wanted > 0 ? (capsules + wanted - 1) / wanted : 1;
        count_ = (capsules + size_ - 1) / size_;
    }
    int64_t count() const { return count_; }
    int64_t begin(int64_t block) const { return block * size_; }
    int64_t end(int64_t block) const { return std::min(capsules_, (block + 1) * size_); }

  private:
    int64_t capsules_, size_ = 1, count_ = 0;
};

// out[x] = Σ_block partial[block][x], in the order of the blocks, in double.
template <class A, class Out> void add_blocks(const A* partial, int64_t blocks, int64_t size, Out* out, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (size >= 4096)
    for (int64_t x = 0; x < size; ++x) {
        double sum = 0;
        for (int64_t block = 0; block < blocks; ++block) sum += static_cast<double>(partial[block * size + x]);
        out[x] = Out(static_cast<A>(sum));
    }
}

// One input capsule's matrix in the accumulation type: itself, or converted into scratch once for the whole batch.
template <class T, class A> const A* load_weight(const Capsules& c, int64_t i, A* scratch) {
    const T* weight = static_cast<const T*>(c.weight) + i * c.weight_stride;
    if constexpr (std::is_same_v<T, A>) {
        return weight;
    } else {
        for (int64_t x = 0; x < c.K * c.J * c.D; ++x) scratch[x] = static_cast<A>(weight[x]);
        return scratch;
    }
}

// û [J·D] = u [K] times W [K, J·D].
template <class T, class A> void make_votes(const T* u, const A* weight, int64_t K, int64_t JD, A* votes) {
    std::memset(votes, 0, sizeof(A) * static_cast<size_t>(JD));
    for (int64_t k = 0; k < K; ++k) {
        const A a = static_cast<A>(u[k]);
        const A* row = weight + k * JD;
        for (int64_t jd = 0; jd < JD; ++jd) votes[jd] += a * row[jd];
    }
}

inline bool is_there(const Capsules& c, int64_t b, int64_t i) {
    return !c.mask || c.mask[b * c.N + i];
}

template <class T, class Policy, class A = accumulation_t<T>>
void reduce(const Capsules& c, const Policy& policy, A* out /* [B, J, D] */) {
    const int64_t JD = c.J * c.D, KJD = c.K * JD, size = c.B * JD;
    const Blocks blocks(c.N, size);
    Buffer<A> partial(blocks.count() * size);
    const int64_t scratch_size = KJD + JD + policy.scratch_size();
    Buffer<A> scratch(scratch_size * c.threads);

#pragma omp parallel for schedule(dynamic) num_threads(c.threads)
    for (int64_t block = 0; block < blocks.count(); ++block) {
        A* weight_scratch = scratch.get() + omp_get_thread_num() * scratch_size;
        A* votes = weight_scratch + KJD;
        A* policy_scratch = votes + JD;
        A* sum = partial.get() + block * size;
        std::fill(sum, sum + size, A(0));
        for (int64_t i = blocks.begin(block); i < blocks.end(block); ++i) {
            const A* weight = load_weight<T>(c, i, weight_scratch);
            for (int64_t b = 0; b < c.B; ++b) {
                if (!is_there(c, b, i)) continue;
                make_votes(static_cast<const T*>(c.u) + (b * c.N + i) * c.K, weight, c.K, JD, votes);
                policy.accumulate(b, votes, sum + b * JD, policy_scratch);
            }
        }
    }
    add_blocks(partial.get(), blocks.count(), size, out, c.threads);
}

// Policies that need to know which input capsule they see (the stored gradient of the votes) take i as well.
template <class Policy, class A>
concept EmitsByCapsule = requires(const Policy& p, A* x) { p.emit(int64_t{}, int64_t{}, x); };

template <class T, class Policy, class A = accumulation_t<T>>
void emit(const Capsules& c, const Policy& policy, const CapsuleGradients& gradients,
          A* g_params /* [policy.param_count()] */) {
    const int64_t JD = c.J * c.D, KJD = c.K * JD, params = policy.param_count();
    const bool shared = c.weight_stride == 0 && gradients.weight;
    const int64_t shared_size = shared ? KJD : 0;
    const Blocks blocks(c.N, params + shared_size);
    Buffer<A> partial(blocks.count() * params);
    Buffer<A> shared_partial(blocks.count() * shared_size);
    const int64_t scratch_size = 2 * KJD + 2 * JD + policy.scratch_size();
    Buffer<A> scratch(scratch_size * c.threads);

#pragma omp parallel for schedule(dynamic) num_threads(c.threads)
    for (int64_t block = 0; block < blocks.count(); ++block) {
        A* weight_scratch = scratch.get() + omp_get_thread_num() * scratch_size;
        A* votes = weight_scratch + KJD;
        A* g_votes = votes + JD;
        A* policy_scratch = g_votes + JD;
        A* g_weight = shared ? shared_partial.get() + block * KJD : policy_scratch + policy.scratch_size();
        A* param_sum = partial.get() + block * params;
        std::fill(param_sum, param_sum + params, A(0));
        if (shared) std::fill(g_weight, g_weight + KJD, A(0));

        for (int64_t i = blocks.begin(block); i < blocks.end(block); ++i) {
            const A* weight = load_weight<T>(c, i, weight_scratch);
            if (gradients.weight && !shared) std::fill(g_weight, g_weight + KJD, A(0));
            for (int64_t b = 0; b < c.B; ++b) {
                const int64_t item = (b * c.N + i) * c.K;
                const T* u = static_cast<const T*>(c.u) + item;
                T* g_u = gradients.u ? static_cast<T*>(gradients.u) + item : nullptr;
                if (!is_there(c, b, i)) {
                    if (g_u) std::fill(g_u, g_u + c.K, T(0));
                    continue;
                }
                if constexpr (EmitsByCapsule<Policy, A>) {
                    policy.emit(b, i, g_votes);
                } else {
                    make_votes(u, weight, c.K, JD, votes);
                    policy.emit(b, votes, g_votes, param_sum, policy_scratch);
                }
                for (int64_t k = 0; k < c.K; ++k) {
                    if (g_u) {
                        A dot = 0;
#pragma omp simd reduction(+ : dot)
                        for (int64_t jd = 0; jd < JD; ++jd) dot += weight[k * JD + jd] * g_votes[jd];
                        g_u[k] = T(dot);
                    }
                    if (gradients.weight) {
                        const A a = static_cast<A>(u[k]);
                        A* row = g_weight + k * JD;
                        for (int64_t jd = 0; jd < JD; ++jd) row[jd] += a * g_votes[jd];
                    }
                }
            }
            if (gradients.weight && !shared) {
                T* out = static_cast<T*>(gradients.weight) + i * KJD;
                for (int64_t x = 0; x < KJD; ++x) out[x] = T(g_weight[x]);
            }
        }
    }
    if (params) add_blocks(partial.get(), blocks.count(), params, g_params, c.threads);
    if (shared) add_blocks(shared_partial.get(), blocks.count(), KJD, static_cast<T*>(gradients.weight), c.threads);
}

// Calls function.operator()<storage type>() for a run-time dtype and turns a lack of memory into a status.
template <class Function> Status for_dtype(Dtype dtype, Function function) {
    try {
        switch (dtype) {
            case Dtype::float32: function.template operator()<float>(); return Status::ok;
            case Dtype::float64: function.template operator()<double>(); return Status::ok;
            case Dtype::bfloat16: function.template operator()<bfloat16>(); return Status::ok;
            case Dtype::float16: function.template operator()<float16>(); return Status::ok;
        }
    } catch (const std::bad_alloc&) {
        return Status::out_of_memory;
    }
    return Status::unsupported;
}

// squash and its vector-Jacobian product over the B·J output capsules of a routing.
template <class A> void squash_outputs(const A* s, A* v, int64_t rows, int64_t D) {
    for (int64_t r = 0; r < rows; ++r) squash_vector(s + r * D, v + r * D, D, squash_sabour<A>);
}

template <class A> void squash_outputs_backward(const A* g_v, const A* s, A* g_s, int64_t rows, int64_t D) {
    for (int64_t r = 0; r < rows; ++r) squash_vector_backward(g_v + r * D, s + r * D, g_s + r * D, D, squash_sabour<A>);
}

}  // namespace capsops::cpu
