"""The registry of networks: a row for each name that the setting `model` allows.

To add a network, write its module and a row of `MODELS`, and add its name to `TrainConfig.model`. Importing this
package imports no torch: every row imports its network when it is built.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from cardiocaps.config import TrainConfig


@dataclass(frozen=True)
class Model:
    """A row of the registry.

    Attributes:
        title: the network's name in tables. Raises ValueError if it is empty.
        build: makes the network from the run's settings and the value at which its regression starts.
        loss: makes the loss from the run's settings and the class weights [2] (None: ones).
        settings: settings of TrainConfig that only this network has. A test compares them with those that TrainConfig
            refuses for every other network.
        title_of: the title under these settings, for a network whose settings change what it is.
        freezable: a value of the setting `freeze` -> names of the modules and parameters of the network that it
            freezes, with all that is in them.
    """

    title: str
    build: Callable[[TrainConfig, float], nn.Module]
    loss: Callable[[TrainConfig, Tensor | None], nn.Module]
    settings: tuple[str, ...] = ()
    title_of: Callable[[TrainConfig], str] | None = None
    freezable: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.title.strip():
            raise ValueError(f"Model: title is {self.title!r}; expected the name that tables show")


def build(config: TrainConfig, regression_start: float = 0.0) -> nn.Module:
    """The network `config.model` of the sizes `config.network`, with freshly drawn parameters.

    A network is called with image [B, 9, S, S] and, in training, label int64 [B]. It returns a
    `cardiocaps.models.prediction.Prediction`. Its attribute `size` is S.

    Args:
        config: settings of the run. The network ignores those that it has no use for.
        regression_start: see `cardiocaps.models.cardiocaps.CardioCaps`.

    Raises:
        ConfigError: it needs a package that is not installed.
    """
    return MODELS[config.model].build(config, regression_start)


def from_pretrained(folder: Path | str) -> nn.Module:
    """See `cardiocaps.models.pretrained.from_pretrained`."""
    from cardiocaps.models import pretrained

    return pretrained.from_pretrained(folder)


def save_pretrained(
    network: nn.Module, config: TrainConfig, folder: Path | str, about: Mapping[str, Any] | None = None
) -> None:
    """See `cardiocaps.models.pretrained.save_pretrained`."""
    from cardiocaps.models import pretrained

    pretrained.save_pretrained(network, config, folder, about)


def make_loss(config: TrainConfig, class_weights: Tensor | None) -> nn.Module:
    """The loss that `config.model` is trained with.

    Args:
        config: settings of the run.
        class_weights: [2], as `cardiocaps.models.losses.class_weights` returns it. None: ones.
    """
    return MODELS[config.model].loss(config, class_weights)


def is_frozen(config: TrainConfig, name: str) -> bool:
    """Whether `config.freeze` freezes the module or the parameter of this name in `build(config)`."""
    parts = () if config.freeze is None else MODELS[config.model].freezable[config.freeze]
    return any(name == part or name.startswith(f"{part}.") for part in parts)


def title(config: TrainConfig) -> str:
    """What tables call the network of a run."""
    model = MODELS[config.model]
    name = model.title if model.title_of is None else model.title_of(config)
    return f"{name}, as published" if _published(config) else name


def _cardiocaps(config: TrainConfig, regression_start: float) -> nn.Module:
    from cardiocaps.models.cardiocaps import CardioCaps

    return CardioCaps(
        config.network,
        routing=config.routing,
        iterations=config.iterations,
        primary_layout=config.primary_layout,
        affine=config.affine,
        regression_start=regression_start,
        published=_published(config),
    )


def _cardiocaps_title(config: TrainConfig) -> str:
    routing = {"attention": "CardioCaps", "dynamic": "DR-CapsNet", "uniform": "uniform routing"}[config.routing]
    return routing if config.affine == "matrices" else f"{routing}, {config.affine} affine map"


def _em_capsnet(config: TrainConfig, _: float) -> nn.Module:
    from cardiocaps.models.em_capsnet import EMCapsNet

    return EMCapsNet(
        config.network,
        iterations=config.iterations,
        renormalise=config.renormalise,
        published=_published(config),
    )


def _cnn(config: TrainConfig, _: float) -> nn.Module:
    from cardiocaps.models.cnn import CNN

    return CNN(config.network, pooled=config.model == "cnn-1", published=_published(config))


def _efficient_capsnet(config: TrainConfig, _: float) -> nn.Module:
    from cardiocaps.models.efficient_capsnet import EfficientCapsNet

    return EfficientCapsNet(config.network, published=_published(config))


def _unet(config: TrainConfig, _: float) -> nn.Module:
    from cardiocaps.models.monai_networks import PublishedUNet, UNet

    return PublishedUNet(config.network) if _published(config) else UNet(config.network)


def _published(config: TrainConfig) -> bool:
    return config.form == "published"


def _by_size(module: str, name: str) -> Callable[[TrainConfig, float], nn.Module]:
    """Builds the class `name` of a module of this package, which takes the sizes alone."""

    def build(config: TrainConfig, _: float) -> nn.Module:
        network: nn.Module = getattr(import_module(f"{__name__}.{module}"), name)(config.network)
        return network

    return build


def _capsule_loss(config: TrainConfig, class_weights: Tensor | None) -> nn.Module:
    from cardiocaps.models.losses import CardioCapsLoss, TargetLoss

    if config.task == "regression":
        return TargetLoss(
            reconstruction_weight=config.reconstruction_weight, regression_weight=config.regression_weight
        )
    return CardioCapsLoss(
        class_weights,
        reconstruction_weight=config.reconstruction_weight,
        regression_weight=config.regression_weight,
        weigh="capsule" if config.class_weight == "proportion" else "sample",
        # The published code averages over the classes where it does not weigh them.
        mean_over_classes=_published(config) and config.class_weight == "none",
    )


def _spread_loss(_: TrainConfig, class_weights: Tensor | None) -> nn.Module:
    from cardiocaps.models.losses import SpreadLoss

    return SpreadLoss(class_weights)


def _cross_entropy(config: TrainConfig, class_weights: Tensor | None) -> nn.Module:
    from cardiocaps.models.losses import CrossEntropyLoss

    return CrossEntropyLoss(class_weights, divided=_published(config))


MODELS: Mapping[str, Model] = {
    "cardiocaps": Model(
        "CardioCaps",
        _cardiocaps,
        _capsule_loss,
        settings=("routing", "affine", "primary_layout"),
        title_of=_cardiocaps_title,
        freezable={"primary": ("conv", "primary")},
    ),
    "em-capsnet": Model(
        "EM-CapsNet",
        _em_capsnet,
        _spread_loss,
        settings=("renormalise",),
        freezable={"primary": ("conv", "pose", "activation")},
    ),
    "efficient-capsnet": Model(
        "Efficient-CapsNet",
        _efficient_capsnet,
        _capsule_loss,
        freezable={"primary": ("convolutions", "primary")},
    ),
    "cnn-1": Model("CNN-(1)", _cnn, _cross_entropy, freezable={"backbone": ("features",)}),
    "cnn-2": Model("CNN-(2)", _cnn, _cross_entropy, freezable={"backbone": ("features",)}),
    "resnet18": Model(
        "ResNet18",
        _by_size("monai_networks", "ResNet18"),
        _cross_entropy,
        freezable={
            "backbone": tuple(f"network.{name}" for name in ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4"))
        },
    ),
    "unet": Model(
        "U-Net",
        _unet,
        _cross_entropy,
        freezable={"backbone": ("network",)},
    ),
    "vit": Model(
        "ViT",
        _by_size("monai_networks", "ViT"),
        _cross_entropy,
        freezable={"backbone": tuple(f"network.{name}" for name in ("patch_embedding", "blocks", "norm", "cls_token"))},
    ),
}
"""The name of a network -> its row."""
