"""Use an installed capsops: compute on its kernels, and look for a second OpenMP runtime beside torch's.

Two runtimes in one process would each start a thread for every core. Prints the report of `capsops info`.
"""

import re
from pathlib import Path

import torch

import capsops


def main() -> None:
    u, weight = torch.randn(4, 64, 8, dtype=torch.float64, requires_grad=True), torch.randn(64, 8, 10, 16).double()
    with capsops.use_backend("reference"):
        expected = capsops.dynamic_routing(u, weight, iterations=3)
        (expected_gradient,) = torch.autograd.grad(expected.sum(), u)
    with capsops.use_backend("cpu"):
        v = capsops.dynamic_routing(u.float(), weight.float(), iterations=3)
        (gradient,) = torch.autograd.grad(v.sum(), u)
    # Relative to the largest number: sums in float32 lose digits where their terms cancel.
    for actual, wanted in ((v, expected), (gradient, expected_gradient)):
        error = (actual - wanted).abs().max() / wanted.abs().max()
        assert error < 1e-4, f"the kernels are off by {error:.1e} of the largest number; expected at most 1e-4"

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
