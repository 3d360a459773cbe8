"""The general types of a data set: a clip and a study."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from cardiocaps.data import splits
from cardiocaps.data.header import Header
from cardiocaps.data.problems import Problem, summarise
from cardiocaps.errors import ConfigError, plural, printable


@dataclass(frozen=True)
class Clip:
    """What one label stands for: a video, or a row of the table (protocol `paper`)."""

    name: str
    path: Path
    split: str  # "train", "val", "test"; "mixed" in the paper protocol, which splits frames
    label: int  # 1 = abnormal; 0 if the study has no labels
    targets: Mapping[str, float]  # what can be regressed, by the names in `Study.units`; NaN: not measured
    measurements: Mapping[str, float]  # name -> value, the mean if measured on several frames
    # A key made up for this study, the same for all videos of a patient; None if the table names no patients. Patients
    # are counted and drawn by it. It is never shown or written.
    patient: str | None = field(default=None, repr=False)
    shown_as: str = field(default="", compare=False)  # what messages call it, if its name may say who the patient is

    @property
    def where(self) -> str:
        """What messages call the clip."""
        return self.shown_as or self.name


@dataclass(frozen=True)
class Study:
    """The usable clips of a data set, and what was left out and why."""

    root: Path  # the folder
    table: Path  # the file in it that holds the labels
    protocol: str
    split_rule: str  # "column", "stratified" or "frames"
    clips: tuple[Clip, ...]
    problems: tuple[Problem, ...]
    claims: Mapping[str, Header]  # video name -> what the table says about the video
    unlisted: int  # number of videos in the folder that the table does not name
    label_rule: Mapping[str, float]  # measurement -> its threshold; empty if the table gives the labels themselves
    units: Mapping[str, str]  # regression target -> unit of its errors, the usual target first; empty: there is none
    rule: str = ""  # the label rule in words, a line of the summary
    further_tables: tuple[Path, ...] = ()  # of a data set with several tables
    needed_splits: tuple[str, ...] = splits.SPLITS  # each of them must have clips of both classes
    group_column: str | None = None  # the table's column that names patients or studies
    group_kind: str = ""  # what it names: "patient", or "study" (of a patient on one day); "" without the column
    has_labels: bool = True

    def clips_in(self, split: str) -> tuple[Clip, ...]:
        """The clips that have frames in a split, in the order that a batch's `clip` counts them."""
        return tuple(clip for clip in self.clips if clip.split in (split, splits.MIXED))

    def check_splits(self) -> None:
        """Raise DataError unless each needed split (all clips, in the paper protocol) has clips, of both classes."""
        splits.check(
            {s: [clip.label for clip in self.clips_in(s)] for s in self.needed_splits}, "clips", self.has_labels
        )

    def of_target(self, wanted: str | None) -> Study:
        """The study for a regression alone: without labels, and without the clips that lack the target.

        Args:
            wanted: as in `target`.

        Raises:
            ConfigError: the data have no such target, or none at all.
            DataError: no clip of a needed split has it.
        """
        target = self.target(wanted)
        if target is None:
            raise ConfigError("task is 'regression'; expected classification, because the data have no target")
        lacking = [clip for clip in self.clips if math.isnan(clip.targets[target])]
        notes = [Problem(clip.where, f"{printable(target)} not measured (left out)", harmless=True) for clip in lacking]
        left_out = {id(clip) for clip in lacking}
        found = replace(
            self,
            clips=tuple(replace(clip, label=0) for clip in self.clips if id(clip) not in left_out),
            problems=(*self.problems, *notes),
            label_rule={},
            rule=f"no labels: regression of {printable(target)} alone",
            has_labels=False,
        )
        found.check_splits()
        return found

    def target(self, wanted: str | None) -> str | None:
        """The name of the regression target.

        Args:
            wanted: a name; None: the usual one.

        Returns:
            None if the data set has no target.

        Raises:
            ConfigError: it has no such target.
        """
        if wanted is None:
            return next(iter(self.units), None)
        if wanted not in self.units:
            names = f"one of {', '.join(self.units)}" if self.units else "none, because the data have no target"
            raise ConfigError(f"regression_target is {printable(wanted)!r}; expected {names}")
        return wanted

    def summary(self) -> str:
        """Some lines of text: clips and abnormal clips in each split, the label rule, and problems by kind."""
        rule = {
            "column": "by video, the table's own column",
            "stratified": "by video, drawn at random in each class",
            "frames": "over frames: it leaks",
        }[self.split_rule]
        lines = [f"{len(self.clips)} clips, protocol {self.protocol}, split {rule}"]
        for split in splits.SPLITS if self.split_rule != "frames" else ():
            lines.append(self._counted(split, self.clips_in(split)))
        if self.split_rule == "frames":
            lines.append(self._counted("all", self.clips))
        else:
            lines.append(f"  ({self._whose()})")
        if self.rule:
            lines.append(self.rule)
        if self.unlisted:
            lines.append(f"videos in the folder that the table does not name: {self.unlisted}")
        for what, harmless in (("problems", False), ("notes", True)):
            found = [problem for problem in self.problems if problem.harmless == harmless]
            if found:
                lines += [f"{len(found)} {what}:", summarise(found)]
        return "\n".join(lines)

    def _counted(self, split: str, clips: Sequence[Clip]) -> str:
        abnormal = f", {sum(clip.label for clip in clips)} abnormal" if self.has_labels else ""
        return f"  {split:5s} {len(clips):6d} clips{abnormal}"

    def _whose(self) -> str:
        """Whether videos of one patient are in different splits, as far as the table shows."""
        unknown = "videos of one patient may stand in different splits"
        if self.group_column is None:
            return f"the table names no patients: {unknown}"
        names = {clip.name: clip for clip in self.clips}
        groups = {name: clip.patient or name for name, clip in names.items()}
        apart = splits.divided({name: clip.split for name, clip in names.items()}, groups)
        of = f"{len(set(groups.values()))} {plural(self.group_kind)} of the column {self.group_column}"
        said = f"{len(apart)} of {of} stand in several splits" if apart else f"each of {of} stands in one split"
        return f"{said}; the table names no patients: {unknown}" if self.group_kind == "study" else said
