"""What holds of every network: shapes, sizes to the digit, that it learns, what it refuses."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cardiocaps.config import PRESETS
from cardiocaps.errors import ConfigError
from cardiocaps.models import MODELS, build, make_loss
from cardiocaps.models.losses import CardioCapsLoss, CrossEntropyLoss, SpreadLoss
from cardiocaps.models.prediction import RECONSTRUCTED_CHANNELS, Prediction, of_logits, share

# At the paper's size. Written out where the sum is short.
PARAMETERS = {
    "cardiocaps": 325_722_375,
    "em-capsnet": sum(
        [
            9 * 25 * 32 + 2 * 32,  # convolution, batch normalisation
            33 * 32 * 16 + 33 * 32,  # primary poses, activations
            2 * (9 * 32 * 4 * 32 * 4 + 2 * 32),  # two convolutional layers: matrices, both β
            32 * 4 * 2 * 4 + 2 * 2,  # classes
        ]
    ),
    "efficient-capsnet": sum(
        [
            (9 * 25 + 1) * 32 + (32 * 9 + 1) * 64 + (64 * 9 + 1) * 64 + (64 * 9 + 1) * 128 + 2 * (32 + 64 + 64 + 128),
            (14 * 14 + 1) * 128,  # depthwise
            16 * 8 * 2 * 16 + 16 * 2,  # matrices, prior
            33 * 512 + 513 * 1024 + 1025 * 3 * 256 * 256,  # decoder
        ]
    ),
    "cnn-1": (9 * 81 + 1) * 32 + (32 * 81 + 1) * 64 + 65 * 32 + 33 * 16 + 17 * 8 + 9 * 2,
    "cnn-2": (9 * 81 + 1) * 32 + (32 * 81 + 1) * 64 + 65 * 32 + (32 * 120 * 120 + 1) * 16 + 17 * 8 + 9 * 2,
    "resnet18": 11_196_354,  # torchvision's 11,689,512, with 9 channels in place of 3 and 2 classes in place of 1000
    "unet": 667_368,
    "vit": 74_402,
}


# The published code's, at the paper's size, where its network is another one. Sums of the layers that it has.
_MATRICES = 460_800 * 8 * 2 * 16
PUBLISHED = {
    "em-capsnet": sum(
        [
            (9 * 25 + 1) * 8 + 2 * 8,  # convolution, batch normalisation
            9 * 8 * 16 + 9 * 8,  # primary poses, activations
            2 * (9 * 8 * 4 * 8 * 4 + 2 * 8),  # two convolutional layers
            8 * 4 * 2 * 4 + 2 * 2,  # classes
        ]
    ),
    "efficient-capsnet": sum(
        [
            (9 * 25 + 1) * 32 + (32 * 9 + 1) * 64 + (64 * 9 + 1) * 64 + (64 * 9 + 1) * 128 + 2 * (32 + 64 + 64 + 128),
            (9 * 9 + 1) * 128,  # depthwise
            211_600 * (8 * 2 * 16 + 2),  # matrices, prior
            33 * 512 + 513 * 1024 + 1025 * 3 * 256 * 256,  # decoder
        ]
    ),
    "cnn-2": (9 * 81 + 1) * 32 + (32 * 81 + 1) * 64 + 65 * 32 + (32 * 120 * 120 + 1) * 16 + 17 * 8 + 9 * 2,
    "unet": 9_862_124,
}


def settings(model: str, preset: str = "tiny", **changed: Any) -> Any:
    values = _settings(model, preset)
    vars(values).update(changed)
    return values


def _settings(model: str, preset: str) -> Any:
    return SimpleNamespace(
        task="both",
        model=model,
        network=PRESETS[preset],
        routing="attention",
        iterations=3,
        primary_layout="channels",
        affine="matrices",
        class_weight="balanced",
        form="corrected",
        renormalise=False,
        reconstruction_weight=0.0005,
        regression_weight=0.05,
    )


def on_meta(config: Any) -> nn.Module:
    """The network without its numbers."""
    with torch.device("meta"):
        return build(config)


def batch(items: int = 8, size: int = 64) -> dict[str, Tensor]:
    """Grey images with some noise, and a bright patch where the label is 1."""
    rng = torch.Generator().manual_seed(1)
    label = torch.arange(items) % 2
    image = 0.2 + 0.1 * torch.rand(items, 9, size, size, generator=rng)
    image[:, :, 8:24, 8:24] += 0.5 * label[:, None, None, None]
    return {"image": image, "label": label, "target": 4 + label.float()}


def losses(net: nn.Module, loss: nn.Module, items: dict[str, Tensor]) -> dict[str, Tensor]:
    out: Prediction = net(items["image"], items["label"])
    image = None if out.reconstruction is None else items["image"][:, :RECONSTRUCTED_CHANNELS]
    target = None if out.regression is None else items["target"]
    result: dict[str, Tensor] = loss(out.scores, items["label"], out.reconstruction, image, out.regression, target)
    return result


@pytest.mark.parametrize("model", MODELS)
def test_at_the_papers_size(model: str) -> None:
    net = on_meta(settings(model, "paper"))
    assert sum(p.numel() for p in net.parameters()) == PARAMETERS[model]
    out = net(torch.empty(2, 9, 256, 256, device="meta"))
    assert out.scores.shape == (2, 2) and out.probability.shape == (2,)
    assert out.reconstruction is None or out.reconstruction.shape == (2, 3, 256, 256)
    assert (out.reconstruction is None) == (model not in ("cardiocaps", "efficient-capsnet"))
    assert (out.regression is None) == (model != "cardiocaps")


@pytest.mark.parametrize("model", PUBLISHED)
def test_the_published_form_has_the_published_size(model: str) -> None:
    net = on_meta(settings(model, "paper", form="published"))
    assert sum(p.numel() for p in net.parameters()) == PUBLISHED[model]
    assert net(torch.empty(2, 9, 256, 256, device="meta")).scores.shape == (2, 2)


def test_the_published_sizes_are_those_of_the_published_code() -> None:
    assert PUBLISHED["em-capsnet"] == 21_772
    assert round(PUBLISHED["efficient-capsnet"] / 1e6, 1) == 256.8


@pytest.mark.parametrize("model", MODELS)
def test_the_published_form_predicts_and_has_gradients(model: str) -> None:
    torch.manual_seed(1)
    net = build(settings(model, form="published", renormalise=model == "em-capsnet"), 4.5)
    out = net(batch()["image"], batch()["label"])
    assert out.scores.shape == (8, 2) and out.scores.isfinite().all()
    loss = losses(net, make_loss(settings(model, form="published"), torch.tensor([0.6, 3.0])), batch())
    loss["loss"].backward()
    assert sum(float(p.grad.abs().sum()) for p in net.parameters() if p.grad is not None) > 0


def test_cnn_2_as_published_pools_nowhere() -> None:
    def pools(**changed: Any) -> int:
        layers = on_meta(settings(**changed)).modules()
        return sum(isinstance(x, nn.MaxPool2d | nn.AdaptiveMaxPool2d) for x in layers)

    assert (pools(model="cnn-2"), pools(model="cnn-2", form="published")) == (1, 0)
    assert pools(model="cnn-1") == pools(model="cnn-1", form="published") == 3


def test_a_dead_logit_of_the_published_unet_stays_dead() -> None:
    torch.manual_seed(0)
    net = build(settings("unet", form="published"))
    with torch.no_grad():
        net.head[-2].bias[1] = -100.0
    out = net(batch()["image"])
    assert (out.scores >= 0).all() and (out.scores[:, 1] == 0).all()
    out.scores[:, 1].sum().backward()
    assert not any(p.grad.any() for p in net.parameters() if p.grad is not None)


@pytest.mark.parametrize("preset", ["tiny", "small"])
@pytest.mark.parametrize("model", MODELS)
def test_a_prediction(model: str, preset: str) -> None:
    torch.manual_seed(0)
    net = build(settings(model, preset)).eval()
    size = PRESETS[preset].size
    assert net.size == size
    with torch.inference_mode():
        out = net(torch.rand(3, 9, size, size))
    assert out.scores.shape == (3, 2) and out.scores.isfinite().all()
    assert out.probability.shape == (3,) and out.probability.dtype == torch.float32
    assert ((out.probability > 0) & (out.probability < 1)).all()
    assert torch.equal(out.probability > 0.5, out.scores[:, 1] > out.scores[:, 0])


@pytest.mark.parametrize("model", MODELS)
def test_it_learns(model: str) -> None:
    """The loss of a small batch falls by far; on the way every parameter has a gradient."""
    torch.manual_seed(0)
    net, loss, items = build(settings(model), 4.5), make_loss(settings(model), torch.tensor([0.6, 3.0])), batch()
    optimiser = torch.optim.Adam(net.parameters(), lr=3e-3)
    if isinstance(loss, SpreadLoss):
        loss.begin_epoch(9, 10)
    history = []
    for step in range(30):
        optimiser.zero_grad()
        parts = losses(net, loss, items)
        assert tuple(parts) == loss.parts
        parts["loss"].backward()
        history.append(parts["loss"].item())
        if step == 0:
            for name, p in net.named_parameters():
                assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, name
        optimiser.step()
    assert min(history[-5:]) < 0.6 * history[0]


@pytest.mark.parametrize("model", MODELS)
def test_a_step_asks_the_device_for_nothing(model: str) -> None:
    """Meta tensors stand in for a GPU's: they have no values to ask for, and cannot be mixed with the CPU's."""
    net, loss = on_meta(settings(model)), make_loss(settings(model), None).to("meta")
    parts = losses(net, loss, {name: x.to("meta") for name, x in batch().items()})
    parts["loss"].backward()
    assert all(p.grad is not None and p.grad.device.type == "meta" for p in net.parameters())


@pytest.mark.parametrize("model", MODELS)
def test_channels_last_and_autocast_change_the_rounding_only(model: str) -> None:
    results = []
    for last, half in ((False, False), (True, False), (True, True)):
        torch.manual_seed(0)
        net, items = build(settings(model), 4.5), batch()
        if last:
            net.to(memory_format=torch.channels_last)
            items["image"] = items["image"].contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            parts = losses(net, make_loss(settings(model), None), items)
        assert parts["loss"].dtype == torch.float32
        results.append(parts["loss"])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(results[2], results[0], rtol=0.05, atol=0.02)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("shape", [(1, 3, 64, 64), (1, 9, 64, 32), (9, 64, 64)])
def test_wrong_image(model: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r": image has shape \[.*\]; expected \[B, 9, 64, 64\]$"):
        on_meta(settings(model))(torch.empty(shape, device="meta"))


@pytest.mark.parametrize(
    ("model", "package"), [("resnet18", "monai"), ("unet", "monai"), ("vit", "monai"), ("vit", "einops")]
)
def test_a_missing_package_is_named(model: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [package, *(name for name in sys.modules if name.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    expected = rf"^model: '{model}' needs the package {package}.*; pip install 'cardiocaps\[experiments\]'$"
    with pytest.raises(ConfigError, match=expected):
        on_meta(settings(model))


def test_the_loss_of_a_model() -> None:
    for model in MODELS:
        kind = {"cardiocaps": CardioCapsLoss, "efficient-capsnet": CardioCapsLoss, "em-capsnet": SpreadLoss}
        loss = make_loss(settings(model), torch.tensor([0.6, 3.0]))
        assert type(loss) is kind.get(model, CrossEntropyLoss)
        assert loss.class_weight.tolist() == pytest.approx([0.6, 3.0])
    weighted = settings("cardiocaps")
    weighted.reconstruction_weight, weighted.regression_weight = 0.25, 0.5
    loss = make_loss(weighted, None)
    assert (loss.reconstruction_weight, loss.regression_weight) == (0.25, 0.5)
    assert (loss.weigh, loss.mean_over_classes) == ("sample", False)
    assert make_loss(settings("cardiocaps", class_weight="proportion"), None).weigh == "capsule"
    for form, class_weight, mean in (
        ("corrected", "none", False),
        ("published", "none", True),
        ("published", "balanced", False),
    ):
        for model in ("cardiocaps", "efficient-capsnet"):
            loss = make_loss(settings(model, form=form, class_weight=class_weight), None)
            assert loss.mean_over_classes is mean
    assert make_loss(settings("vit", form="published"), None).divided is True
    assert make_loss(settings("vit"), None).divided is False


def test_settings_reach_cardiocaps() -> None:
    config = settings("cardiocaps")
    config.routing, config.iterations, config.primary_layout, config.affine = "dynamic", 2, "legacy", "convolution"
    net = build(config, 55.0)
    assert (net.classes.routing, net.classes.iterations, net.classes.shared) == ("dynamic", 2, True)
    assert net.primary.layout == "legacy"
    assert net.regression.bias.item() == 55


def test_probability() -> None:
    scores = torch.tensor([[0.2, 0.6], [0.0, 0.5], [0.0, 0.0]], dtype=torch.bfloat16)
    assert share(scores).tolist() == pytest.approx([0.75, 1.0, 0.5], rel=1e-2)
    out = of_logits(torch.tensor([[0.0, 0.0], [1.0, 3.0], [0.0, 1000.0]]))
    assert out.probability.tolist() == pytest.approx([0.5, 1 / (1 + torch.e**-2), 1.0])
