"""Report the registers and the shared memory of the built CUDA kernels, and check that no kernel spills.

    python tests/core/cuda_resources.py [extension]

The exit status is 1 if a kernel spills registers or keeps an array in memory, or if an architecture is missing. An
extension without CUDA kernels has nothing to check; with CAPSOPS_CUDA=1 that is an error.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path


def cuobjdump() -> str:
    """Find cuobjdump on the path, beside nvcc, or in Triton."""
    triton = importlib.util.find_spec("triton")
    nvcc = shutil.which(os.environ.get("CUDACXX") or "nvcc")
    folders = [Path(nvcc).resolve().parent] if nvcc else []
    if triton and triton.origin:
        folders.append(Path(triton.origin).parent / "backends/nvidia/bin")
    found = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=os.pathsep.join(map(str, folders)))
    return found or sys.exit("cuobjdump: not found on the path, beside nvcc or in Triton; expected one of them")


def kernels(extension: str) -> Iterator[tuple[str, str, dict[str, int]]]:
    """Yield the architecture, name and resources of every kernel."""
    command = [cuobjdump(), "--dump-resource-usage", extension]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    architecture = name = ""
    for line in report.splitlines():
        if match := re.match(r"arch = (\w+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function (\w+):", line):
            name = match[1]
        elif "REG:" in line:
            yield architecture, name, {key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)", line)}


def main() -> int:
    import capsops._C as built

    extension = sys.argv[1] if len(sys.argv) > 1 else built.__file__
    if built.cuda_architectures is None:
        print("the extension has no CUDA kernels (no nvcc, or CAPSOPS_CUDA=0)")
        return int(os.environ.get("CAPSOPS_CUDA") == "1")
    missing = {f"sm_{a}" for a in built.cuda_architectures.split()}
    seen: dict[str, list[dict[str, int]]] = {}
    failed = False
    for architecture, name, used in kernels(extension):
        seen.setdefault(architecture, []).append(used)
        if used["STACK"] or used["LOCAL"]:
            print(f"{architecture}: {name}: {used['STACK']} bytes of stack, {used['LOCAL']} of local memory")
            failed = True
    for architecture, all_used in seen.items():
        registers, shared = (max(used[key] for used in all_used) for key in ("REG", "SHARED"))
        print(
            f"{architecture}: {len(all_used)} kernels, at most {registers} registers, {shared} bytes of static memory"
        )
    for architecture in sorted(missing - set(seen)):
        print(f"{architecture}: no kernels")
    return int(failed or bool(missing - set(seen)))


if __name__ == "__main__":
    sys.exit(main())
