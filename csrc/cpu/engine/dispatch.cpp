// Chooses between the compiled instruction sets: the best one that runs on this machine, or the next one for votes that
// would leave half of its lanes idle, unless one was selected.

#include <atomic>
#include <cstring>

#if defined(CAPSOPS_X86)
#include <cpuid.h>
#endif

#include "../../operators.h"
#include "layout.h"

namespace capsops::cpu {

namespace baseline {
extern const Kernels kernels;
}
#if defined(CAPSOPS_X86)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
#endif

namespace {

struct InstructionSet {
    const char* name;
    int vector_bytes;
    const Kernels* kernels;
    bool (*runs)();
};

#if defined(CAPSOPS_X86)
// Asks the processor itself: not every Clang lets __builtin_cpu_supports ask for F16C.
bool has_f16c() {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && c & bit_F16C;
}
#endif

// Best first.
const InstructionSet all[] = {
#if defined(CAPSOPS_X86)
    {"avx512", 64, &avx512::kernels,
     [] {
         return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
     }},
    {"avx2", 32, &avx2::kernels,
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c(); }},
#endif
    {"baseline", 16, &baseline::kernels, [] { return true; }},
};

// The first instruction set that runs here, from `set` on.
const InstructionSet* first_from(const InstructionSet* set) {
    while (!set->runs()) ++set;
    return set;
}

const InstructionSet* const best = first_from(all);
std::atomic<const InstructionSet*> forced{nullptr};

const InstructionSet* in_use() {
    const InstructionSet* set = forced.load(std::memory_order_relaxed);
    return set ? set : best;
}

}  // namespace

const Kernels& kernels() {
    return *in_use()->kernels;
}

const Kernels& kernels(const Capsules& c) {
    const InstructionSet* set = in_use();
    const int64_t number = c.dtype == Dtype::float64 ? 8 : 4, vote_bytes = c.rows * c.D * number;
    // Not below AVX2: from AVX2 on, multiplications and additions are fused.
    if (set != forced.load(std::memory_order_relaxed) && set->vector_bytes == 64 && vote_bytes <= 32 &&
        !batch_fills_lanes(c, 64 / number))
        set = first_from(set + 1);
    return *set->kernels;
}

const char* instruction_set() {
    return in_use()->name;
}

const char* instruction_sets() {
    static const char* const names = [] {
        static char text[64] = "";
        for (const InstructionSet& set : all) {
            if (!set.runs()) continue;
            if (*text) std::strcat(text, " ");
            std::strcat(text, set.name);
        }
        return text;
    }();
    return names;
}

bool use_instruction_set(const char* name) {
    if (std::strcmp(name, "auto") == 0) {
        forced.store(nullptr, std::memory_order_relaxed);
        return true;
    }
    for (const InstructionSet& set : all) {
        if (std::strcmp(set.name, name) || !set.runs()) continue;
        forced.store(&set, std::memory_order_relaxed);
        return true;
    }
    return false;
}

}  // namespace capsops::cpu
