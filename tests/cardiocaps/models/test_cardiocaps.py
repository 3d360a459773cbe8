"""CardioCaps: what its routings, layouts and affine maps do, the decoder's mask, the regression's start."""

from __future__ import annotations

import pytest
import torch

from capsops import attention_routing, dynamic_routing
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
    value = 2 / 1152 if routing == "uniform" else 1.0
    before[:, 0].sum().backward()
    optimiser.step()
    other = CardioCaps(PRESETS["tiny"], routing=routing, affine="constant").to(memory_format=torch.channels_last)
    other.load_state_dict(net.state_dict())
    out = other(torch.rand(3, 9, 64, 64))
    for x in (net, other):
        torch.testing.assert_close(x.classes.weight, torch.full((8, 2, 16), value))
    if routing == "attention":
        assert not torch.allclose(out.capsules[:, 0], out.capsules[:, 1])
    else:
        assert torch.equal(out.capsules[:, 0], out.capsules[:, 1])
        assert out.probability.tolist() == [0.5] * 3


def test_the_couplings_of_constant_votes_depend_on_the_image() -> None:
    """With votes that are divided by N the order of the lengths would be that of the biases, for every image."""
    torch.manual_seed(0)
    net = CardioCaps(PRESETS["tiny"], affine="constant").double()
    u = 0.5 * torch.randn(6, 1152, 8, dtype=torch.float64)
    with torch.no_grad():
        net.classes.attn_bias.zero_()
        net.classes.attn_weight.copy_(torch.tensor([[0.5, 0.5], [-0.5, -0.5]]))
    order = net.classes(torch.cat([u + 0.05, u - 0.05])).norm(dim=2).argmax(dim=1)
    assert order.tolist() == [0] * 6 + [1] * 6
    votes = u.sum(dim=2)[:, :, None, None].expand(-1, -1, 2, 16)
    couplings = torch.einsum("kj,bnjd->bnkd", net.classes.attn_weight, votes).softmax(dim=2)
    s = (couplings * votes).sum(dim=1) * 2 / 1152
    norm = s.norm(dim=2, keepdim=True)
    torch.testing.assert_close(net.classes(u), norm / (1 + norm**2) * s)


@pytest.mark.parametrize("routing", ["attention", "dynamic", "uniform"])
def test_the_published_convolution_has_four_parameters(routing: str) -> None:
    """x̂_j = w_j u + b_j, repeated to fill the class capsule, against materialised votes."""
    torch.manual_seed(0)
    net = CardioCaps(PRESETS["tiny"], routing=routing, affine="convolution", published=True).double()
    assert net.classes.scale.numel() + net.classes.offset.numel() == 4
    u = torch.randn(2, 1152, 8, dtype=torch.float64)
    x = u[:, :, None, :] * net.classes.scale[:, None] + net.classes.offset[:, None]  # [B, N, 2, 8]
    with torch.no_grad():
        votes = x.repeat(1, 1, 1, 2)
        expected = {
            "attention": lambda: attention_routing(votes, None, net.classes.attn_weight, net.classes.attn_bias),
            "dynamic": lambda: dynamic_routing(votes, None, 3),
            "uniform": lambda: dynamic_routing(votes, None, 1),
        }[routing]()
        torch.testing.assert_close(net.classes(u), expected)


def test_the_published_constant_is_a_hundredth() -> None:
    net = CardioCaps(PRESETS["tiny"], affine="constant", published=True)
    assert torch.equal(net.classes.weight, torch.full((8, 2, 16), 0.01)) and net.classes.input_weight is None


def test_the_published_decoder_is_linear() -> None:
    torch.manual_seed(0)
    net = CardioCaps(PRESETS["tiny"], published=True)
    with torch.no_grad():
        net.decoder[4].bias.fill_(-3.0)
    assert net(torch.rand(1, 9, 64, 64)).reconstruction.max() < -2


def test_runs_of_the_older_constant_map_do_not_fit() -> None:
    """Their votes were 2 / N in place of ones."""
    net = CardioCaps(PRESETS["tiny"], affine="constant")
    older = {name: x for name, x in net.state_dict().items() if name != "classes.input_weight"}
    with pytest.raises(RuntimeError, match=r"Missing key.*classes\.input_weight"):
        net.load_state_dict(older)


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
@pytest.mark.parametrize("published", [False, True])
def test_every_parameter_learns_with_other_affine_maps(routing: str, affine: str, published: bool) -> None:
    torch.manual_seed(0)
    check_gradients(CardioCaps(PRESETS["tiny"], routing=routing, affine=affine, published=published))


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
