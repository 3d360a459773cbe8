"""Replace the routing of a network of your own by capsops: the same outputs and gradients, without stored votes.

    python examples/own_network.py --batch 16 --capsules 1152

`StoredVotes` is routing by agreement as capsule networks are commonly published: its weight is [1, J, N, D, K], and it
stores the vote [D] of every input capsule for every output capsule. `with_capsops` makes a layer of capsops with its
weights, so a trained network can be converted too. The program compares the outputs and gradients of both, and measures
the time of a forward and backward pass.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import Tensor, nn

from capsops.nn import CapsuleLayer, convert_weight


class StoredVotes(nn.Module):
    """Input capsules u [B, N, K] -> output capsules [B, J, D]."""

    def __init__(self, in_capsules: int, in_dim: int, out_capsules: int, out_dim: int, iterations: int = 3) -> None:
        super().__init__()
        self.iterations = iterations
        self.weight = nn.Parameter(0.1 * torch.randn(1, out_capsules, in_capsules, out_dim, in_dim))

    def forward(self, u: Tensor) -> Tensor:
        votes = (self.weight @ u[:, None, :, :, None]).squeeze(-1)  # [B, J, N, D]: what takes the memory
        logits = votes.new_zeros(votes.shape[:3])
        for iteration in range(self.iterations):
            s = (logits.softmax(dim=1)[..., None] * votes).sum(dim=2)
            length = s.norm(dim=-1, keepdim=True)
            v = length / (1 + length**2) * s
            if iteration < self.iterations - 1:
                logits = logits + (votes * v[:, :, None]).sum(dim=-1)
        return v


def with_capsops(layer: StoredVotes) -> CapsuleLayer:
    """The layer of capsops that computes what this layer computes, with a copy of its weights."""
    weight = convert_weight(layer.weight.detach(), "JNDK")  # [N, K, J, D]
    converted = CapsuleLayer(*weight.shape, routing="dynamic", iterations=layer.iterations, bias=False)
    converted.load_state_dict({"weight": weight})
    return converted


def step(layer: nn.Module, u: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """The output of a layer for u and, for the gradient g of the output, the gradient of u."""
    u = u.detach().requires_grad_()
    v = layer(u)
    layer.zero_grad()
    v.backward(g)
    return v.detach(), u.grad


def milliseconds(layer: nn.Module, u: Tensor, g: Tensor, repeats: int) -> float:
    """The median time of a forward and backward pass."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        step(layer, u, g)
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare routing with stored votes with capsops.")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--capsules", type=int, default=1152, help="input capsules; 1152 as in Sabour et al. 2017")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.manual_seed(0)

    stored = StoredVotes(options.capsules, 8, 10, 16)
    converted = with_capsops(stored)
    u, g = torch.randn(options.batch, options.capsules, 8), torch.randn(options.batch, 10, 16)
    for name, a, b in zip(("outputs", "gradients"), step(stored, u, g), step(converted, u, g), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        print(f"{name}: equal but for rounding, largest difference {(a - b).abs().max().item():.1e}")

    slow, fast = (milliseconds(layer, u, g, options.repeats) for layer in (stored, converted))
    print(f"forward and backward: stored votes {slow:.1f} ms, capsops {fast:.1f} ms ({slow / fast:.1f} times as fast)")


if __name__ == "__main__":
    main()
