// The kernels of agreement.cuh for votes that are in memory (staged.cuh). A row of numbers is shared by several threads
// of a block, its lanes.
#pragma once

#include "../../math/softmax.h"
#include "../engine/staged.cuh"

namespace capsops::cuda {

constexpr int lanes_for(int64_t length) {
    int lanes = 1;
    while (lanes < max_threads && 4 * lanes < length) lanes *= 2;
    return lanes;
}

// Launches a kernel over rows, with one number for each thread in shared memory and the number of lanes as its last
// argument.
template <class A, class... P, class... Q>
Status launch_rows(void (*kernel)(P...), int64_t rows, int64_t length, const ExecutionContext& context,
                   const Q&... arguments) {
    const int lanes = lanes_for(length);
    return launch(kernel, blocks_for(rows * lanes), max_threads, max_threads * static_cast<int64_t>(sizeof(A)), context,
                  arguments..., lanes);
}

// dots = û · x, followed by û · y if y is not null. A row for each vote.
template <class A>
__global__ void agreements(StagedVotes<A> t, const A* x, const A* y /* [B, J, D], or null */,
                           A* dots /* [1 or 2, pairs, J] */, int lanes) {
    const int64_t rows = t.pairs() * t.J, lane = threadIdx.x % lanes;
    for (int64_t first = blockIdx.x * blockDim.x / lanes; first < rows; first += index_stride() / lanes) {
        const int64_t row = first + threadIdx.x / lanes, pair = row / t.J;
        const A* const v = t.votes + row * t.D;
        const int64_t state = (pair / t.count * t.J + row % t.J) * t.D;
        A with_x = 0, with_y = 0;
        for (int64_t d = lane; row < rows && d < t.D; d += lanes) {
            with_x += v[d] * x[state + d];
            if (y) with_y += v[d] * y[state + d];
        }
        with_x = sum_over_lanes(with_x, lanes);
        if (y) with_y = sum_over_lanes(with_y, lanes);
        if (row >= rows || lane > 0) continue;
        dots[row] = with_x;
        if (y) dots[rows + row] = with_y;
    }
}

// softmax and softmax_backward of math/softmax.h, in place. A row for each pair.
template <class A>
__global__ void couple_rows(A* z, A* e /* [pairs, J]; e may be null */, int64_t pairs, int64_t J, bool leaky,
                            int lanes) {
    const int64_t lane = threadIdx.x % lanes;
    for (int64_t first = blockIdx.x * blockDim.x / lanes; first < pairs; first += index_stride() / lanes) {
        const int64_t pair = first + threadIdx.x / lanes, end = pair < pairs ? J : 0;
        A *const c = z + pair * J, *const delta = e + pair * J;
        A largest = leaky || lane >= end ? A(0) : c[lane], sum = 0, mean = 0;
        for (int64_t j = lane; j < end; j += lanes) largest = max(c[j], largest);
        largest = over_lanes(largest, lanes, [](A a, A b) { return max(a, b); });
        for (int64_t j = lane; j < end; j += lanes) {
            c[j] = exponential(c[j] - largest);
            sum += c[j];
        }
        const A inverse = reciprocal(sum_over_lanes(sum, lanes) + (leaky ? exponential(-largest) : A(0)));
        for (int64_t j = lane; j < end; j += lanes) {
            c[j] *= inverse;
            if (e) mean += c[j] * delta[j];
        }
        if (!e) continue;
        mean = sum_over_lanes(mean, lanes);
        for (int64_t j = lane; j < end; j += lanes) delta[j] = c[j] * (delta[j] - mean);
    }
}

// g (+)= (c + prior) y + δ x + rest, without δ if it is null. A row for each vote.
template <class A>
__global__ void add_agreement_gradient(StagedVotes<A> t, Couplings<A> c, const A* delta, const A* x, const A* y,
                                       const A* rest, A* g, bool add, int lanes) {
    const int64_t rows = t.pairs() * t.J;
    for (int64_t row = first_index() / lanes; row < rows; row += index_stride() / lanes) {
        const int64_t pair = row / t.J, state = (pair / t.count * t.J + row % t.J) * t.D;
        const bool present = t.present(pair);
        const A weight = present ? c.of(t, pair, row % t.J) : A(0), slope = present && delta ? delta[row] : A(0);
        for (int64_t d = threadIdx.x % lanes; d < t.D; d += lanes) {
            A sum = add ? g[row * t.D + d] : A(0);
            if (present) sum += weight * y[state + d] + (rest ? rest[state + d] : A(0));
            if (present && delta) sum += slope * x[state + d];
            g[row * t.D + d] = sum;
        }
    }
}

// g_prior [N, J] = Σ_b e, or Σ_b w e if weighed.
template <class A, bool weighed>
__global__ void add_over_items(StagedVotes<A> t, const A* e, const A* input_weight /* [B, N] */, A* g_prior) {
    for (int64_t x = first_index(); x < t.count * t.J; x += index_stride()) {
        double sum = 0;
        for (int64_t b = 0; b < t.B; ++b) {
            const int64_t pair = b * t.count + x / t.J;
            if (!t.present(pair)) continue;
            A own = e[b * t.count * t.J + x];
            if constexpr (weighed) own *= input_weight[t.of_all(pair)];
            sum += static_cast<double>(own);
        }
        g_prior[t.first * t.J + x] = static_cast<A>(sum);
    }
}

// The logits û · x, and û · y if y is not null.
template <class A>
Status stage_agreements(const StagedVotes<A>& t, const A* x, const A* y, A* dots, const ExecutionContext& context) {
    return launch_rows<A>(agreements<A>, t.pairs() * t.J, t.D, context, t, x, y, dots);
}
template <class A>
Status stage_softmax(const StagedVotes<A>& t, A* z, A* e, bool leaky, const ExecutionContext& context) {
    return launch_rows<A>(couple_rows<A>, t.pairs(), t.J, context, z, e, t.pairs(), t.J, leaky);
}

}  // namespace capsops::cuda
