"""The nine channels of the network: three RGB views of a frame, the full frame and two zoomed ones.

The paper resizes a frame to 728 pixels, turns it by up to ±10°, crops 512 pixels at random and takes the middle 256 of
them. That is a turned window of 256 of the 728 pixels, whose centre lies up to ±108 pixels from the frame's centre. The
published code turns the whole frame and cuts then, so that the window's centre turns too, and draws this once, for test
data too. Here the window turns about its own centre, training draws it anew in each epoch, and in evaluation it is
fixed.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, interpolate

MAX_ANGLE = 10.0  # degrees
MAX_SHIFT = 108 / 728  # of the base side
_BASE_OVER_INPUT = 728 / 256
_IN_CACHE = 8  # frames

# Not from the paper: small variations, like those of the probe's position and of the machine's settings.
_FULL_SHIFT = 0.04
_FULL_LOG_SCALE = 0.1
_LOG_GAIN = 0.15


def base_side(size: int) -> int:
    """Side in pixels of the cached frames for a network input of `size` pixels: 256 -> 728, 64 -> 182."""
    return round(size * _BASE_OVER_INPUT)


def draw_jitter(rng: np.random.Generator, train: bool) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The geometry and tone of the three views of a frame.

    In training, the zoomed views are turned and shifted as in the paper, the full one a little, and gain and gamma
    change. In evaluation all are fixed: the zoomed views look halfway up and halfway down the range of training, where
    the septum and the posterior wall lie in a parasternal long-axis view.

    Args:
        rng: the generator of this item in this epoch.
        train: whether to draw them at random.

    Returns:
        jitter float32 [3, 4]: (degrees, dx, dy, log scale) of the full and the two zoomed views, see
        `three_views`; tone float32 [2]: (gain, gamma), 1 and 1 for none.
    """
    jitter, tone = np.zeros((3, 4), np.float32), np.ones(2, np.float32)
    if not train:
        jitter[1:, 2] = -MAX_SHIFT / 2, MAX_SHIFT / 2
        return jitter, tone
    jitter[1:, :3] = rng.uniform(-1, 1, (2, 3)) * (MAX_ANGLE, MAX_SHIFT, MAX_SHIFT)
    jitter[0] = rng.uniform(-1, 1, 4) * (MAX_ANGLE, _FULL_SHIFT, _FULL_SHIFT, _FULL_LOG_SCALE)
    tone = np.exp(rng.uniform(-_LOG_GAIN, _LOG_GAIN, 2)).astype(np.float32)
    return jitter, tone


def three_views(base: Tensor, size: int, jitter: Tensor, tone: Tensor | None = None) -> Tensor:
    """The nine-channel input of the network, computed on the device of the frames.

    Args:
        base: uint8 [B, 3, S, S], S = `base_side(size)`.
        size: side of the result in pixels.
        jitter: float32 [B, 3, 4], for each view (degrees, dx, dy, log scale). The view's window is turned clockwise by
            the angle; its centre is shifted by dx to the right and by dy down, as shares of the frame's side; it is
            exp(-log scale) times as wide. Outside of the frame is black.
        tone: float32 [B, 2], rows (gain, gamma): x becomes gain · x^gamma, so black stays black.

    Returns:
        float32 [B, 9, size, size] in [0, 1]: the full frame (antialiased), then the two zoomed views
        (`size` of S pixels wide, pixel for pixel but for the turn).
    """
    side = base.shape[-1]
    # In place if possible: allocating memory for a batch of frames costs more than the arithmetic.
    pixels = base.float().div_(255)
    small = interpolate(pixels, (size, size), mode="bilinear", antialias=True, align_corners=False)
    full = _sample(small, jitter[:, :1], 1.0, size)
    zoomed = _sample(pixels, jitter[:, 1:], size / side, size)
    views = torch.cat([full, zoomed], dim=1)
    if tone is not None:
        gain, gamma = tone.view(-1, 2, 1, 1, 1).unbind(1)
        views = views.clamp_(min=0).pow_(gamma).mul_(gain)
    return views.clamp_(0, 1)


def fixed_views(base: Tensor, size: int) -> Tensor:
    """The views of an evaluation: bit for bit `three_views` with what `draw_jitter` gives without training.

    On a CPU it takes less than half of the time: the geometry is that of all frames, so each point of a view is located
    once, and frames are taken a few at a time, which stay in the cache.

    Args:
        base: uint8 [B, 3, S, S], S = `base_side(size)`.
        size: side of the result in pixels.

    Returns:
        float32 [B, 9, size, size] in [0, 1].
    """
    jitter, tone = (torch.from_numpy(x).to(base.device) for x in draw_jitter(np.random.default_rng(0), train=False))
    if base.device.type != "cpu":
        return three_views(base, size, jitter.expand(len(base), *jitter.shape), tone.expand(len(base), *tone.shape))
    views = base.new_empty(len(base), 9, size, size, dtype=torch.float32)
    for some, out in zip(base.split(_IN_CACHE), views.split(_IN_CACHE), strict=True):
        pixels = some.float().div_(255)
        small = interpolate(pixels, (size, size), mode="bilinear", antialias=True, align_corners=False)
        for image, of, window, part in (
            (small, jitter[:1], 1.0, out[:, :3]),
            (pixels, jitter[1:], size / base.shape[-1], out[:, 3:]),
        ):
            # All channels of all frames as those of one image: `_sample` locates a point once for an image.
            sampled = _sample(image.flatten(0, 1)[None], of[None], window, size)
            by_view = sampled.view(len(of), len(some), 3, size, size)
            part.unflatten(1, (len(of), 3)).copy_(by_view.transpose(0, 1))
    return views.clamp_(0, 1)  # gain and gamma are 1


def _sample(image: Tensor, jitter: Tensor, window: float, size: int) -> Tensor:
    """V windows, `window` of the side wide, of each image [B, C, H, H]: jitter [B, V, 4] -> [B, V C, size, size].

    The V sampling grids of an image are stacked into one, so that the image is not copied for each of them.
    """
    (batch, views, _), channels = jitter.shape, image.shape[1]
    angle, dx, dy, log_scale = jitter.unbind(-1)
    turn, width = torch.deg2rad(angle), window * torch.exp(-log_scale)
    cos, sin = width * torch.cos(turn), width * torch.sin(turn)
    theta = torch.stack([cos, -sin, 2 * dx, sin, cos, 2 * dy], -1).view(batch * views, 2, 3)
    grid = affine_grid(theta, [batch * views, channels, size, size], align_corners=False)
    grid = grid.view(batch, views * size, size, 2)
    sampled = grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return sampled.view(batch, channels, views, size, size).transpose(1, 2).reshape(batch, -1, size, size)
