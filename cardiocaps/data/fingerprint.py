"""What a run was trained on, kept so that a change of the table or of the folder is noticed later.

For every video the split, the label, the targets and the file's bytes, under a digest of its name. Neither names nor
measured values are kept; but who already knows a name can find out whether it is among them, so the record is as
confidential as predictions.csv. Patients are kept as which videos belong together, for a digest of a short identifier
could be undone by trying all.

A video that was left out when the run began, because it could not be decoded, has no bytes here. It is left out when
the run goes on, too, whatever has become of it: it may have been the disk that failed. Only videos that the run was
trained on or is judged by must be there and unchanged.
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
_TEXT = {"fingerprint": str, "table": str, "protocol": str, "split_rule": str, "label_rule": dict, "videos": dict}


@dataclass(frozen=True)
class Fingerprint:
    """What a study consists of, in the order of its clips."""

    videos: Mapping[str, tuple[str, str, str, str]]  # digest of the name -> split, label, digest of targets, patient
    label_rule: Mapping[str, float]  # measurement -> smallest abnormal value in cm
    table: str  # SHA-256 of the table's bytes; "" where it cannot be read
    protocol: str
    split_rule: str
    contents: Mapping[str, str] = field(default_factory=dict)
    """Digest of the name -> digest of the file's bytes, of the videos that can be used; empty where nothing has been
    decoded yet."""

    @classmethod
    def of(cls, study: Study) -> Fingerprint:
        """The fingerprint of a study. A video with several clips (paper protocol) has a label and targets of each."""
        clips: dict[str, list[Clip]] = {}
        for clip in study.clips:
            clips.setdefault(_name_digest(clip.name), []).append(clip)
        patients: dict[str, str] = {}
        videos = {}
        for name, own in clips.items():
            patient = own[0].patient
            number = patients.setdefault(patient, str(len(patients))) if patient else "-"
            # Six digits, for the last ones of an average depend on the machine.
            targets = " ".join(f"{value:.6g}" for clip in own for value in clip.targets.values())
            videos[name] = own[0].split, "".join(str(clip.label) for clip in own), _digest(targets), number
        return cls(videos, dict(study.label_rule), _file_digest(study.table), study.protocol, study.split_rule)

    def with_contents(self, contents: Mapping[str, str]) -> Fingerprint:
        """The same, with the SHA-256 of the bytes of each video that could be decoded, by its name."""
        return replace(self, contents={_name_digest(name): sha256[:16] for name, sha256 in contents.items()})

    def as_used(self, study: Study) -> Study:
        """This study, read once more, without the videos that could not be used then, each with a note; any other study
        as it is."""
        if not self.contents or self.digest != Fingerprint.of(study).digest:
            return study
        unused = dict.fromkeys(clip.name for clip in study.clips if _name_digest(clip.name) not in self.contents)
        notes = [Problem(name, "left out as it was at first: it could not be used then", True) for name in unused]
        clips = tuple(clip for clip in study.clips if clip.name not in unused)
        return replace(study, clips=clips, problems=(*study.problems, *notes))

    @cached_property
    def digest(self) -> str:
        """16 hexadecimal digits of the videos' names, splits, labels, targets, patients and order, and the label rule:
        equal where `differences` finds nothing else than other contents."""
        return _digest(json.dumps([list(self.videos.items()), sorted(self.label_rule.items())]))

    @cached_property
    def digest_without_splits(self) -> str:
        """As `digest`, of the videos and the label rule alone: equal for two seeds of a split that is drawn. Patients
        are numbered by the order, and that is the splits'."""
        videos = sorted((name, label, targets) for name, (_, label, targets, _) in self.videos.items())
        return _digest(json.dumps([videos, sorted(self.label_rule.items())]))

    def has_seen(self, name: str, sha256: str | None) -> bool:
        """Whether a run on this study has trained or validated on a video, by its name or by its file's bytes. (Where
        frames are split, every video has frames in the training.)"""
        key = _name_digest(name)
        return (key in self.videos and self.videos[key][0] != "test") or (sha256 or "")[:16] in self._seen_contents

    @cached_property
    def _seen_contents(self) -> frozenset[str]:
        return frozenset(content for key, content in self.contents.items() if self.videos[key][0] != "test")

    def differences(self, now: Fingerprint) -> list[str]:
        """What has changed from this study to another, in words without names; empty where nothing has.

        Other bytes of the table are no difference by themselves: they may be a new column or line ends.
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
        """Plain values for JSON, a line a video."""
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
        """What `as_dict` gave. Raises ConfigError, beginning with `where`, for anything else."""
        if not isinstance(content, dict) or content.get("kind") != _KIND:
            raise ConfigError(f"{where} is no record of a run's data")
        if content.get("version") != _VERSION:
            raise ConfigError(f"{where} was written by another version of this program")
        if not all(isinstance(content.get(name), kind) for name, kind in _TEXT.items()):
            raise ConfigError(f"{where} is damaged")
        lines = {name: tuple(str(text).split(" ")) for name, text in content["videos"].items()}
        rule = {calc: math.inf if cm is None else cm for calc, cm in content["label_rule"].items()}
        if not all(len(x) == 5 for x in lines.values()) or not all(type(cm) in (int, float) for cm in rule.values()):
            raise ConfigError(f"{where} is damaged")
        videos: Any = {name: line[:4] for name, line in lines.items()}
        contents = {name: line[4] for name, line in lines.items() if line[4] != "-"}
        found = cls(videos, rule, content["table"], content["protocol"], content["split_rule"], contents)
        if found.digest != content["fingerprint"]:
            raise ConfigError(f"{where} is damaged: its videos do not have the fingerprint that it names")
        return found


def read_fingerprint(path: Path) -> Fingerprint | None:
    """The fingerprint in a file; None where there is no such file. Raises ConfigError where it is damaged."""
    try:
        # Anything else, a FIFO say, might be waited for.
        if path.exists() and not path.is_file():
            raise ConfigError(f"cannot read {printable(path)}: it is no file")
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"cannot read {printable(path)}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{printable(path)} is damaged: it is no JSON") from error
    return Fingerprint.from_dict(content, printable(path))


def _first_of_patient(patients: Iterable[str]) -> list[int]:
    """For each video the place of its patient's first video, which two studies can be compared by; -1 for none."""
    first: dict[str, int] = {}
    return [-1 if patient == "-" else first.setdefault(patient, i) for i, patient in enumerate(patients)]


def _count(n: int, what: str) -> str:
    """`3 videos changed their split`; "" for none."""
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
