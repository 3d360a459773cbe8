"""The reader of EchoNet-Dynamic's layout: `FileList.csv`, with a row for each video, and `Videos/NAME.avi`.

A video is abnormal if its ejection fraction is below 50 %, the limit by which Ouyang and coauthors (Nature
2020;580:252-256) judge their network. It is a research label rule, not a diagnosis.
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
from cardiocaps.data.listing import Item, Listing, make_study, numbered, read_rows, video_file, videos_in
from cardiocaps.data.study import Study
from cardiocaps.data.thresholds import with_given
from cardiocaps.errors import DataError, printable

FILE_NAME, VIDEOS = "FileList.csv", "Videos"

DYNAMIC_THRESHOLDS: Mapping[str, float] = {"ef": 50.0}
"""Measurement -> smallest normal value in percent."""

DYNAMIC_UNITS: Mapping[str, str] = {"ef": "percentage points", "esv": "mL", "edv": "mL"}
"""Regression target -> unit of its errors. Two ejection fractions, in percent, differ by percentage points."""

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
    listing, unlisted = _read(root, root, DYNAMIC_UNITS, rule["ef"], group_column, follow_links)
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


def _rule(threshold: float) -> str:
    return f"abnormal: an ejection fraction below {threshold:g} %"


def _read(
    root: Path,
    folder: Path,
    units: Mapping[str, str],
    threshold: float,
    group_column: str | None,
    follow_links: bool,
) -> tuple[Listing, int]:
    """The rows of the table in `folder`, and the number of videos beside it that it does not name."""
    table = folder / FILE_NAME
    file = printable(table.name)
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
        return Item(
            where,
            name,
            path,
            int(targets["ef"] < threshold),
            targets,
            claim,
            split=cell.get("Split", "").strip().lower(),
            group="" if group is None else cells[group].strip(),
            note="ESV above EDV (kept)" if backwards else "",
        )

    listing = read_rows(
        table,
        numbered(lines),
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
