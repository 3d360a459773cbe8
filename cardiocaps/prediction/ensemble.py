"""The networks of one or several runs, and what they say of a video together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cardiocaps.config import TrainConfig, read_run
from cardiocaps.data.cache import choose_frames
from cardiocaps.data.header import VideoError
from cardiocaps.data.remote_files import local_copy
from cardiocaps.data.video import probe, read_frames, regular_file
from cardiocaps.data.views import base_side, fixed_views
from cardiocaps.errors import CheckpointError, ConfigError
from cardiocaps.evaluation.calibration import Calibration, read_calibration
from cardiocaps.evaluation.decision import Decision, read_decision
from cardiocaps.evaluation.familiarity import FALSE_ALARMS, Familiarity, read_familiarity
from cardiocaps.evaluation.predictions import unit_of
from cardiocaps.metrics import Floats
from cardiocaps.prediction.inputs import Input
from cardiocaps.runtime.device import Machine
from cardiocaps.training.checkpoints import best_network, weights_digest
from cardiocaps.training.network import TrainedNetwork
from cardiocaps.training.run_folder import RunFolder

UNLIKE, STILL, BLANK = "unlike-training-data", "still", "blank"
"""The flags of a video, besides those of a DICOM file (`cardiocaps.data.dicom.FLAGS`)."""


@dataclass(frozen=True)
class FrameSettings:
    """What a network sees of a video: `count` frames, chosen by `choice` (see `choose_frames`), of `size` pixels."""

    size: int
    count: int
    choice: str
    reader: str

    @classmethod
    def of(cls, config: TrainConfig) -> FrameSettings:
        assert config.frames_per_clip is not None
        choice = config.frame_choice or ("first" if config.protocol == "paper" else "spread")
        return cls(base_side(config.network.size), config.frames_per_clip, choice, config.video_reader)


@dataclass(frozen=True, eq=False)
class Frames:
    """Frames of a video: their numbers [n], and pixels uint8 [n, 3, S, S]."""

    numbers: NDArray[np.int64]
    pixels: NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Video:
    """A decoded video: how many frames it shows, its width over its height, the flags of its file, and the frames that
    the networks see."""

    length: int
    aspect: float
    flags: tuple[str, ...]
    frames: Mapping[FrameSettings, Frames]


@dataclass(frozen=True, eq=False)
class Member:
    """The best network of a run, with what the run keeps for it."""

    name: str
    config: TrainConfig
    network: TrainedNetwork
    weights: str
    decision: Decision
    calibration: Calibration
    familiarity: Familiarity | None

    @classmethod
    def load(cls, path: Path, machine: Machine, config: TrainConfig) -> Member:
        """Raises ConfigError or CheckpointError where the run cannot be used."""
        run = RunFolder.open(path)
        network = best_network(config, run, TrainedNetwork)
        weights, unit = weights_digest(network), unit_of(config)
        machine.lay_out(network.model)
        network.to(machine.device).eval()
        return cls(
            path.resolve().name,
            config,
            network,
            weights,
            read_decision(run.decision, weights) or Decision.unknown(unit, weights),
            read_calibration(run.calibration, weights) or Calibration("none", unit, weights),
            read_familiarity(run.familiarity, weights),
        )

    def say(self, videos: Sequence[Frames], machine: Machine) -> list[dict[str, Floats]]:
        """What the network says of each frame of each video: as `TrainedNetwork.of_frames`, float64 [n].

        Raises:
            CheckpointError: an output is not finite.
        """
        assert self.config.batch_size is not None
        pixels = np.concatenate([frames.pixels for frames in videos])
        said: dict[str, list[torch.Tensor]] = {}
        for first in range(0, len(pixels), self.config.batch_size):
            with torch.inference_mode(), self._precision(machine):
                image = self.image_of(pixels[first : first + self.config.batch_size], machine)
                for name, values in self.network.of_frames(image).items():
                    said.setdefault(name, []).append(values.cpu())
        if self.config.regression_target is None:
            said.pop("regression", None)  # the head that regresses was not trained
        out = {name: torch.cat(parts).double().numpy() for name, parts in said.items()}
        if not all(np.isfinite(values).all() for values in out.values()):
            raise CheckpointError(f"{self.name}: the network's output is not finite: its training diverged")
        ends = np.cumsum([len(frames.numbers) for frames in videos])[:-1]
        parts = {name: np.split(values, ends) for name, values in out.items()}
        return [{name: values[i] for name, values in parts.items()} for i in range(len(videos))]

    def image_of(self, pixels: NDArray[np.uint8], machine: Machine) -> torch.Tensor:
        """The network's input [n, 9, size, size] for frames [n, 3, S, S], in the fixed views of an evaluation."""
        image = fixed_views(torch.from_numpy(pixels).to(machine.device), self.config.network.size)
        return image.contiguous(memory_format=torch.channels_last) if machine.channels_last else image

    def _precision(self, machine: Machine) -> torch.autocast:
        return torch.autocast(machine.device, torch.bfloat16, enabled=self.config.precision == "bf16")


@dataclass(frozen=True, eq=False)
class Ensemble:
    """The networks of runs. Its numbers are means over them."""

    members: tuple[Member, ...]
    machine: Machine
    unit: str  # of the regression

    @property
    def target(self) -> str:
        """What is regressed, with its unit: the name of a column."""
        target = self.members[0].config.regression_target or "regression"
        unit = {"%": "percent"}.get(self.unit, self.unit)
        return f"{target}_{unit}" if unit else target

    @property
    def regresses_alone(self) -> bool:
        """Whether the networks know no classes."""
        return self.members[0].config.task == "regression"

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that `score` gives to the row of a video."""
        read = ("frames", "frames_used")
        several = len(self.members) > 1
        fits = ("p_like_training_data", "flags")
        if self.regresses_alone:
            return (*read, self.target, *(["regression_sd"] if several else []), *fits)
        classes = ("probability", "calibrated_probability", *(["probability_sd"] if several else []))
        return (*read, *classes, "threshold", "decision", self.target, *fits)

    @property
    def frame_columns(self) -> tuple[str, ...]:
        """The columns that `score` gives to the row of a frame."""
        return ("frame", self.target) if self.regresses_alone else ("frame", "probability", self.target)

    @property
    def identity(self) -> list[dict[str, Any]]:
        """What decides the results, for each network."""

        def of(member: Member) -> dict[str, Any]:
            decides = {
                "threshold": member.decision.threshold,
                "threshold_rule": member.decision.rule,
                "calibration": member.calibration.method,
            }
            return {
                "run": member.name,
                "weights": member.weights,
                **({} if self.regresses_alone else decides),
                "knows_its_data": member.familiarity is not None,
            }

        return [of(member) for member in self.members]

    def read(self, video: Input, follow_links: bool = False) -> Video | str:
        """The frames that the networks see of a video, or the reason why it cannot be read."""
        try:
            if video.url is None:
                return self._decode(regular_file(video.path, video.root, follow_links))
            with local_copy(video.url) as path:
                return self._decode(path)
        except VideoError as error:
            return str(error)

    def _decode(self, path: Path) -> Video:
        """Raises VideoError."""
        header = probe(path)
        flags = header.flags.split()
        frames = {}
        for settings in {FrameSettings.of(member.config) for member in self.members}:
            numbers = choose_frames(header.frames, settings.count, settings.choice)
            frames[settings] = Frames(numbers, read_frames(path, numbers, settings.size, settings.reader, flags))
        return Video(header.frames, header.width / header.height, tuple(flags), frames)

    @property
    def group(self) -> int:
        """The number of videos whose frames fill a batch."""
        config = self.members[0].config
        assert config.batch_size is not None and config.frames_per_clip is not None
        return -(-config.batch_size // config.frames_per_clip)

    def score(self, videos: Sequence[Video]) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
        """Of each video the row, and the rows of its frames where all networks see the same frames (else none).

        Raises:
            CheckpointError: an output is not finite.
        """
        if not videos:
            return []
        settings = [FrameSettings.of(member.config) for member in self.members]
        said = [
            member.say([video.frames[of] for video in videos], self.machine)
            for member, of in zip(self.members, settings, strict=True)
        ]
        return [
            self._rows(video, [video.frames[of] for of in settings], [of_member[i] for of_member in said])
            for i, video in enumerate(videos)
        ]

    def _rows(
        self, video: Video, seen: Sequence[Frames], said: Sequence[Mapping[str, Floats]]
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        means = [{name: float(values.mean()) for name, values in one.items()} for one in said]
        unlike = self._p_value(means)
        found = {
            UNLIKE: unlike is not None and unlike <= FALSE_ALARMS,
            STILL: video.length == 1,
            BLANK: all(np.ptp(frames.pixels) == 0 for frames in seen),
        }
        flags = dict.fromkeys([*(flag for flag, is_so in found.items() if is_so), *video.flags])
        row: dict[str, Any] = {
            "frames": video.length,
            "frames_used": max(len(frames.numbers) for frames in seen),
            **(self._regressed(means) if self.regresses_alone else self._decided(means)),
            self.target: _mean_of(means, "regression"),
            "p_like_training_data": unlike,
            "flags": " ".join(flags),
        }
        frames = seen[0] if all(x is seen[0] for x in seen) else None
        rows = []
        for i, number in enumerate(() if frames is None else frames.numbers.tolist()):
            values = [{name: float(x[i]) for name, x in one.items()} for one in said]
            of_frame = {"frame": number, self.target: _mean_of(values, "regression")}
            rows.append(
                of_frame if self.regresses_alone else {**of_frame, "probability": _mean_of(values, "probability")}
            )
        return row, rows

    def _decided(self, means: Sequence[Mapping[str, float]]) -> dict[str, Any]:
        probabilities = [mean["probability"] for mean in means]
        probability, threshold = fmean(probabilities), fmean(m.decision.threshold for m in self.members)
        calibrated = [float(m.calibration(p)) for m, p in zip(self.members, probabilities, strict=True)]
        return {
            "probability": probability,
            "calibrated_probability": fmean(calibrated),
            "probability_sd": pstdev(probabilities) if len(self.members) > 1 else None,
            "threshold": threshold,
            "decision": int(probability > threshold),
        }

    def _regressed(self, means: Sequence[Mapping[str, float]]) -> dict[str, Any]:
        values = [mean["regression"] for mean in means]
        return {"regression_sd": pstdev(values) if len(values) > 1 else None}

    def _p_value(self, means: Sequence[Mapping[str, float]]) -> float | None:
        """How well the video fits the training data, from 0 to 1; None if no run can tell.

        Of several runs the least counts, times their number (Bonferroni), which keeps the rate of false alarms.
        """
        values = [
            member.familiarity.p_value(mean["reconstruction_error"])
            for member, mean in zip(self.members, means, strict=True)
            if member.familiarity is not None and "reconstruction_error" in mean
        ]
        return min(1.0, min(values) * len(values)) if values else None


def load(paths: Sequence[Path], machine: Machine, changed: Mapping[str, Any]) -> Ensemble:
    """The ensemble of some runs.

    Args:
        changed: settings that differ from the runs'.

    Raises:
        ConfigError: a path is not a run, a run is given twice, or the runs regress different things.
        CheckpointError: a file of a run is missing or damaged.
    """
    members = tuple(Member.load(path, machine, replace(read_run(path), **changed)) for path in paths)
    seen: dict[str, str] = {}
    for member in members:
        if member.weights in seen:
            raise ConfigError(f"RUN: {member.name} has the same weights as {seen[member.weights]}")
        seen[member.weights] = member.name
    tasks = {member.config.task == "regression" for member in members}
    if len(tasks) > 1:
        raise ConfigError("RUN: some runs regress alone and others know classes; expected one and the same task")
    targets = {str(member.config.regression_target) for member in members}
    if len(targets) > 1:
        raise ConfigError(f"RUN: the runs regress {' and '.join(sorted(targets))}; expected one and the same")
    return Ensemble(members, machine, regression_unit(paths[0]))


def regression_unit(path: Path) -> str:
    """The unit of a run's regression; "" if the run has not been evaluated, or does not regress."""
    import json

    try:
        content = json.loads(RunFolder(path).metrics_json.read_text(encoding="utf-8"))
        return str(content["network"]["regression"]["unit"])
    except (OSError, ValueError, LookupError, TypeError):
        return ""


def _mean_of(said: Sequence[Mapping[str, float]], name: str) -> float | None:
    """None if a network does not say it."""
    return fmean(one[name] for one in said) if all(name in one for one in said) else None
