"""How well the maps point at what makes the label, measured on the test videos of a phantom, whose anatomy is known.

By method, for the class that is decided, as means over videos with bootstrap intervals (percentiles, over videos):

* mass: the share of the map's positive mass on the left ventricle (its cavity and walls), of the frame as a whole.
* pointing: the share of frames whose largest value lies there (Zhang et al. 2018).
* deletion, insertion: the area under the probability of the class while pixels of the network's input are made black,
  or brought back into a black input, in the order of the map (Petsiuk et al. 2018); of the middle frame.

Each is compared with chance, video by video: for mass and pointing an even map over the sector of the ultrasound, for
deletion and insertion a smooth random map. Beside the methods stands the brightness of the frame, which knows no
network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import interpolate

from cardiocaps import DISCLAIMER
from cardiocaps.config import read_run
from cardiocaps.errors import ConfigError, DataError, printable
from cardiocaps.explanation.maps import check_explainable, maps_of, methods_for
from cardiocaps.phantom import Variant, phantom_is_complete
from cardiocaps.phantom.masks import Mask, sector_and_ventricle
from cardiocaps.phantom.patients import Patient, plan
from cardiocaps.prediction.ensemble import FrameSettings, Member, Video, load
from cardiocaps.prediction.inputs import Input
from cardiocaps.runtime.device import Machine, machine_for
from cardiocaps.runtime.files import lock_folder, output_errors, write_csv
from cardiocaps.runtime.program import print_line
from cardiocaps.runtime.progress import shown
from cardiocaps.runtime.quiet import quiet

_STEPS = 16
_RESAMPLES = 2000
_CELLS = 8
"""Side of the grid of random numbers that a smooth random map is interpolated from."""
_MORE_IS_BETTER = {"mass": True, "pointing": True, "deletion": False, "insertion": True}
_BRIGHTNESS = "brightness"

Floats = NDArray[np.float64]


def measure(run: Path, out: Path, changed: Mapping[str, Any], methods: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Write `measures.csv`, and `measures_by_video.csv` with what it is the mean of.

    Args:
        run: folder of a run that was trained on the phantom.
        out: folder of the results.
        changed: settings that differ from the run's.
        methods: names of `maps.METHODS`; none: all that the network allows.

    Returns:
        The rows of `measures.csv`.

    Raises:
        CardioCapsError: the run, its phantom or the folder cannot be used.
    """
    quiet()
    config = replace(read_run(run), **changed)
    if config.data is not None:
        raise ConfigError("--measure needs a run on the phantom, whose anatomy is known; this run has other data")
    root, videos, seed = config.phantom_dir, config.phantom_videos, config.phantom_seed
    variant = Variant.of(config)
    if not phantom_is_complete(root, videos, seed, variant):
        raise DataError(f"phantom_dir: {printable(root)} does not hold the phantom that the run used")
    if config.split_seed is not None or config.protocol != "video":
        raise ConfigError("--measure needs a run with the phantom's own split; this run drew another")
    patients = [patient for patient in plan(videos, seed, variant) if patient.split == "test"]
    rows: list[dict[str, Any]] = []
    with machine_for(config) as machine:
        ensemble = load([run], machine, changed)
        check_explainable(ensemble)
        (member,) = ensemble.members
        methods = methods_for(member.network.model, methods)
        for patient in shown(patients, len(patients), "measuring") if config.progress else patients:
            video = ensemble.read(Input(patient.video, root / patient.video, root))
            if isinstance(video, str):
                raise DataError(f"{patient.video}: {video}")
            ((row, _),) = ensemble.score([video])
            rows += of_video(member, machine, patient, video, row["decision"], methods)
    means = summary(rows)
    with output_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    with lock_folder(out):
        write_csv(out / "measures_by_video.csv", rows)
        write_csv(out / "measures.csv", means, digits=4)
    print_line(table(means))
    print_line(f"{len(patients)} test videos; written to {printable(out)}. {DISCLAIMER}")
    return means


def of_video(
    member: Member, machine: Machine, patient: Patient, video: Video, label: int, methods: Sequence[str]
) -> list[dict[str, Any]]:
    """A row for each method and measure of a video: its value, and that of chance."""
    seen = video.frames[FrameSettings.of(member.config)]
    maps: dict[str, NDArray[Any]] = dict(maps_of(member, machine, seen.pixels, label, methods))
    images = member.image_of(seen.pixels, machine)
    maps[_BRIGHTNESS] = images[:, :3].mean(dim=1).cpu().numpy()
    size = images.shape[-1]
    masks = [sector_and_ventricle(patient, int(frame), size) for frame in seen.numbers]
    middle = len(masks) // 2
    rng = torch.Generator().manual_seed(patient.index)
    cells = torch.rand(1, 1, _CELLS, _CELLS, generator=rng)
    random = interpolate(cells, (size, size), mode="bilinear", align_corners=False)[0, 0].numpy()
    probability = _probability(member, label)
    chance = [float((ventricle & sector).sum() / sector.sum()) for sector, ventricle in masks]
    by_chance = area_under(probability, images[middle], random)
    rows = []
    for name, values in maps.items():
        deletion, insertion = area_under(probability, images[middle], values[middle])
        found: dict[str, tuple[Any, Any]] = {
            "mass": (np.mean([mass_on(one, m[1]) for one, m in zip(values, masks, strict=True)]), np.mean(chance)),
            "pointing": (
                np.mean([points_at(one, m[1]) for one, m in zip(values, masks, strict=True)]),
                np.mean(chance),
            ),
            "deletion": (deletion, by_chance[0]),
            "insertion": (insertion, by_chance[1]),
        }
        for what, (value, expected) in found.items():
            about = {"video": patient.name, "kind": patient.kind, "class": label, "method": name, "measure": what}
            rows.append({**about, "value": float(value), "chance": float(expected)})
    return rows


def mass_on(values: NDArray[Any], mask: Mask) -> float:
    """The share of a map's positive mass on a mask; 0 if there is no positive mass."""
    mass = np.maximum(values, 0).astype(np.float64)
    total = float(mass.sum())
    return float(mass[mask].sum()) / total if total > 0 else 0.0


def points_at(values: NDArray[Any], mask: Mask) -> float:
    """1 if the largest value of a map lies on a mask, else 0. Of several the share that does; 0 if none is positive."""
    most = values.max()
    return float(mask[values == most].mean()) if most > 0 else 0.0


def area_under(
    probability: Callable[[torch.Tensor], torch.Tensor], image: torch.Tensor, values: NDArray[Any]
) -> tuple[float, float]:
    """The areas under the curves of deletion and of insertion.

    Args:
        probability: of images [n, C, S, S], [n].
        image: [C, S, S].
        values: a map [S, S]; its largest values go first.

    Returns:
        Both areas, in [0, 1].
    """
    rank = np.empty(values.size, np.int64)
    rank[np.argsort(-values, axis=None, kind="stable")] = np.arange(values.size)
    at = torch.linspace(0, values.size, _STEPS + 1).round().long()
    first = (torch.from_numpy(rank).view(1, *image.shape[1:]) < at[:, None, None]).to(image.device)[:, None]
    deleted, inserted = image.masked_fill(first, 0), image.masked_fill(~first, 0)
    deletion, insertion = (
        float(torch.trapezoid(probability(x).double().cpu(), dx=1 / _STEPS)) for x in (deleted, inserted)
    )
    return deletion, insertion


def _probability(member: Member, label: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Of a class, in batches of the run."""
    assert member.config.batch_size is not None
    size = member.config.batch_size

    def of(images: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            p = torch.cat([member.network.of_frames(part)["probability"] for part in images.split(size)])
        return p if label == 1 else 1 - p

    return of


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The means over videos with 95 % intervals, and whether the difference to chance is above 0.

    Returns:
        For each method and measure: n, value, low, high, chance, gain (how much better than chance), gain_low,
        gain_high and verdict.
    """
    found = []
    for method, what in dict.fromkeys((row["method"], row["measure"]) for row in rows):
        of = [row for row in rows if row["method"] == method and row["measure"] == what]
        value, chance = (np.array([row[name] for row in of], np.float64) for name in ("value", "chance"))
        gain = (value - chance) * (1 if _MORE_IS_BETTER[what] else -1)
        low, high = _interval(value)
        gain_low, gain_high = _interval(gain)
        verdict = "better than chance" if gain_low > 0 else "no better than chance"
        verdict = "worse than chance" if gain_high < 0 else verdict
        numbers = {"n": len(of), "value": float(value.mean()), "low": low, "high": high, "chance": float(chance.mean())}
        gains = {"gain": float(gain.mean()), "gain_low": gain_low, "gain_high": gain_high}
        found.append({"method": method, "measure": what, **numbers, **gains, "verdict": verdict})
    return found


def _interval(values: Floats) -> tuple[float, float]:
    """The bootstrap percentile interval of a mean."""
    drawn = np.random.default_rng(0).integers(len(values), size=(_RESAMPLES, len(values)))
    low, high = np.percentile(values[drawn].mean(axis=1), (2.5, 97.5))
    return float(low), float(high)


def table(means: Sequence[Mapping[str, Any]]) -> str:
    """The means as a table in Markdown."""
    lines = ["| method | measure | mean (95 % interval) | chance | |", "|---|---|---|---|---|"]
    for row in means:
        number = f"{row['value']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
        lines.append(f"| {row['method']} | {row['measure']} | {number} | {row['chance']:.3f} | {row['verdict']} |")
    return "\n".join(lines)
