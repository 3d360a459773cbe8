"""Matrices [T, K, J, D] by type of input capsules, as in the class capsules of EM networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import capsops
from capsops.nn import CapsuleLayer, EMCapsules

B, T, POSITIONS, K, J, D = 3, 4, 5, 6, 3, 7
N = T * POSITIONS

Call = Callable[[Tensor, Tensor], Tensor]


def _calls() -> dict[str, Call]:
    g = torch.Generator().manual_seed(1)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float64)

    attention, prior, state, logits = normal(J, J), normal(N, J), normal(B, J, D), normal(B, N, J)
    activation, beta, mask = normal(B, N).sigmoid(), normal(J), normal(B, N) < 1
    return {
        "affine_votes": lambda u, W: capsops.affine_votes(u, W),
        "attention": lambda u, W: capsops.attention_routing(u, W, attention, mask=mask),
        "dynamic": lambda u, W: capsops.dynamic_routing(u, W, mask=mask),
        "dynamic-logits": lambda u, W: capsops.dynamic_routing(u, W, logits=logits),
        "dynamic-over-inputs": lambda u, W: capsops.dynamic_routing(u, W, axis="input", mask=mask),
        "self-attention": lambda u, W: capsops.self_attention_routing(u, W, prior),
        "em": lambda u, W: torch.cat([x.flatten() for x in capsops.em_routing(u, activation, W, beta, beta)]),
        "step": lambda u, W: capsops.routing_step(u, W, state),
        "step-logits": lambda u, W: capsops.routing_step(u, W, state, logits, mask=mask),
        "couplings": lambda u, W: capsops.coupling_coefficients("dynamic", u, W, mask=mask, differentiable=True),
    }


CALLS = _calls()


def _with_gradients(call: Call, u: Tensor, weight: Tensor) -> list[Tensor]:
    out = call(u, weight)
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=out.dtype)
    return [out, *torch.autograd.grad(out, [u, weight], g)]


@pytest.mark.parametrize("name", CALLS)
def test_agrees_with_a_matrix_for_every_capsule(name: str) -> None:
    """The matrices written out by an index, and their gradients added by a loop."""
    g = torch.Generator().manual_seed(3)
    u = torch.randn(B, N, K, generator=g, dtype=torch.float64).requires_grad_()
    weight = torch.randn(T, K, J, D, generator=g, dtype=torch.float64).requires_grad_()
    v, g_u, g_weight = _with_gradients(CALLS[name], u, weight)

    full = weight.detach()[torch.arange(N) // POSITIONS].requires_grad_()
    expected_v, expected_g_u, g_full = _with_gradients(CALLS[name], u, full)
    assert torch.equal(v, expected_v) and torch.equal(g_u, expected_g_u)
    for t in range(T):
        of_type = sum(g_full[i] for i in range(t * POSITIONS, (t + 1) * POSITIONS))
        torch.testing.assert_close(g_weight[t], of_type, rtol=1e-12, atol=1e-12)


def test_one_type_is_a_shared_matrix() -> None:
    u, weight = torch.randn(B, N, K), torch.randn(1, K, J, D, requires_grad=True)
    v = capsops.dynamic_routing(u, weight)
    assert torch.equal(v, capsops.dynamic_routing(u, weight[0]))
    (g_weight,) = torch.autograd.grad(v.sum(), weight)
    assert g_weight.shape == weight.shape


def test_orders_types_as_primary_capsules_do() -> None:
    features = torch.randn(2, T * K, 2, 3, dtype=torch.float64)
    weight = torch.randn(T, K, J, D, dtype=torch.float64)
    u = capsops.primary_capsules(features, T)
    votes = capsops.affine_votes(u, weight).reshape(2, T, 2, 3, J, D)
    for t in range(T):
        capsules = capsops.squash(features[:, t * K : (t + 1) * K].movedim(1, -1).contiguous())
        expected = torch.einsum("byxk,kjd->byxjd", capsules, weight[t])
        torch.testing.assert_close(votes[:, t], expected)


@pytest.mark.parametrize("routing", ["attention", "dynamic", "uniform", "self-attention", "em"])
def test_layers(routing: str) -> None:
    torch.manual_seed(0)
    u, activation = torch.randn(B, N, K), torch.rand(B, N)
    inputs = (u, activation) if routing == "em" else (u,)

    def layer(**options: Any) -> torch.nn.Module:
        return EMCapsules(N, K, J, D, **options) if routing == "em" else CapsuleLayer(N, K, J, D, routing, **options)

    by_type, full = layer(types=T), layer()
    assert by_type.weight.shape == (T, K, J, D) and f"types={T}" in repr(by_type)
    full.load_state_dict(by_type.state_dict() | {"weight": by_type.weight.repeat_interleave(POSITIONS, dim=0)})
    for x, y in zip(by_type(*inputs), full(*inputs), strict=True):
        assert torch.equal(x, y)
    # Without the check of the layer, the matrices of 20 capsules would be those of 20 types of 40 capsules.
    with pytest.raises(ValueError, match=rf"has shape .* expected .* with N = {N} and K = {K}"):
        full(*[torch.cat([x, x], dim=1) for x in inputs])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"types": 3}, "types is 3; expected a divisor of in_capsules = 20"),
        ({"types": 0}, "types is 0; expected an integer of at least 1"),
        ({"types": 4, "shared": True}, "types is 4; expected None, because shared is True"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CapsuleLayer(N, K, J, D, "dynamic", **options)


def test_bad_number_of_matrices() -> None:
    with pytest.raises(
        ValueError, match=r"weight has shape \[3, 6, 3, 7\]; expected \[20, 6, J, D\] or \[T, 6, J, D\]"
    ):
        capsops.dynamic_routing(torch.randn(B, N, K), torch.randn(3, K, J, D))


def test_initial_couplings_are_soft() -> None:
    """As with a shared matrix: votes of a type lie in K dimensions."""
    torch.manual_seed(0)
    for types in (1, 8, 64):
        layer = CapsuleLayer(1024, 8, 32, 16, "dynamic", types=types)
        u = torch.nn.functional.normalize(torch.randn(4, 1024, 8), dim=-1)
        assert layer.coupling_coefficients(u).amax(dim=2).mean() < 0.3
        assert 0.01 < layer(u).norm(dim=-1).median() < 0.95
