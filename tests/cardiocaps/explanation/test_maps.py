"""The maps on the network's input."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from capsops import affine_votes, coupling_coefficients
from capsops.nn import CapsuleLayer, PrimaryCapsules
from cardiocaps.config import PRESETS, TrainConfig
from cardiocaps.errors import ConfigError
from cardiocaps.explanation import capsules
from cardiocaps.explanation.capsules import capsule_map, contributions, on_feature_map
from cardiocaps.explanation.gradcam import grad_cam, last_convolution
from cardiocaps.explanation.grid import Grid
from cardiocaps.explanation.maps import methods_for
from cardiocaps.models import MODELS, build
from cardiocaps.models.cardiocaps import CardioCaps

ROUTINGS = ("attention", "dynamic", "uniform")
N, K, J, D = 37, 5, 2, 3


def _layer(routing: str, **options: Any) -> CapsuleLayer:
    return CapsuleLayer(N, K, J, D, routing, bias=routing == "attention", dtype=torch.float64, **options)


def _naive(layer: CapsuleLayer, u: Tensor) -> Tensor:
    """The formula, with all votes and couplings at once."""
    votes = affine_votes(u, layer.weight)
    attention = layer.routing == "attention"
    given = (layer.attn_weight, layer.attn_bias) if attention else ()
    c = coupling_coefficients(layer.routing, u, layer.weight, *given, iterations=layer.iterations)
    s = ((c if attention else c[..., None]) * votes).sum(dim=1, keepdim=True)
    return ((c if attention else c[..., None]) * votes * s / s.norm(dim=-1, keepdim=True)).sum(dim=-1)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("chunk", [1, 100, 1 << 20])
def test_the_contributions_add_up_to_the_length_of_s(
    routing: str, shared: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capsules, "_CHUNK", chunk)
    layer = _layer(routing, shared=shared)
    u = torch.randn(3, N, K, dtype=torch.float64)
    sent, v = contributions(layer, u)
    torch.testing.assert_close(v, layer(u))
    torch.testing.assert_close(sent, _naive(layer, u))
    length = v.norm(dim=2)  # |v| = |s|² / (1 + |s|²)
    torch.testing.assert_close(sent.sum(dim=1), (length / (1 - length)).sqrt())


def test_a_class_capsule_of_zero_is_sent_nothing() -> None:
    sent, _ = contributions(_layer("dynamic"), torch.zeros(2, N, K, dtype=torch.float64))
    assert not sent.any()


@pytest.mark.parametrize(
    "layer",
    [
        lambda: CapsuleLayer(N, K, J, D, "self-attention"),
        lambda: CapsuleLayer(N, K, J, D, "dynamic", bias=True),
        lambda: CapsuleLayer(N, K, J, D, "attention", squash="layer_norm"),
    ],
)
def test_layers_whose_s_is_not_the_sum_are_refused(layer: Any) -> None:
    with pytest.raises(ValueError, match="expected"):
        contributions(layer(), torch.randn(1, N, K))


class _Largest(TorchDispatchMode):
    """The largest tensor that an operator makes, in elements."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [x.untyped_storage().nbytes() // x.element_size() for x in tree_leaves(out) if isinstance(x, Tensor)]
        self.largest = max(self.largest, *sizes, 0)
        return out


@pytest.mark.parametrize("routing", ROUTINGS)
def test_the_votes_are_never_all_held(routing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capsules, "_CHUNK", 1 << 12)
    monkeypatch.setattr(sys.modules["capsops.ops.coupling_coefficients"], "_CHUNK", 1 << 12)
    batch, many, dim = 8, 4000, 32
    layer = CapsuleLayer(many, 4, J, dim, routing, bias=routing == "attention", shared=True)
    u = torch.randn(batch, many, 4)
    with _Largest() as seen:
        contributions(layer, u)
    assert u.numel() <= seen.largest < batch * many * J * dim / 10


@pytest.mark.parametrize("layout", ["channels", "legacy"])
def test_capsules_come_back_to_their_places(layout: str) -> None:
    """The squared length of a capsule, put back, is the sum of the squares of its channels."""
    primary = PrimaryCapsules(3, 4, 2, 3, 1, layout=layout, dtype=torch.float64)
    image = torch.zeros(1, 3, 8, 8, dtype=torch.float64)
    nn.init.zeros_(primary.conv.bias)
    image[0, :, 5, 3] = 1  # which rows 3 to 5 and columns 1 to 3 of the map see
    found = on_feature_map(primary(image).norm(dim=2), 4, 2, layout)[0]
    assert found.shape == (6, 6) and (found[3:6, 2:4] > 0).all()
    assert not found[:3].any() and not found[:, 4:].any()
    # In layout "legacy" a capsule is two neighbouring pixels of a row: columns 0 and 1, 2 and 3.
    assert bool(found[3:6, 0].any()) == (layout == "legacy")


def test_a_number_of_capsules_that_is_no_square_map_is_refused() -> None:
    with pytest.raises(ValueError, match="square feature map"):
        on_feature_map(torch.ones(1, 4 * 6), 4, 8, "channels")


def test_the_grid_is_that_of_the_receptive_fields() -> None:
    """The centre of the pixels that a cell sees, found by its gradient."""
    layers = nn.Sequential(nn.Conv2d(1, 1, 5, 2), nn.MaxPool2d(3, 1, 1), nn.Conv2d(1, 1, 3, 2, dilation=2))
    for layer in (layers[0], layers[2]):
        nn.init.ones_(layer.weight)
    grid = Grid().after(5, 2).after(3, 1, 1).after(3, 2, 0, 2)
    linear = nn.Sequential(layers[0], nn.AvgPool2d(3, 1, 1), layers[2]).double()
    for cell in (1, 3):
        image = torch.zeros(1, 1, 40, 40, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(linear(image)[0, 0, cell, cell], image)
        centre = (gradient[0, 0].sum(1) * torch.arange(40)).sum() / gradient.sum()
        assert float(centre) == pytest.approx(grid.start + cell * grid.step)


def test_a_cell_is_spread_around_its_centre_and_nothing_is_lost() -> None:
    cells = torch.zeros(2, 6, 6, dtype=torch.float64)
    cells[0, 2, 4], cells[1] = 3.0, torch.randn(6, 6, dtype=torch.float64)
    found = Grid(8.0, 4.0).on_input(cells, 40)
    torch.testing.assert_close(found.sum(dim=(1, 2)), cells.sum(dim=(1, 2)))
    y, x = divmod(int(found[0].argmax()), 40)
    assert (y, x) == (16, 24) and not found[0, :, 28:].any()


@pytest.mark.parametrize("layout", ["channels", "legacy"])
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("affine", ["matrices", "convolution", "constant"])
@pytest.mark.parametrize("published", [False, True])
def test_a_map_of_cardiocaps_adds_up_to_the_length_of_s(
    routing: str, affine: str, layout: str, published: bool
) -> None:
    network = CardioCaps(
        PRESETS["tiny"], routing=routing, affine=affine, primary_layout=layout, published=published
    ).eval()
    # In double, because lengths near 1, as those of the published maps, say little of s.
    network, image, label = network.double(), torch.rand(3, 9, 64, 64).double(), torch.tensor([0, 1, 1])
    found = capsule_map(network, image, label)
    v = network(image).scores.gather(1, label[:, None]).squeeze(1)
    torch.testing.assert_close(found.sum(dim=(1, 2)), (v / (1 - v)).sqrt(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("model", MODELS)
def test_grad_cam_of_every_network(model: str) -> None:
    network = build(replace(TrainConfig(), model=model, preset="tiny")).eval()
    image = torch.rand(2, 9, 64, 64)
    found = grad_cam(network, image, torch.tensor([0, 1]))
    assert found.shape == (2, 64, 64) and bool((found >= 0).all()) and bool(torch.isfinite(found).all())
    layer, _ = last_convolution(network, image[:1])
    assert isinstance(layer, nn.Conv2d) and not layer._forward_hooks


def test_grad_cam_is_its_formula() -> None:
    network = build(replace(TrainConfig(), model="cnn-2", preset="tiny")).eval()
    image = torch.rand(2, 9, 64, 64)
    layer, grid = last_convolution(network, image[:1])
    kept: list[Tensor] = []
    hook = layer.register_forward_hook(lambda *x: kept.append(x[2]))
    scores = network(image).scores
    hook.remove()
    for label in (0, 1):
        (gradient,) = torch.autograd.grad(scores[:, label].sum(), kept[0], retain_graph=True)
        weights = gradient.mean(dim=(2, 3), keepdim=True)
        expected = grid.on_input((weights * kept[0]).sum(dim=1).relu().detach(), 64)
        torch.testing.assert_close(grad_cam(network, image, torch.tensor([label, label])), expected)


def test_a_network_without_a_map_of_cells_is_refused() -> None:
    with pytest.raises(ConfigError, match="this network has none"):
        last_convolution(nn.Flatten(), torch.rand(1, 9, 8, 8))


def test_the_methods_of_a_network() -> None:
    of = {name: build(replace(TrainConfig(), model=name, preset="tiny")) for name in ("cardiocaps", "em-capsnet")}
    assert methods_for(of["cardiocaps"]) == ("capsules", "gradcam")
    assert methods_for(of["cardiocaps"], ["gradcam", "gradcam"]) == ("gradcam",)
    assert methods_for(of["em-capsnet"]) == ("gradcam",)
    with pytest.raises(ConfigError, match="'capsules' needs primary capsules"):
        methods_for(of["em-capsnet"], ["capsules"])
