"""FlopCounterMode counts the operators: what the kernels compute, by PyTorch's convention."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import capsops

from .routings import EXAMPLES, ROUTINGS, VOTES, Routing, each

COUNTER = "torch.utils.flop_counter"
SHAPE = B, N, K, J, D = 2, 7, 5, 3, 11
VOTE_FLOPS, CONTRACTION = 2 * B * N * K * J * D, 2 * B * N * J * D


def _count(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as mode:
        call()
    return mode.get_total_flops()


def _by_hand(routing: Routing) -> tuple[int, int, int]:
    """Forward, backward with every gradient, and forward on the reference."""
    name, rows = routing.name, routing.rows or 1
    votes, contraction = rows * VOTE_FLOPS, rows * CONTRACTION
    if name == "votes":
        return votes, 2 * votes, votes
    if name.startswith("attention"):
        # Forward: convolution (J), sum. Backward: convolution, its transpose, its gradient (J each), two more.
        naive = votes + J * contraction  # its weighted sum is no matrix product
        return votes + (J + 1) * contraction, 3 * votes + (3 * J + 2) * contraction, naive
    if name.startswith("dynamic"):
        R = int(name[7])
        naive = votes + (2 * R - 1) * contraction  # one sum for each iteration, an agreement for each but the last
        if "logits" in name:  # the first iteration has couplings, and backward their agreement with g_s
            backward = (R - 1) * (votes + 3 * contraction) + 3 * votes + (4 * R - 2) * contraction
            return R * votes + (2 * R - 1) * contraction, backward, naive
        forward = R * votes + 2 * (R - 1) * contraction
        if routing.detached:
            return forward, 3 * votes + 2 * contraction, naive
        return forward, (R - 1) * (votes + 3 * contraction) + 3 * votes + (4 * R - 3) * contraction, naive
    if name.startswith("step"):
        return votes + 2 * contraction, 3 * votes + 5 * contraction, votes + 2 * contraction
    if name.startswith("self-attention"):
        return 2 * votes + 2 * contraction, 4 * votes + 7 * contraction, votes + 2 * contraction
    R = int(name[2])
    forward = (R + 1) * (votes + 2 * contraction) + (R - 1) * contraction
    backward = (R - 1) * (votes + 5 * contraction) + 3 * votes + (6 * R - 2) * contraction
    return forward, backward, votes + 2 * R * contraction  # the reference's E-step multiplies no matrices


@pytest.mark.parametrize("routing", [*ROUTINGS, VOTES], ids=lambda r: r.name)
def test_the_counts_are_those_of_the_formulas(routing: Routing) -> None:
    arguments = {n: x.float().requires_grad_() for n, x in routing.arguments(SHAPE).items()}
    forward, backward, naive = _by_hand(routing)
    out: tuple[Tensor, ...] = ()

    def call() -> None:
        nonlocal out
        out = each(routing.call(**arguments))

    assert _count(call) == forward
    assert _count(lambda: torch.autograd.backward(out, [torch.ones_like(x) for x in out])) == backward
    with capsops.use_backend("reference"):
        # PyTorch's own count of the same routing with its votes stored.
        assert _count(lambda: routing.call(**arguments)) == naive


def test_a_shared_matrix_saves_products_only_in_the_sum_of_the_votes() -> None:
    u, weight = torch.randn(B, N, K), torch.randn(K, J, D)
    assert _count(lambda: capsops.dynamic_routing(u, weight, 1)) == VOTE_FLOPS // N
    assert _count(lambda: capsops.dynamic_routing(u, weight, 2)) == VOTE_FLOPS // N + VOTE_FLOPS + 2 * CONTRACTION
    assert _count(lambda: capsops.affine_votes(u, weight)) == VOTE_FLOPS


def test_only_wanted_gradients_are_counted() -> None:
    u, weight = torch.randn(B, N, K), torch.randn(N, K, J, D, requires_grad=True)
    bias = torch.randn(J, D, requires_grad=True)
    assert _count(lambda: capsops.affine_votes(u, weight).sum().backward()) == 2 * VOTE_FLOPS
    v = capsops.dynamic_routing(u, weight.detach(), bias=bias, iterations=2)
    assert _count(lambda: v.sum().backward()) == VOTE_FLOPS + 3 * CONTRACTION


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_operator_has_a_formula(name: str) -> None:
    operator = getattr(torch.ops.capsops, name)
    assert operator in flop_registry
    counted = _count(lambda: operator(*EXAMPLES[name]))
    assert (counted == 0) == name.startswith(("squash", "primary_capsules"))
    # By name too, as an exported graph may call it.
    names = [a.name for a in operator.default._schema.arguments]
    assert _count(lambda: operator(**dict(zip(names, EXAMPLES[name], strict=True)))) == counted


@pytest.mark.parametrize("order", [("capsops", COUNTER), (COUNTER, "capsops")])
def test_the_counter_may_be_imported_before_or_after(order: tuple[str, str]) -> None:
    """capsops does not import it: it imports Triton."""
    program = (
        f"import sys, torch, {order[0]}; early = 'triton' in sys.modules; import {order[1]}, capsops\n"
        f"with {COUNTER}.FlopCounterMode(display=False) as mode:\n"
        "    capsops.affine_votes(torch.ones(2, 3, 4), torch.ones(3, 4, 5, 6))\n"
        "print(mode.get_total_flops(), early)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[0] == str(2 * 2 * 3 * 4 * 5 * 6)
    if order[0] == "capsops":
        assert run.stdout.split()[1] == "False"
