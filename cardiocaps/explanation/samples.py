"""A picture of some videos of a data set (figure 1 of the paper): frames with calipers, views, reconstructions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cardiocaps.config import TrainConfig, read_run
from cardiocaps.data.cache import choose_frames
from cardiocaps.data.echonet_lvh.measurements import FILE_NAME, Row, read_measurements
from cardiocaps.data.header import VideoError
from cardiocaps.data.open import dataset_of, read_study
from cardiocaps.data.problems import Problem, summarise
from cardiocaps.data.study import Clip, Study
from cardiocaps.data.video import probe, read_frames
from cardiocaps.data.views import base_side, fixed_views
from cardiocaps.errors import DataError
from cardiocaps.plots import CLASSES, new_figure, save
from cardiocaps.runtime.device import machine_for
from cardiocaps.runtime.program import print_line
from cardiocaps.training.checkpoints import best_network
from cardiocaps.training.network import TrainedNetwork
from cardiocaps.training.run_folder import RunFolder

_COLOURS = ("#ffb000", "#35c2ff", "#ff5f87", "#8fd14f")
_VIEWS = ("full frame", "upper view", "lower view")


@dataclass(frozen=True)
class Sample:
    """A frame of a video.

    Attributes:
        frame: uint8 [3, H, H].
        number: of the frame in its video.
        aspect: width of the video over its height.
        views: float32 [9, S, S] in [0, 1].
        calipers: a text, and the two ends [2, 2] as shares of the frame's width and height, of each measurement.
    """

    title: str
    frame: NDArray[np.uint8]
    number: int
    aspect: float
    views: torch.Tensor
    calipers: tuple[tuple[str, NDArray[np.float64]], ...]


def preview(data: Path, out: Path, videos: int, settings: Mapping[str, Any], run: Path | None = None) -> None:
    """Draw samples of a data set, half of them abnormal if there are as many.

    The frame is the first one that has calipers (EchoNet-LVH's layout), else the middle one.

    Args:
        data: folder or table of the data set.
        out: PNG file.
        videos: how many.
        settings: of TrainConfig that differ from the run's, or without a run from the defaults.
        run: folder of a run, whose network reconstructs the frames; the videos are then those of its test split.

    Raises:
        CardioCapsError: the data, the run or the file cannot be used; or the network has no decoder.
    """
    config = (TrainConfig() if run is None else read_run(run)).resolved()
    config = replace(config, **{**settings, "data": data})
    study = read_study(config, needed_splits=("test",) if run is not None else ())
    chosen = _chosen(study.clips if run is None else study.clips_in("test"), videos)
    calipers = _calipers(study) if dataset_of(config) == "echonet-lvh" else {}
    samples, problems = [], []
    for clip in chosen:
        try:
            samples.append(_sample(clip, calipers.get(clip.name, ()), config.network.size))
        except VideoError as error:
            problems.append(Problem(clip.where, str(error)))
    if problems:
        print_line(summarise(problems))
    if not samples:
        raise DataError(f"preview: none of {len(chosen)} videos could be read")
    reconstructed = None if run is None else _reconstructed(config, run, samples)
    _draw(samples, reconstructed, out)
    print_line(f"{len(samples)} videos in {out}; the picture is a part of your data")


def _chosen(clips: tuple[Clip, ...], number: int) -> list[Clip]:
    """Normal and abnormal clips in turn, each video once, in the order of the data set."""
    by_label: dict[int, dict[Path, Clip]] = {0: {}, 1: {}}
    for clip in clips:
        by_label[clip.label].setdefault(clip.path, clip)
    normal, abnormal = (list(found.values()) for found in by_label.values())
    some = min(number // 2, len(abnormal))
    return [*normal[: number - some], *abnormal[:some]]


def _calipers(study: Study) -> dict[str, list[Row]]:
    """The rows of each video whose caliper has two ends."""
    table = read_measurements(study.root / FILE_NAME, max_bad_share=1.0, follow_links=True)
    found: dict[str, list[Row]] = {}
    for row in table.rows:
        if row.frame is not None and _ends(row) is not None:
            found.setdefault(row.name, []).append(row)
    return found


def _ends(row: Row) -> NDArray[np.float64] | None:
    """The ends of a caliper in pixels, [(x, y), (x, y)]; None if the table does not state them."""
    try:
        x1, x2, y1, y2 = (float(cell) for cell in row.points.split("\0"))
    except ValueError:
        return None
    ends = np.array([(x1, y1), (x2, y2)])
    return ends if np.isfinite(ends).all() else None


def _sample(clip: Clip, rows: list[Row] | tuple[()], size: int) -> Sample:
    """Raises VideoError."""
    header = probe(clip.path)
    number = int(choose_frames(header.frames, 1, "spread")[0])
    own = [row for row in rows if row.frame is not None and row.frame < header.frames]
    if own:
        assert own[0].frame is not None
        number = own[0].frame
    base = read_frames(clip.path, [number], base_side(size))
    sides = np.array([header.width, header.height])
    lines = []
    for row in own:
        ends = _ends(row)
        if row.frame == number and ends is not None:
            lines.append((f"{row.calc} {row.cm:.1f} cm", (ends + 0.5) / sides))
    return Sample(
        title=CLASSES[clip.label],
        frame=base[0],
        number=number,
        aspect=header.width / header.height,
        views=fixed_views(torch.from_numpy(base), size)[0],
        calipers=tuple(lines),
    )


def _reconstructed(config: TrainConfig, run: Path, samples: list[Sample]) -> torch.Tensor:
    """The reconstructions [n, 3, S, S] of a run's best network."""
    with machine_for(config) as machine:
        network = best_network(config, RunFolder.open(run), TrainedNetwork).model.eval().to(machine.device)
        with torch.inference_mode():
            found = [network(s.views[None].to(machine.device)).reconstruction for s in samples]
    if found[0] is None:
        raise DataError(f"preview: model {config.model!r} of the run has no decoder; expected one, or no --run")
    return torch.cat(found).float().cpu().clamp(0, 1)


def _draw(samples: list[Sample], reconstructed: torch.Tensor | None, out: Path) -> None:
    columns = 1 + len(_VIEWS) + (reconstructed is not None)
    figure = new_figure(2.6 * columns + 0.4, 2.5 * len(samples) + 0.8, "Samples of the data, as the network sees them")
    grid = figure.subplots(len(samples), columns, squeeze=False)
    for i, sample in enumerate(samples):
        extent = (0.0, sample.aspect, 1.0, 0.0)
        first = grid[i, 0]
        first.imshow(sample.frame.transpose(1, 2, 0), extent=extent)
        for k, (text, ends) in enumerate(sample.calipers):
            colour = _COLOURS[k % len(_COLOURS)]
            first.plot(*(ends * (sample.aspect, 1.0)).T, color=colour, linewidth=1.2, marker="_", markersize=6)
            first.text(0.02 * sample.aspect, 0.06 + 0.08 * k, text, color=colour, fontsize=7)
        first.set_title(f"{sample.title}, frame {sample.number}", fontsize=9)
        pictures = [*zip(_VIEWS, sample.views.unflatten(0, (3, 3)), strict=True)]
        if reconstructed is not None:
            pictures.append(("reconstruction of the full frame", reconstructed[i]))
        for axes, (title, picture) in zip(grid[i, 1:], pictures, strict=True):
            # The full frame is a square for the network; here it has its own shape again.
            whole = "full frame" in title
            axes.imshow(picture.permute(1, 2, 0).numpy(), extent=extent if whole else None)
            axes.set_title(title, fontsize=9)
        for axes in grid[i]:
            axes.set_axis_off()
    save(figure, out)
