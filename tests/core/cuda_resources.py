"""Report the registers and the shared memory of the built CUDA kernels, and check that no kernel spills.

    python -m tests.core.cuda_resources

The exit status is 1 if a kernel spills registers or keeps an array in memory, or if an architecture is missing. An
extension without CUDA kernels, or with their PTX alone, has nothing to check; with CAPSOPS_CUDA=1 that is an error.
"""

from __future__ import annotations

import os
import sys

from benchmarks import sass


def main() -> int:
    import capsops._C as built

    if built.cuda_architectures is None:
        print(f"the extension has no CUDA kernels ({built.cuda_reason})")
        return int(os.environ.get("CAPSOPS_CUDA") == "1")
    failed = False
    capabilities = [x for x in built.cuda_architectures.split() if x.isdigit()]
    if not capabilities:
        print(f"the extension has no machine code, only PTX: {built.cuda_architectures}; CAPSOPS_CUDA=1 builds it")
        return int(os.environ.get("CAPSOPS_CUDA") == "1")
    for capability in capabilities:
        try:
            kernels = sass.read(built.__file__, f"sm_{capability}")
        except sass.SassError as error:
            print(error)
            failed = True
            continue
        for name, kernel in kernels.items():
            if kernel.stack or kernel.local:
                print(f"sm_{capability}: {name}: {kernel.stack} bytes of stack, {kernel.local} of local memory")
                failed = True
        registers = max(kernel.registers for kernel in kernels.values())
        print(f"sm_{capability}: {len(kernels)} kernels, at most {registers} registers")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
