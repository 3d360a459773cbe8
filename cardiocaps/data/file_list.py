"""The readers of EchoNet-Dynamic and EchoNet-Pediatric: `FileList.csv`, a row for each video, and `Videos/NAME.avi`.

EchoNet-Pediatric has these in a folder for each view. A video is abnormal if its ejection fraction is below 50 %
(Dynamic) or 55 % (Pediatric). The thresholds are research label rules, not diagnoses; docs/data-sets.md says where they
come from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cardiocaps.data.cells import (
    MAX_FPS,
    RowError,
    blank,
    claimed,
    find_columns,
    find_group,
    number,
    records,
    video_name,
    whole,
)
from cardiocaps.data.header import MAX_FRAMES, MAX_SIDE, Header
from cardiocaps.data.listing import Item, Listing, check_folder, make_study, numbered, read_rows, video_file, videos_in
from cardiocaps.data.study import Study
from cardiocaps.data.thresholds import with_given
from cardiocaps.errors import ConfigError, DataError, printable

FILE_NAME, VIDEOS = "FileList.csv", "Videos"

DYNAMIC_THRESHOLDS: Mapping[str, float] = {"ef": 50.0}
"""Measurement -> smallest normal value in percent."""

PEDIATRIC_THRESHOLDS: Mapping[str, float] = {"ef": 55.0}
"""As DYNAMIC_THRESHOLDS."""

DYNAMIC_UNITS: Mapping[str, str] = {"ef": "percentage points", "esv": "mL", "edv": "mL"}
"""Regression target -> unit of its errors. Two ejection fractions, in percent, differ by percentage points."""

PEDIATRIC_UNITS: Mapping[str, str] = {"ef": "percentage points"}
"""As DYNAMIC_UNITS: the table has no volumes."""

VIEWS = ("A4C", "PSAX")
"""The views of EchoNet-Pediatric, apical four-chamber and parasternal short-axis: each is a folder."""

FOLDS = 10
"""Number of folds that EchoNet-Pediatric's videos are split into."""

MAX_VOLUME = 2000.0
"""The largest volume of a left ventricle in mL that is believed; dilated ones reach some hundreds."""

_CLAIMS = ("NumberOfFrames", "FrameWidth", "FrameHeight", "FPS")
_PERCENT = (0.01, 100.0)


def read_dynamic(
    root: Path | str,
    *,
    thresholds: Mapping[str, float] | None = None,
    group_column: str | None = None,
    follow_links: bool = False,
    **how: Any,
) -> Study:
    """Read a folder in EchoNet-Dynamic's layout.

    Args:
        root: holds `FileList.csv` with the columns FileName, EF (percent), ESV and EDV (mL) and, if the videos are to
            be compared with it, FrameHeight, FrameWidth, FPS and NumberOfFrames; and the videos in `Videos`.
        thresholds: {"ef": smallest normal ejection fraction in percent}; None: DYNAMIC_THRESHOLDS.
        group_column: the table's column that names patients or studies; see `cells.find_group`.
        follow_links: the table and the videos may be links that leave the folder.
        how: the other arguments of `listing.make_study`, from `split` on.

    Raises:
        DataError: the folder or the table cannot be used; or as `listing.make_study`.
        ConfigError: no such threshold or column.
    """
    root = Path(root)
    rule = with_given(DYNAMIC_THRESHOLDS, thresholds, _PERCENT, "%")
    check_folder(root)
    listing, unlisted = _read(root, "", DYNAMIC_UNITS, rule["ef"], group_column, follow_links)
    return make_study(
        root,
        [listing],
        label_rule=rule,
        rule=_rule(rule["ef"]),
        units=DYNAMIC_UNITS,
        unlisted=unlisted,
        group_column=group_column,
        **how,
    )


def read_pediatric(
    root: Path | str,
    *,
    view: str = VIEWS[0],
    val_fold: int = 8,
    test_fold: int = 9,
    thresholds: Mapping[str, float] | None = None,
    group_column: str | None = None,
    follow_links: bool = False,
    **how: Any,
) -> Study:
    """Read a folder in EchoNet-Pediatric's layout.

    Args:
        root: holds a folder for each of VIEWS, each with `FileList.csv` and `Videos` as in EchoNet-Dynamic, without
            ESV and EDV; Split is the number of a fold.
        view: one of VIEWS, or "both". The videos are called VIEW/NAME.
        val_fold: the fold that is the validation split.
        test_fold: the fold that is the test split; all others are the training split.
        thresholds: {"ef": smallest normal ejection fraction in percent}; None: PEDIATRIC_THRESHOLDS.
        group_column: see `read_dynamic`.
        follow_links: likewise.
        how: likewise.

    Raises:
        DataError: as `read_dynamic`.
        ConfigError: as `read_dynamic`; or both folds are the same.
    """
    if val_fold == test_fold:
        raise ConfigError(f"val_fold is {val_fold}; expected another one than test_fold, which is the same")
    root = Path(root)
    rule = with_given(PEDIATRIC_THRESHOLDS, thresholds, _PERCENT, "%")
    check_folder(root)
    folds = dict.fromkeys(range(FOLDS), "train") | {val_fold: "val", test_fold: "test"}
    listings, unlisted = zip(
        *(
            _read(root, name, PEDIATRIC_UNITS, rule["ef"], group_column, follow_links, folds)
            for name in (VIEWS if view == "both" else (view,))
        ),
        strict=True,
    )
    if len({(listing.has_splits, listing.group_column) for listing in listings}) > 1:
        raise DataError(
            f"{FILE_NAME}: the tables of {' and '.join(VIEWS)} differ in their columns of splits or of patients; "
            "expected the same in both"
        )
    return make_study(
        root,
        listings,
        label_rule=rule,
        rule=_rule(rule["ef"]),
        units=PEDIATRIC_UNITS,
        unlisted=sum(unlisted),
        group_column=group_column,
        **how,
    )


def _rule(threshold: float) -> str:
    return f"abnormal: an ejection fraction below {threshold:g} %"


def _read(
    root: Path,
    view: str,
    units: Mapping[str, str],
    threshold: float,
    group_column: str | None,
    follow_links: bool,
    folds: Mapping[int, str] | None = None,
) -> tuple[Listing, int]:
    """The rows of a table, and the number of videos beside it that it does not name.

    Args:
        root: the data's folder.
        view: the folder of the table in it; "": the same.
        units: the targets that the table has.
        threshold: of the label rule.
        group_column: see `read_dynamic`.
        follow_links: likewise.
        folds: fold -> split, if the column Split names folds.
    """
    folder = root / view
    table = folder / FILE_NAME
    file = str(table.relative_to(root))
    lines = records(table, follow_links)
    _, header = next(lines, (0, []))
    required = ["FileName", *(target.upper() for target in units)]
    if not header:
        raise DataError(f"{file}: empty, expected the columns {', '.join(required)}")
    places = find_columns(header, file, required, ("Split", *_CLAIMS))
    group, kind = find_group(header, file, group_column)
    column = None if group is None else printable(header[group])
    try:
        found = videos_in([folder / VIDEOS])
    except OSError as error:
        raise DataError(f"{printable(folder / VIDEOS)}: {error.strerror}") from None
    named: set[str] = set()

    def item(where: str, cells: Sequence[str]) -> Item:
        cell = {name: cells[place] for name, place in places.items()}
        name = video_name("FileName", cell["FileName"])
        named.add(name)
        targets = {target: _measured(target, cell[target.upper()]) for target in units}
        if math.isnan(targets["ef"]):
            raise RowError("EF is blank")
        claim = Header(
            whole("NumberOfFrames", claimed("NumberOfFrames", cell, MAX_FRAMES)),
            whole("FrameWidth", claimed("FrameWidth", cell, MAX_SIDE)),
            whole("FrameHeight", claimed("FrameHeight", cell, MAX_SIDE)),
            claimed("FPS", cell, MAX_FPS),
        )
        path = video_file(found.get(name, ()), root, follow_links)
        backwards = targets.get("esv", 0.0) > targets.get("edv", math.inf)
        split = cell.get("Split", "").strip().lower()
        if folds is not None and split:
            split = folds.get(whole("Split", number("Split", split)), "")
            if not split:
                raise RowError(f"Split out of range: allowed are the folds 0 to {FOLDS - 1}")
        return Item(
            where,
            f"{view}/{name}" if view else name,
            path,
            int(targets["ef"] < threshold),
            targets,
            claim,
            split=split,
            group="" if group is None else cells[group].strip(),
            note="ESV above EDV (kept)" if backwards else "",
        )

    listing = read_rows(
        table,
        numbered(lines, f"{view} " if view else ""),
        len(header),
        item,
        has_splits="Split" in places,
        group_column=column,
        group_kind=kind,
    )
    return listing, len(found.keys() - named)


def _measured(target: str, text: str) -> float:
    """The value of a target; NaN if its cell is blank. Raises RowError if it is impossible."""
    if blank(text):
        return math.nan
    column, unit, most = target.upper(), "%" if target == "ef" else "mL", 100.0 if target == "ef" else MAX_VOLUME
    value = number(column, text)
    if not 0 < value <= most:
        raise RowError(f"{column} out of range: {value:.6g} {unit} (allowed: above 0, at most {most:g})")
    return value
