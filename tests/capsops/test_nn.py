"""The layers: shapes, layouts, initialisation, state; networks learn through them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import capsops
from capsops import nn
from capsops.nn.capsules import initial_deviation
from capsops.nn.grid import Sizes
from tests.capsops.grids import em_over_positions, windows_on
from tests.capsops.routings import each


@pytest.mark.parametrize("routing", nn.ROUTINGS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_capsule_layer(routing: str, bias: bool, shared: bool) -> None:
    if routing == "self-attention" and bias and shared:
        with pytest.raises(ValueError, match="bias is True; expected False, because shared matrices"):
            nn.CapsuleLayer(17, 4, 3, 5, routing, shared=True)
        return
    layer = nn.CapsuleLayer(17, 4, 3, 5, routing, bias=bias, shared=shared)
    u = torch.randn(2, 17, 4, requires_grad=True)
    v = layer(u)
    assert v.shape == (2, 3, 5)
    v.square().sum().backward()
    for name, p in layer.named_parameters():
        assert p.grad is not None, name
        # A bias that is common to all couplings would have no gradient; these biases have one.
        assert p.grad.abs().max() > 0, name
    mask = torch.ones(2, 17, dtype=torch.bool)
    mask[0, :5] = False
    assert not torch.equal(layer(u, mask), v)
    assert layer.coupling_coefficients(u, mask).shape == ((2, 17, 3, 5) if routing == "attention" else (2, 17, 3))


def test_a_layer_with_initial_logits() -> None:
    """It learns them, and takes others to which it adds its own."""
    layer = nn.CapsuleLayer(7, 4, 3, 5, "dynamic", logits=True)
    assert "logits=True" in repr(layer) and (layer.logits == 0).all()
    u, given = torch.randn(2, 7, 4), torch.randn(2, 7, 3)
    plain = nn.CapsuleLayer(7, 4, 3, 5, "dynamic")
    plain.load_state_dict({n: x for n, x in layer.state_dict().items() if n != "logits"})
    torch.testing.assert_close(layer(u), plain(u))
    layer(u).square().sum().backward()
    assert layer.logits.grad.abs().max() > 0
    with torch.no_grad():
        layer.logits.normal_()
    both = layer.logits.detach() + given
    for call in (lambda x, *args: x(*args), lambda x, *args: x.coupling_coefficients(*args)):
        assert not torch.equal(call(layer, u), call(plain, u))
        torch.testing.assert_close(call(layer, u, None, given), call(plain, u, None, both))


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


def _start(layer: nn.CapsuleLayer, u: torch.Tensor) -> tuple[float, torch.Tensor]:
    """The mean of the largest coupling, over up to 2,000 input capsules, and the lengths of the output capsules."""
    v = layer(u)
    if layer.routing != "dynamic":
        return layer.coupling_coefficients(u).amax(dim=2).mean().item(), v.norm(dim=-1)
    # The logits are û · V, with V the sum of the output capsules of the iterations before: a part of the votes will do.
    V = torch.zeros_like(v)
    for t in range(1, layer.iterations):
        V += capsops.dynamic_routing(u, layer.weight, t)
    some = slice(0, 2000)
    votes = capsops.affine_votes(u[:, some], layer.weight if layer.shared else layer.weight[some])
    c = torch.einsum("bnjd,bjd->bnj", votes, V).softmax(dim=2)
    return c.amax(dim=2).mean().item(), v.norm(dim=-1)


# N, K, J, D, shared
STARTS = [
    (16, 8, 2, 16, False),
    (16, 8, 10, 16, False),
    (16, 8, 100, 16, False),
    (16, 4, 1000, 16, False),
    (144, 4, 40, 16, False),
    (144, 2, 400, 16, False),
    (1152, 8, 10, 16, False),
    (1152, 1, 200, 8, False),
    (10_000, 1, 40, 16, False),
    (100_000, 1, 2, 16, False),
    (1000, 8, 2, 16, True),
    (1000, 8, 200, 16, True),
    (100_000, 2, 1000, 4, True),
]


@pytest.mark.parametrize(
    ("routing", "N", "K", "J", "D", "shared"),
    [
        (routing, *sizes)
        for routing in ("attention", "dynamic", "self-attention")
        for sizes in STARTS
        # The couplings of all input capsules of the larger ones would take half a minute.
        if routing == "dynamic" or sizes[0] * sizes[2] < 300_000
    ],
)
@torch.no_grad()
def test_initial_couplings_are_soft_and_lengths_in_range(
    routing: str, N: int, K: int, J: int, D: int, shared: bool
) -> None:
    torch.manual_seed(0)
    layer = nn.CapsuleLayer(N, K, J, D, routing, bias=False, shared=shared)
    directions = torch.nn.functional.normalize(torch.randn(1, N, K), dim=-1)
    for length, shortest in ((1.0, 1e-3), (0.3, 1e-4)):
        largest, lengths = _start(layer, directions * length)
        assert largest < (0.6 if J == 2 else 0.3)
        assert shortest < lengths.median() < 0.95
        assert lengths.quantile(0.1) > shortest / 10  # no capsule vanishes
        if length == 1:
            assert largest * J > 1.0001  # the routing has begun to choose


@pytest.mark.parametrize(("N", "K", "J", "D", "shared"), [STARTS[1], STARTS[4], STARTS[6], STARTS[10]])
@torch.no_grad()
def test_initial_couplings_over_the_inputs(N: int, K: int, J: int, D: int, shared: bool) -> None:
    torch.manual_seed(0)
    layer = nn.CapsuleLayer(N, K, J, D, "dynamic", axis="input", bias=False, shared=shared)
    u = torch.nn.functional.normalize(torch.randn(1, N, K), dim=-1)
    assert 1.001 < N * layer.coupling_coefficients(u).amax(dim=1).mean() < 3
    assert 1e-3 < layer(u).norm(dim=-1).median() < 0.95
    assert "axis='input'" in repr(layer)


@pytest.mark.parametrize("iterations", [1, 2, 3, 5, 10])
def test_initial_logits_of_any_number_of_iterations(iterations: int) -> None:
    torch.manual_seed(0)
    layer = nn.CapsuleLayer(144, 8, 100, 16, "dynamic", iterations=iterations, bias=False)
    u = torch.nn.functional.normalize(torch.randn(1, 144, 8), dim=-1)
    with torch.no_grad():
        largest, lengths = _start(layer, u)
    assert largest < 0.1
    assert 0.02 < lengths.median() < 0.95


@pytest.mark.parametrize(
    "size", [(1152, 8, 10, 16), (460_800, 8, 2, 16), (16, 8, 2, 16), (512, 8, 2, 16), (512, 4, 2, 8)]
)
def test_few_output_capsules_start_as_before(size: tuple[int, int, int, int]) -> None:
    """The networks that this repository has trained have σ = J / √(N D)."""
    N, _, J, D = size
    for routing in nn.ROUTINGS:
        if (routing, J) != ("self-attention", 10):
            layer = nn.CapsuleLayer(*size, routing, device="meta")
            assert initial_deviation(layer) == J / math.sqrt(N * D)


@pytest.mark.parametrize("routing", nn.ROUTINGS)
def test_state_dict_round_trip(routing: str, tmp_path: Path) -> None:
    layer, other = (nn.CapsuleLayer(9, 4, 3, 5, routing) for _ in range(2))
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    other.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
    u = torch.randn(2, 9, 4)
    assert torch.equal(layer(u), other(u))


def test_repr() -> None:
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
    assert "bias" not in repr(nn.CapsuleLayer(9, 4, 3, 5, "self-attention"))
    text = repr(nn.EMCapsules(9, 4, 3, 5, iterations=2, inverse_temperature=(0.1, 0.2), renormalise=True))
    for part in ("in_capsules=9", "iterations=2", "inverse_temperature=(0.1, 0.2)", "renormalise=True"):
        assert part in text
    text = repr(nn.ConvCapsules(2, 4, 3, 5, 3, 2, 1, "em"))
    for part in ("in_types=2", "kernel_size=(3, 3)", "stride=(2, 2)", "padding=(1, 1)", "competition='positions'",
                 "EMCapsules(in_capsules=18"):  # fmt: skip
        assert part in text


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


def test_primary_capsules_with_windows_of_every_kind() -> None:
    torch.manual_seed(0)
    options = {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "dilation": (1, 2), "groups": 2}
    primary = nn.PrimaryCapsules(4, types=3, dim=4, **options)
    x = torch.randn(2, 4, 7, 6)
    convolution = torch.nn.Conv2d(4, 12, **options)
    convolution.load_state_dict(primary.conv.state_dict())
    features = convolution(x)
    expected = capsops.squash(features.unflatten(1, (3, 4)).movedim(2, -1)).flatten(1, 3)
    torch.testing.assert_close(primary(x), expected)


@pytest.mark.parametrize(("dims", "size"), [(1, (9,)), (3, (3, 4, 5))])
@pytest.mark.parametrize("layout", nn.LAYOUTS)
def test_primary_capsules_of_other_images(dims: int, size: tuple[int, ...], layout: str) -> None:
    torch.manual_seed(0)
    primary = nn.PrimaryCapsules(3, 2, 4, kernel_size=2, stride=1, layout=layout, dims=dims)
    x = torch.randn(2, 3, *size)
    features = primary.conv(x)
    capsules = features.unflatten(1, (2, 4)).movedim(2, -1) if layout == "channels" else features
    torch.testing.assert_close(primary(x), capsops.squash(capsules.reshape(2, -1, 4)))


@pytest.mark.parametrize("routing", nn.ROUTINGS)
def test_layers_on_meta_compute_shapes(routing: str) -> None:
    """On the device "meta", which autocast does not know."""
    with torch.device("meta"):
        u = nn.PrimaryCapsules(3, types=2, dim=4, kernel_size=3, stride=2)(torch.zeros(2, 3, 9, 17))
        assert u.shape == (2, 64, 4)
        assert nn.CapsuleLayer(64, 4, 3, 5, routing)(u).shape == (2, 3, 5)
        grid = u.reshape(2, 2, 4, 8, 4)
        assert nn.ConvCapsules(2, 4, 3, 5, routing=routing)(grid).shape == (2, 3, 2, 6, 5)
        poses, activations = nn.ConvCapsules(2, 4, 3, 5, routing="em")(grid, grid[..., 0])
        assert poses.shape == (2, 3, 2, 6, 5) and activations.shape == (2, 3, 2, 6)


@pytest.mark.parametrize("layout", nn.LAYOUTS)
def test_primary_capsules_of_no_image(layout: str) -> None:
    primary = nn.PrimaryCapsules(3, types=2, dim=4, kernel_size=3, stride=2, layout=layout)
    assert primary(torch.zeros(0, 3, 9, 17)).shape == (0, 64, 4)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: nn.CapsuleLayer(9, 4, 3, 5, "atention"),
            "routing is 'atention'; expected one of 'attention', ",
        ),
        (lambda: nn.CapsuleLayer(0, 4, 3, 5), "in_capsules is 0"),
        (lambda: nn.CapsuleLayer(9, 4, 3, 5.0), "out_dim is 5.0"),
        (lambda: nn.CapsuleLayer(9, 4, 3, 5, iterations=0), "iterations is 0"),
        (
            lambda: nn.CapsuleLayer(9, 4, 3, 5, "uniform", leaky=True),
            "leaky is True; expected False",
        ),
        (
            lambda: nn.CapsuleLayer(9, 4, 3, 5, detach=True),
            "detach is True; expected False, because routing is 'attention'",
        ),
        (lambda: nn.PrimaryCapsules(1, 2, 4)(torch.zeros(1, 20, 20)), r"x has shape \[1, 20, 20\]; expected \[B,"),
        (lambda: nn.PrimaryCapsules(1, 2, 4, layout="rows"), "layout is 'rows'; expected one of 'channels', 'legacy'"),
        (lambda: nn.PrimaryCapsules(1, 2, 4, squash="relu"), "squash is 'relu'"),
        (lambda: nn.PrimaryCapsules(1, -2, 4), "types is -2"),
        (lambda: nn.PrimaryCapsules(4, 2, 4, groups=3), "groups is 3; expected a divisor of in_channels = 4"),
        (lambda: nn.PrimaryCapsules(3, 2, 4, groups=3), "groups is 3; expected a divisor of types · dim = 8"),
        (lambda: nn.PrimaryCapsules(3, 2, 4, groups=0), "groups is 0"),
        (lambda: nn.PrimaryCapsules(1, 2, 4, (9, 9, 9)), r"kernel_size is \(9, 9, 9\)"),
        (
            lambda: nn.PrimaryCapsules(1, 2, 4, (3, 9), dims=2)(torch.zeros(1, 1, 20, 8)),
            r"kernel_size is \(3, 9\); expected at most \(20, 8\), because the grid is 20 × 8",
        ),
        (lambda: nn.EMCapsules(9, 0, 3, 5), "EMCapsules: in_dim is 0"),
        (lambda: nn.EMCapsules(9, 4, 3, 5, iterations=0), "EMCapsules: iterations is 0"),
        (
            lambda: nn.EMCapsules(9, 4, 3, 5, inverse_temperature=-1),
            "inverse_temperature is -1; expected nothing below 0",
        ),
        (lambda: nn.EMCapsules(9, 4, 3, 5, inverse_temperature=(1, 2)), "has 2 numbers; expected 3"),
        (lambda: nn.CapsuleLayer(9, 4, 3, 5, "em"), "routing is 'em'; expected one of"),
        (lambda: nn.ConvCapsules(2, 4, 3, 5, kernel_size=0), "kernel_size is 0"),
        (lambda: nn.ConvCapsules(2, 4, 3, 5, stride=1.5), "stride is 1.5"),
        (lambda: nn.ConvCapsules(2, 4, 3, 5, padding=-1), "padding is -1; expected an integer of at least 0"),
        (lambda: nn.ConvCapsules(2, 4, 3, 5, (3, 3, 3)), r"kernel_size is \(3, 3, 3\); .* at least 1, or a tuple of 2"),
        (lambda: nn.ConvCapsules(2, 4, 3, 5, 3, (1, 0)), r"stride is \(1, 0\)"),
        (lambda: nn.ConvCapsules(2, 4, 3, 5, 3, 1, (True, 0)), r"padding is \(True, 0\)"),
        (lambda: nn.ConvCapsules(2, 4, 4, 5, groups=0), "groups is 0; expected an integer of at least 1"),
        (lambda: nn.ConvCapsules(2, 4, 3, 5, groups=2), "groups is 2; expected a divisor of out_types = 3"),
        (lambda: nn.ConvCapsules(2, 4, 3, 5, dilation="2"), "dilation is '2'; expected an integer of at least 1, or"),
        (lambda: nn.ConvCapsules(2, 4, 3, 5, dims=4), "dims is 4; expected 1, 2 or 3"),
        (
            lambda: nn.ConvCapsules(2, 4, 3, 5, routing="em", competition="all"),
            "competition is 'all'; expected one of 'positions', 'window'",
        ),
        (
            lambda: nn.ConvCapsules(2, 4, 3, 5, competition="window"),
            "competition is 'window'; expected None, because routing is 'dynamic'",
        ),
        (lambda: nn.ConvCapsules(2, 4, 3, 5, routing="sda"), "routing is 'sda'; expected one of .* 'em'"),
        (lambda: nn.ConvCapsules(2, 4, 3, 5)(torch.zeros(1, 2, 5, 4)), r"pose has shape \[1, 2, 5, 4\]; expected"),
        (lambda: nn.ConvCapsules(2, 4, 3, 5)(torch.zeros(1, 3, 5, 5, 4)), "with in_types = 2 and K = 4"),
        (lambda: nn.ConvCapsules(2, 4, 3, 5)(torch.zeros(1, 2, 5, 5, 2, 4)), r"expected \[B, in_types, H, W, K\]"),
        (
            lambda: nn.ConvCapsules(2, 4, 3, 5)(torch.zeros(1, 2, 2, 5, 4)),
            "kernel_size is 3; expected at most 2",
        ),
        (
            lambda: nn.ConvCapsules(2, 4, 3, 5, (3, 2), dilation=2)(torch.zeros(1, 2, 4, 5, 4)),
            r"kernel_size is \(3, 2\); expected at most \(2, 3\), .* 4 × 5 with padding 0 and dilation 2",
        ),
        (
            lambda: nn.ConvCapsules(2, 4, 3, 5, dims=3)(torch.zeros(1, 2, 4, 5, 4)),
            r"pose has shape .*; expected \[B, in_types, L, H, W, K\]",
        ),
        (
            lambda: nn.ConvCapsules(2, 4, 3, 5)(torch.zeros(1, 2, 5, 5, 4), torch.zeros(1, 2, 5, 5)),
            "activation is a tensor; expected None, because routing is 'dynamic'",
        ),
        (
            lambda: nn.ConvCapsules(2, 4, 3, 5, routing="em")(torch.zeros(1, 2, 5, 5, 4)),
            "activation is None; expected a tensor, because routing is 'em'",
        ),
        (
            lambda: nn.ConvCapsules(2, 4, 3, 5, routing="em")(torch.zeros(1, 2, 5, 5, 4), torch.zeros(1, 2, 5)),
            r"activation has shape \[1, 2, 5\]; expected \[B, in_types, H, W\] = \[1, 2, 5, 5\]",
        ),
        (
            lambda: nn.ConvCapsules(2, 4, 3, 5)(torch.zeros(1, 2, 5, 5, 4), mask=torch.ones(1, 2, 5, 6).bool()),
            r"mask has shape \[1, 2, 5, 6\]",
        ),
    ],
)
def test_bad_arguments(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        # Options of the inner layer, which routes.
        (lambda: nn.ConvCapsules(2, 4, 3, 5, iterations=0), ValueError, "ConvCapsules: iterations is 0"),
        (lambda: nn.ConvCapsules(2, 4, 3, 5, leaky="yes"), ValueError, "ConvCapsules: leaky is 'yes'"),
        (
            lambda: nn.ConvCapsules(2, 4, 3, 5, routing="uniform", leaky=True),
            ValueError,
            "ConvCapsules: leaky is True; expected False",
        ),
        (
            lambda: nn.ConvCapsules(2, 4, 3, 5, routing="self-attention", shared=True),
            ValueError,
            "ConvCapsules: bias is True; expected False",
        ),
        (
            lambda: nn.ConvCapsules(2, 4, 3, 5, routing="em", inverse_temperature=-1),
            ValueError,
            "ConvCapsules: inverse_temperature is -1",
        ),
        (
            lambda: nn.ConvCapsules(2, 4, 3, 5, routing="em", bias=True),
            TypeError,
            "ConvCapsules: option is 'bias'; expected one of iterations, inverse_temperature",
        ),
        (lambda: nn.ConvCapsules(2, 4, 3, 5, _layer="mine"), TypeError, "ConvCapsules: option is '_layer'; expected"),
        # Inputs that the inner layer would refuse.
        (lambda: nn.ConvCapsules(2, 4, 3, 5)(None), TypeError, "ConvCapsules: pose is a NoneType"),
        (
            lambda: nn.ConvCapsules(2, 4, 3, 5)(torch.zeros(1, 2, 5, 5, 4).double()),
            ValueError,
            "ConvCapsules: weight has dtype torch.float32; expected torch.float64, the dtype of pose",
        ),
        (
            lambda: nn.ConvCapsules(2, 4, 3, 5)(torch.zeros(1, 2, 5, 5, 4), mask=torch.zeros(1, 2, 5, 5)),
            ValueError,
            "ConvCapsules: mask is torch.float32 on cpu; expected torch.bool",
        ),
        (
            lambda: nn.ConvCapsules(2, 4, 3, 5, routing="em")(
                torch.zeros(1, 2, 5, 5, 4), torch.zeros(1, 2, 5, 5).half()
            ),
            ValueError,
            "ConvCapsules: activation has dtype torch.float16",
        ),
        # Inputs that the functions and torch's convolution would refuse.
        (lambda: nn.PrimaryCapsules(1, 2, 4)(None), TypeError, "PrimaryCapsules: x is a NoneType"),
        (
            lambda: nn.PrimaryCapsules(1, 2, 4)(torch.zeros(1, 2, 20, 20)),
            ValueError,
            r"PrimaryCapsules: x has shape \[1, 2, 20, 20\]; .* in_channels = 1",
        ),
        (
            lambda: nn.PrimaryCapsules(1, 2, 4)(torch.zeros(1, 1, 8, 20)),
            ValueError,
            "PrimaryCapsules: kernel_size is 9; expected at most 8, because the grid is 8 × 20 with padding 0",
        ),
        (
            lambda: nn.PrimaryCapsules(1, 2, 4)(torch.zeros(1, 1, 20, 20).double()),
            ValueError,
            "PrimaryCapsules: weight has dtype torch.float32; expected torch.float64, the dtype of x",
        ),
        (lambda: nn.PrimaryCapsules(1, 2, 4, kernel_size=0), ValueError, "PrimaryCapsules: kernel_size is 0"),
        (lambda: nn.PrimaryCapsules(1, 2, 4, padding=-1), ValueError, "PrimaryCapsules: padding is -1"),
        (lambda: nn.EMCapsules(9, 4, 3, 5, renormalise=1), ValueError, "EMCapsules: renormalise is 1"),
        (
            lambda: nn.EMCapsules(9, 4, 3, 5)(torch.zeros(2, 8, 4), torch.zeros(2, 8)),
            ValueError,
            r"EMCapsules: pose has shape \[2, 8, 4\]; expected \[B, N, \(P,\) K\] with N = 9 and K = 4",
        ),
        (
            lambda: nn.EMCapsules(9, 4, 3, 5)(torch.zeros(2, 9, 4), torch.zeros(2, 8)),
            ValueError,
            r"EMCapsules: activation has shape \[2, 8\]; expected \[B, N\] = \[2, 9\]",
        ),
        (lambda: nn.KMeansCapsules(9, 4, 3, 5)(None), TypeError, "KMeansCapsules: u is a NoneType"),
        (
            lambda: nn.InvertedAttentionCapsules(9, 4, 3, 5)(torch.zeros(2, 8, 4)),
            ValueError,
            r"InvertedAttentionCapsules: u has shape \[2, 8, 4\]; expected \[B, N, K\] with N = 9 and K = 4",
        ),
        (
            lambda: nn.InvertedAttentionCapsules(9, 4, 3, 5, rows=2)(torch.zeros(2, 9, 3, 4)),
            ValueError,
            r"InvertedAttentionCapsules: u has shape \[2, 9, 3, 4\]; expected \[B, N, 2, K\] with N = 9 and K = 4",
        ),
        (
            lambda: nn.InvertedAttentionCapsules(9, 4, 3, 5, rows=2)(torch.zeros(2, 9, 4)),
            ValueError,
            r"InvertedAttentionCapsules: u has shape \[2, 9, 4\]; expected \[B, N, 2, K\]",
        ),
        (
            lambda: nn.KMeansCapsules(9, 4, 3, 5)(torch.zeros(2, 9, 4).double()),
            ValueError,
            "KMeansCapsules: weight has dtype torch.float32",
        ),
        (
            lambda: nn.KMeansCapsules(9, 4, 3, 5)(torch.zeros(2, 9, 4), torch.ones(2, 8).bool()),
            ValueError,
            r"KMeansCapsules: mask has shape \[2, 8\]",
        ),
        (
            lambda: nn.KMeansCapsules(9, 4, 3, 5).step(torch.zeros(2, 9, 4), torch.zeros(2, 3, 4)),
            ValueError,
            r"KMeansCapsules: v has shape \[2, 3, 4\]; expected \[B, J, D\] = \[2, 3, 5\]",
        ),
        (lambda: nn.InvertedAttentionCapsules(9, 4, 3, 5, rows=0), ValueError, "InvertedAttentionCapsules: rows is 0"),
        (lambda: nn.KMeansCapsules(9, 4, 3, 5, iterations=0), ValueError, "KMeansCapsules: iterations is 0"),
        (
            lambda: nn.SelfRoutingCapsules(9, 4, 3, 5)(torch.zeros(2, 9, 4), torch.zeros(2, 8)),
            ValueError,
            r"SelfRoutingCapsules: activation has shape \[2, 8\]; expected \[B, N\] = \[2, 9\]",
        ),
        (
            lambda: nn.SelfRoutingCapsules(9, 4, 3, 5)(torch.zeros(2, 9, 4), None),
            TypeError,
            "SelfRoutingCapsules: activation is a NoneType",
        ),
        (lambda: nn.ConcurrentCapsules([]), ValueError, "ConcurrentCapsules: layers is empty"),
        (
            lambda: nn.ConcurrentCapsules([torch.nn.Linear(2, 2)]),
            TypeError,
            "ConcurrentCapsules: layer is a Linear; expected one that has a method `step`",
        ),
        (
            lambda: nn.ConcurrentCapsules([nn.KMeansCapsules(9, 4, 3, 5)], iterations=0),
            ValueError,
            "ConcurrentCapsules: iterations is 0",
        ),
        (
            lambda: nn.ConvCapsules(2, 4, 3, 5).step(torch.zeros(1, 2, 5, 5, 4)),
            ValueError,
            "ConvCapsules: routing is 'dynamic'; expected 'inverted-attention' or 'k-means', which have steps",
        ),
        (
            lambda: nn.ConvCapsules(2, 4, 3, 5, routing="k-means").step(torch.zeros(1, 2, 5, 5, 4), torch.zeros(1, 3)),
            ValueError,
            r"ConvCapsules: v has shape \[1, 3\]; expected \[1, 3, 3, 3, 5\], that of the result",
        ),
        (
            lambda: nn.ConvCapsules(2, 4, 3, 5, routing="self-routing")(torch.zeros(1, 2, 5, 5, 4)),
            ValueError,
            "ConvCapsules: activation is None; expected a tensor, because routing is 'self-routing'",
        ),
        (
            lambda: nn.ConvCapsules(2, 4, 3, 5, routing="inverted-attention", rows=2)(torch.zeros(1, 2, 5, 5, 4)),
            ValueError,
            r"ConvCapsules: pose has shape .*; expected \[B, in_types, H, W, P, K\]",
        ),
        (lambda: nn.convert_weight(None), TypeError, "convert_weight: weight is a NoneType"),
    ],
)
def test_errors_name_what_was_called(build, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^" + message):
        build()


@pytest.mark.parametrize("routing", nn.ROUTINGS)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("method", ["forward", "coupling_coefficients"])
def test_errors_of_a_capsule_layer_name_it(routing: str, backend: str, method: str) -> None:
    call = getattr(nn.CapsuleLayer(9, 4, 3, 5, routing), method)
    u = torch.zeros(2, 9, 4)
    for arguments, error, message in (
        ((None,), TypeError, "u is a NoneType"),
        ((u[0],), ValueError, r"u has shape \[9, 4\]; expected \[B, N, K\] with N = 9 and K = 4"),
        ((u[:, :8],), ValueError, r"u has shape \[2, 8, 4\]; expected \[B, N, K\] with N = 9 and K = 4"),
        ((u[:, :, :3],), ValueError, r"u has shape \[2, 9, 3\]; expected \[B, N, K\] with N = 9 and K = 4"),
        ((u.double(),), ValueError, "weight has dtype torch.float32; expected torch.float64, the dtype of u"),
        ((u, torch.zeros(2, 8).bool()), ValueError, r"mask has shape \[2, 8\]"),
    ):
        with capsops.use_backend(backend), pytest.raises(error, match="^CapsuleLayer: " + message):
            call(*arguments)


@pytest.mark.parametrize("rows", [(), (3,)], ids=["vectors", "matrices"])
@pytest.mark.parametrize("shared", [False, True])
def test_em_capsules(rows: tuple[int, ...], shared: bool) -> None:
    torch.manual_seed(0)
    layer = nn.EMCapsules(17, 4, 3, 5, inverse_temperature=0.1, shared=shared)
    pose, activation = torch.randn(2, 17, *rows, 4), torch.rand(2, 17)
    out, a = layer(pose, activation)
    assert out.shape == (2, 3, *rows, 5)
    assert a.shape == (2, 3)
    (out.square().sum() + a.square().sum()).backward()
    for name, p in layer.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().max() > 0, name
    mask = torch.ones(2, 17, dtype=torch.bool)
    mask[0, :5] = False
    assert not torch.equal(layer(pose, activation, mask)[0], out)
    r = layer.coupling_coefficients(pose, activation, mask)
    assert r.shape == (2, 17, 3)
    torch.testing.assert_close(r.sum(dim=2), mask.float())


def test_em_capsules_keep_the_scale_of_the_pose() -> None:
    torch.manual_seed(0)
    layer = nn.EMCapsules(200, 16, 4, 8)
    votes = capsops.affine_votes(torch.randn(4, 200, 16), layer.weight)
    assert 0.9 < votes.std() < 1.1


def _unfolded(
    layer: nn.ConvCapsules, pose: torch.Tensor, activation: torch.Tensor | None, mask: torch.Tensor
) -> list[torch.Tensor]:
    """The same layer, position by position: gather the capsules of the window one by one and route only those."""
    items, capsules = [], layer.capsules
    for b in range(len(pose)):
        for window in windows_on(pose.shape[2 : 2 + layer.dims], layer.in_types, *layer.windows):
            here = [(n, place) for n, place in window if mask[b][place]]
            there = [n for n, _ in here]
            u = torch.stack([pose[b][place] for _, place in here])[None]
            if activation is not None:
                a = torch.stack([activation[b][place] for _, place in here])[None]
                out = capsops.em_routing(
                    u,
                    a,
                    capsules.weight[there],
                    capsules.beta_u,
                    capsules.beta_a,
                    capsules.iterations,
                    inverse_temperature=capsules.inverse_temperature,
                )
            elif layer.routing == "self-attention":
                out = (capsops.self_attention_routing(u, capsules.weight[there], capsules.prior[there]),)
            else:
                out = (capsops.dynamic_routing(u, capsules.weight[there], capsules.iterations, bias=capsules.bias),)
            items.append(out)
    return [torch.cat(x) for x in zip(*items, strict=True)]


def _compare_with(expected: list[torch.Tensor], out: object, leaves: list[torch.Tensor], dims: int) -> None:
    """Compare out [B, J, *positions, …] and its gradients with what is expected, [B · positions, J, …]."""
    found = [x.movedim(1, 1 + dims).flatten(0, dims) for x in (out if isinstance(out, tuple) else (out,))]
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y)
    gradients = [torch.autograd.grad([x.square().sum() for x in outs], leaves) for outs in (found, expected)]
    for x, y in zip(*gradients, strict=True):
        assert y.abs().max() > 0
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("routing", "rows"), [("dynamic", ()), ("self-attention", ()), ("em", ()), ("em", (3,))])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation", "masked"),
    [
        (1, 1, 0, 1, True),
        (3, 1, 0, 1, False),
        (3, 2, 1, 1, True),
        (2, 1, 1, 1, False),
        (2, 3, 0, 1, True),
        ((3, 2), (1, 2), (1, 0), (1, 3), True),
    ],
)
def test_conv_capsules(
    backend: str, routing: str, rows: tuple[int, ...], kernel: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes,
    masked: bool,
) -> None:  # fmt: skip
    torch.manual_seed(0)
    options = {"inverse_temperature": 0.5, "competition": "window"} if routing == "em" else {}
    layer = nn.ConvCapsules(
        2, 3, 4, 3, kernel, stride, padding, routing, dilation=dilation, **options, dtype=torch.float64
    )
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.5)
    pose = torch.randn(2, 2, 5, 6, *rows, 3, dtype=torch.float64, requires_grad=True)
    activation = torch.rand(2, 2, 5, 6, dtype=torch.float64, requires_grad=True) if routing == "em" else None
    mask = torch.ones(2, 2, 5, 6, dtype=torch.bool)
    if masked:
        mask[0, 1, 2], mask[1, :, :, 4] = False, False
        mask[:, 0, 0, 0] = False
        mask[:, 1, 0, :] |= True  # a position in the corner keeps one capsule
        if kernel == 1:
            mask[:, 1] = True
    with capsops.use_backend(backend):
        out = layer(pose, activation, mask if masked else None)
    with capsops.use_backend("reference"):
        expected = _unfolded(layer, pose, activation, mask)
    leaves = [pose, *([] if activation is None else [activation]), *layer.parameters()]
    _compare_with(expected, out, leaves, 2)


@pytest.mark.parametrize(
    ("dims", "grid", "kernel", "stride", "padding", "dilation"),
    [(1, (7,), 3, 2, 1, 2), (3, (3, 4, 3), 2, 1, 0, 1), (3, (3, 2, 4), (2, 1, 3), (2, 1, 1), (1, 0, 0), 1)],
)
@pytest.mark.parametrize("routing", ["dynamic", "em"])
def test_conv_capsules_on_other_grids(
    routing: str, dims: int, grid: tuple[int, ...], kernel: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes
) -> None:
    torch.manual_seed(0)
    options = {"inverse_temperature": 0.5, "competition": "window"} if routing == "em" else {}
    layer = nn.ConvCapsules(
        2, 3, 4, 2, kernel, stride, padding, routing, dilation=dilation, dims=dims, **options, dtype=torch.float64
    )
    pose = torch.randn(2, 2, *grid, 3, dtype=torch.float64, requires_grad=True)
    activation = torch.rand(2, 2, *grid, dtype=torch.float64, requires_grad=True) if routing == "em" else None
    expected = _unfolded(layer, pose, activation, torch.ones(2, 2, *grid, dtype=torch.bool))
    leaves = [pose, *([] if activation is None else [activation]), layer.capsules.weight]
    _compare_with(expected, layer(pose, activation), leaves, dims)


@pytest.mark.parametrize("routing", ["dynamic", "em", "self-routing", "k-means"])
def test_groups_are_layers_side_by_side(routing: str) -> None:
    grouped = nn.ConvCapsules(6, 3, 4, 5, (3, 2), 1, 1, routing, groups=2, dtype=torch.float64)
    layers = [nn.ConvCapsules(3, 3, 2, 5, (3, 2), 1, 1, routing, dtype=torch.float64) for _ in range(2)]
    for layer, part in zip(layers, grouped.parts, strict=True):
        layer.load_state_dict(part.state_dict())
    pose = torch.randn(2, 6, 4, 5, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2, 6, 4, 5) < 0.8
    activation = [torch.rand(2, 6, 4, 5, dtype=torch.float64)] if routing in ("em", "self-routing") else [None]
    out = grouped(pose, *activation, mask)
    parts = [
        layer(pose[:, 3 * i : 3 * i + 3], *[x if x is None else x[:, 3 * i : 3 * i + 3] for x in (*activation, mask)])
        for i, layer in enumerate(layers)
    ]
    for x, y in zip(each(out), zip(*map(each, parts), strict=True), strict=True):
        torch.testing.assert_close(x, torch.cat(y, dim=1), rtol=0, atol=0)
    each(out)[0].square().sum().backward()
    assert pose.grad is not None and (pose.grad[mask] != 0).any()
    assert all(x.grad is not None for x in grouped.parameters())
    if routing == "k-means":
        steps = [layer.step(pose[:, 3 * i : 3 * i + 3], out[:, 2 * i : 2 * i + 2]) for i, layer in enumerate(layers)]
        torch.testing.assert_close(grouped.step(pose, out), torch.cat(steps, dim=1), rtol=0, atol=0)
    assert "groups=2" in str(grouped)


@pytest.mark.parametrize(
    ("grid", "kernel", "stride", "padding", "dilation", "rows", "masked", "options"),
    [
        ((4, 5), 3, 1, 0, 1, (2,), False, {}),
        ((5, 4), 3, 2, 1, 1, (), True, {}),
        ((5, 4), (2, 3), (1, 2), (0, 1), (2, 1), (2,), True, {"renormalise": True}),
        ((4, 6), 2, 2, 0, 1, (), False, {}),  # no overlap
        ((4, 4), 3, 1, 1, 1, (), False, {"iterations": 1}),
        ((6,), 3, 1, 1, 1, (), True, {"iterations": 4}),
        ((2, 3, 3), 2, 1, 0, 1, (), False, {"iterations": 2}),
    ],
)
def test_em_over_positions(
    grid: tuple[int, ...], kernel: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes, rows: tuple[int, ...],
    masked: bool, options: dict,
) -> None:  # fmt: skip
    torch.manual_seed(0)
    layer = nn.ConvCapsules(
        2, 3, 3, 2, kernel, stride, padding, "em", dilation=dilation, dims=len(grid), inverse_temperature=0.5,
        **options, dtype=torch.float64,
    )  # fmt: skip
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.7)
    pose = torch.randn(2, 2, *grid, *rows, 3, dtype=torch.float64, requires_grad=True)
    activation = torch.rand(2, 2, *grid, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(2, 2, *grid, dtype=torch.bool)
    if masked:
        mask[0, 1, 2], mask[1, :, 3] = False, False
        with torch.no_grad():
            pose[0, 1, 2] = torch.nan  # what the mask leaves out has no effect
    windows, capsules, items = windows_on(grid, 2, *layer.windows), layer.capsules, []
    for b in range(2):
        votes = [
            {at: (pose[b][at] @ capsules.weight[n].flatten(1)).unflatten(-1, (3, 2)) for n, at in window if mask[b][at]}
            for window in windows
        ]
        votes = [{at: x.movedim(-2, 0) for at, x in window.items()} for window in votes]
        f, T = layer.capsules.inverse_temperature, layer.capsules.iterations
        temperatures = [f * (1 - 0.95 ** (t + 1)) for t in range(T)]
        betas = capsules.beta_u, capsules.beta_a
        items += em_over_positions(votes, activation[b], *betas, temperatures, renormalise=capsules.renormalise)
    expected = [torch.stack(x) for x in zip(*items, strict=True)]
    out = layer(pose, activation, mask if masked else None)
    _compare_with(expected, out, [pose, activation, *layer.parameters()], len(grid))


@pytest.mark.parametrize("B", [1, 4])
def test_em_over_positions_has_the_same_bits_with_any_number_of_threads(B: int) -> None:
    layer = nn.ConvCapsules(4, 8, 6, 8, 3, routing="em")
    given = torch.randn(B, 4, 12, 12, 8, requires_grad=True), torch.rand(B, 4, 12, 12, requires_grad=True)
    results = []
    before = torch.get_num_threads()
    for threads in (1, 3, 2):
        torch.set_num_threads(threads)
        try:
            out = layer(*given)
            loss = out[0].square().sum() + out[1].sum()
            results.append([*out, *torch.autograd.grad(loss, [*given, *layer.parameters()])])
        finally:
            torch.set_num_threads(before)
    for some in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(some, results[0], strict=True))


@pytest.mark.parametrize(
    ("grid", "kernel", "stride", "padding", "dilation"),
    [
        ((7,), 3, 1, 1, 1),
        ((9,), 4, 2, 2, 1),
        ((11,), 3, 2, 0, 2),
        ((12,), 4, 4, 1, 6),
        ((6, 5), (3, 2), (2, 1), (1, 0), (1, 3)),
        ((3, 5, 4), 2, (1, 2, 1), (1, 0, 1), (1, 2, 1)),
    ],
)
def test_places_of_windows(
    grid: tuple[int, ...], kernel: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes
) -> None:
    """Every place of a window that lies on the grid is that of its capsule, once; the others of none."""
    layer = nn.ConvCapsules(2, 3, 3, 2, kernel, stride, padding, "em", dilation=dilation, dims=len(grid))
    windows = layer.windows
    N = 2 * math.prod(windows.kernel_size)
    found = windows.places(grid, 2, torch.device("cpu"))
    capsules = torch.arange(2 * math.prod(grid)).view(2, *grid)
    expected = sorted(
        (int(capsules[at]), n + N * position)
        for position, window in enumerate(windows_on(grid, 2, *windows))
        for n, at in window
    )
    assert sorted((g, int(x)) for g, row in enumerate(found) for x in row if x >= 0) == expected


def test_em_over_positions_shares_matrices() -> None:
    shared = nn.ConvCapsules(2, 3, 4, 3, 3, routing="em", shared=True)
    layer = nn.ConvCapsules(2, 3, 4, 3, 3, routing="em")
    with torch.no_grad():
        layer.capsules.weight.copy_(shared.capsules.weight.expand_as(layer.capsules.weight))
    given = torch.randn(2, 2, 5, 4, 3), torch.rand(2, 2, 5, 4)
    for x, y in zip(shared(*given), layer(*given), strict=True):
        torch.testing.assert_close(x, y)


def test_em_over_positions_in_low_precision() -> None:
    """Computed in float32, also where autocast casts down what comes before."""
    layer = nn.ConvCapsules(2, 3, 4, 3, 3, routing="em")
    pose, activation = torch.randn(2, 2, 5, 4, 3).bfloat16(), torch.rand(2, 2, 5, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(pose, activation)
    expected = layer(pose.float(), activation.float())
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)
    layer.bfloat16()
    low = layer(pose, activation)
    exact = layer.float()(pose.float(), activation.float())
    for x, y in zip(low, exact, strict=True):
        assert torch.equal(x, y.bfloat16())


def test_em_over_positions_in_transforms_and_graphs() -> None:
    torch.manual_seed(0)
    layer = nn.ConvCapsules(1, 2, 2, 2, 2, routing="em", iterations=2, dims=1)
    given = torch.randn(3, 1, 3, 2), torch.rand(3, 1, 3)
    out = layer(*given)

    def loss(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(layer, parameters, given)[0].square().sum()

    expected = torch.autograd.grad(out[0].square().sum(), list(layer.parameters()), allow_unused=True)
    found = torch.func.grad(loss)(dict(layer.named_parameters()))
    for g, wanted in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(g, torch.zeros_like(g) if wanted is None else wanted)
    mapped = torch.func.vmap(lambda pose, activation: layer(pose[None], activation[None]))(*given)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)(*given)
    for x, y, z in zip(out, mapped, compiled, strict=True):
        torch.testing.assert_close(y.squeeze(1), x)
        torch.testing.assert_close(z, x)


def test_conv_capsules_beyond_the_padding() -> None:
    """A window that lies in the padding has no capsule: it gives 0 and no gradient."""
    layer = nn.ConvCapsules(2, 3, 4, 5, kernel_size=1, padding=1, bias=False)
    pose = torch.randn(2, 2, 3, 3, 3, requires_grad=True)
    v = layer(pose)
    assert v.shape == (2, 4, 5, 5, 5)
    assert (v[:, :, 0] == 0).all()
    assert (v[:, :, 1, 1] != 0).any()
    (g,) = torch.autograd.grad(v[:, :, 0].sum(), pose)
    assert (g == 0).all()


@pytest.mark.parametrize("routing", ["dynamic", "em"])
def test_conv_capsules_of_no_image(routing: str) -> None:
    layer = nn.ConvCapsules(2, 3, 4, 5, 3, 1, 1, routing)
    given = (torch.zeros(0, 2, 6, 7, 3), *[torch.zeros(0, 2, 6, 7)] * (routing == "em"))
    out = layer(*given)
    assert (out[0] if routing == "em" else out).shape == (0, 4, 6, 7, 5)


@pytest.mark.parametrize("routing", ["dynamic", "em"])
def test_conv_capsules_hold_no_votes(routing: str) -> None:
    """No tensor that a training step creates is as large as the votes, nor are all together that it saves."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest, saved = 0, {}

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else (out,):
                if isinstance(x, torch.Tensor):
                    largest = max(largest, x.numel())
            return out

    def save(x: torch.Tensor) -> torch.Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // 4
        return x

    layer = nn.ConvCapsules(8, 8, 16, 8, kernel_size=3, routing=routing)
    given = [torch.randn(2, 8, 10, 10, 8, requires_grad=True), torch.rand(2, 8, 10, 10)][: 1 + (routing == "em")]
    fields, votes = 2 * 64 * 9 * 8 * 8, 2 * 64 * 9 * 8 * 16 * 8
    with capsops.use_backend("cpu"), Largest():
        with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
            out = layer(*given)
        (out[0] if routing == "em" else out).square().sum().backward()
    assert fields / 2 <= largest < votes / 4
    assert 0 < sum(saved.values()) < votes


STEPS = [
    lambda N, **options: nn.InvertedAttentionCapsules(N, 4, 3, 5, iterations=3, **options),
    lambda N, **options: nn.InvertedAttentionCapsules(N, 4, 3, 5, iterations=3, rows=2, **options),
    lambda N, **options: nn.KMeansCapsules(N, 4, 3, 5, **options),
]


@pytest.mark.parametrize("build", STEPS, ids=["attention", "matrices", "k-means"])
def test_layers_of_steps(build) -> None:
    torch.manual_seed(0)
    layer = build(7)
    rows = () if getattr(layer, "rows", None) is None else (2,)
    u = torch.randn(2, 7, *rows, 4, requires_grad=True)
    v = layer(u)
    assert v.shape == (2, 3, *rows, 5)
    assert torch.equal(v, layer.step(u, layer.step(u, layer.step(u))))
    for g in torch.autograd.grad(v.square().mul(v.detach().abs() + 1).sum(), [u, *layer.parameters()]):
        assert g.abs().max() > 0
    # A mask is as good as fewer capsules.
    shared = build(7, shared=True)
    mask = torch.tensor([[True] * 5 + [False] * 2] * 2)
    torch.testing.assert_close(shared(u, mask), shared(u[:, :5]))
    with torch.autocast("cpu", torch.bfloat16):
        low = shared(u.bfloat16())
    torch.testing.assert_close(low, shared(u.bfloat16().float()))
    with torch.device("meta"):
        assert build(7)(torch.zeros(2, 7, *rows, 4)).shape == v.shape
    assert build(7)(u[:0]).shape == (0, 3, *rows, 5)


@pytest.mark.parametrize("routing", ["inverted-attention", "k-means"])
def test_steps_on_a_grid(routing: str) -> None:
    layer = nn.ConvCapsules(2, 4, 3, 5, 3, 2, 1, routing, iterations=2)
    u = torch.randn(2, 2, 5, 4, 4)
    assert torch.equal(layer(u), layer.step(u, layer.step(u)))
    top = nn.KMeansCapsules(3 * 3 * 2, 5, 2, 4)
    network = nn.ConcurrentCapsules([layer, top], iterations=1)
    assert torch.equal(network(u), top.step(layer.step(u).flatten(1, 3)))
    assert "iterations=1" in repr(network)


def test_layers_on_a_grid_and_of_steps_are_exported_for_any_batch() -> None:
    layers = [nn.ConvCapsules(2, 4, 3, 5, 3, 2, 1, "inverted-attention"), nn.KMeansCapsules(3 * 3 * 2, 5, 2, 4)]
    network = nn.ConcurrentCapsules(layers)
    program = torch.export.export(
        network, (torch.randn(2, 2, 5, 4, 4),), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=99)},)
    )
    u = torch.randn(5, 2, 5, 4, 4)
    torch.testing.assert_close(program.module()(u), network(u))


def test_self_routing_capsules() -> None:
    torch.manual_seed(0)
    layer = nn.SelfRoutingCapsules(7, 4, 3, 5)
    torch.nn.init.normal_(layer.routing_weight)
    pose, activation = torch.randn(2, 7, 4, requires_grad=True), torch.rand(2, 7, requires_grad=True)
    out, a = layer(pose, activation)
    assert out.shape == (2, 3, 5)
    torch.testing.assert_close(a.sum(dim=1), torch.ones(2))
    for g in torch.autograd.grad(out.square().sum() + a.square().sum(), [pose, activation, *layer.parameters()]):
        assert g.isfinite().all() and g.abs().max() > 0
    # What a mask leaves out has no effect, and an activation of 0 hardly any.
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[:, 2] = False
    bad = pose.detach().clone()
    bad[:, 2] = torch.nan
    off = activation.detach().clone()
    off[:, 2] = 0
    for x, y in zip(layer(bad, activation, mask), layer(pose, off), strict=True):
        torch.testing.assert_close(x, y)
    nothing = layer(pose, activation, torch.zeros_like(mask))
    assert all((x == 0).all() for x in nothing)
    with torch.autocast("cpu", torch.bfloat16):
        low = layer(pose.bfloat16(), activation.bfloat16())
    for x, y in zip(low, layer(pose.bfloat16().float(), activation.bfloat16().float()), strict=True):
        torch.testing.assert_close(x, y)


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
    with pytest.raises(ValueError, match=r"shape \[1, 7, 5, 4, 1\]; expected only one way to drop sizes of 1"):
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


def test_a_network_of_em_capsules_learns() -> None:
    """The same with poses and activations: a convolutional capsule layer, then one that is connected to all of them."""
    torch.manual_seed(1)
    options = {"competition": "window", "iterations": 2, "inverse_temperature": 0.05}
    grid = nn.ConvCapsules(2, 2, 3, 2, kernel_size=2, routing="em", **options)
    top = nn.EMCapsules(4 * 3, 2, 2, 2, iterations=2, inverse_temperature=0.05)
    pose, activation = torch.randn(32, 2, 3, 3, 2, 2), torch.full((32, 2, 3, 3), 0.9)
    labels = (pose[..., 0, 0].sum(dim=(1, 2, 3)) > 0).long()
    optimizer = torch.optim.Adam([*grid.parameters(), *top.parameters()], 0.05)
    for _ in range(80):
        poses, activations = grid(pose, activation)
        poses, _ = top(poses.flatten(1, 3), activations.flatten(1, 3))
        loss = torch.nn.functional.cross_entropy(poses[:, :, 0, 0], labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.3


@pytest.mark.parametrize("layer", [nn.CapsuleLayer(5, 4, 3, 2), nn.EMCapsules(5, 4, 3, 2)], ids=["routing", "em"])
def test_matrices_stay_as_they_are_where_images_go_channels_last(layer: torch.nn.Module) -> None:
    layer.weight.grad = torch.zeros_like(layer.weight)
    moved = layer.to(memory_format=torch.channels_last)
    assert moved is layer
    assert layer.weight.is_contiguous() and layer.weight.grad.is_contiguous()
