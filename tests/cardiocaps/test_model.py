"""The network: the paper's sizes to the digit, shapes, the decoder's mask, gradients."""

from __future__ import annotations

import pytest
import torch

from cardiocaps.config import PRESETS
from cardiocaps.models.cardiocaps import CardioCaps


def test_paper_preset_has_the_papers_sizes() -> None:
    net = CardioCaps(PRESETS["paper"], device="meta")
    assert sum(p.numel() for p in net.parameters()) == 325_722_375
    assert net.classes.weight.shape == (460_800, 8, 2, 16)
    net.eval()
    out = net(torch.empty(2, 9, 256, 256, device="meta"))
    assert out.capsules.shape == (2, 2, 16)
    assert out.reconstruction.shape == (2, 3, 256, 256)
    assert out.regression.shape == (2,)


def test_paper_preset_runs_forward() -> None:
    """One frame in evaluation mode with real parameters, 1.3 GB of them."""
    torch.manual_seed(0)
    net = CardioCaps(PRESETS["paper"]).eval()
    with torch.inference_mode():
        out = net(torch.rand(1, 9, 256, 256))
    assert torch.isfinite(out.reconstruction).all()
    assert out.lengths.shape == (1, 2)
    assert ((out.lengths > 0) & (out.lengths < 1)).all()


@pytest.mark.parametrize("name", ["tiny", "small"])
@pytest.mark.parametrize("routing", ["attention", "dynamic", "uniform"])
@pytest.mark.parametrize("layout", ["channels", "legacy"])
def test_every_parameter_learns(name: str, routing: str, layout: str) -> None:
    torch.manual_seed(0)
    net = CardioCaps(PRESETS[name], routing=routing, primary_layout=layout)
    out = net(torch.rand(2, 9, net.size, net.size), torch.tensor([0, 1]))
    (out.lengths.sum() + out.reconstruction.square().mean() + out.regression.square().sum()).backward()
    for parameter, p in net.named_parameters():
        assert p.grad is not None, parameter
        assert torch.isfinite(p.grad).all(), parameter
        assert p.grad.abs().max() > 0, parameter


def test_decoder_sees_the_label_or_else_the_prediction() -> None:
    torch.manual_seed(0)
    net = CardioCaps(PRESETS["tiny"]).eval()
    image = torch.rand(4, 9, 64, 64)
    free = net(image)
    predicted = free.lengths.argmax(dim=1)
    assert torch.equal(net(image, predicted).reconstruction, free.reconstruction)
    assert not torch.equal(net(image, 1 - predicted).reconstruction, free.reconstruction)


def test_probability() -> None:
    torch.manual_seed(0)
    out = CardioCaps(PRESETS["tiny"])(torch.rand(3, 9, 64, 64))
    torch.testing.assert_close(out.probability, out.lengths[:, 1] / out.lengths.sum(dim=1))
    assert ((out.probability > 0.5) == (out.lengths[:, 1] > out.lengths[:, 0])).all()
    assert out._replace(lengths=torch.zeros(3, 2)).probability.tolist() == [0.5] * 3


def test_regression_starts_at_the_mean() -> None:
    torch.manual_seed(0)
    out = CardioCaps(PRESETS["tiny"], regression_start=55.0)(torch.rand(8, 9, 64, 64))
    assert (out.regression - 55).abs().max() < 2


def test_autocast() -> None:
    net = CardioCaps(PRESETS["tiny"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = net(torch.rand(2, 9, 64, 64))
    assert out.lengths.dtype == out.regression.dtype == torch.float32
    out.lengths.sum().backward()
    assert torch.isfinite(net.conv[0].weight.grad).all()


def test_wrong_image() -> None:
    with pytest.raises(ValueError, match=r"image has shape \[1, 3, 64, 64\]; expected \[B, 9, 64, 64\]"):
        CardioCaps(PRESETS["tiny"])(torch.rand(1, 3, 64, 64))
