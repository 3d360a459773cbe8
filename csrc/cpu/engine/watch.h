// How a long operator is given up: between two passes, and between two steps of one. The calling thread asks
// ExecutionContext::stop now and then; the others see its answer.
#pragma once

#include <atomic>
#include <chrono>

#include <omp.h>

#include "../../operators.h"

namespace capsops::cpu::CAPSOPS_ISA {

// Thrown outside of parallel regions alone; for_accumulation turns it into Status::interrupted.
struct Interrupted {};

// Between two passes, or two steps of a serial loop that are not short.
inline void throw_if_stopped(const ExecutionContext& context) {
    if (context.stop && context.stop()) throw Interrupted();
}

// One pass. Its owner calls finish() after the parallel region.
class Watch {
  public:
    explicit Watch(const ExecutionContext& context) : stop_(context.stop) {}

    bool stopped() const { return stopped_.load(std::memory_order_relaxed); }

    void finish() {
        // Once more, unless it has said yes: what its handlers raised is still to be reported.
        if (!stopped() && stop_ && stop_()) stopped_.store(true, std::memory_order_relaxed);
        if (stopped()) throw Interrupted();
    }

  private:
    friend class Steps;
    using Clock = std::chrono::steady_clock;

    // To read the clock in every step would take longer than a short one: the calling thread learns how many steps
    // take about a millisecond.
    bool ask() {
        const Clock::time_point now = Clock::now();
        const auto passed = now - asked_;
        asked_ = now;
        if (passed < std::chrono::milliseconds(1))
            period_ = period_ < most_steps ? 2 * period_ : period_;
        else if (passed > std::chrono::milliseconds(4))
            period_ = period_ > 1 ? period_ / 2 : 1;
        left_ = period_;
        if (stop_()) stopped_.store(true, std::memory_order_relaxed);
        return stopped();
    }

    static constexpr int most_steps = 1 << 16;
    bool (*const stop_)();
    std::atomic<bool> stopped_{false};
    // Of the calling thread alone.
    Clock::time_point asked_{};
    int period_ = 1, left_ = 1;
};

// What one thread does of a pass.
class Steps {
  public:
    explicit Steps(Watch& watch) : watch_(watch), asks_(watch.stop_ && omp_get_thread_num() == 0) {}

    // Before a step: whether to leave it and all others, for the results are not wanted any more.
    bool stopped() {
        if (watch_.stopped()) return true;
        return asks_ && --watch_.left_ <= 0 && watch_.ask();
    }

  private:
    Watch& watch_;
    const bool asks_;
};

}  // namespace capsops::cpu::CAPSOPS_ISA
