"""Grad-CAM (Selvaraju et al. 2017, eq. 1 and 2), computed by captum, of the last convolution of a network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cardiocaps.errors import ConfigError
from cardiocaps.explanation.grid import Grid
from cardiocaps.runtime.packages import require_package


def grad_cam(network: nn.Module, image: Tensor, label: Tensor) -> Tensor:
    """The Grad-CAM of a class, on the network's input.

    It is computed from the output of the last convolution that leaves more than one cell, and from the score of the
    class: the length of its capsule, its activation, or its logit.

    Args:
        network: in evaluation mode.
        image: [B, 9, S, S].
        label: the class of each image, int64 [B].

    Returns:
        [B, S, S], not negative.

    Raises:
        ConfigError: captum is not installed, or the network has no such convolution.
    """
    captum: Any = require_package("captum.attr", "captum", "methods: 'gradcam'", "explain")
    layer, grid = last_convolution(network, image[:1])

    def scores(x: Tensor) -> Tensor:
        return network(x).scores

    with torch.enable_grad():
        found = captum.LayerGradCam(scores, layer).attribute(image, target=label, relu_attributions=True)
    return grid.on_input(found.detach().squeeze(1), image.shape[-1])


def last_convolution(network: nn.Module, image: Tensor) -> tuple[nn.Module, Grid]:
    """The last convolution, in the order of their use, that leaves more than one cell, and where its cells lie.

    Args:
        network: the network.
        image: [1, 9, S, S], which the network is run with.

    Raises:
        ConfigError: there is none.
    """
    grid = Grid()
    found: list[tuple[nn.Module, Grid]] = []

    def passed(module: Any, _: Any, out: Tensor) -> None:
        nonlocal grid
        numbers = (module.kernel_size, module.stride, module.padding, module.dilation)
        kernel, stride, padding, dilation = (x if isinstance(x, int) else x[0] for x in numbers)
        grid = grid.after(kernel, stride, padding, dilation)
        if isinstance(module, nn.Conv2d) and min(out.shape[-2:]) > 1:
            found.append((module, grid))

    # Shortcuts of residual blocks run beside the convolutions that are counted.
    hooks = [
        module.register_forward_hook(passed)
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d | nn.MaxPool2d) and "downsample" not in name
    ]
    try:
        with torch.no_grad():
            network(image)
    finally:
        for hook in hooks:
            hook.remove()
    if not found:
        raise ConfigError(
            "methods: 'gradcam' needs a convolution that leaves more than one cell; this network has none"
        )
    return found[-1]
