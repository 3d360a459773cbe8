"""Use an installed capsops: compute on its kernels, and look for a second OpenMP runtime beside torch's.

Two runtimes in one process would each start a thread for every core. Prints the report of `capsops info`.
"""

import re
from pathlib import Path

import torch

import capsops


def main() -> None:
    u, weight = torch.randn(4, 64, 8, requires_grad=True), torch.randn(64, 8, 10, 16)
    with capsops.use_backend("cpu"):
        v = capsops.dynamic_routing(u, weight, iterations=3)
        (gradient,) = torch.autograd.grad(v.sum(), u)
    with capsops.use_backend("reference"):
        expected = capsops.dynamic_routing(u, weight, iterations=3)
        torch.testing.assert_close(v, expected)
        torch.testing.assert_close(gradient, *torch.autograd.grad(expected.sum(), u))

    maps = Path("/proc/self/maps").read_text()
    runtimes = set(re.findall(r"/.*/lib(?:gomp|omp|iomp5)\b.*", maps))
    assert len(runtimes) == 1, f"OpenMP runtimes: {runtimes}; expected that of torch alone"
    (runtime,) = runtimes
    packages = Path(torch.__file__).resolve().parents[1]
    assert Path(runtime).resolve().is_relative_to(packages), f"the OpenMP runtime is {runtime}; expected that of torch"

    print(capsops.info())
    print("capsops:", Path(capsops.__file__).parent)
    print("OpenMP: ", runtime)


if __name__ == "__main__":
    main()
