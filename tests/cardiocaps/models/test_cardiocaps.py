"""CardioCaps: what its routings, layouts and affine maps do, the decoder's mask, the regression's start."""

from __future__ import annotations

import pytest
import torch

from cardiocaps.config import PRESETS
from cardiocaps.models.cardiocaps import CardioCaps


def test_paper_preset_has_the_papers_sizes() -> None:
    with torch.device("meta"):
        net = CardioCaps(PRESETS["paper"])
    assert sum(p.numel() for p in net.parameters()) == 325_722_375
    assert net.classes.weight.shape == (460_800, 8, 2, 16)
    net.eval()
    out = net(torch.empty(2, 9, 256, 256, device="meta"))
    assert out.capsules.shape == (2, 2, 16)
    assert out.reconstruction.shape == (2, 3, 256, 256)
    assert out.regression.shape == (2,)


@pytest.mark.parametrize(
    ("affine", "parameters", "weight"),
    [
        ("convolution", 325_722_375 - 460_800 * 256 + 256, (8, 2, 16)),
        ("constant", 325_722_375 - 460_800 * 256, (8, 2, 16)),
    ],
)
def test_paper_preset_with_other_affine_maps(affine: str, parameters: int, weight: tuple[int, ...]) -> None:
    with torch.device("meta"):
        net = CardioCaps(PRESETS["paper"], affine=affine)
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert net.classes.weight.shape == weight


def test_convolution_is_one_matrix_for_all_primary_capsules() -> None:
    torch.manual_seed(0)
    shared = CardioCaps(PRESETS["tiny"], affine="convolution").eval()
    each = CardioCaps(PRESETS["tiny"]).eval()
    weights = shared.state_dict()
    weights["classes.weight"] = weights["classes.weight"].expand_as(each.classes.weight)
    each.load_state_dict(weights)
    image = torch.rand(2, 9, 64, 64)
    torch.testing.assert_close(shared(image).capsules, each(image).capsules)


@pytest.mark.parametrize("routing", ["attention", "dynamic", "uniform"])
def test_constant_votes_are_not_learned(routing: str) -> None:
    """Nor changed by a checkpoint. Without attention both class capsules are the same, whatever the image."""
    torch.manual_seed(0)
    net = CardioCaps(PRESETS["tiny"], routing=routing, affine="constant")
    optimiser = torch.optim.Adam(net.parameters(), lr=0.001)
    before = net(torch.rand(2, 9, 64, 64)).scores
    assert before.min() > 0 and before.max() < 0.5, "where the squash is not saturated"
    before[:, 0].sum().backward()
    optimiser.step()
    other = CardioCaps(PRESETS["tiny"], routing=routing, affine="constant").to(memory_format=torch.channels_last)
    other.load_state_dict(net.state_dict())
    out = other(torch.rand(3, 9, 64, 64))
    for x in (net, other):
        torch.testing.assert_close(x.classes.weight, torch.full((8, 2, 16), 2 / 1152))
    if routing == "attention":
        assert not torch.allclose(out.capsules[:, 0], out.capsules[:, 1])
    else:
        assert torch.equal(out.capsules[:, 0], out.capsules[:, 1])
        assert out.probability.tolist() == [0.5] * 3


def test_unknown_affine_map() -> None:
    with pytest.raises(ValueError, match=r"affine is 'affine'; expected one of matrices, convolution, constant"):
        CardioCaps(PRESETS["tiny"], affine="affine")


def test_paper_preset_runs_forward() -> None:
    """One frame in evaluation mode with real parameters, 1.3 GB of them."""
    torch.manual_seed(0)
    net = CardioCaps(PRESETS["paper"]).eval()
    with torch.inference_mode():
        out = net(torch.rand(1, 9, 256, 256))
    assert torch.isfinite(out.reconstruction).all()
    assert out.scores.shape == (1, 2)
    assert ((out.scores > 0) & (out.scores < 1)).all()


@pytest.mark.parametrize("name", ["tiny", "small"])
@pytest.mark.parametrize("routing", ["attention", "dynamic", "uniform"])
@pytest.mark.parametrize("layout", ["channels", "legacy"])
def test_every_parameter_learns(name: str, routing: str, layout: str) -> None:
    torch.manual_seed(0)
    check_gradients(CardioCaps(PRESETS[name], routing=routing, primary_layout=layout))


@pytest.mark.parametrize("routing", ["attention", "dynamic"])
@pytest.mark.parametrize("affine", ["convolution", "constant"])
def test_every_parameter_learns_with_other_affine_maps(routing: str, affine: str) -> None:
    torch.manual_seed(0)
    check_gradients(CardioCaps(PRESETS["tiny"], routing=routing, affine=affine))


def check_gradients(net: CardioCaps) -> None:
    out = net(torch.rand(2, 9, net.size, net.size), torch.tensor([0, 1]))
    (out.scores.sum() + out.reconstruction.square().mean() + out.regression.square().sum()).backward()
    for parameter, p in net.named_parameters():
        assert p.grad is not None, parameter
        assert torch.isfinite(p.grad).all(), parameter
        assert p.grad.abs().max() > 0, parameter


def test_decoder_sees_the_label_or_else_the_prediction() -> None:
    torch.manual_seed(0)
    net = CardioCaps(PRESETS["tiny"]).eval()
    image = torch.rand(4, 9, 64, 64)
    free = net(image)
    predicted = free.scores.argmax(dim=1)
    assert torch.equal(net(image, predicted).reconstruction, free.reconstruction)
    assert not torch.equal(net(image, 1 - predicted).reconstruction, free.reconstruction)


def test_regression_starts_at_the_mean() -> None:
    torch.manual_seed(0)
    out = CardioCaps(PRESETS["tiny"], regression_start=55.0)(torch.rand(8, 9, 64, 64))
    assert (out.regression - 55).abs().max() < 2


def test_autocast() -> None:
    net = CardioCaps(PRESETS["tiny"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = net(torch.rand(2, 9, 64, 64))
    assert out.scores.dtype == out.regression.dtype == torch.float32
    out.scores.sum().backward()
    assert torch.isfinite(net.conv[0].weight.grad).all()
