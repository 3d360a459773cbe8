"""MONAI's ResNet18, U-Net and ViT as classifiers (table V of the paper).

All are made from a preset's image size S. They map image [B, 9, S, S] in [0, 1] to a `Prediction` with logits, and
ignore the label. They raise ValueError for an image of another shape, and ConfigError if MONAI is not installed.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from cardiocaps.config import Preset
from cardiocaps.models.prediction import CLASSES, IN_CHANNELS, Prediction, check_image, of_logits
from cardiocaps.runtime.packages import require_package

# Images up to this size get a ResNet18 of half the channels.
_SMALL = 64


class ResNet18(nn.Module):
    """ResNet18 (He et al. 2016), from random weights; its widths are halved for images of 64 pixels."""

    def __init__(self, sizes: Preset) -> None:
        super().__init__()
        self.size = sizes.size
        nets: Any = require_package("monai.networks.nets", "monai", "model: 'resnet18'")
        # The last two keywords give the usual network with stride 32; MONAI's defaults are for volumes.
        self.network = nets.resnet18(
            spatial_dims=2,
            n_input_channels=IN_CHANNELS,
            num_classes=CLASSES,
            widen_factor=0.5 if sizes.size <= _SMALL else 1.0,
            conv1_t_stride=2,
            bias_downsample=False,
        )

    def forward(self, image: Tensor, label: Tensor | None = None) -> Prediction:
        check_image("ResNet18", image, self.size)
        return of_logits(self.network(image))


class UNet(nn.Module):
    """U-Net (Ronneberger et al. 2015) with a head that averages the 32 maps of the decoder and classifies.

    It has four levels of 32 to 256 channels and batch normalisation. (Instance normalisation would remove the mean of
    each map, which is what the head uses.)
    """

    def __init__(self, sizes: Preset) -> None:
        super().__init__()
        self.size = sizes.size
        nets: Any = require_package("monai.networks.nets", "monai", "model: 'unet'")
        maps = 32
        self.network = nets.UNet(
            spatial_dims=2,
            in_channels=IN_CHANNELS,
            out_channels=maps,
            channels=(32, 64, 128, 256),
            strides=(2, 2, 2),
            norm="batch",
            bias=False,  # batch normalisation has one
        )
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(maps, CLASSES))

    def forward(self, image: Tensor, label: Tensor | None = None) -> Prediction:
        check_image("UNet", image, self.size)
        return of_logits(self.head(self.network(image)))


class PublishedUNet(nn.Module):
    """The U-Net of the code published with CardioCaps, of MONAI's parts: five levels of 32 to 512 channels with two
    convolutions each, and a head of fully connected layers on the two maps of full size.

    The last layer has a ReLU on its logits, as there. A logit that starts below zero for every image has no gradient
    and stays zero.
    """

    def __init__(self, sizes: Preset) -> None:
        super().__init__()
        self.size = sizes.size
        blocks: Any = require_package("monai.networks.nets.basic_unet", "monai", "model: 'unet'")
        first = 32
        self.network = blocks.BasicUNet(
            spatial_dims=2,
            in_channels=IN_CHANNELS,
            out_channels=CLASSES,
            features=(first, 64, 128, 256, 512, first),
            act="relu",
            norm="batch",
            bias=False,  # batch normalisation has one
            upsample="deconv",
        )
        # MONAI's last step does not halve the channels.
        self.network.upcat_1 = blocks.UpCat(2, 2 * first, first, first, "relu", "batch", False, upsample="deconv")
        self.head = nn.Sequential(
            nn.Flatten(),
            nn.Linear(CLASSES * sizes.size**2, 16),
            nn.ReLU(),
            nn.Linear(16, 8),
            nn.ReLU(),
            nn.Linear(8, CLASSES),
            nn.ReLU(),
        )

    def forward(self, image: Tensor, label: Tensor | None = None) -> Prediction:
        check_image("UNet", image, self.size)
        return of_logits(self.head(self.network(image)))


class ViT(nn.Module):
    """Vision transformer (Dosovitskiy et al. 2021) of the paper's sizes: patches of 4 pixels, width 16, depth 2, 4
    heads. Its perceptrons have four times the width, as usual. (The published code's are as wide as the tokens, its
    heads have 32 numbers, its positions are fixed sines: 20,306 parameters, here 74,402.)

    Raises:
        ConfigError: einops, which MONAI needs for this network, is not installed.
    """

    def __init__(self, sizes: Preset) -> None:
        super().__init__()
        self.size = sizes.size
        patch, width = 4, 16
        require_package("einops", "einops", "model: 'vit'")
        nets: Any = require_package("monai.networks.nets", "monai", "model: 'vit'")
        self.network = nets.ViT(
            in_channels=IN_CHANNELS,
            img_size=sizes.size,
            patch_size=patch,
            hidden_size=width,
            mlp_dim=4 * width,
            num_layers=2,
            num_heads=4,
            classification=True,
            num_classes=CLASSES,
            spatial_dims=2,
            post_activation="",  # or MONAI would put a hyperbolic tangent on the logits
        )
        for block in self.network.blocks:
            block.norm_cross_attn = nn.Identity()  # there is no cross-attention, so this would never learn
            # torch's own attention, which does not hold the weights of all pairs of 4097 tokens.
            block.attn.use_flash_attention = True

    def forward(self, image: Tensor, label: Tensor | None = None) -> Prediction:
        check_image("ViT", image, self.size)
        return of_logits(self.network(image)[0])
