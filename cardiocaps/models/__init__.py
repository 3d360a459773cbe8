"""Networks and baselines, by the name that the setting `model` gives them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cardiocaps.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from cardiocaps.config import TrainConfig

MODELS = ("cardiocaps", "em-capsnet", "efficient-capsnet", "cnn-1", "cnn-2", "resnet18", "unet", "vit")


def build(config: TrainConfig, regression_start: float = 0.0, device: torch.device | str | None = None) -> nn.Module:
    """The network `config.model` of the sizes `config.network`, with parameters drawn now.

    A network is called with image [B, 9, S, S] and, in training, label int64 [B], and returns a
    `cardiocaps.models.prediction.Prediction`; its attribute `size` is S.

    Args:
        config: of the run. Settings that the network has no use for, such as the routing of a CNN, are ignored.
        regression_start: see `cardiocaps.models.cardiocaps.CardioCaps`.
        device: where the parameters are made; "meta" makes none.

    Raises:
        ConfigError: an unknown model, or one that needs a package that is not installed.
    """
    sizes, name = config.network, _checked(config)
    if name == "cardiocaps":
        from cardiocaps.models.cardiocaps import CardioCaps

        return CardioCaps(
            sizes,
            routing=config.routing,
            iterations=config.iterations,
            primary_layout=config.primary_layout,
            affine=config.affine,
            regression_start=regression_start,
            device=device,
        )
    if name == "em-capsnet":
        from cardiocaps.models.em_capsnet import EMCapsNet

        return EMCapsNet(sizes, iterations=config.iterations, device=device)
    if name == "efficient-capsnet":
        from cardiocaps.models.efficient_capsnet import EfficientCapsNet

        return EfficientCapsNet(sizes, device=device)
    if name in ("cnn-1", "cnn-2"):
        from cardiocaps.models.cnn import CNN

        return CNN(sizes, pooled=name == "cnn-1", device=device)
    from cardiocaps.models.monai_networks import ResNet18, UNet, ViT

    networks: dict[str, Any] = {"resnet18": ResNet18, "unet": UNet, "vit": ViT}
    network: nn.Module = networks[name](sizes, device=device)
    return network


def make_loss(config: TrainConfig, class_weights: Tensor | None) -> nn.Module:
    """The loss that `config.model` is trained with: CardioCaps' for capsules that are vectors, spread loss for EM
    routing, else cross-entropy.

    `class_weights` [2] as `cardiocaps.models.losses.class_weights` returns it; None for ones. Raises ConfigError for an
    unknown model.
    """
    from cardiocaps.models.losses import CardioCapsLoss, CrossEntropyLoss, SpreadLoss

    name = _checked(config)
    if name in ("cardiocaps", "efficient-capsnet"):
        return CardioCapsLoss(
            class_weights,
            reconstruction_weight=config.reconstruction_weight,
            regression_weight=config.regression_weight,
        )
    return SpreadLoss(class_weights) if name == "em-capsnet" else CrossEntropyLoss(class_weights)


def _checked(config: TrainConfig) -> str:
    if config.model not in MODELS:
        raise ConfigError(f"model: {config.model!r} is not allowed; give one of {', '.join(MODELS)}")
    return config.model
