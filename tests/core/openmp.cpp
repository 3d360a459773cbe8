// The part of an OpenMP runtime that the kernels use, on std::thread. ThreadSanitizer does not know the barriers of
// GCC's own runtime and would report races. Names and meanings are those of libgomp's calling convention (libgomp.h).

#include <atomic>
#include <mutex>
#include <thread>
#include <tuple>
#include <vector>

namespace {

struct Team {
    std::mutex mutex;
    bool started = false;
    long next = 0, end = 0, step = 1, chunk = 1;
};

thread_local Team* team = nullptr;
thread_local int thread_number = 0, thread_count = 1;

bool take(long* begin, long* end) {
    std::lock_guard lock(team->mutex);
    if (team->next >= team->end) return false;
    *begin = team->next;
    *end = team->next + team->chunk * team->step < team->end ? team->next + team->chunk * team->step : team->end;
    team->next = *end;
    return true;
}

}  // namespace

extern "C" {

int omp_get_thread_num() {
    return thread_number;
}
int omp_get_num_threads() {
    return thread_count;
}

void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
    Team own;
    const auto run = [&](int number) {
        // A region may stand in another one, whose team the thread returns to.
        const auto outer = std::tuple(team, thread_number, thread_count);
        team = &own;
        thread_number = number;
        thread_count = static_cast<int>(threads);
        body(data);
        std::tie(team, thread_number, thread_count) = outer;
    };
    std::vector<std::thread> others;
    for (unsigned number = 1; number < threads; ++number) others.emplace_back(run, static_cast<int>(number));
    run(0);
    for (std::thread& other : others) other.join();
}

bool GOMP_loop_nonmonotonic_dynamic_start(long start, long end, long step, long chunk, long* begin, long* stop) {
    {
        std::lock_guard lock(team->mutex);
        if (!team->started) {
            team->started = true;
            team->next = start;
            team->end = end;
            team->step = step;
            team->chunk = chunk;
        }
    }
    return take(begin, stop);
}
bool GOMP_loop_nonmonotonic_dynamic_next(long* begin, long* stop) {
    return take(begin, stop);
}
void GOMP_loop_end_nowait() {}
void GOMP_loop_end() {}

// A parallel region that consists of one loop.
void GOMP_parallel_loop_nonmonotonic_dynamic(void (*body)(void*), void* data, unsigned threads, long start, long end,
                                             long step, long chunk, unsigned flags) {
    struct Loop {
        void (*body)(void*);
        void* data;
        long start, end, step, chunk;
    } loop{body, data, start, end, step, chunk};
    const auto begin = [](void* given) {
        const Loop& l = *static_cast<Loop*>(given);
        {
            std::lock_guard lock(team->mutex);
            if (!team->started) {
                team->started = true;
                team->next = l.start;
                team->end = l.end;
                team->step = l.step;
                team->chunk = l.chunk;
            }
        }
        l.body(l.data);
    };
    GOMP_parallel(begin, &loop, threads, flags);
}

// Used only by probe.cpp, whose loop ends with a barrier and a reduction; the tests do not call it.
void GOMP_barrier() {
    __builtin_trap();
}
void GOMP_atomic_start() {
    __builtin_trap();
}
void GOMP_atomic_end() {
    __builtin_trap();
}

}  // extern "C"
