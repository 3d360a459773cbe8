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
from capsops.nn import ConvCapsules, PrimaryCapsules, convert_weight
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
    weight = W[:, None].expand(K, J, D)
    found = capsops.dynamic_routing(u, weight, 3, logits=b.transpose(1, 2), detach=True, mask=mask)
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
    weight = W.T[:, None].expand(K, J, D)
    items = u * mask[:, :, None]
    found = capsops.dynamic_routing(items, weight, 3, logits=b.transpose(1, 2), axis="input", detach=True)
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
    types, kernel, stride, grid, final_lambda = 2, 3, 1, (4, 5), 0.01
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
    page = PAGE.read_text().split("In DeepCaps")[1]
    names = {"capsops": capsops, "votes": given, "bias": bias}
    exec(page.split("```python\n")[1].split("```")[0], names)  # the loop of the page
    _same(names["v"], torch.stack(formula), given, bias)


def test_every_row_of_the_page_has_a_test() -> None:
    page = PAGE.read_text().split("## What gives the same numbers")[1].split("\n## ")[0]
    rows = re.findall(r"^\| \[([\w./-]+)\]", page, flags=re.MULTILINE)
    assert len(rows) >= 12
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
