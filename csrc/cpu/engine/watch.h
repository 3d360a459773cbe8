// Ends a long operator early: between two passes, or between two steps of one. The calling thread polls
// ExecutionContext::stop; the other threads see the result.
#pragma once

#include <atomic>
#include <chrono>

#include <omp.h>

#include "../../operators.h"

namespace capsops::cpu::CAPSOPS_ISA {

// Thrown only outside of parallel regions; for_accumulation maps it to Status::interrupted.
struct Interrupted {};

// To call between two passes, or between long steps of a serial loop.
inline void throw_if_stopped(const ExecutionContext& context) {
    if (context.stop && context.stop()) throw Interrupted();
}

// Watches one pass. The owner calls finish() after the parallel region.
class Watch {
  public:
    explicit Watch(const ExecutionContext& context) : stop_(context.stop) {}

    bool stopped() const { return stopped_.load(std::memory_order_relaxed); }

    void finish() {
        // Polls a last time, unless stop() has returned true: after that it must not be called again, because the
        // exception of the signal handler is still pending.
        if (!stopped() && stop_ && stop_()) stopped_.store(true, std::memory_order_relaxed);
        if (stopped()) throw Interrupted();
    }

  private:
    friend class Steps;
    using Clock = std::chrono::steady_clock;

    // Polling in every step would take longer than a short step. So the calling thread adapts the number of steps
    // between two polls to take about a millisecond.
    bool ask() {
        const Clock::time_point now = Clock::now();
        const auto passed = now - asked_;
        asked_ = now;
        if (passed < std::chrono::milliseconds(1))
            period_ = period_ < max_steps ? 2 * period_ : period_;
        else if (passed > std::chrono::milliseconds(4))
            period_ = period_ > 1 ? period_ / 2 : 1;
        left_ = period_;
        if (stop_()) stopped_.store(true, std::memory_order_relaxed);
        return stopped();
    }

    static constexpr int max_steps = 1 << 16;
    bool (*const stop_)();
    std::atomic<bool> stopped_{false};
    // Used by the calling thread only.
    Clock::time_point asked_{};
    int period_ = 1, left_ = 1;
};

// The steps of one thread in a pass.
class Steps {
  public:
    explicit Steps(Watch& watch) : watch_(watch), asks_(watch.stop_ && omp_get_thread_num() == 0) {}

    // To call before a step: whether to skip this and all later steps, because the results are no longer wanted.
    bool stopped() {
        if (watch_.stopped()) return true;
        return asks_ && --watch_.left_ <= 0 && watch_.ask();
    }

  private:
    Watch& watch_;
    const bool asks_;
};

}  // namespace capsops::cpu::CAPSOPS_ISA
