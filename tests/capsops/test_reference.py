"""The reference, with which the other tests compare, against the formulas of the papers written as loops."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

import capsops

from .routings import ROUTINGS, Routing, each

by_routing = pytest.mark.parametrize("routing", ROUTINGS, ids=lambda r: r.name)
Array = np.ndarray[Any, np.dtype[np.float64]]


@pytest.fixture(autouse=True)
def on_the_reference():
    with capsops.use_backend("reference"):
        yield


def _rng() -> np.random.Generator:
    return np.random.default_rng(7)


def _em(
    votes: Array, activation: Array, beta_u: Array, beta_a: Array, temperatures: list[float], *, normalise: bool = False
) -> tuple[Array, Array]:
    """Procedure 1 of Hinton et al. 2018 for one item, line by line. votes [N, J, H]; normalise: see em_routing."""
    N, J, H = votes.shape
    R = np.full((N, J), 1 / J)
    mean, sigma, a = np.zeros((J, H)), np.zeros((J, H)), np.zeros(J)
    for t, inverse_temperature in enumerate(temperatures):
        # M-step
        for i in range(N):
            for j in range(J):
                R[i, j] = R[i, j] * activation[i]
        if normalise:
            for i in range(N):
                R[i] = R[i] / R[i].sum()
        for j in range(J):
            cost = np.zeros(H)
            for h in range(H):
                mean[j, h] = sum(R[i, j] * votes[i, j, h] for i in range(N)) / R[:, j].sum()
                variance = sum(R[i, j] * (votes[i, j, h] - mean[j, h]) ** 2 for i in range(N)) / R[:, j].sum()
                sigma[j, h] = math.sqrt(variance)
                cost[h] = (beta_u[j] + math.log(sigma[j, h])) * R[:, j].sum()
            a[j] = 1 / (1 + math.exp(-inverse_temperature * (beta_a[j] - cost.sum())))
        if t + 1 == len(temperatures):
            break
        # E-step
        for i in range(N):
            p = np.zeros(J)
            for j in range(J):
                exponent = -sum((votes[i, j, h] - mean[j, h]) ** 2 / (2 * sigma[j, h] ** 2) for h in range(H))
                p[j] = math.exp(exponent) / math.sqrt(math.prod(2 * math.pi * sigma[j, h] ** 2 for h in range(H)))
            R[i] = a * p / (a * p).sum()
    return mean, a


@pytest.mark.parametrize("rows", [None, 1, 3])
@pytest.mark.parametrize("iterations", [1, 2, 3])
@pytest.mark.parametrize("normalise", [False, True])
def test_em(rows: int | None, iterations: int, normalise: bool) -> None:
    B, N, K, J, D = 2, 9, 3, 4, 2
    rng = _rng()
    pose = rng.normal(size=(B, N, rows or 1, K)) / K**0.5
    weight, activation = rng.normal(size=(N, K, J, D)), rng.uniform(0.1, 0.9, size=(B, N))
    beta_u, beta_a = rng.normal(size=J), rng.normal(size=J)
    temperatures = [0.7 * (1 - 0.95 ** (t + 1)) for t in range(iterations)]
    given = [pose if rows else pose[:, :, 0], activation, weight, beta_u, beta_a]
    mean, a = capsops.em_routing(
        *map(torch.from_numpy, given), iterations, inverse_temperature=0.7, renormalise=normalise
    )
    assert mean.shape == ((B, J, rows, D) if rows else (B, J, D))
    for b in range(B):
        votes = np.zeros((N, J, rows or 1, D))
        for i in range(N):
            for j in range(J):
                votes[i, j] = pose[b, i] @ weight[i, :, j]  # a product of matrices
        expected = _em(votes.reshape(N, J, -1), activation[b], beta_u, beta_a, temperatures, normalise=normalise)
        # They differ by ε, 1e-8, which the paper does not have.
        np.testing.assert_allclose(mean[b].reshape(J, -1).numpy(), expected[0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(a[b].numpy(), expected[1], rtol=1e-5, atol=1e-6)


def test_em_temperatures() -> None:
    routing = next(r for r in ROUTINGS if r.name == "em1")
    arguments = routing.arguments((2, 9, 3, 4, 2))
    schedule = [0.01 * (1 - 0.95), 0.01 * (1 - 0.95**2), 0.01 * (1 - 0.95**3)]
    for got in (
        capsops.em_routing(**arguments),
        capsops.em_routing(**arguments, iterations=3, inverse_temperature=0.01),
        capsops.em_routing(**arguments, inverse_temperature=tuple(schedule)),
    ):
        torch.testing.assert_close(got, capsops.em_routing(**arguments, inverse_temperature=schedule))


def test_em_of_no_capsules_is_the_bias() -> None:
    beta_a = torch.tensor([-1.0, 0.5, 2.0])
    pose, activation = capsops.em_routing(
        torch.zeros(2, 0, 4), torch.zeros(2, 0), torch.zeros(0, 4, 3, 5), torch.ones(3), beta_a, inverse_temperature=1.0
    )
    assert torch.equal(pose, torch.zeros(2, 3, 5))
    torch.testing.assert_close(activation, torch.sigmoid((1 - 0.95**3) * beta_a).expand(2, 3))
    mask = torch.tensor([[False] * 6, [True] * 6])
    pose, activation = capsops.em_routing(
        torch.randn(2, 6, 4),
        torch.rand(2, 6),
        torch.randn(6, 4, 3, 5),
        torch.ones(3),
        beta_a,
        inverse_temperature=(0.5, 0.5, 2.0),
        mask=mask,
    )
    assert torch.equal(pose[0], torch.zeros(3, 5))
    torch.testing.assert_close(activation[0], torch.sigmoid(2 * beta_a))


def test_em_of_capsules_that_are_off() -> None:
    """Activation 0 acts like a mask, with and without normalising again, and has a finite gradient."""
    routing = next(r for r in ROUTINGS if r.name == "em3")
    arguments = routing.arguments((2, 9, 3, 4, 2))
    off = torch.arange(9) % 2 == 0
    arguments["activation"][:, off] = 0
    for renormalise in (False, True):
        leaf = arguments["activation"].clone().requires_grad_()
        out = capsops.em_routing(**{**arguments, "activation": leaf}, renormalise=renormalise)
        masked = capsops.em_routing(**arguments, renormalise=renormalise, mask=(~off).expand(2, 9))
        torch.testing.assert_close(out, masked)
        (g,) = torch.autograd.grad(out[0].sum() + out[1].sum(), leaf)
        assert torch.isfinite(g).all()


@pytest.mark.parametrize("with_logits", [False, True])
def test_step(with_logits: bool) -> None:
    B, N, K, J, D = 2, 6, 3, 4, 5
    rng = _rng()
    u, weight, state = rng.normal(size=(B, N, K)), rng.normal(size=(N, K, J, D)), rng.normal(size=(B, J, D))
    logits = rng.normal(size=(B, N, J)) * with_logits
    if with_logits:
        logits[0, 2, 1] = -np.inf
    given = [u, weight, state, *[logits] * with_logits]
    got = capsops.routing_step(*map(torch.from_numpy, given)).numpy()
    for b in range(B):
        s = np.zeros((J, D))
        for i in range(N):
            votes = np.stack([u[b, i] @ weight[i, :, j] for j in range(J)])
            c = np.exp([votes[j] @ state[b, j] + logits[b, i, j] for j in range(J)])
            for j in range(J):
                s[j] += c[j] / c.sum() * votes[j]
        np.testing.assert_allclose(got[b], s, rtol=1e-10)


def test_inverted_dot_product_attention_routing() -> None:
    """Tsai et al. 2020, algorithm 1, as docs/capsops.md writes it with `routing_step`."""
    B, N, K, J, D = 2, 6, 3, 4, 5
    rng = _rng()
    u, weight = rng.normal(size=(B, N, K)), rng.normal(size=(N, K, J, D))
    state = torch.zeros(B, J, D, dtype=torch.float64)
    for _ in range(3):
        s = capsops.routing_step(torch.from_numpy(u), torch.from_numpy(weight), state)
        state = torch.nn.functional.layer_norm(s, (D,))
    for b in range(B):
        pose = np.zeros((J, D))
        for _ in range(3):
            s = np.zeros((J, D))
            for i in range(N):
                votes = np.stack([u[b, i] @ weight[i, :, j] for j in range(J)])
                r = np.exp([votes[j] @ pose[j] for j in range(J)])
                s += (r / r.sum())[:, None] * votes
            for j in range(J):
                pose[j] = (s[j] - s[j].mean()) / math.sqrt(s[j].var() + 1e-5)
        np.testing.assert_allclose(state[b].numpy(), pose, rtol=1e-9)


@pytest.mark.parametrize("weights", [False, True])
def test_attention(weights: bool) -> None:
    """CardioCaps, eq. 4: z_kd = Σ_j A_kj û_jd + a_k, c_kd = softmax_k(z_d), s_k = Σ_i w_i c_ik û_ik, by components."""
    B, N, K, J, D = 2, 6, 3, 4, 5
    rng = _rng()
    u, weight, w = rng.normal(size=(B, N, K)), rng.normal(size=(N, K, J, D)), rng.normal(size=(B, N))
    A, a = rng.normal(size=(J, J)), rng.normal(size=J)
    input_weight = torch.from_numpy(w) if weights else None
    v = capsops.attention_routing(*map(torch.from_numpy, (u, weight, A, a)), input_weight=input_weight).numpy()
    for b in range(B):
        s = np.zeros((J, D))
        for i in range(N):
            votes = np.stack([u[b, i] @ weight[i, :, j] for j in range(J)])
            for d in range(D):
                z = [math.exp(a[k] + sum(A[k, j] * votes[j, d] for j in range(J))) for k in range(J)]
                for k in range(J):
                    s[k, d] += (w[b, i] if weights else 1) * z[k] / sum(z) * votes[k, d]
        for j in range(J):
            n = np.linalg.norm(s[j])
            np.testing.assert_allclose(v[b, j], n / (1 + n * n) * s[j], rtol=1e-10)


@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("weights", [False, True])
def test_self_attention(prior: bool, weights: bool) -> None:
    """Mazzia et al. 2021: A_j = Û_j Û_jᵀ / √D [N, N], c = softmax_j(Σ_k A_jik) + prior; weights of the last sum."""
    B, N, K, J, D = 2, 6, 3, 4, 5
    rng = _rng()
    u, weight, log_prior = rng.normal(size=(B, N, K)), rng.normal(size=(N, K, J, D)), rng.normal(size=(N, J))
    w = rng.normal(size=(B, N)) if weights else np.ones((B, N))
    given = [u, weight, *[log_prior] * prior]
    input_weight = torch.from_numpy(w) if weights else None
    v = capsops.self_attention_routing(*map(torch.from_numpy, given), input_weight=input_weight).numpy()
    for b in range(B):
        votes = np.stack([[u[b, i] @ weight[i, :, j] for i in range(N)] for j in range(J)])  # [J, N, D]
        A = votes @ votes.transpose(0, 2, 1) / math.sqrt(D)
        logits = A.sum(axis=2)  # [J, N]
        c = np.exp(logits) / np.exp(logits).sum(axis=0) + (log_prior.T if prior else 0)
        for j in range(J):
            s = sum(w[b, i] * c[j, i] * votes[j, i] for i in range(N))
            n = np.linalg.norm(s)
            np.testing.assert_allclose(v[b, j], (1 - math.exp(-n)) * s / n, rtol=1e-10)


def test_self_attention_scale() -> None:
    routing = next(r for r in ROUTINGS if r.name == "self-attention-prior")
    arguments = routing.arguments((2, 9, 3, 4, 16))
    torch.testing.assert_close(
        capsops.self_attention_routing(**arguments), capsops.self_attention_routing(**arguments, scale=0.25)
    )
    # Without agreement the couplings are equal.
    del arguments["prior"]
    uniform = capsops.affine_votes(arguments["u"], arguments["weight"]).mean(dim=1) * 9 / 4
    got = capsops.self_attention_routing(**arguments, scale=0)
    torch.testing.assert_close(got, capsops.squash(uniform, kind="efficient"))


def test_primary_capsules() -> None:
    B, types, K, height, width = 2, 3, 4, 2, 6
    features = torch.randn(B, types * K, height, width, dtype=torch.float64)
    channels = capsops.primary_capsules(features, types)
    legacy = capsops.primary_capsules(features, types, layout="legacy", squash="efficient")
    assert channels.shape == legacy.shape == (B, types * height * width, K)
    for b in range(B):
        for t in range(types):
            for p in range(height * width):
                s = torch.stack([features[b, t * K + k, p // width, p % width] for k in range(K)])
                torch.testing.assert_close(channels[b, t * height * width + p], capsops.squash(s))
        for c in range(types * K):
            for q in range(height * width // K):
                s = features[b, c].flatten()[q * K : q * K + K]
                got = legacy[b, c * (height * width // K) + q]
                torch.testing.assert_close(got, capsops.squash(s, kind="efficient"))


@by_routing
def test_dtypes(routing: Routing) -> None:
    """Low precision gives nearly the results of float64: nothing overflows, and ε does not vanish."""
    arguments = routing.arguments((2, 9, 3, 4, 2))
    exact = each(routing.call(**arguments))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for got, expected in zip(
            each(routing.call(**{n: x.to(dtype) for n, x in arguments.items()})), exact, strict=True
        ):
            assert got.dtype == dtype
            torch.testing.assert_close(got.double(), expected, rtol=0, atol=20 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("routing", [r for r in ROUTINGS if not r.detached], ids=lambda r: r.name)
@pytest.mark.parametrize("shared", [False, True], ids=["matrices", "shared"])
def test_gradcheck(routing: Routing, shared: bool) -> None:
    arguments = {n: x.requires_grad_() for n, x in routing.arguments((2, 4, 2, 3, 2), shared=shared).items()}
    mask = torch.tensor([[True, False, True, True], [True, True, True, False]])
    assert torch.autograd.gradcheck(
        lambda *values: routing.call(**dict(zip(arguments, values, strict=True)), mask=mask), tuple(arguments.values())
    )


@by_routing
def test_masked_values_have_no_effect(routing: Routing) -> None:
    arguments = {n: x.requires_grad_() for n, x in routing.arguments((3, 7, 3, 4, 3)).items()}
    mask = torch.rand(3, 7, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[1] = False
    mask[:, 2] = False  # masked in all items: its parameters have no effect either
    out = each(routing.call(**arguments, mask=mask))
    expected = torch.autograd.grad(sum(x.sum() for x in out), list(arguments.values()))
    hidden = {n: x.detach().clone() for n, x in arguments.items()}
    hidden[routing.capsules][~mask] = float("nan")
    for name in {"activation", "input_weight"} & set(hidden):
        hidden[name][~mask] = float("nan")
    for name in {"weight", "prior"} & set(hidden):
        hidden[name][2] = float("nan")
    hidden = {n: x.requires_grad_() for n, x in hidden.items()}
    again = each(routing.call(**hidden, mask=mask))
    torch.testing.assert_close(again, out, rtol=0, atol=0)
    got = torch.autograd.grad(sum(x.sum() for x in again), list(hidden.values()))
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


@by_routing
@pytest.mark.parametrize("shape", [(0, 5, 3, 2, 4), (2, 0, 3, 2, 4)], ids=["no-batch", "no-capsules"])
def test_empty(routing: Routing, shape: tuple[int, ...]) -> None:
    arguments = {n: x.requires_grad_() for n, x in routing.arguments(shape).items()}
    out = each(routing.call(**arguments))
    assert all(torch.isfinite(x).all() for x in out)
    torch.autograd.backward([x.sum() for x in out])
    assert all(x.grad is not None and torch.isfinite(x.grad).all() for x in arguments.values())
