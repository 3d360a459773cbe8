#!/usr/bin/env bash
# Everything that fits into a short time on a machine with a GPU, in one command:
#
#   benchmarks/gpu_slot.sh DIR [MINUTES]      results in DIR, at most eight files; 9 minutes unless told otherwise
#
# What is measured, in which order, and what the exit status says: python3 -m benchmarks.gpu --help. Needs Python with
# torch, numpy and pytest; nvcc, cmake, ninja and pybind11 where the extension has no kernels for the GPU yet.
set -euo pipefail
out=$(mkdir -p "$1" && cd "$1" && pwd)
minutes=${2:-9}
cd "$(dirname "$0")/.."
commit=$(git rev-parse HEAD 2>/dev/null || true)
export PYTHONUNBUFFERED=1
# The program keeps to its minutes by itself; what hangs all the same is ended half a minute later.
seconds=$(python3 -c "print(int(60 * float('$minutes')) + 30)")
exec timeout --kill-after=10 "$seconds" \
    python3 -m benchmarks.gpu --out "$out" --minutes "$minutes" ${commit:+--commit "$commit"} "${@:3}"
