"""The calls in docs/migrating.md give the numbers of other implementations: float64, each formula written as loops.

A formula takes the parameters in the layout of that implementation. The small constants that implementations add to
denominators are left out, except in EM routing, where they matter most. Values, and gradients of the input capsules and
of the parameters, are compared.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

import capsops
from capsops.nn import (
    ConcurrentCapsules,
    ConvCapsules,
    InvertedAttentionCapsules,
    KMeansCapsules,
    PrimaryCapsules,
    convert_weight,
)
from tests.capsops.grids import em_over_positions, windows_on

B, N, K, J, D = 2, 5, 3, 4, 2
PAGE = Path(__file__).parents[2] / "docs" / "migrating.md"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(3)


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def _votes(u: Tensor, vote: Callable[[Tensor, int, int], Tensor]) -> Tensor:
    """[N, J, …] for one batch item u [N, K]; vote(u_i, i, j) is that of input capsule i for output capsule j."""
    return torch.stack([torch.stack([vote(u[i], i, j) for j in range(J)]) for i in range(len(u))])


def _squash(s: Tensor) -> Tensor:
    n = s.square().sum().sqrt()
    return n**2 / (1 + n**2) * s / n


def _agreement(
    votes: Tensor,
    iterations: int,
    *,
    bias: Tensor | None = None,
    detach: bool = False,
    leaky: bool = False,
    present: Sequence[bool] = (True,) * N,
    initial: Tensor | None = None,
    over_inputs: bool = False,
) -> Tensor:
    """Routing by agreement of one item, votes [N, J, D] and initial logits [N, J] -> v [J, D]."""
    start = torch.zeros(N, J, dtype=torch.float64) if initial is None else initial
    logits = [[start[i, j] for j in range(J)] for i in range(N)]
    for iteration in range(iterations):
        last = iteration == iterations - 1
        used = votes.detach() if detach and not last else votes
        v = []
        for j in range(J):
            s = torch.zeros(D, dtype=torch.float64) if bias is None else bias[j]
            for i in range(N):
                rivals = [b[j] for b in logits] if over_inputs else logits[i]
                share = logits[i][j].exp() / (sum(b.exp() for b in rivals) + leaky)
                s = s + present[i] * share * used[i, j]
            v.append(_squash(s))
        if not last:
            logits = [[logits[i][j] + (used[i, j] * v[j]).sum() for j in range(J)] for i in range(N)]
    return torch.stack(v)


def _same(found: Tensor, formula: Tensor, *parameters: Tensor) -> None:
    """Compare values, and the gradients of the parameters."""
    torch.testing.assert_close(found, formula, rtol=1e-9, atol=1e-12)
    g = torch.randn_like(found)
    gradients = [torch.autograd.grad(v, parameters, g, retain_graph=True) for v in (found, formula)]
    for a, b in zip(*gradients, strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_xifengguo_capsnet_pytorch() -> None:
    u, W = _random(B, N, K), _random(J, N, D, K)
    formula = [_agreement(_votes(x, lambda x, i, j: W[j, i] @ x), 3, detach=True) for x in u]
    found = capsops.dynamic_routing(u, convert_weight(W, "JNDK"), 3, detach=True)
    _same(found, torch.stack(formula), u, W)


def test_xifengguo_capsnet_keras() -> None:
    u, W = _random(B, N, K), _random(J, N, D, K)
    formula = [_agreement(_votes(x, lambda x, i, j: W[j, i] @ x), 3) for x in u]
    _same(capsops.dynamic_routing(u, convert_weight(W, "JNDK"), 3), torch.stack(formula), u, W)


def test_danielhavir_capsule_network() -> None:
    u, W = _random(B, N, K), _random(1, J, N, D, K)
    formula = [_agreement(_votes(x, lambda x, i, j: W[0, j, i] @ x), 3, detach=True) for x in u]
    found = capsops.dynamic_routing(u, convert_weight(W, "JNDK"), 3, detach=True)
    _same(found, torch.stack(formula), u, W)


def test_ageron_handson_ml() -> None:
    u, W = _random(B, N, K), _random(1, N, J, D, K)
    formula = [_agreement(_votes(x, lambda x, i, j: W[0, i, j] @ x), 2) for x in u]
    _same(capsops.dynamic_routing(u, convert_weight(W, "NJDK"), 2), torch.stack(formula), u, W)


def test_adambielski_capsnet_pytorch() -> None:
    """It learns the initial logits; n_iterations counts the rounds after the first."""
    u, W, b, n_iterations = _random(B, N, K), _random(N, K, J * D), _random(N, J), 3
    formula = [
        _agreement(_votes(x, lambda x, i, j: x @ W[i, :, j * D : (j + 1) * D]), n_iterations + 1, initial=b) for x in u
    ]
    found = capsops.dynamic_routing(u, W.view(N, K, J, D), n_iterations + 1, logits=b)
    _same(found, torch.stack(formula), u, W, b)


def test_gram_ai_capsule_networks() -> None:
    u, W, b = _random(B, N, K), _random(J, N, K, D), _random(J, 1, N, 1, 1)
    logits = b[:, 0, :, 0, 0].T
    formula = [_agreement(_votes(x, lambda x, i, j: x @ W[j, i]), 3, initial=logits, over_inputs=True) for x in u]
    found = capsops.dynamic_routing(u, convert_weight(W, "JNKD"), 3, logits=logits, axis="input")
    _same(found, torch.stack(formula), u, W, b)


def test_leftthomas_capsnet() -> None:
    u, W = _random(B, N, K), _random(J, N, D, K)
    formula = [_agreement(_votes(x, lambda x, i, j: W[j, i] @ x), 3, over_inputs=True) for x in u]
    found = capsops.dynamic_routing(u, convert_weight(W, "JNDK"), 3, axis="input")
    _same(found, torch.stack(formula), u, W)


@pytest.mark.parametrize("leaky", [False, True])
def test_sarasra_models(leaky: bool) -> None:
    u, W, bias = _random(B, N, K), _random(N, K, J * D), _random(J, D)
    formula = [
        _agreement(_votes(x, lambda x, i, j: x @ W[i, :, j * D : (j + 1) * D]), 3, bias=bias, leaky=leaky) for x in u
    ]
    found = capsops.dynamic_routing(u, W.view(N, K, J, D), 3, bias=bias, leaky=leaky)
    _same(found, torch.stack(formula), u, W, bias)


def test_naturomics_capsnet_tensorflow() -> None:
    """The gradient of the bias differs: there it also passes through the couplings, as those of u and W do not."""
    u, W, bias = _random(B, N, K), _random(1, N, J * D, K, 1), _random(1, 1, J, D, 1)
    formula = [
        _agreement(
            _votes(x, lambda x, i, j: (W[0, i, j * D : (j + 1) * D, :, 0] * x).sum(dim=1)),
            3,
            bias=bias[0, 0, :, :, 0],
            detach=True,
        )
        for x in u
    ]
    weight = convert_weight(W.view(N, J, D, K), "NJDK")
    found = capsops.dynamic_routing(u, weight, 3, bias=bias.view(J, D), detach=True)
    _same(found, torch.stack(formula), u, W)


def test_thudm_comirec() -> None:
    """ComiRec-DR: `CapsuleNetwork` with bilinear_type 2."""
    u, W = _random(B, N, K), _random(1, N, J * D, K)
    mask = torch.tensor([[True] * 3 + [False] * 2, [True] * N])
    formula = [
        _agreement(
            _votes(x, lambda x, i, j: (W[0, i, j * D : (j + 1) * D] * x).sum(dim=1)),
            3,
            detach=True,
            present=present.tolist(),
        )
        for x, present in zip(u, mask, strict=True)
    ]
    weight = convert_weight(W.view(N, J, D, K), "NJDK")
    found = capsops.dynamic_routing(u, weight, 3, detach=True, mask=mask)
    _same(found, torch.stack(formula), u, W)


def test_thudm_comirec_mind() -> None:
    """`CapsuleNetwork` with bilinear_type 0: one matrix for all capsules, and random logits that are not learned."""
    u, W, b = _random(B, N, K), _random(K, D), _random(B, J, N).detach()
    mask = torch.tensor([[True] * 3 + [False] * 2, [True] * N])
    formula = [
        _agreement(_votes(x, lambda x, i, j: x @ W), 3, detach=True, present=present.tolist(), initial=logits.T)
        for x, present, logits in zip(u, mask, b, strict=True)
    ]
    found = capsops.dynamic_routing(u, W, 3, logits=b.transpose(1, 2), detach=True, mask=mask)
    _same(found, torch.stack(formula), u, W)


def test_shiningcosmos_pytorch_comirec() -> None:
    """Its softmax runs over the items, also over those that pad a sequence, whose embedding is 0."""
    u, W, b = _random(B, N, K), _random(D, K), _random(B, J, N).detach()
    mask = torch.tensor([[1.0] * 3 + [0.0] * 2, [1.0] * N]).double()
    formula = [
        _agreement(
            _votes(x, lambda x, i, j: W @ x),
            3,
            detach=True,
            present=present.tolist(),
            initial=logits.T,
            over_inputs=True,
        )
        for x, present, logits in zip(u * mask[:, :, None], mask, b, strict=True)
    ]
    items = u * mask[:, :, None]
    found = capsops.dynamic_routing(items, W.T, 3, logits=b.transpose(1, 2), axis="input", detach=True)
    _same(found, torch.stack(formula), u, W)


def test_escvm_efficient_capsnet() -> None:
    u, W, b = _random(B, N, K), _random(J, N, K, D), _random(J, N, 1)
    formula = []
    for x in u:
        votes = _votes(x, lambda x, i, j: x @ W[j, i])
        # The row sums of the matrix of all products of two votes for the same output capsule.
        logit = [[sum((votes[i, j] * votes[k, j]).sum() for k in range(N)) / math.sqrt(D) for j in range(J)]
                 for i in range(N)]  # fmt: skip
        for j in range(J):
            s = torch.zeros(D, dtype=torch.float64)
            for i in range(N):
                s = s + (logit[i][j].exp() / sum(other.exp() for other in logit[i]) + b[j, i, 0]) * votes[i, j]
            n = s.square().sum().sqrt()
            formula.append((1 - 1 / n.exp()) * s / n)
    prior = b.squeeze(-1).T
    found = capsops.self_attention_routing(u, convert_weight(W, "JNKD"), prior)
    _same(found, torch.stack(formula).view(B, J, D), u, W, b)


def test_jihyeonseong_cardiocaps() -> None:
    u, W, weight, bias = _random(B, N, K), _random(J, N, D, K), _random(J, J, 1, 1), _random(J)
    formula = []
    for x in u:
        votes = _votes(x, lambda x, i, j: W[j, i] @ x)
        z = [[sum(weight[k, j, 0, 0] * votes[i, j] for j in range(J)) + bias[k] for k in range(J)] for i in range(N)]
        for j in range(J):
            s = torch.zeros(D, dtype=torch.float64)
            for i in range(N):
                s = s + z[i][j].exp() / sum(other.exp() for other in z[i]) * votes[i, j]
            formula.append(_squash(s))
    found = capsops.attention_routing(u, convert_weight(W, "JNDK"), weight[:, :, 0, 0], bias)
    _same(found, torch.stack(formula).view(B, J, D), u, W, weight, bias)


def _em(
    votes: Tensor,
    activation: Tensor,
    beta_u: Tensor,
    beta_a: Tensor,
    temperatures: Sequence[float],
    *,
    renormalise: bool,
) -> tuple[Tensor, Tensor]:
    """EM routing of one item: votes [N, J, H], activation [N], beta_u [J, H], beta_a [J] -> pose [J, H], a [J]."""
    epsilon = 1e-8
    r = [[torch.full((), 1 / J, dtype=torch.float64) for _ in range(J)] for _ in range(N)]
    for iteration, temperature in enumerate(temperatures):
        w = [[r[i][j] * activation[i] for j in range(J)] for i in range(N)]
        if renormalise:
            w = [[w[i][j] / (sum(w[i]) + epsilon) for j in range(J)] for i in range(N)]
        mean, variance, a = [], [], []
        for j in range(J):
            total = sum(w[i][j] for i in range(N))
            mean.append(sum(w[i][j] * votes[i, j] for i in range(N)) / (total + epsilon))
            variance.append(sum(w[i][j] * (votes[i, j] - mean[j]) ** 2 for i in range(N)) / (total + epsilon) + epsilon)
            cost = (beta_u[j] + variance[j].sqrt().log()) * total
            a.append(torch.sigmoid(temperature * (beta_a[j] - cost.sum())))
        if iteration + 1 < len(temperatures):
            for i in range(N):
                p = [
                    a[j] * (-((votes[i, j] - mean[j]) ** 2) / (2 * variance[j]) - variance[j].sqrt().log()).sum().exp()
                    for j in range(J)
                ]
                r[i] = [p[j] / sum(p) for j in range(J)]
    return torch.stack(mean), torch.stack(a)


def test_www0wwwjs1_matrix_capsules_em_tensorflow() -> None:
    """Its iterations count the rounds after the first, and beta_v has a number for each component of a pose."""
    iter_routing, lambda_0, lambda_step = 2, 0.01, 0.01
    pose, W, beta_v, beta_a = _random(B, N, 4, 4), _random(1, N, J, 4, 4), _random(J, 16), _random(J)
    activation = torch.rand(B, N, dtype=torch.float64).requires_grad_()
    temperatures = [lambda_0 + lambda_step * t for t in range(iter_routing + 1)]
    formula = [
        _em(_votes(p, lambda x, i, j: (x @ W[0, i, j]).flatten()), a, beta_v, beta_a, temperatures, renormalise=False)
        for p, a in zip(pose, activation, strict=True)
    ]
    means, activations = (torch.stack(part) for part in zip(*formula, strict=True))
    weight, beta_u = convert_weight(W, "NJKD"), beta_v.mean(dim=1)
    found = capsops.em_routing(
        pose, activation, weight, beta_u, beta_a, iter_routing + 1, inverse_temperature=temperatures
    )
    _same(found[0], means.view(B, J, 4, 4), pose, W, activation)
    _same(found[1], activations, pose, W, activation, beta_v, beta_a)


def test_yl_1993_matrix_capsules_em_pytorch() -> None:
    pose, W, beta_u, beta_a = _random(B, N, 4, 4), _random(1, N, J, 4, 4), _random(J), _random(J)
    activation = torch.rand(B, N, dtype=torch.float64).requires_grad_()
    formula = [
        _em(
            _votes(p, lambda x, i, j: (x @ W[0, i, j]).flatten()),
            a,
            beta_u[:, None].expand(J, 16),
            beta_a,
            [1e-3] * 3,
            renormalise=True,
        )
        for p, a in zip(pose, activation, strict=True)
    ]
    means, activations = (torch.stack(part) for part in zip(*formula, strict=True))
    weight = convert_weight(W, "NJKD")
    found = capsops.em_routing(
        pose, activation, weight, beta_u, beta_a, 3, inverse_temperature=[1e-3] * 3, renormalise=True
    )
    _same(found[0], means.view(B, J, 4, 4), pose, W)
    _same(found[1], activations, pose, W, beta_u, beta_a)


def test_ibm_matrix_capsules_with_em_routing() -> None:
    """A vote has a bias, and the cost of a position is divided by the number of input capsules for each output."""
    types, kernel, stride, grid, final_lambda = 2, 3, 1, (3, 5), 0.01
    n = kernel**2 * types
    pose, activation = _random(B, types, *grid, 4, 4), torch.rand(B, types, *grid, dtype=torch.float64).requires_grad_()
    w, b = _random(1, n, J, 4, 4), _random(1, n, J, 4, 4)
    beta_v, beta_a = _random(J), _random(J)
    windows = windows_on(grid, types, (kernel,) * 2, (stride,) * 2, (0, 0), (1, 1))
    formula = []
    for item, a in zip(pose, activation, strict=True):
        votes = [{at: item[at] @ w[0, n] + b[0, n] for n, at in window} for window in windows]
        temperatures = [final_lambda * (1 - 0.95 ** (t + 1)) for t in range(3)]
        formula += em_over_positions(votes, a, beta_v, beta_a, temperatures, information=100 * J / n)
    means, activations = (torch.stack(part) for part in zip(*formula, strict=True))

    factor = 100 * J / n
    layer = ConvCapsules(types, 8, J, 4, kernel, stride, routing="em", inverse_temperature=factor * final_lambda)
    weight = torch.cat([convert_weight(w, "NJKD"), convert_weight(b, "NJKD")], dim=1)
    parameters = {"weight": weight, "beta_u": beta_v, "beta_a": beta_a / factor}
    identity = torch.eye(4, dtype=torch.float64).expand_as(pose)
    found = torch.func.functional_call(
        layer,
        {f"capsules.{name}": x for name, x in parameters.items()},
        (torch.cat([pose, identity], dim=-1), activation),
    )
    _same(found[0].movedim(1, 3).flatten(0, 2), means, pose, w, b, activation)
    _same(found[1].movedim(1, 3).flatten(0, 2), activations, pose, w, b, activation, beta_v, beta_a)


def _softmax(logits: Sequence[Tensor]) -> list[Tensor]:
    return [b.exp() / sum(other.exp() for other in logits) for b in logits]


def _layer_norm(s: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = s - s.mean()
    return centred / (centred.square().mean() + 1e-5).sqrt() * weight + bias


def _inverted_attention(votes: Tensor, v: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
    """One iteration of one item: votes [N, J, …] and the v [J, …] before -> v [J, …]."""
    n = votes[0, 0].numel()
    sums = [torch.zeros_like(votes[0, 0]) for _ in range(J)]
    for of_one in votes:
        logits = [of_one[j].sum() * 0 if v is None else (of_one[j] * v[j]).sum() / math.sqrt(n) for j in range(J)]
        for j, share in enumerate(_softmax(logits)):
            sums[j] = sums[j] + share * of_one[j]
    return torch.stack([_layer_norm(s, weight, bias) for s in sums])


def _parameters(layer: torch.nn.Module) -> list[Tensor]:
    for x in layer.parameters():
        torch.nn.init.normal_(x)
    return list(layer.parameters())


@pytest.mark.parametrize("matrix_pose", [False, True])
def test_apple_ml_capsules_inverted_dot_product_attention_routing(matrix_pose: bool) -> None:
    """`CapsuleFC`, with num_routing iterations of one layer."""
    rows = 3 if matrix_pose else None
    layer = InvertedAttentionCapsules(N, K, J, D, iterations=3, rows=rows, dtype=torch.float64)
    u = _random(B, N, rows, K) if rows else _random(B, N, K)
    w = _random(N, K, D, J) if matrix_pose else _random(N, K, J, D)
    _, weight, bias = _parameters(layer)
    formula = []
    for x in u:
        votes = _votes(x, lambda x, i, j: x @ (w[i, :, :, j] if matrix_pose else w[i, :, j]))
        v = None
        for _ in range(3):
            v = _inverted_attention(votes, v, weight, bias)
        formula.append(v)
    matrices = convert_weight(w, "NKDJ") if matrix_pose else w
    found = torch.func.functional_call(layer, {"weight": matrices}, (u,))
    _same(found, torch.stack(formula), u, w, weight, bias)


def test_concurrent_inverted_attention() -> None:
    """The same implementation with its two kinds of layers on top of each other, in two iterations."""
    grid = ConvCapsules(2, K, J, D, (2, 3), routing="inverted-attention", dtype=torch.float64)
    top = InvertedAttentionCapsules(J * 2, D, J, 3, dtype=torch.float64)
    network = ConcurrentCapsules([grid, top], iterations=2)
    W, weight, bias, W2, weight2, bias2 = _parameters(network)
    u = _random(B, 2, 3, 3, K)
    formula = []
    for x in u:
        windows = [torch.stack([x[at] for _, at in w]) for w in windows_on((3, 3), 2, (2, 3), (1, 1), (0, 0), (1, 1))]
        votes = [_votes(window, lambda x, i, j: x @ W[i, :, j]) for window in windows]
        below: list[list[Tensor | None]] = [[None, None]]  # by iteration, then by position
        below += [[_inverted_attention(votes[p], None, weight, bias) for p in range(2)]]
        below += [[_inverted_attention(votes[p], below[1][p], weight, bias) for p in range(2)]]
        v = None
        for t in (1, 1):  # in its second iteration the upper layer sees what the lower one had before its second
            capsules = torch.stack(below[t], dim=1).flatten(0, 1)  # over output types, then positions
            v = _inverted_attention(_votes(capsules, lambda x, i, j: x @ W2[i, :, j]), v, weight2, bias2)
        formula.append(v)
    _same(network(u), torch.stack(formula), u, W, weight, bias, W2, weight2, bias2)


@pytest.mark.parametrize("share_weights", [False, True])
def test_bojone_capsule(share_weights: bool) -> None:
    """Its squash has 0.5 in place of 1, and only the last output is squashed."""
    u, W = _random(B, N, K), _random(1 if share_weights else N, K, J * D)
    formula = []
    for x in u:
        votes = _votes(x, lambda x, i, j: x @ W[0 if share_weights else i, :, j * D : (j + 1) * D])
        o: list[Tensor] | None = None
        for _ in range(3):
            shares = []
            for i in range(N):
                directions = [s / s.square().sum().sqrt() for s in o or []]
                shares.append(
                    _softmax([votes[i, j] @ directions[j] if o else torch.zeros(()).double() for j in range(J)])
                )
            o = [sum(shares[i][j] * votes[i, j] for i in range(N)) for j in range(J)]
        lengths = [s.square().sum().sqrt() for s in o]
        formula.append(torch.stack([n / (0.5 + n**2) * s for s, n in zip(o, lengths, strict=True)]))
    layer = KMeansCapsules(N, K, J, D, shared=share_weights, dtype=torch.float64)
    weight = W.view(K, J, D) if share_weights else W.view(N, K, J, D)
    _same(torch.func.functional_call(layer, {"weight": weight}, (u,)), torch.stack(formula), u, W)


def test_coder3000_sr_capsnet() -> None:
    """`SelfRouting2d`: A types in, J out. Capsules of a window run over the places of the kernel, then the types."""
    A, kernel, stride, pad = 2, 2, 2, 1
    n = kernel**2 * A
    pose, a = _random(B, A, 3, 3, K), torch.rand(B, A, 3, 3, dtype=torch.float64).requires_grad_()
    W1, W2, b2 = _random(n, J * D, K), _random(n, J, K), _random(1, 1, n, J)
    poses, activations = [], []
    for item, chance in zip(pose, a, strict=True):
        for window in windows_on((3, 3), A, (kernel,) * 2, (stride,) * 2, (pad,) * 2, (1, 1)):
            total, ar = torch.zeros(()).double(), [torch.zeros(()).double() for _ in range(J)]
            sums = [torch.zeros(D).double() for _ in range(J)]
            for i, at in window:
                r = _softmax([W2[i, j] @ item[at] + b2[0, 0, i, j] for j in range(J)])
                total = total + chance[at]
                for j in range(J):
                    ar[j] = ar[j] + chance[at] * r[j]
                    sums[j] = sums[j] + chance[at] * r[j] * (W1[i, j * D : (j + 1) * D] @ item[at])
            poses.append(torch.stack([s / x for s, x in zip(sums, ar, strict=True)]))
            activations.append(torch.stack(ar) / total)
    layer = ConvCapsules(A, K, J, D, kernel, stride, pad, "self-routing", dtype=torch.float64)
    parameters = {
        "weight": W1.view(n, J, D, K).permute(0, 3, 1, 2),
        "routing_weight": W2.transpose(1, 2),
        "routing_bias": b2[0, 0],
    }
    found = torch.func.functional_call(layer, {f"capsules.{name}": x for name, x in parameters.items()}, (pose, a))
    _same(found[0].movedim(1, 3).flatten(0, 2), torch.stack(poses), pose, a, W1, W2, b2)
    _same(found[1].movedim(1, 3).flatten(0, 2), torch.stack(activations), pose, a, W2, b2)


def test_lalonde_segcaps() -> None:
    """Each position routes by itself."""
    height, width = 2, 3
    votes, b = _random(B, N, height, width, J, D), _random(1, 1, J, D)
    formula = [
        _agreement(votes[item, :, row, column], 3, bias=b[0, 0])
        for item in range(B)
        for row in range(height)
        for column in range(width)
    ]
    found = capsops.dynamic_routing(votes.permute(0, 2, 3, 1, 4, 5).flatten(0, 2), None, 3, bias=b[0, 0])
    _same(found, torch.stack(formula), votes, b)


def test_brjathu_deepcaps() -> None:
    """The softmax runs over output capsules and positions, and the squash takes the length over all positions."""
    height, width = 2, 3
    given, bias = _random(B, N, J, D, height, width), _random(J, D, 1, 1)
    places = [(j, row, column) for j in range(J) for row in range(height) for column in range(width)]
    formula = []
    for item in given:
        logits = torch.zeros(N, J, height, width, dtype=torch.float64)
        for _ in range(3):
            v = []
            for j in range(J):
                s = bias[j].expand(D, height, width)
                for i in range(N):
                    share = logits[i].exp() / sum(logits[i][place].exp() for place in places)
                    s = s + share[j] * item[i, j]
                v.append(_squash(s))
            logits = logits + torch.stack([(item[i] * torch.stack(v)).sum(1) for i in range(N)])
        formula.append(torch.stack(v).permute(0, 2, 3, 1))
    names = _run_loop_of_the_page("In DeepCaps", votes=given, bias=bias)
    _same(names["v"], torch.stack(formula), given, bias)


def _run_loop_of_the_page(before: str, **names: object) -> dict:
    """Run the block of code that follows the text `before`; return its variables."""
    after = PAGE.read_text().split(before)[1]
    names |= {"torch": torch, "capsops": capsops, "convert_weight": convert_weight}
    exec(after.split("```python\n")[1].split("```")[0], names)
    return names


def test_czhang99_capsule_nlu() -> None:
    """Votes with a bias and a tanh; words beyond the end of a sentence are masked."""
    caps, W, b = _random(B, N, K), _random(K, J * D), _random(J * D)
    mask = torch.tensor([[True] * 3 + [False] * 2, [True] * N])
    formula = [
        _agreement(
            _votes(x, lambda x, i, j: torch.tanh(x @ W[:, j * D : (j + 1) * D] + b[j * D : (j + 1) * D])),
            3,
            present=present.tolist(),
        )
        for x, present in zip(caps, mask, strict=True)
    ]
    votes = torch.tanh(capsops.affine_votes(caps, W.view(K, J, D)) + b.view(J, D))
    _same(capsops.dynamic_routing(votes, None, 3, mask=mask), torch.stack(formula), caps, W, b)


def test_datawhalechina_torch_rechub() -> None:
    """ComiRec-DR (`bilinear_type` 2) with the softmax over the items, also those that pad a sequence."""
    u, w = _random(B, N, K), _random(1, N, J * D, K)
    mask = torch.tensor([[1.0] * 3 + [0.0] * 2, [1.0] * N]).double()
    items = u * mask[:, :, None]
    formula = [
        _agreement(
            _votes(x, lambda x, i, j: (w[0, i, j * D : (j + 1) * D] * x).sum(dim=1)),
            3,
            detach=True,
            present=present.tolist(),
            over_inputs=True,
        )
        for x, present in zip(items, mask, strict=True)
    ]
    weight = convert_weight(w.view(N, J, D, K), "NJDK")
    _same(capsops.dynamic_routing(items, weight, 3, axis="input", detach=True), torch.stack(formula), u, w)


def test_nii_yamagishilab_capsule_forensics_v2() -> None:
    """`RoutingLayer`: each component of a vote has a coupling of its own, a softmax over the input capsules."""
    x, route_weights = _random(B, N, K), _random(J, N, D, K)
    formula = []
    for item in x:
        priors = _votes(item, lambda u, i, j: route_weights[j, i] @ u)
        logits = torch.zeros_like(priors)
        for _ in range(2):
            v = []
            for j in range(J):
                shares = torch.stack([torch.stack(_softmax(list(logits[:, j, d]))) for d in range(D)], dim=1)
                v.append(_squash((shares * priors[:, j]).sum(dim=0)))
            logits = logits + priors * torch.stack(v)
        formula.append(torch.stack(v))
    names = _run_loop_of_the_page("In Capsule-Forensics-v2", u=x, route_weights=route_weights)
    _same(names["v"], torch.stack(formula), x, route_weights)


def test_glassroom_heinsen_routing() -> None:
    """`Routing` (Heinsen 2019), the Gaussian model: a loop on votes that are held."""
    a_inp, mu_inp = _random(B, N), _random(B, N, K)
    W, bias, beta_use, beta_ign = _random(N, J, K, D), _random(N, J, 1, D), _random(N, J), _random(N, J)
    formula = []
    for a, mu in zip(a_inp, mu_inp, strict=True):
        V = _votes(mu, lambda x, i, j: x @ W[i, j] + bias[i, j, 0])
        f = 1 / (1 + (-a).exp())
        R = torch.full((N, J), 1 / J).double()
        out, mean, var = [], [], []
        for iteration in range(3):
            if iteration:
                R = []
                for i in range(N):
                    p = [-((V[i, j] - mean[j]) ** 2 / (2 * var[j])).sum() - var[j].sqrt().log().sum() for j in range(J)]
                    R.append(torch.stack(_softmax([torch.nn.functional.logsigmoid(out[j]) + p[j] for j in range(J)])))
                R = torch.stack(R)
            used = [[f[i] * R[i, j] for j in range(J)] for i in range(N)]
            out, mean, var = [], [], []
            for j in range(J):
                out.append(sum(beta_use[i, j] * used[i][j] - beta_ign[i, j] * (f[i] - used[i][j]) for i in range(N)))
                total = sum(used[i][j] for i in range(N)) + 1e-5
                mean.append(sum(used[i][j] * V[i, j] for i in range(N)) / total)
                var.append(sum(used[i][j] * (V[i, j] - mean[j]) ** 2 for i in range(N)) / total + 1e-5)
        formula.append((torch.stack(out), torch.stack(mean)))
    names = _run_loop_of_the_page(
        "Heinsen's routing of 2019", a_inp=a_inp, mu_inp=mu_inp, W=W, B=bias, beta_use=beta_use, beta_ign=beta_ign
    )
    parameters = a_inp, mu_inp, W, bias, beta_use, beta_ign
    _same(names["a_out"], torch.stack([x[0] for x in formula]), *parameters)
    _same(names["mu_out"], torch.stack([x[1] for x in formula]), a_inp, mu_inp, W, bias)


def test_every_row_of_the_page_has_a_test() -> None:
    page = PAGE.read_text().split("## What gives the same numbers")[1].split("\n## ")[0]
    rows = re.findall(r"^\| \[([\w./-]+)\]", page, flags=re.MULTILINE)
    assert len(rows) >= 25
    for row in rows:
        assert f"test_{re.sub(r'[^a-z0-9]', '_', row.lower())}" in globals(), row


@pytest.mark.parametrize("layout", ["channels", "legacy"])
def test_primary_capsules(layout: str) -> None:
    """A view of the feature map is "legacy"; capsules whose components are channels at one place are "channels"."""
    x, types, dim = _random(B, 2, 7, 6), 3, 4
    layer = PrimaryCapsules(2, types, dim, kernel_size=3, stride=1, layout=layout, dtype=torch.float64)
    features = layer.conv(x)
    _, _, height, width = features.shape
    formula = torch.empty(B, types * height * width, dim, dtype=torch.float64)
    for b in range(B):
        flat = features[b].flatten()
        for i in range(types * height * width):
            kind, place = divmod(i, height * width)
            row, column = divmod(place, width)
            for k in range(dim):
                channel = features[b, kind * dim + k, row, column]
                formula[b, i, k] = channel if layout == "channels" else flat[i * dim + k]
    expected = torch.stack([torch.stack([_squash(s) for s in item]) for item in formula])
    torch.testing.assert_close(layer(x), expected)


def test_eight_convolutions_as_primary_capsules() -> None:
    """A convolution for each component of a capsule, as gram-ai has them, is one with its channels in another order."""
    convolutions = [torch.nn.Conv2d(2, 3, 3, dtype=torch.float64) for _ in range(4)]  # 4 components, 3 types
    layer = PrimaryCapsules(2, types=3, dim=4, kernel_size=3, stride=1, dtype=torch.float64)
    with torch.no_grad():
        for name in ("weight", "bias"):
            parts = [getattr(convolution, name) for convolution in convolutions]
            getattr(layer.conv, name).copy_(torch.stack(parts, dim=1).flatten(0, 1))
    x = _random(B, 2, 7, 6)
    capsules = torch.stack([convolution(x).flatten(1) for convolution in convolutions], dim=-1)
    torch.testing.assert_close(layer(x), capsops.squash(capsules))


def test_the_windows_of_conv_capsules_are_those_of_the_page() -> None:
    """Input capsules of a window: its rows, its columns, then the types."""
    layer = ConvCapsules(2, 3, 4, 2, kernel_size=2, routing="em", competition="window", dtype=torch.float64)
    pose, activation = torch.randn(B, 2, 3, 3, 3, dtype=torch.float64), torch.rand(B, 2, 3, 3, dtype=torch.float64)
    window = [(pose[:, kind, row, column], activation[:, kind, row, column])
              for row in (1, 2) for column in (0, 1) for kind in (0, 1)]  # fmt: skip
    poses, activations = (torch.stack(part, dim=1) for part in zip(*window, strict=True))
    expected = layer.capsules(poses, activations)
    for found, wanted in zip(layer(pose, activation), expected, strict=True):
        torch.testing.assert_close(found[:, :, 1, 0], wanted)
