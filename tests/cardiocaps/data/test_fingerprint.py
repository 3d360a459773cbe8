"""What a run remembers of its study: every change is said in words, and no name is shown."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cardiocaps.data.echonet_lvh.labels import THRESHOLDS
from cardiocaps.data.echonet_lvh.measurements import FILE_NAME
from cardiocaps.data.echonet_lvh.reader import UNITS
from cardiocaps.data.fingerprint import Fingerprint, read_fingerprint
from cardiocaps.data.study import Clip, Study
from cardiocaps.errors import ConfigError
from cardiocaps.runtime.files import write_json


def _clip(name: str, split: str, label: int, width: float) -> Clip:
    return Clip(name, Path(f"/data/{name}.avi"), split, label, {"width": width, "ef": math.nan}, {"LVIDd": width})


CLIPS = tuple(
    _clip(f"Doe^Jane{i}", split, i % 2, 4 + i / 10)
    for i, split in enumerate(("train", "train", "train", "val", "val", "test", "test"))
)


def _study(clips: tuple[Clip, ...] = CLIPS, root: Path = Path("/nowhere")) -> Study:
    return Study(root, root / FILE_NAME, "video", "column", clips, (), {}, 0, THRESHOLDS, UNITS)


def _changed(place: int, **values: object) -> tuple[Clip, ...]:
    clip = replace(CLIPS[place], **values)  # type: ignore[arg-type]
    return (*CLIPS[:place], clip, *CLIPS[place + 1 :])


@pytest.mark.parametrize(
    ("clips", "expected"),
    [
        (CLIPS, []),
        (_changed(0, split="test"), ["1 video changed its split"]),
        (_changed(3, label=0), ["1 video changed its label"]),
        (_changed(6, targets={"width": 4.6001, "ef": math.nan}), ["1 video changed its measurements"]),
        (_changed(6, targets={"width": 4.6, "ef": 60.0}), ["1 video changed its measurements"]),
        (_changed(6, targets={"width": 4.6 + 1e-12, "ef": math.nan}), []),  # the last digits of an average
        (_changed(2, name="another"), ["1 video was added", "1 video was removed"]),
        (CLIPS[2:], ["2 videos were removed"]),
        ((*CLIPS, _clip("more", "val", 0, 5.0)), ["1 video was added"]),
        (CLIPS[::-1], ["the videos are in another order"]),
        (
            tuple(replace(c, split={"train": "test", "test": "train"}.get(c.split, c.split)) for c in CLIPS[:-1]),
            ["4 videos changed their split", "1 video was removed"],
        ),
        (_changed(0, path=Path("/elsewhere/x.avi")), []),  # data may move
    ],
)
def test_what_changed_is_said(clips: tuple[Clip, ...], expected: list[str]) -> None:
    before, now = Fingerprint.of(_study()), Fingerprint.of(_study(clips))
    assert before.differences(now) == expected
    assert (before.digest == now.digest) == (not expected)


def test_names_composed_and_decomposed_are_one() -> None:
    one, other = (Fingerprint.of(_study(_changed(0, name=name))) for name in ("J\u00fcrgen", "Ju\u0308rgen"))
    assert one.differences(other) == []


def test_a_threshold_that_changed_is_named() -> None:
    before = Fingerprint.of(_study())
    now = replace(before, label_rule={**before.label_rule, "IVSd": math.inf})
    assert before.differences(now) == ["the thresholds of the labels changed (IVSd is inf, was 1.1)"]
    assert now.digest != before.digest


def test_patients_are_compared_by_who_belongs_together() -> None:
    def grouped(*patients: str) -> Fingerprint:
        before = Fingerprint.of(_study())
        videos = {
            name: (*values[:3], patient)
            for (name, values), patient in zip(before.videos.items(), patients, strict=True)
        }
        return replace(before, videos=videos)

    before = grouped("0", "0", "1", "1", "2", "-", "3")
    assert before.differences(grouped("5", "5", "4", "4", "2", "-", "8")) == []
    assert before.differences(grouped("0", "0", "1", "1", "1", "-", "3")) == ["1 video changed its patient"]


def test_the_paper_protocols_clips_of_one_video() -> None:
    clips = tuple(replace(clip, name="one", split="mixed") for clip in CLIPS)
    before = Fingerprint.of(_study(clips))
    assert len(before.videos) == 1
    now = Fingerprint.of(_study((*clips[:-1], replace(clips[-1], label=1))))
    assert before.differences(now) == ["1 video changed its label"]


def test_it_comes_back_from_json_and_names_nobody(tmp_path: Path) -> None:
    (tmp_path / "MeasurementsList.csv").write_text("a table")
    before = Fingerprint.of(_study(root=tmp_path))
    before = replace(before, label_rule={**before.label_rule, "RVDd": math.inf})
    write_json(tmp_path / "data.json", before.as_dict())
    text = (tmp_path / "data.json").read_text()
    assert Fingerprint.from_dict(json.loads(text), "data.json") == before
    assert len(before.table) == 64
    assert not any(part in text for part in ("Doe", "Jane", str(tmp_path), "4.1"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: [], "is not a record of a run's data"),
        (lambda d: {**d, "kind": "x"}, "is not a record of a run's data"),
        (lambda d: {**d, "version": 99}, "another version"),
        (lambda d: {**d, "videos": []}, "is damaged"),
        (lambda d: {**d, "label_rule": {"IVSd": "x"}}, "is damaged"),
        (lambda d: {**d, "videos": {"a": 1}}, "is damaged"),
        (lambda d: {**d, "videos": dict(list(d["videos"].items())[1:])}, "is damaged"),
        (lambda d: {name: x for name, x in d.items() if name != "table"}, "is damaged"),
    ],
)
def test_damage_is_noticed(damage: Callable[[dict[str, object]], object], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^data.json .*{message}"):
        Fingerprint.from_dict(damage(Fingerprint.of(_study()).as_dict()), "data.json")


def test_the_same_digest_on_every_machine() -> None:
    assert Fingerprint.of(_study()).digest == "9816ab3e3f34da18"


def test_what_was_left_out_at_first_is_left_out_again() -> None:
    contents = {clip.name: f"{i:064x}"[::-1] for i, clip in enumerate(CLIPS)}
    bad = CLIPS[1]
    before = Fingerprint.of(_study()).with_contents({n: sha for n, sha in contents.items() if n != bad.name})
    again = before.as_used(_study())
    assert again.clips == (*CLIPS[:1], *CLIPS[2:])
    assert [(problem.where, problem.harmless) for problem in again.problems] == [(bad.name, True)]
    # What a run does: the study of the table, and the contents of what was decoded.
    decoded = {clip.name: contents[clip.name] for clip in again.clips}
    assert before.differences(Fingerprint.of(_study()).with_contents(decoded)) == []
    lost = {name: sha for name, sha in decoded.items() if name != CLIPS[4].name}
    now = Fingerprint.of(_study()).with_contents({**lost, CLIPS[0].name: "f" * 64})
    assert before.differences(now) == ["1 video changed its content", "1 video can no longer be used"]
    # A study that differs, and one without a record of its decoding, are returned unchanged.
    other = _study(_changed(0, label=1))
    assert before.as_used(other) is other and Fingerprint.of(other).as_used(other) is other


def test_a_missing_record_is_none(tmp_path: Path) -> None:
    assert read_fingerprint(tmp_path / "data.json") is None
