"""A record of the data of a run, which shows later whether the table or the folder has changed.

It holds digests of each video's name, targets and bytes, its split and its label. Names and measured values are not
kept. Somebody who knows a name can find out whether the record holds it, so the record is as confidential as
predictions.csv. Patients are kept only as numbers: the digest of a short identifier could be inverted by trying all.

A video that could not be decoded when the run began has no digest of its bytes. It is also left out when the run goes
on, even if it can be decoded by then. All videos that the run trained on or is judged by must be present and unchanged.
"""

from __future__ import annotations

import hashlib
import json
import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from cardiocaps.data.problems import Problem
from cardiocaps.data.study import Clip, Study
from cardiocaps.errors import ConfigError, printable

_KIND, _VERSION = "cardiocaps data", 1
_FIELDS = ("split", "label", "measurements")


@dataclass(frozen=True)
class Fingerprint:
    """The content of a study, in the order of its clips."""

    videos: Mapping[str, tuple[str, str, str, str]]  # digest of the name -> split, label, digest of targets, patient
    label_rule: Mapping[str, float]  # measurement -> its threshold
    table: str  # SHA-256 of the table's bytes; "" if it cannot be read; of several tables, of their digests
    protocol: str
    split_rule: str
    contents: Mapping[str, str] = field(default_factory=dict)
    """Digest of the name -> digest of the file's bytes, of the usable videos; empty before decoding."""

    @classmethod
    def of(cls, study: Study) -> Fingerprint:
        """The fingerprint of a study. A video with several clips (paper protocol) has the labels and targets of all."""
        clips: dict[str, list[Clip]] = {}
        for clip in study.clips:
            clips.setdefault(_name_digest(clip.name), []).append(clip)
        patients: dict[str, str] = {}
        videos = {}
        for name, own in clips.items():
            patient = own[0].patient
            number = patients.setdefault(patient, str(len(patients))) if patient else "-"
            # Six digits, because the last digits of an average depend on the machine.
            targets = " ".join(f"{value:.6g}" for clip in own for value in clip.targets.values())
            videos[name] = own[0].split, "".join(str(clip.label) for clip in own), _digest(targets), number
        table, *further = (_file_digest(path) for path in (study.table, *study.further_tables))
        if further:
            table = hashlib.sha256(" ".join((table, *further)).encode()).hexdigest()
        return cls(videos, dict(study.label_rule), table, study.protocol, study.split_rule)

    def with_contents(self, contents: Mapping[str, str]) -> Fingerprint:
        """The same with `contents`: name -> SHA-256 of the bytes, of each video that could be decoded."""
        return replace(self, contents={_name_digest(name): sha256[:16] for name, sha256 in contents.items()})

    def as_used(self, study: Study) -> Study:
        """The study without the videos that could not be used when this record was made, each with a note.

        A study that differs from the record is returned unchanged.
        """
        if not self.contents or self.digest != Fingerprint.of(study).digest:
            return study
        unused = {clip.name: clip for clip in study.clips if _name_digest(clip.name) not in self.contents}
        why = "left out as it was at first: it could not be used then"
        notes = [Problem(clip.where, why, harmless=True) for clip in unused.values()]
        clips = tuple(clip for clip in study.clips if clip.name not in unused)
        return replace(study, clips=clips, problems=(*study.problems, *notes))

    @cached_property
    def digest(self) -> str:
        """16 hexadecimal digits, equal for two studies with the same videos, splits, labels, targets, patients, order
        and label rule."""
        return _digest(json.dumps([list(self.videos.items()), sorted(self.label_rule.items())]))

    @cached_property
    def digest_without_splits(self) -> str:
        """As `digest`, without splits and order: equal for two seeds of a random split.

        It leaves out patients too, because they are numbered in the order of the videos.
        """
        videos = sorted((name, label, targets) for name, (_, label, targets, _) in self.videos.items())
        return _digest(json.dumps([videos, sorted(self.label_rule.items())]))

    def has_seen(self, name: str, sha256: str | None) -> bool:
        """Whether a run on this study has trained or validated on the video of this name, or with these bytes."""
        key = _name_digest(name)
        return (key in self.videos and self.videos[key][0] != "test") or (sha256 or "")[:16] in self._seen_contents

    @cached_property
    def _seen_contents(self) -> frozenset[str]:
        return frozenset(content for key, content in self.contents.items() if self.videos[key][0] != "test")

    def differences(self, now: Fingerprint) -> list[str]:
        """The changes from this study to `now`, in words without names; empty if there are none.

        A table with other bytes is not a change by itself: it may have a new column or other line ends.
        """
        both = [name for name in self.videos if name in now.videos]
        found = [
            _count(sum(self.videos[name][place] != now.videos[name][place] for name in both), f"changed {{}} {what}")
            for place, what in enumerate(_FIELDS)
        ]
        patients = [_first_of_patient(of.videos[name][3] for name in both) for of in (self, now)]
        found += [
            _count(sum(x != y for x, y in zip(*patients, strict=True)), "changed {} patient"),
            *self._differences_of_contents(now, both),
            _count(len(now.videos) - len(both), "{be} added"),
            _count(len(self.videos) - len(both), "{be} removed"),
        ]
        if both != [name for name in now.videos if name in self.videos]:
            found.append("the videos are in another order")
        rules = [
            f"{calc} is {now.label_rule.get(calc)}, was {self.label_rule.get(calc)}"
            for calc in dict.fromkeys((*self.label_rule, *now.label_rule))
            if self.label_rule.get(calc) != now.label_rule.get(calc)
        ]
        if rules:
            found.append(f"the thresholds of the labels changed ({', '.join(rules)})")
        return [text for text in found if text]

    def _differences_of_contents(self, now: Fingerprint, both: Sequence[str]) -> list[str]:
        if not (self.contents and now.contents):
            return []
        pairs = [(self.contents.get(name), now.contents.get(name)) for name in both]
        return [
            _count(sum(x is not None and y is not None and x != y for x, y in pairs), "changed {} content"),
            _count(sum(x is not None and y is None for x, y in pairs), "can no longer be used"),
            _count(sum(x is None and y is not None for x, y in pairs), "can be used now"),
        ]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with a line for each video."""
        return {
            "kind": _KIND,
            "version": _VERSION,
            "fingerprint": self.digest,
            "table": self.table,
            "protocol": self.protocol,
            "split_rule": self.split_rule,
            "label_rule": {calc: None if math.isinf(cm) else cm for calc, cm in self.label_rule.items()},
            "videos": {n: " ".join((*values, self.contents.get(n, "-"))) for n, values in self.videos.items()},
        }

    @classmethod
    def from_dict(cls, content: Any, where: str) -> Fingerprint:
        """The inverse of `as_dict`. Raises ConfigError, whose text begins with `where`, for other content."""
        if not isinstance(content, dict) or content.get("kind") != _KIND:
            raise ConfigError(f"{where} is not a record of a run's data")
        if content.get("version") != _VERSION:
            raise ConfigError(f"{where} was written by another version of this program")
        try:
            lines = {name: tuple(text.split(" ")) for name, text in content["videos"].items()}
            videos: Any = {name: line[:4] for name, line in lines.items()}
            contents = {name: line[4] for name, line in lines.items() if line[4] != "-"}
            rule = {calc: math.inf if cm is None else cm for calc, cm in content["label_rule"].items()}
            found = cls(videos, rule, content["table"], content["protocol"], content["split_rule"], contents)
            right = found.digest == content["fingerprint"]
        except (AttributeError, KeyError, IndexError):
            right = False
        if not right:
            raise ConfigError(f"{where} is damaged")
        return found


def read_fingerprint(path: Path) -> Fingerprint | None:
    """The fingerprint in a file; None if the file does not exist. Raises ConfigError if it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"cannot read {printable(path)}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{printable(path)} is damaged: it is not JSON") from error
    return Fingerprint.from_dict(content, printable(path))


def _first_of_patient(patients: Iterable[str]) -> list[int]:
    """For each video the index of its patient's first video, or -1: the same in any numbering of the patients."""
    first: dict[str, int] = {}
    return [-1 if patient == "-" else first.setdefault(patient, i) for i, patient in enumerate(patients)]


def _count(n: int, what: str) -> str:
    """For example "3 videos changed their split"; "" for 0."""
    text = what.format("its" if n == 1 else "their", be="was" if n == 1 else "were")
    return f"{n} video{'' if n == 1 else 's'} {text}" if n else ""


def _name_digest(name: str) -> str:
    return _digest(unicodedata.normalize("NFC", name))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _file_digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""
