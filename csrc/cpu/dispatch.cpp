// The choice between the instruction sets that the kernels were compiled for: the best that runs here, unless another
// is asked for.

#include <atomic>
#include <cstring>

#include "../routing.h"

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
    const Kernels* kernels;
    bool (*runs)();
};

// Best first.
const InstructionSet all[] = {
#if defined(CAPSOPS_X86)
    {"avx512", &avx512::kernels,
     [] {
         return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
     }},
    {"avx2", &avx2::kernels,
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }},
#endif
    {"baseline", &baseline::kernels, [] { return true; }},
};

const InstructionSet* best() {
    const InstructionSet* set = all;
    while (!set->runs()) ++set;
    return set;
}

std::atomic<const InstructionSet*> chosen{best()};

}  // namespace

const Kernels& kernels() {
    return *chosen.load(std::memory_order_relaxed)->kernels;
}

const char* instruction_set() {
    return chosen.load(std::memory_order_relaxed)->name;
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
    for (const InstructionSet& set : all) {
        if (std::strcmp(set.name, name) || !set.runs()) continue;
        chosen.store(&set, std::memory_order_relaxed);
        return true;
    }
    return false;
}

}  // namespace capsops::cpu
