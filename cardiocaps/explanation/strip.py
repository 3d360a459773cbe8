"""The maps of a video as one small picture for the report of a prediction.

It has a row for each method: on the left the middle frame, beside it up to eight frames over time in two lines, all
with the map laid over them. The colours of a row are shares of the largest value in any of the video's frames.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cardiocaps.explanation.maps import Maps, check_explainable, maps_of, methods_for
from cardiocaps.explanation.picture import COLOURS, OPACITY
from cardiocaps.prediction.ensemble import Ensemble, FrameSettings, Video
from cardiocaps.prediction.report import Illustration

_HEIGHT = 144  # pixels of a row: twice what a page shows, for fine screens
_LINES, _COLUMNS = 2, 4  # of the frames over time


def illustration(ensemble: Ensemble) -> Illustration:
    """The maps of the class that is decided, by every method that the network and the installed packages allow.

    Raises:
        ConfigError: several networks, or one that knows no classes or allows no method.
    """
    check_explainable(ensemble)
    (member,) = ensemble.members
    allowed = methods_for(member.network.model)
    methods = [name for name in allowed if name != "gradcam" or find_spec("captum")] or [*allowed]

    def draw(video: Video, row: Mapping[str, Any]) -> bytes:
        seen = video.frames[FrameSettings.of(member.config)]
        maps = maps_of(member, ensemble.machine, seen.pixels, row["decision"], methods)
        return strip(seen.pixels, maps, video.aspect)

    return Illustration(tuple(methods), draw)


def strip(pixels: NDArray[np.uint8], maps: Maps, aspect: float) -> bytes:
    """The picture, a JPEG.

    Args:
        pixels: frames [n, 3, S, S].
        maps: of these frames. Only positive values are drawn.
        aspect: width of the video over its height.
    """
    from PIL import Image

    width = min(max(round(_HEIGHT * aspect), 8), 4 * _HEIGHT)
    small = (width // _LINES, _HEIGHT // _LINES)
    middle, shown = len(pixels) // 2, over_time(len(pixels))
    picture = Image.new("RGB", (width + _COLUMNS * small[0], _HEIGHT * len(maps)))
    for row, values in enumerate(maps.values()):
        positive = np.maximum(values, 0)
        share = positive / (positive.max() or 1)
        picture.paste(_overlaid(pixels[middle], share[middle], (width, _HEIGHT)), (0, row * _HEIGHT))
        for place, frame in enumerate(shown):
            line, column = divmod(place, _COLUMNS)
            at = (width + column * small[0], row * _HEIGHT + line * small[1])
            picture.paste(_overlaid(pixels[frame], share[frame], small), at)
    content = BytesIO()
    picture.save(content, format="JPEG", quality=85)
    return content.getvalue()


def over_time(frames: int) -> Sequence[int]:
    """The indices of at most eight frames, spread evenly from the first to the last."""
    number = min(frames, _LINES * _COLUMNS)
    chosen: list[int] = np.linspace(0, frames - 1, number).round().astype(int).tolist()
    return chosen


def _overlaid(frame: NDArray[np.uint8], share: NDArray[np.float32], size: tuple[int, int]) -> Any:
    """A frame [3, S, S] of `size` (width, height) with a map [H, H] in [0, 1] laid over it."""
    import matplotlib
    from PIL import Image

    image = Image.fromarray(np.ascontiguousarray(frame.transpose(1, 2, 0))).resize(size, Image.Resampling.LANCZOS)
    fine = np.asarray(Image.fromarray(share).resize(size, Image.Resampling.BILINEAR))[..., None]
    opacity = OPACITY * fine
    colours = matplotlib.colormaps[COLOURS](fine[..., 0])[..., :3]
    mixed = (1 - opacity) * np.asarray(image) + opacity * 255 * colours
    return Image.fromarray(mixed.round().astype(np.uint8))
