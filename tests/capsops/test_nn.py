"""The layers: shapes, layouts, initialisation, state, and that a network learns through them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import capsops
from capsops import nn


@pytest.mark.parametrize("routing", nn.ROUTINGS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_capsule_layer(routing: str, bias: bool, shared: bool) -> None:
    layer = nn.CapsuleLayer(17, 4, 3, 5, routing, bias=bias, shared=shared)
    u = torch.randn(2, 17, 4, requires_grad=True)
    v = layer(u)
    assert v.shape == (2, 3, 5)
    v.square().sum().backward()
    for name, p in layer.named_parameters():
        assert p.grad is not None, name
        # A bias common to all couplings would have none; these have.
        assert p.grad.abs().max() > 0, name
    mask = torch.ones(2, 17, dtype=torch.bool)
    mask[0, :5] = False
    assert not torch.equal(layer(u, mask), v)
    assert layer.coupling_coefficients(u, mask).shape == ((2, 17, 3, 5) if routing == "attention" else (2, 17, 3))


def test_shared_matrices_take_any_number_of_capsules() -> None:
    layer = nn.CapsuleLayer(20, 4, 3, 5, "dynamic", shared=True)
    assert layer(torch.randn(2, 7, 4)).shape == (2, 3, 5)


@pytest.mark.parametrize("size", [(1152, 8, 10, 16), (4000, 8, 2, 16), (50, 64, 4, 64)])
def test_initial_lengths_lie_where_the_squash_is_steep(size: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer = nn.CapsuleLayer(*size, "uniform", bias=False)
    u = torch.nn.functional.normalize(torch.randn(8, size[0], size[1]), dim=-1)
    lengths = layer(u).norm(dim=-1)
    assert 0.35 < lengths.mean() < 0.65  # ‖s‖ = 1 gives 0.5


@pytest.mark.parametrize("routing", nn.ROUTINGS)
def test_state_dict_round_trip(routing: str, tmp_path: Path) -> None:
    layer, other = (nn.CapsuleLayer(9, 4, 3, 5, routing) for _ in range(2))
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    other.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
    u = torch.randn(2, 9, 4)
    assert torch.equal(layer(u), other(u))


def test_repr_says_what_it_is() -> None:
    text = repr(nn.CapsuleLayer(9, 4, 3, 5, "dynamic", iterations=2, bias=False, leaky=True))
    for part in (
        "in_capsules=9",
        "in_dim=4",
        "out_capsules=3",
        "routing='dynamic'",
        "iterations=2",
        "leaky=True",
        "bias=False",
    ):
        assert part in text
    assert "layout='legacy'" in repr(nn.PrimaryCapsules(1, 2, 4, layout="legacy"))


def test_primary_capsules_channels() -> None:
    primary = nn.PrimaryCapsules(3, types=5, dim=4, kernel_size=3, stride=2)
    x = torch.randn(2, 3, 9, 11)
    u = primary(x)
    features = primary.conv(x)
    assert u.shape == (2, 5 * 4 * 5, 4)
    # Capsule of type 3 at row 1, column 2: channels 12 … 15 there.
    expected = capsops.squash(features[:, 12:16, 1, 2])
    torch.testing.assert_close(u[:, 3 * 20 + 1 * 5 + 2], expected)


def test_primary_capsules_legacy() -> None:
    primary = nn.PrimaryCapsules(3, types=2, dim=4, kernel_size=3, stride=2, layout="legacy")
    x = torch.randn(2, 3, 9, 17)
    features = primary.conv(x)  # [2, 8, 4, 8]
    u = primary(x)
    assert u.shape == (2, 64, 4)
    # Capsule 9 is the second one of channel 1: its pixels 4 … 7, which lie in row 0.
    torch.testing.assert_close(u[:, 9], capsops.squash(features[:, 1, 0, 4:8]))


@pytest.mark.parametrize("layout", nn.LAYOUTS)
def test_primary_capsules_of_no_image(layout: str) -> None:
    primary = nn.PrimaryCapsules(3, types=2, dim=4, kernel_size=3, stride=2, layout=layout)
    assert primary(torch.zeros(0, 3, 9, 17)).shape == (0, 64, 4)


def test_primary_capsules_legacy_needs_a_multiple() -> None:
    with pytest.raises(ValueError, match="15 pixels of a channel into capsules of 4"):
        nn.PrimaryCapsules(1, 2, 4, kernel_size=3, stride=1, layout="legacy")(torch.randn(1, 1, 5, 7))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: nn.CapsuleLayer(9, 4, 3, 5, "atention"), "routing is 'atention'; allowed are 'attention', 'dynamic'"),
        (lambda: nn.CapsuleLayer(0, 4, 3, 5), "in_capsules is 0"),
        (lambda: nn.CapsuleLayer(9, 4, 3, 5.0), "out_dim is 5.0"),
        (lambda: nn.CapsuleLayer(9, 4, 3, 5, iterations=0), "iterations is 0"),
        (lambda: nn.CapsuleLayer(9, 4, 3, 5, "uniform", leaky=True), "leaky belongs to routing 'dynamic'"),
        (
            lambda: nn.CapsuleLayer(9, 4, 3, 5, detach=True),
            "detach belongs to routing 'dynamic'",
        ),
        (lambda: nn.PrimaryCapsules(1, 2, 4)(torch.zeros(1, 20, 20)), r"x has shape \[1, 20, 20\]; expected \[B,"),
        (lambda: nn.PrimaryCapsules(1, 2, 4, layout="rows"), "layout is 'rows'; allowed are 'channels', 'legacy'"),
        (lambda: nn.PrimaryCapsules(1, 2, 4, squash="relu"), "squash is 'relu'"),
        (lambda: nn.PrimaryCapsules(1, -2, 4), "types is -2"),
    ],
)
def test_bad_arguments(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_convert_weight() -> None:
    J, N, D, K = 3, 7, 5, 4
    common = torch.randn(J, N, D, K)
    u = torch.randn(2, N, K)
    weight = nn.convert_weight(common)
    assert weight.shape == (N, K, J, D)
    assert weight.is_contiguous()
    torch.testing.assert_close(capsops.affine_votes(u, weight), torch.einsum("jndk,bnk->bnjd", common, u))
    assert torch.equal(nn.convert_weight(common[None]), weight)
    assert torch.equal(nn.convert_weight(common.permute(1, 0, 2, 3)[None, ..., None], "NJDK"), weight)
    assert torch.equal(nn.convert_weight(common.permute(1, 3, 0, 2), "NKJD"), weight)


def test_convert_weight_of_one_capsule() -> None:
    assert nn.convert_weight(torch.randn(1, 1, 5, 4)).shape == (1, 4, 1, 5)
    assert nn.convert_weight(torch.randn(1, 1, 7, 5, 4)).shape == (7, 4, 1, 5)
    with pytest.raises(ValueError, match=r"shape \[1, 7, 5, 4, 1\]; it could be read in several ways"):
        nn.convert_weight(torch.randn(1, 7, 5, 4, 1))


def test_convert_weight_refuses() -> None:
    with pytest.raises(ValueError, match="layout is 'JNDD'"):
        nn.convert_weight(torch.randn(2, 3, 4, 5), "JNDD")
    with pytest.raises(ValueError, match=r"weight has shape \[3, 4, 5\]"):
        nn.convert_weight(torch.randn(3, 4, 5))


@pytest.mark.parametrize("routing", nn.ROUTINGS)
def test_a_network_learns(routing: str) -> None:
    """Two classes that differ by the sign of one direction; the loss falls well below chance."""
    torch.manual_seed(1)
    net = nn.CapsuleLayer(12, 4, 2, 8, routing)
    u = torch.randn(128, 12, 4)
    labels = (u[:, :, 0].sum(dim=1) > 0).long()
    optimizer = torch.optim.Adam(net.parameters(), 0.02)
    for _ in range(150):
        loss = torch.nn.functional.cross_entropy(net(u).norm(dim=-1) * 10, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.3
