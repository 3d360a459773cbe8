#!/usr/bin/env bash
# Runs the CPU kernels under sanitizers, without Python: every operator and dtype, for each instruction set of this
# machine.
#
#   tests/core/sanitize.sh                                AddressSanitizer (with leaks), UndefinedBehaviorSanitizer
#   tests/core/sanitize.sh thread                         ThreadSanitizer
#   tests/core/sanitize.sh address,undefined emulated     only the baseline instruction set; also the CUDA kernels on
#                                                         the host (AddressSanitizer), compared with it
#   tests/core/sanitize.sh none emulated                  the same without sanitizers, three times as fast: whether the
#                                                         CUDA kernels compute what the CPU's compute
#   tests/core/sanitize.sh undefined aarch64              for 64-bit ARM on any Linux machine, by a cross compiler and an
#                                                         emulator (apt-get install g++-aarch64-linux-gnu qemu-user)
set -euo pipefail
cd "$(dirname "$0")/../.."

sanitizers=${1:-address,undefined}
kind=${2:-}
machine=$(uname -m)
cxx=${CXX:-g++}
run=()
link=()
if [ "$kind" = aarch64 ] && [ "$machine" != aarch64 ]; then
    machine=aarch64 cxx=aarch64-linux-gnu-g++ run=(qemu-aarch64) link=(-static)
    for tool in "$cxx" "${run[@]}"; do
        command -v "$tool" >/dev/null || { echo "sanitize.sh: there is no $tool; apt-get install" \
            "g++-aarch64-linux-gnu qemu-user" >&2; exit 1; }
    done
fi
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
watch=()
[ "$sanitizers" = none ] || watch=(-fsanitize="$sanitizers" -fno-sanitize-recover=all)
options=(-std=c++20 -O1 -g1 -fno-omit-frame-pointer -fopenmp -fno-math-errno -fno-trapping-math -fno-strict-aliasing
    -ffp-contract=fast -Wno-psabi -Wno-ignored-attributes "${watch[@]}")

jobs=()
sets=("baseline 16")
x86=()
if [ "$machine" = x86_64 ] && [ "$kind" != emulated ]; then
    sets+=("avx2 32 -mavx2 -mfma -mf16c" "avx512 64 -mavx512f -mavx512vl -mavx512bw -mavx512dq -mavx2 -mfma -mf16c")
    x86=(-DCAPSOPS_X86)
fi
for set in "${sets[@]}"; do
    read -r name bytes flags <<<"$set"
    for source in csrc/cpu/*/*.cpp; do
        [[ $source == */dispatch.cpp ]] && continue
        # shellcheck disable=SC2086
        jobs+=("$name-$(basename "$source" .cpp).o $source -DCAPSOPS_ISA=$name -DCAPSOPS_VECTOR_BYTES=$bytes $flags")
    done
done
emulation=
if [ "$kind" = emulated ]; then
    emulation=-DCAPSOPS_EMULATION
    for source in csrc/cuda/*/*.cu; do
        jobs+=("cuda-$(basename "$source" .cu).o $source -xc++ $emulation -Wno-unknown-pragmas -fno-sanitize=undefined")
    done
fi
jobs+=("dispatch.o csrc/cpu/engine/dispatch.cpp ${x86[*]}" "every_operator.o tests/core/every_operator.cpp $emulation")
[[ $sanitizers == *thread* ]] && jobs+=("openmp.o tests/core/openmp.cpp")
export cxx build
export OPTIONS="${options[*]}"
printf '%s\n' "${jobs[@]}" | xargs -P "$(nproc)" -I{} bash -c 'set -- {}; $cxx $OPTIONS "${@:3}" -c "$2" -o "$build/$1"'
if [[ $sanitizers == *thread* ]]; then
    # Without -fopenmp, so that the kernels call openmp.cpp instead of libgomp.
    "$cxx" "${watch[@]}" "$build"/*.o -o "$build/every_operator" -pthread
else
    "$cxx" "${watch[@]}" -fopenmp "${link[@]}" "$build"/*.o -o "$build/every_operator"
fi
OMP_WAIT_POLICY=passive "${run[@]}" "$build/every_operator"
