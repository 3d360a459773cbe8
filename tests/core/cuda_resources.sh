#!/usr/bin/env bash
# Compiles every CUDA kernel for every architecture, prints what the kernels take, and fails where one spills registers
# or keeps an array in memory.
#
#   tests/core/cuda_resources.sh [architectures]     default: 80 90 100, or CAPSOPS_CUDA_ARCHS
#
# Without nvcc there is nothing to do, and with CAPSOPS_CUDA=1 that is an error.
set -euo pipefail
cd "$(dirname "$0")/../.."

nvcc=${CUDACXX:-$(command -v nvcc || echo "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc")}
if ! command -v "$nvcc" >/dev/null; then
    echo "CUDA kernels: not compiled, for there is no nvcc (CUDACXX, PATH, CUDA_HOME)"
    [ "${CAPSOPS_CUDA:-}" != 1 ]
    exit
fi

archs=${*:-${CAPSOPS_CUDA_ARCHS:-80 90 100}}
options=(-std=c++20 -O3 --expt-relaxed-constexpr -Xptxas -v)
for arch in ${archs//;/ }; do options+=(-gencode "arch=compute_$arch,code=sm_$arch"); done

build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
export nvcc build
export OPTIONS="${options[*]}"
printf '%s\n' csrc/cuda/*.cu | xargs -P "$(nproc)" -I{} bash -c \
    '$nvcc $OPTIONS -c {} -o "$build/$(basename {}).o" 2>"$build/$(basename {}).log" || { cat "$build/$(basename {}).log"; exit 255; }'

# ptxas names a kernel, then its stack frame and spills, then its registers.
cat "$build"/*.log | c++filt | awk '
    /Compiling entry function/ { split($0, part, "\x27"); kernel = part[2]; arch = part[4] }
    /bytes stack frame/ { frame = $1; spills = $5 + $9 }
    /Used [0-9]+ registers/ {
        match($0, /Used [0-9]+/)
        registers = substr($0, RSTART + 5, RLENGTH - 5) + 0
        ++kernels[arch]
        if (registers > most[arch]) most[arch] = registers
        if (frame > 0 || spills > 0) {
            printf "%s, %s: %d bytes of stack, %d of spills\n", kernel, arch, frame, spills
            failed = 1
        }
    }
    END {
        for (arch in kernels) {
            printf "%s: %d kernels, at most %d registers\n", arch, kernels[arch], most[arch]
            any = 1
        }
        exit failed || !any
    }'
