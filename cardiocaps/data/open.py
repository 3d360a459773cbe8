"""The data of a run: read from its folder, decoded, and compared with what the run was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cardiocaps.config import TRAINABLE_PHANTOM, TrainConfig, options
from cardiocaps.data import cache
from cardiocaps.data.datamodule import EchoDataModule
from cardiocaps.data.datasets import AUTO, DATASETS, OWN_SETTINGS, PHANTOM, choose
from cardiocaps.data.fingerprint import Fingerprint, read_fingerprint
from cardiocaps.data.study import Study
from cardiocaps.data.views import base_side
from cardiocaps.errors import ConfigError, DataError, printable
from cardiocaps.phantom import Variant, phantom_is_complete, write_phantom
from cardiocaps.runtime.device import Machine
from cardiocaps.runtime.files import is_missing, write_json
from cardiocaps.runtime.program import print_line


def read_study(
    config: TrainConfig, *, again: bool = False, needed_splits: Sequence[str] = ("train", "val", "test")
) -> Study:
    """Read the study of a run: from its folder, or from the phantom, which is made if it is missing.

    Args:
        config: settings of the run.
        again: the run has used the study before, so a missing phantom is an error: a new one might differ.
        needed_splits: each of them needs clips of both classes.

    Raises:
        DataError: as the reader; the run's folder or phantom is missing; or the folder's layout is not recognised.
        ConfigError: as the reader; or the data set does not have a setting that was given, or the target of the task.
        OutputError: as `write_phantom`.
    """
    root = config.data
    if again and root is not None and is_missing(root):
        raise DataError(f"data: {printable(root)}, which the run used, is not there; give --data, where it is now")
    if root is None:
        root, variant = config.phantom_dir, Variant.of(config)
        if not phantom_is_complete(root, config.phantom_videos, config.phantom_seed, variant):
            if again:
                how = f"--videos {config.phantom_videos} --seed {config.phantom_seed}{variant.command()}"
                raise DataError(
                    f"phantom_dir: {printable(root)} does not hold the phantom that the run used; give --data, where "
                    f"it is now, or make it again: python -m cardiocaps.phantom {printable(root)} {how}"
                )
            if config.phantom_videos < TRAINABLE_PHANTOM:
                raise ConfigError(
                    f"phantom_videos is {config.phantom_videos}; expected at least {TRAINABLE_PHANTOM}: fewer leave a "
                    "split without abnormal videos"
                )
            print_line(f"making {config.phantom_videos} phantom videos in {root}")
            write_phantom(root, config.phantom_videos, config.phantom_seed, progress=config.progress, variant=variant)
    dataset = dataset_of(config)
    row = DATASETS[dataset]
    for name in OWN_SETTINGS:
        value, usual = getattr(config, name), options()[name].default
        if name not in row.settings and value != usual:
            raise ConfigError(f"{name} is {value!r}; expected {usual}, because data set {dataset} has no such setting")
    study = row.read(
        root,
        **{name: getattr(config, name) for name in row.settings},
        split=config.split,
        seed=config.seed if config.split_seed is None else config.split_seed,
        max_bad_share=config.max_bad_share,
        limit=config.limit,
        thresholds=config.threshold,
        group_column=config.group_column,
        allow_split_patients=config.allow_split_patients,
        follow_links=config.follow_links,
        needed_splits=needed_splits,
        labels=config.task != "regression",
    )
    if config.task == "regression":
        return study.of_target(config.regression_target)
    return replace(study, units={}) if config.task == "classification" else study


def dataset_of(config: TrainConfig) -> str:
    """The name of the layout in which the data of a run are read. Raises DataError as `datasets.choose`."""
    return PHANTOM if config.data is None else choose(config.data, config.dataset, config.table)


def with_layout(config: TrainConfig) -> TrainConfig:
    """The settings with the layout of the data in place of "auto"; prints which it is.

    Raises:
        DataError: as `dataset_of`.
    """
    if config.dataset != AUTO or (config.data is not None and is_missing(config.data)):
        return config  # `read_study` says what to do about missing data
    dataset = dataset_of(config)
    if config.data is not None:
        print_line(f"data: {printable(config.data)} is read as {dataset}")
    return replace(config, dataset=dataset)  # type: ignore[arg-type]


def decoded(config: TrainConfig, study: Study, on: cache.Engine | None = None) -> cache.Cached:
    """A study with the frames that a run needs, in the cache. Raises as `cache.build`."""
    return cache.build(
        study,
        size=base_side(config.network.size),
        frames_per_clip=config.frames_per_clip,  # type: ignore[arg-type]
        frame_choice=config.frame_choice or ("first" if study.protocol == "paper" else "spread"),
        folder=config.cache_dir,
        max_bad_share=config.max_bad_share,
        workers=config.decode_workers,
        reader=config.video_reader,
        progress=config.progress,
        on=on,
    )


def decode(config: TrainConfig, machine: Machine, study: Study) -> EchoDataModule:
    """The data module of a study, after decoding.

    Raises:
        DataError: as `cache.build`; or a needed split lacks frames of a class.
        OutputError: as `cache.build`.
        ConfigError: the study has no such target, or a package is missing.
    """
    target = study.target(config.regression_target)
    return EchoDataModule(
        decoded(config, study),
        size=config.network.size,
        batch_size=config.batch_size,  # type: ignore[arg-type]
        target=target,
        seed=config.seed,
        split_seed=config.split_seed,
        num_workers=config.workers,
        pin_memory=machine.pin_memory,
        channels_last=machine.channels_last,
    )


@dataclass(frozen=True)
class RunData:
    """A decoded study on which a run is trained or judged."""

    data: EchoDataModule
    fingerprint: Fingerprint
    is_own: bool | None  # whether the run was trained on it; None if the run has no record of its data
    left_out: int = 0  # number of test videos left out because the run was trained or validated on them


def decode_for_run(
    config: TrainConfig,
    machine: Machine,
    study: Study,
    record: Path,
    advice: str,
    *,
    trained: bool,
    allow_changed: bool = False,
    keep: bool = False,
) -> RunData:
    """As `decode`, for a study that must be what the run's record of its data says.

    Args:
        record: the fingerprint of the run's data, `RunFolder.data`.
        advice: what to do if the study differs; the error message ends with it.
        trained: whether the run has trained already.
        allow_changed: print what has changed and go on, without test videos that the run was trained or validated on.
        keep: write the record where there is none yet.

    Raises:
        DataError: as `decode`; or the study has changed, or may have changed (a random split without a record); or no
            test video is left.
        OutputError: as `decode`.
        ConfigError: the record is damaged.
    """
    before, now = read_fingerprint(record), Fingerprint.of(study)
    if before is None:
        if trained:
            _note_no_record(study, "begin a new run" if keep else advice, allow_changed)
        data = decode(config, machine, study)
        now = now.with_contents(data.contents())
        if keep:
            write_json(record, now.as_dict())
        return RunData(data, now, False if allow_changed else None)
    if not allow_changed:
        _refuse_changes(before.differences(now), study, advice)  # before decoding, which takes long
    data = decode(config, machine, before.as_used(study))
    now = now.with_contents(data.contents())
    changes = before.differences(now)
    if not changes:
        if before.table != now.table:
            same = "its videos, splits, labels and targets have not"
            print_line(f"note: the table's file has changed since the run began; {same}")
        return RunData(data, now, True)
    if not allow_changed:
        _refuse_changes(changes, study, advice)
    print_line(f"note: the data of {study.root} are not what the run was trained on: {', '.join(changes)}")
    unseen, left_out = _without_seen(data.study, study, before, data.contents())
    if left_out:
        videos = "1 test video is" if left_out == 1 else f"{left_out} test videos are"
        print_line(f"note: {videos} left out: the run was trained or validated on the same ones, or on their patients")
        data = decode(config, machine, unseen)
    return RunData(data, now, False, left_out)


def _note_no_record(study: Study, advice: str, allow_changed: bool) -> None:
    """Print that a trained run has no record of its data. Raises DataError if its split may have changed."""
    forgotten = "this run kept no fingerprint of its data, as older versions did not"
    if study.split_rule != "stratified":
        print_line(f"note: {forgotten}: whether they have changed is unknown")
    elif allow_changed:
        print_line(f"note: {forgotten}, and its split is drawn anew: videos it was trained on may be tested on")
    else:
        # A random split depends on the usable videos, the patients and the limit, which versions treat differently.
        raise DataError(
            f"data: {printable(study.root)}: the split is random, and this run has no record of its data, so its "
            f"videos may now be in other splits; {advice}"
        )


def _without_seen(usable: Study, study: Study, before: Fingerprint, contents: Mapping[str, str]) -> tuple[Study, int]:
    """The `usable` part of a study without the test videos that are not new to a run on `before`, and their number.

    A video is not new if the run has trained or validated on it, or on a video of its patient.

    Raises:
        DataError: no test video is left.
    """
    seen = {clip.name: clip for clip in study.clips if before.has_seen(clip.name, contents.get(clip.name))}
    patients = {clip.patient for clip in seen.values() if clip.patient is not None}
    tested = {clip.name: clip for clip in usable.clips_in("test")}
    out = {name for name, clip in tested.items() if name in seen or clip.patient in patients}
    if tested and len(out) == len(tested):
        raise DataError(
            f"data: {printable(study.root)} has no test video that is new to the run: it was trained or validated on "
            f"all {len(out)}, or on their patients"
        )
    return replace(usable, clips=tuple(clip for clip in usable.clips if clip.name not in out)), len(out)


def _refuse_changes(changes: Sequence[str], study: Study, advice: str) -> None:
    if changes:
        raise DataError(
            f"data: {printable(study.root)} is not what the run was trained on: {', '.join(changes)}; {advice}"
        )
