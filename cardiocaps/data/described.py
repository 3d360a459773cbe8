"""What a data set holds and what is wrong with it, for `cardiocaps data`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from statistics import fmean, pstdev
from typing import Any

from cardiocaps.config import TrainConfig
from cardiocaps.data.datasets import DATASETS
from cardiocaps.data.open import dataset_of, read_study
from cardiocaps.data.splits import SPLITS, divided
from cardiocaps.data.study import Clip, Study
from cardiocaps.data.views import base_side
from cardiocaps.errors import DataError, plural, printable


def describe(config: TrainConfig) -> dict[str, Any]:
    """What a training with these settings would find, in types of JSON. No video is decoded.

    What such a training would refuse is said in the entry `refused`, and the data are described without that check.

    Raises:
        DataError: the data cannot be read at all.
        ConfigError: as `cardiocaps.data.open.read_study`.
    """
    assert config.data is not None and config.frames_per_clip is not None
    dataset = dataset_of(config)
    refused = None
    try:
        study = read_study(config)
    except DataError as error:
        study = read_study(replace(config, max_bad_share=1.0, allow_split_patients=True), needed_splits=())
        refused = str(error)
    study.target(config.regression_target)  # raises if it has none of this name
    videos = {clip.path: clip for clip in study.clips}
    side = base_side(config.network.size)
    frames = sum(_frames(study, clip, config.frames_per_clip) for clip in videos.values())
    return {
        "data": str(config.data),
        "dataset": dataset,
        "title": DATASETS[dataset].title,
        "protocol": study.protocol,
        "split": study.split_rule,
        "videos": len(videos),
        "splits": {split: _counts(study, study.clips_in(split)) for split in SPLITS}
        if study.split_rule != "frames"
        else None,
        "all": _counts(study, study.clips),
        "patients": _patients(study),
        "unlisted_videos": study.unlisted,
        "rule": study.rule,
        "targets": {name: {"unit": unit, **_statistics(study, name)} for name, unit in study.units.items()},
        "problems": _kinds(study, harmless=False),
        "notes": _kinds(study, harmless=True),
        "refused": refused,
        "cache_bytes": frames * 3 * side**2,
        "summary": study.summary(),
    }


def as_text(found: Mapping[str, Any]) -> str:
    """What `describe` returns, as lines."""
    lines = [f"{printable(found['data'])}: {found['title']} ({found['dataset']}), {found['videos']} videos"]
    lines.append(found["summary"])
    for name, x in found["targets"].items():
        spread = "" if x["mean"] is None else f": {x['mean']:.4g} ± {x['sd']:.3g} ({x['min']:.4g} to {x['max']:.4g})"
        lines.append(f"target {printable(name)}, {x['unit'] or 'without unit'}, of {x['n']} clips{spread}")
    lines.append(f"decoded frames in the cache: about {found['cache_bytes'] / 1e6:.1f} MB")
    if found["refused"]:
        lines.append(f"a training refuses these data: {found['refused']}")
    return "\n".join(lines)


def _frames(study: Study, clip: Clip, wanted: int) -> int:
    """The frames of a clip's video that are cached; if the table does not say how many it has, as many as wanted."""
    claim = study.claims.get(clip.name)
    return min(wanted, claim.frames) if claim is not None and claim.frames else wanted


def _counts(study: Study, clips: tuple[Clip, ...]) -> dict[str, int]:
    if not study.has_labels:
        return {"clips": len(clips)}
    abnormal = sum(clip.label for clip in clips)
    return {"clips": len(clips), "normal": len(clips) - abnormal, "abnormal": abnormal}


def _patients(study: Study) -> dict[str, Any] | None:
    """How many patients (or studies) there are, and how many stand in several splits; None if none are named."""
    if study.group_column is None:
        return None
    groups = {clip.name: clip.patient or clip.name for clip in study.clips}
    apart = [] if study.split_rule == "frames" else divided({clip.name: clip.split for clip in study.clips}, groups)
    return {
        "column": study.group_column,
        "of": plural(study.group_kind),
        "number": len(set(groups.values())),
        "in_several_splits": len(apart),
    }


def _statistics(study: Study, target: str) -> dict[str, float | int | None]:
    values = [x for clip in study.clips if math.isfinite(x := clip.targets.get(target, math.nan))]
    if not values:
        return {"n": 0, "mean": None, "sd": None, "min": None, "max": None}
    return {"n": len(values), "mean": fmean(values), "sd": pstdev(values), "min": min(values), "max": max(values)}


def _kinds(study: Study, *, harmless: bool) -> dict[str, int]:
    """The problems (or notes) by kind, most frequent first."""
    return dict(Counter(x.kind for x in study.problems if x.harmless == harmless).most_common())
