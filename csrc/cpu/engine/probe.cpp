// Measures the memory bandwidth and the arithmetic of this machine, as a yardstick for benchmarks: loops that only
// read, copy or compute.

#include <chrono>

#include "stream.h"

namespace capsops::cpu::CAPSOPS_ISA {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
}

}  // namespace

Status probe(Probe what, int64_t size_, int threads, double* rate) {
    return for_accumulation(Dtype::float32, [&]<class>() {
        using A = float;
        constexpr int n = Lanes<A>::count, unroll = 8;
        const int64_t size = what == Probe::arithmetic ? 64 : ceil_div(size_, 4 * 1024) * 1024;
        Buffer<A> from(size), to(what == Probe::copy ? size : 64);
        // First touched by the thread that uses it.
#pragma omp parallel for schedule(static) num_threads(threads)
        for (int64_t x = 0; x < size; x += 64) {
            fill(from.get() + x, 64, A(1));
            if (what == Probe::copy) fill(to.get() + x, 64, A(0));
        }
        double work = 0;
        A total = 0;
        const auto start = Clock::now();
#pragma omp parallel num_threads(threads) reduction(+ : total)
        {
            Lanes<A> sum[unroll];
            for (int m = 0; m < unroll; ++m) sum[m] = from.get()[m];
            if (what == Probe::arithmetic) {
                const Lanes<A> factor = from.get()[0] * A(0.999), term = from.get()[1] * A(0.001);
                for (int64_t x = 0; x < size_; ++x)
#pragma GCC unroll 8
                    for (int m = 0; m < unroll; ++m) sum[m] = sum[m] * factor + term;
            } else {
#pragma omp for schedule(static)
                for (int64_t x = 0; x < size; x += unroll * n)
#pragma GCC unroll 8
                    for (int m = 0; m < unroll; ++m) {
                        if (what == Probe::copy)
                            store_nontemporal(to.get() + x + m * n, load(from.get() + x + m * n));
                        else
                            sum[m] += load(from.get() + x + m * n);
                    }
                fence_nontemporal();
            }
            for (int m = 0; m < unroll; ++m) total += sum[m].v[0];
        }
        const double seconds = seconds_since(start);
        if (what == Probe::arithmetic)
            work = 2.0 * static_cast<double>(size_) * unroll * n * threads;
        else
            work = (what == Probe::copy ? 8.0 : 4.0) * static_cast<double>(size);
        // Uses the sum, so that the compiler keeps the loops.
        *rate = total == A(-1) ? 0 : work / seconds;
    });
}

}  // namespace capsops::cpu::CAPSOPS_ISA
