// The policies of the streaming loops: what each routing does with a vote. Their mathematics is that of
// csrc/coupling.h; here the output capsules of one input capsule are different threads.
#pragma once

#include "staged_couplings.cuh"
#include "stream.cuh"

namespace capsops::cuda {

// ---- one coupling for all components ------------------------------------------------------------------------

// Of the logits of a batch item, number 0 in shared memory, and if wanted the gradients e of its couplings, number 1;
// both summed over the parts of a vote.
template <class A, int width> struct RowSoftmax {
    const At<A, width>& at;
    A largest, inverse, mean = 0;  // mean: Σ_k c_k e_k

    __device__ A dot_of(int number, int64_t k) const {
        A sum = 0;
        for (int part = 0; part < at.parts; ++part) sum += at.shared(number, at.row + k * at.parts + part);
        return sum;
    }
    __device__ RowSoftmax(const At<A, width>& at_, bool leaky, bool with_gradient) : at(at_) {
        largest = leaky ? A(0) : dot_of(0, 0);
#pragma unroll 1
        for (int64_t k = 0; k < at.J; ++k) largest = larger(dot_of(0, k), largest);
        A sum = leaky ? exponential(-largest) : A(0);
#pragma unroll 1
        for (int64_t k = 0; k < at.J; ++k) {
            const A e = exponential(dot_of(0, k) - largest);
            sum += e;
            if (with_gradient) mean += e * dot_of(1, k);
        }
        inverse = reciprocal(sum);
        mean *= inverse;
    }
    __device__ A coupling() const { return exponential(dot_of(0, at.j) - largest) * inverse; }
    // c (e − Σ_k c_k e_k)
    __device__ A gradient() const { return coupling() * (dot_of(1, at.j) - mean); }
};

// All couplings equal.
template <class A, int width> struct Equal {
    struct Own {};
    A coupling;

    __device__ void start(const At<A, width>&, Own&) const {}
    __device__ void couple(const At<A, width>&, const Own&, const A (&)[width], A (&c)[width]) const {
#pragma unroll
        for (int d = 0; d < width; ++d) c[d] = coupling;
    }

    static int64_t staged_numbers(int64_t, int64_t) { return 0; }
    Status stage_couplings(const StagedVotes<A>&, A*, Couplings<A>& c, const Place&) const {
        c.equal = coupling;
        return Status::ok;
    }
};

// c = softmax_j(û · x) + prior, or from behind δ = c (e − Σ_k c_k e_k) with e = û · y.
template <class A, int width, bool adjoint> struct Agreement {
    struct Own {
        A x[width], y[width];
    };
    const A* x;      // [B, J, D]
    const A* y;      // [B, J, D], if adjoint
    const A* prior;  // [N, J], or null
    bool leaky;

    __device__ void start(const At<A, width>& at, Own& own) const {
        load(x, at, own.x);
        if (adjoint) load(y, at, own.y);
    }
    __device__ void couple(const At<A, width>& at, const Own& own, const A (&v)[width], A (&c)[width]) const {
        const A dots[2] = {dot(v, own.x), adjoint ? dot(v, own.y) : A(0)};
        at.show(0, dots);
        A weight = 0;
        if (at.there) {
            const RowSoftmax<A, width> softmax(at, leaky, adjoint);
            weight = adjoint ? softmax.gradient() : softmax.coupling();
            if (prior) weight += prior[at.i * at.J + at.j];
        }
#pragma unroll
        for (int d = 0; d < width; ++d) c[d] = weight;
    }

    static int64_t staged_numbers(int64_t J, int64_t) { return (adjoint ? 2 : 1) * J; }
    Status stage_couplings(const StagedVotes<A>& t, A* scratch, Couplings<A>& c, const Place& place) const {
        A* const e = adjoint ? scratch + t.pairs() * t.J : nullptr;
        c.c = adjoint ? e : scratch;
        c.prior = prior;
        CAPSOPS_TRY(stage_agreements(t, x, adjoint ? y : nullptr, scratch, place));
        return stage_softmax(t, scratch, e, leaky, place);
    }
};

// g_û = Σ_t [c^t g^t + δ^t x^t] over iterations.
template <class A, int width> struct AgreementGradient {
    struct Own {};
    const A* x;    // [iterations, B, J, D], the states of the logits
    const A* g;    // [iterations, B, J, D], the gradients of the sums
    int64_t size;  // of one iteration
    int64_t iterations;
    bool equal_first;  // whether the couplings of the first of them are equal
    bool leaky, detach;
    A equal;
    const A* prior = nullptr;  // [N, J], or null
    const A* rest = nullptr;   // [B, J, D], added to g_û; or null
    A* g_prior = nullptr;      // [N, J], or null

    void cut(int, int) {}
    __device__ void begin_block() const {}
    __device__ void end_block(A*) const {}
    __device__ void start(const At<A, width>&, Own&) const {}
    __device__ void gradient(const At<A, width>& at, const Own&, const A (&v)[width], A (&out)[width]) const {
#pragma unroll
        for (int d = 0; d < width; ++d) out[d] = A(0);
        if (rest) load(rest, at, out);
        for (int64_t t = 0; t < iterations; ++t) {
            A own_x[width], own_g[width], c = equal, delta = 0;
            load(g + t * size, at, own_g);
            if (t > 0 || !equal_first) {
                load(x + t * size, at, own_x);
                const A dots[2] = {dot(v, own_x), dot(v, own_g)};
                at.show(0, dots);
                if (g_prior) {
                    __syncthreads();
                    add_up(at);
                    __syncthreads();
                }
                c = 0;
                if (at.there) {
                    const RowSoftmax<A, width> softmax(at, leaky, !detach);
                    c = softmax.coupling();
                    if (!detach) delta = softmax.gradient();
                    if (prior) c += prior[at.i * at.J + at.j];
                }
            }
#pragma unroll
            for (int d = 0; d < width; ++d) out[d] += c * own_g[d];
            if (detach || (t == 0 && equal_first)) continue;
#pragma unroll
            for (int d = 0; d < width; ++d) out[d] += delta * own_x[d];
        }
    }

    static constexpr bool needs_votes = true;
    static int64_t staged_numbers(int64_t J, int64_t) { return 2 * J; }
    Status stage_gradient(const StagedVotes<A>& t, A* scratch, A* to, A*, int64_t, const Place& place) const {
        for (int64_t m = 0; m < iterations; ++m) {
            const A *own_x = x + m * size, *own_g = g + m * size;
            Couplings<A> c{.equal = equal};
            A* delta = nullptr;
            if (m > 0 || !equal_first) {
                A* const e = scratch + t.pairs() * t.J;
                c.c = scratch, c.prior = prior;
                delta = detach ? nullptr : e;
                CAPSOPS_TRY(stage_agreements(t, own_x, detach && !g_prior ? nullptr : own_g, scratch, place));
                if (g_prior)
                    CAPSOPS_TRY(
                        launch(add_over_items<A>, blocks_for(t.count * t.J), most_threads, 0, place, t, e, g_prior));
                CAPSOPS_TRY(stage_softmax(t, scratch, delta, leaky, place));
            }
            CAPSOPS_TRY(launch_rows<A>(add_agreement_gradient<A>, t.pairs() * t.J, t.D, place, t, c, delta, own_x,
                                       own_g, m == 0 ? rest : nullptr, to, m > 0));
        }
        return Status::ok;
    }

  private:
    // g_prior = Σ_b e, by the thread of the first item of each tile.
    __device__ void add_up(const At<A, width>& at) const {
        if (at.item > 0 || at.part > 0 || !at.in_run) return;
        A sum = 0;
        for (int item = 0; item < at.items; ++item)
            for (int part = 0; part < at.parts; ++part) sum += at.shared(1, at.slot + item * at.row_size + part);
        A& to = g_prior[at.i * at.J + at.j];
        to = at.tile == 0 ? sum : to + sum;
    }
};

// ---- attention: a coupling for each component -----------------------------------------------------------------

// z_k = Σ_j A_kj û_j + a_k and c = softmax_k(z), for every component by itself (CardioCaps, eq. 4). In shared memory:
// the votes [width], then z, or what else the threads of a batch item exchange [width].
template <class A, int width> struct Attention {
    // Of two output capsules, j and k: z_k − z_j = own û_j + other û_k + constant, and a softmax of two needs no more.
    struct Own {
        A own, other, constant;
    };
    const A* weight;  // [J, J]
    const A* bias;    // [J], or null

    __device__ void start(const At<A, width>& at, Own& own) const {
        if (at.J != 2) return;
        const int64_t j = at.j, k = 1 - j;
        own.own = weight[k * 2 + j] - weight[j * 2 + j];
        own.other = weight[k * 2 + k] - weight[j * 2 + k];
        own.constant = bias ? bias[k] - bias[j] : A(0);
    }
    __device__ void couple(const At<A, width>& at, const Own& own, const A (&v)[width], A (&c)[width]) const {
        at.show(0, v);
        if (at.J == 2) {
#pragma unroll
            for (int d = 0; d < width; ++d)
                c[d] = reciprocal(A(1) + exponential(own.own * v[d] + own.other * at.of(d, 1 - at.j) + own.constant));
            return;
        }
#pragma unroll
        for (int d = 0; d < width; ++d) c[d] = at.there && bias ? bias[at.j] : A(0);
#pragma unroll 1
        for (int64_t k = 0; at.there && k < at.J; ++k) {
            const A a = weight[at.j * at.J + k];
#pragma unroll
            for (int d = 0; d < width; ++d) c[d] += a * at.of(d, k);
        }
        at.show(width, c);
        if (!at.there) return;
        // c_j = 1 / Σ_k e^(z_k − z_j): without the largest, for `exponential` has a bound.
        A sum[width];
#pragma unroll
        for (int d = 0; d < width; ++d) sum[d] = A(0);
#pragma unroll 1
        for (int64_t k = 0; k < at.J; ++k) {
#pragma unroll
            for (int d = 0; d < width; ++d) sum[d] += exponential(at.of(width + d, k) - c[d]);
        }
#pragma unroll
        for (int d = 0; d < width; ++d) c[d] = reciprocal(sum[d]);
    }

    static int64_t staged_numbers(int64_t J, int64_t D) { return J * D; }
    Status stage_couplings(const StagedVotes<A>& t, A* scratch, Couplings<A>& c, const Place& place) const {
        c.c = scratch, c.elementwise = true;
        return stage(t, scratch, nullptr, nullptr, place);
    }
    // The couplings, or with g_s the gradients c g_s of the weighted votes, and dz.
    Status stage(const StagedVotes<A>& t, A* c, const A* g_s, A* dz, const Place& place) const {
        Product z = mix_capsules<A>(t, weight, false, t.votes, c);
        z.bias = bias;
        CAPSOPS_TRY(multiply_matrices(z, place));
        return launch(couple_components<A>, blocks_for(t.pairs() * t.D), most_threads, 0, place, t, c, g_s, dz);
    }
};

// dz_k = c_k (q_k − Σ_j c_j q_j) with q = g_s û;  g_û,j = c_j g_s,j + Σ_k A_kj dz_k;  g_A,kj = Σ dz_k û_j;  g_a,k = Σ
// dz_k. In shared memory, behind what Attention has: g_A and g_a of this thread [J + 1].
template <class A, int width> struct AttentionGradient {
    struct Own {
        typename Attention<A, width>::Own attention;
        A g_s[width], other[width];  // other: of two output capsules, g_s of the other
    };
    Attention<A, width> attention;
    const A* g_s;  // [B, J, D]
    bool wants_params;
    int64_t J, params_at;  // where the gradients of the parameters begin in shared memory
    int rows = 0, parts = 0;

    void cut(int rows_, int parts_) { rows = rows_, parts = parts_; }
    __device__ A& param(int64_t m, int64_t slot) const {
        return reinterpret_cast<A*>(shared_memory())[(params_at + m) * (static_cast<int64_t>(blockDim.x) + 1) + slot];
    }
    __device__ void begin_block() const {
        for (int64_t m = 0; wants_params && m <= J; ++m) param(m, threadIdx.x) = 0;
    }
    __device__ void start(const At<A, width>& at, Own& own) const {
        attention.start(at, own.attention);
        load(g_s, at, own.g_s);
        if (at.J == 2) load(g_s + (at.j == 0 ? at.D : -at.D), at, own.other);
    }
    __device__ void gradient(const At<A, width>& at, const Own& own, const A (&v)[width], A (&g)[width]) const {
        A c[width], dz[width];
        attention.couple(at, own.attention, v, c);
        if (at.J == 2) {
            // dz_j = −dz_k = c_j c_k (q_j − q_k).
            A own_product = 0, other_product = 0, sum = 0;
#pragma unroll
            for (int d = 0; d < width; ++d) {
                const A other = at.of(d, 1 - at.j);
                const A difference = own.g_s[d] * v[d] - own.other[d] * other;
                dz[d] = at.there ? c[d] * (A(1) - c[d]) * difference : A(0);
                g[d] = at.there ? c[d] * own.g_s[d] - own.attention.own * dz[d] : A(0);
                own_product += dz[d] * v[d];
                other_product += dz[d] * other;
                sum += dz[d];
            }
            if (wants_params) {
                param(at.j, at.slot) += own_product;
                param(1 - at.j, at.slot) += other_product;
                param(2, at.slot) += sum;
            }
            return;
        }
#pragma unroll
        for (int d = 0; d < width; ++d) {
            if (!at.there) c[d] = A(0);
            g[d] = c[d] * own.g_s[d];
            dz[d] = g[d] * v[d];
        }
        at.show(width, dz);
        A mean[width];
#pragma unroll
        for (int d = 0; d < width; ++d) mean[d] = A(0);
#pragma unroll 1
        for (int64_t k = 0; at.there && k < at.J; ++k) {
#pragma unroll
            for (int d = 0; d < width; ++d) mean[d] += at.of(width + d, k);
        }
#pragma unroll
        for (int d = 0; d < width; ++d) dz[d] -= c[d] * mean[d];
        at.show(width, dz);
        if (!at.there) return;
#pragma unroll 1
        for (int64_t k = 0; k < at.J; ++k) {
            const A a = attention.weight[k * at.J + at.j];
            A product = 0;
#pragma unroll
            for (int d = 0; d < width; ++d) {
                g[d] += a * at.of(width + d, k);
                product += dz[d] * at.of(d, k);
            }
            if (wants_params) param(k, at.slot) += product;
        }
        A sum = 0;
#pragma unroll
        for (int d = 0; d < width; ++d) sum += dz[d];
        if (wants_params) param(J, at.slot) += sum;
    }
    // params [runs, J·J + J]: g_A and g_a.
    __device__ void end_block(A* params) const {
        if (!wants_params) return;
        __syncthreads();
        for (int64_t x = threadIdx.x; x < J * (J + 1); x += blockDim.x) {
            const int64_t k = x / (J + 1), m = x % (J + 1);
            A sum = 0;
            for (int row = 0; row < rows; ++row)
                for (int part = 0; part < parts; ++part) sum += param(m, (row * J + k) * parts + part);
            params[blockIdx.x * J * (J + 1) + (m < J ? k * J + m : J * J + k)] = sum;
        }
    }

    static constexpr bool needs_votes = true;
    static int64_t staged_numbers(int64_t J, int64_t D) { return J * D; }
    Status stage_gradient(const StagedVotes<A>& t, A* dz, A* g, A* params, int64_t pieces, const Place& place) const {
        CAPSOPS_TRY(attention.stage(t, g, g_s, dz, place));
        CAPSOPS_TRY(multiply_matrices(mix_capsules<A>(t, attention.weight, true, dz, g), place));
        if (!wants_params) return Status::ok;
        CAPSOPS_TRY(multiply_matrices(mixing_gradient<A>(t, dz, t.votes, params, pieces, J * J + J), place));
        return multiply_matrices(mixing_gradient<A>(t, dz, nullptr, params + J * J, pieces, J * J + J), place);
    }
};

// ---- votes that were stored, with their gradients ---------------------------------------------------------------

template <class T, int width> struct StoredGradient {
    struct Own {};
    using A = Accumulation<T>;
    const T* g_votes;  // [B, N, J, D]

    void cut(int, int) {}
    __device__ void begin_block() const {}
    __device__ void end_block(A*) const {}
    __device__ void start(const At<A, width>&, Own&) const {}
    __device__ void gradient(const At<A, width>& at, const Own&, const A (&)[width], A (&g)[width]) const {
#pragma unroll
        for (int d = 0; d < width; ++d)
            g[d] = at.there && d < at.count
                       ? static_cast<A>(g_votes[((at.b * at.N + at.i) * at.J + at.j) * at.D + at.part * width + d])
                       : A(0);
    }

    static constexpr bool needs_votes = false;
    static int64_t staged_numbers(int64_t, int64_t) { return 0; }
    Status stage_gradient(const StagedVotes<A>& t, A*, A* g, A*, int64_t, const Place& place) const {
        return launch(stage_rows<A, T>, blocks_for(t.pairs() * t.J * t.D), most_threads, 0, place, t, g_votes,
                      t.J * t.D, g);
    }
};

}  // namespace capsops::cuda
