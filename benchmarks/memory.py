"""Peak memory of routing forward and backward, beyond the tensors that the caller holds.

    python -m benchmarks.memory                 the paper's shape, compiled kernels
    python -m benchmarks.memory --shape mnist --naive

Each case runs in a process of its own. The caller's tensors are u, weight and their gradients; whatever the peak of
the resident set shows above them is counted. Linux only (/proc).
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from pathlib import Path

import torch
from torch import Tensor

import capsops

from .shapes import MNIST, PAPER, QUARTER, Shape

SHAPES = {shape.name: shape for shape in (PAPER, QUARTER, MNIST)}
ROUTINGS = {
    "attention": lambda u, weight, attn_weight, attn_bias: capsops.attention_routing(u, weight, attn_weight, attn_bias),
    "dynamic": lambda u, weight, **_: capsops.dynamic_routing(u, weight, 3),
    "dynamic, detached": lambda u, weight, **_: capsops.dynamic_routing(u, weight, 3, detach=True),
}


def _resident(field: str) -> int:
    """A line of /proc/self/status, in bytes: VmRSS, or VmHWM for the peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def extra_bytes(routing: str, shape: Shape, backend: str) -> int:
    """Peak bytes of one forward and backward beyond u, weight, their gradients and the outputs."""
    inputs = shape.inputs()
    with capsops.use_backend(backend):
        # A small call first, so that start-up (threads, the autograd engine) is not counted.
        small = Shape("small", 2, 16, shape.K, shape.J, shape.D).inputs()
        ROUTINGS[routing](**small).sum().backward()
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = _resident("VmRSS")
        ROUTINGS[routing](**inputs).square().sum().backward()
    gradients = sum(x.grad.nbytes for x in inputs.values() if isinstance(x.grad, Tensor))
    return _resident("VmHWM") - before - gradients


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--shape", choices=SHAPES, default="paper")
    parser.add_argument("--naive", action="store_true", help="also measure the reference, which holds the votes")
    arguments = parser.parse_args()
    if not Path("/proc/self/clear_refs").exists():
        sys.exit("error: peak memory is read from /proc, which this system does not have")

    shape = SHAPES[arguments.shape]
    sizes = f"B={shape.B}, N={shape.N:,}, K={shape.K}, J={shape.J}, D={shape.D}"
    held = 2 * 4 * (shape.B * shape.N * shape.K + shape.N * shape.K * shape.J * shape.D)
    print(f"{sizes}, float32, {torch.get_num_threads()} threads; u, weight and their gradients: {held / 1e6:,.0f} MB")
    context = multiprocessing.get_context("spawn")
    for backend in ["cpu", "reference"] if arguments.naive else ["cpu"]:
        for routing in ROUTINGS:
            with context.Pool(1) as pool:
                extra = pool.apply(extra_bytes, (routing, shape, backend))
            print(f"{backend:<10} {routing:<18} forward + backward: {extra / 1e6:10,.1f} MB more")


if __name__ == "__main__":
    main()
