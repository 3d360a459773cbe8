"""The program `python -m cardiocaps.data.from_dicom IN OUT`: a folder of DICOM files becomes a data set of videos.

OUT gets `videos/NAME.avi`, grey and without what is burnt in beside the sector, and `videos.csv`, which has a row for
each file. Identifiers of patients, studies and images become keyed hashes (HMAC-SHA256): the same key gives the same
hash, and without the key nobody can try identifiers until one fits. The key is a file beside OUT, so that OUT can be
given away without it.

The videos are PNG in AVI: lossless, and of the lossless codecs that `cardiocaps.data.video` reads the one that always
shows damage. FFV1 takes a fifth less room, but its decoder does not report a damaged frame.

After an interruption the same command goes on: a row is kept if its file has the same path, size and time of change,
and its video is there. Files that could not be used are tried again.
"""

from __future__ import annotations

import csv
import hmac
import os
import secrets
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path

from cardiocaps.config import CommandLine, options
from cardiocaps.data.dicom import (
    READER_VERSION,
    Cine,
    NoPixelsError,
    Sector,
    find_sector,
    grey_frames,
    is_dicom,
    read_tags,
)
from cardiocaps.data.header import VideoError
from cardiocaps.data.problems import Problem, summarise
from cardiocaps.data.video import regular_file
from cardiocaps.errors import ConfigError, DataError, OutputError, printable
from cardiocaps.runtime.files import (
    atomic_write,
    is_unused,
    lock_folder,
    output_errors,
    read_json,
    remove_leftovers,
    write_csv,
    write_json,
)
from cardiocaps.runtime.packages import require_package
from cardiocaps.runtime.processes import cores, in_parallel
from cardiocaps.runtime.program import Interruption, print_line, run_program
from cardiocaps.runtime.progress import shown

TABLE = "videos.csv"
VIDEOS = "videos"
MARKER = "from_dicom.json"  # written first
COLUMNS = (
    *("path", "patient", "study", "frames", "width", "height", "fps", "cm_per_pixel_x", "cm_per_pixel_y"),
    *("flags", "problem", "source"),
)
_KIND, _VERSION = "cardiocaps from_dicom", 1
_SHORTEST_KEY = 32  # characters
_RATE = Fraction(25)  # of the AVI file if none is stated: the container needs one. The table's cell is empty
_SAVE_EVERY = 10.0  # seconds
_DIGITS = ".6g"

Row = dict[str, str]


@dataclass(frozen=True)
class Outcome:
    """What a conversion came to.

    Attributes:
        videos: rows of the table that have a video.
        made: those of them that were made now.
        bad: a problem for each DICOM image that could not be used; its place is the row's `source`.
        copies: further files with an image that is there already.
        others: DICOM files that are no image, such as reports.
        unlisted: videos in the folder that the table does not name, because their DICOM files are gone.
    """

    videos: int
    made: int
    bad: tuple[Problem, ...]
    copies: int
    others: int
    unlisted: int


def pseudonym(key: bytes, kind: str, identifier: str) -> str:
    """The keyed hash that stands for an identifier.

    Args:
        key: the content of the key file, without white space around it.
        kind: "patient", "study" or "image". A patient and a study with the same identifier have different hashes.
        identifier: PatientID (after IssuerOfPatientID and a backslash, if the file has an issuer), StudyInstanceUID or
            SOPInstanceUID.

    Returns:
        The first 32 hexadecimal digits of HMAC-SHA256.
    """
    return hmac.new(key, f"{kind}\0{identifier}".encode("utf-8", "surrogatepass"), "sha256").hexdigest()[:32]


def convert(
    root: Path,
    out: Path,
    *,
    key_file: Path | None = None,
    follow_links: bool = False,
    workers: int | None = None,
    progress: bool = False,
) -> Outcome:
    """Convert all DICOM files in a folder and its subfolders.

    Args:
        root: the folder. Files of other kinds in it are ignored.
        out: a new or empty folder, or one that this function has written with the same key.
        key_file: at least 32 characters. None: `OUT.key` beside `out`, which is made if it is missing.
        follow_links: files may be links that leave `root`.
        workers: threads; None: one for each core. The result does not depend on it.
        progress: show on standard error how many files are done.

    Raises:
        ConfigError: pydicom is not installed, the key cannot be used, or one folder is inside the other.
        DataError: there is no DICOM file.
        OutputError: `out` cannot be written, is being written by another process, or holds something else.
    """
    require_package("pydicom", "pydicom", "reading DICOM", extra="dicom")
    _check_folders(root, out, key_file)
    with output_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    with lock_folder(out):
        key = _claim(out, key_file)
        with output_errors(out):
            (out / VIDEOS).mkdir(exist_ok=True)
        remove_leftovers(out, out / VIDEOS)
        return _Conversion(root, out, key, follow_links, workers or cores(), progress).run()


class _Conversion:
    """The conversion of one folder into another that is locked."""

    def __init__(self, root: Path, out: Path, key: bytes, follow_links: bool, workers: int, progress: bool) -> None:
        self.root, self.out, self.key, self.follow_links, self.progress = root, out, key, follow_links, progress
        self.pool = partial(ThreadPoolExecutor, workers)
        self.files = {self._source(path): path for path in _files(root)}  # in order of their paths
        self.rows: dict[str, Row] = {}  # by source
        self.copies = self.others = 0

    def run(self) -> Outcome:
        if not self.files:
            raise DataError(f"{printable(self.root)}: no DICOM file in it")
        before = _read_table(self.out / TABLE)
        self.rows = {source: before[source] for source in self.files if self._is_made(before.get(source))}
        kept = len(self.rows)
        try:
            self._make(self._images())
        finally:
            self._save()
        bad = tuple(Problem(source, row["problem"]) for source, row in self.rows.items() if row["problem"])
        listed = {row["path"] for row in self.rows.values()}
        unlisted = sum(f"{VIDEOS}/{path.name}" not in listed for path in (self.out / VIDEOS).iterdir())
        videos = len(self.rows) - len(bad)
        return Outcome(videos, videos - kept, bad, self.copies, self.others, unlisted)

    def _source(self, path: Path) -> str:
        """The keyed hash by which a row recognises its file: of path inside the folder, size and time of change."""
        try:
            status = path.stat()
            state = f"{status.st_size}\0{status.st_mtime_ns}"
        except OSError:  # reading the file will give the reason
            state = ""
        return pseudonym(self.key, "file", f"{path.relative_to(self.root)}\0{state}")

    def _is_made(self, row: Row | None) -> bool:
        if row is None or not row["path"]:
            return False
        video = self.out / row["path"]
        return video.is_file() and video.stat().st_size > 0

    def _images(self) -> dict[str, list[str]]:
        """The images to convert: path of the video -> its files, usually one."""
        todo = [source for source in self.files if source not in self.rows]
        with in_parallel(self.pool, self._video_of, todo) as results:
            found = dict(shown(results, len(todo), "reading tags") if self.progress else results)
        made = {row["path"] for row in self.rows.values()}
        images: dict[str, list[str]] = {}
        for source in todo:
            video = found[source]
            if isinstance(video, NoPixelsError):
                self.others += 1
            elif isinstance(video, VideoError):
                self.rows[source] = _bad_row(source, video)
            elif video in made:
                self.copies += 1
            else:
                images.setdefault(video, []).append(source)
        return images

    def _video_of(self, source: str) -> str | VideoError:
        """The path of a file's video, from its tags, or why there is none."""
        try:
            instance = self._tags(source).instance
            if not instance:
                raise VideoError("damaged header: no SOP instance UID")
        except VideoError as error:
            return error
        return f"{VIDEOS}/{pseudonym(self.key, 'image', instance)}.avi"

    def _tags(self, source: str) -> Cine:
        return read_tags(regular_file(self.files[source], self.root, self.follow_links))

    def _make(self, images: dict[str, list[str]]) -> None:
        saved = time.monotonic()
        with in_parallel(self.pool, lambda video: self._converted(video, images[video]), images) as results:
            for video, rows in shown(results, len(images), "converting") if self.progress else results:
                self.rows |= {row["source"]: row for row in rows}
                self.copies += len(images[video]) - len(rows)
                if time.monotonic() - saved > _SAVE_EVERY:
                    self._save()
                    saved = time.monotonic()

    def _converted(self, video: str, sources: Sequence[str]) -> list[Row]:
        """Write a video from the first of its files that can be used. Returns its row, and those of files before it."""
        bad: list[Row] = []
        for source in sources:
            try:
                return [*bad, self._row(video, source)]
            except VideoError as error:
                bad.append(_bad_row(source, error))
        return bad

    def _row(self, video: str, source: str) -> Row:
        """The row of a file, after its video has been written. Raises VideoError."""
        cine = self._tags(source)
        sector = find_sector(cine)
        with atomic_write(self.out / video, sync=False) as part:
            _encode(part, cine, sector)
        header = cine.header
        numbers = {"fps": header.fps, "cm_per_pixel_x": header.cm_x, "cm_per_pixel_y": header.cm_y}
        flags = (*header.flags.split(), *sector.flags, *(() if cine.patient else ("no-patient",)))
        return {
            "path": video,
            "patient": pseudonym(self.key, "patient", cine.patient) if cine.patient else "",
            "study": pseudonym(self.key, "study", cine.study) if cine.study else "",
            **{name: str(getattr(header, name)) for name in ("frames", "width", "height")},
            **{name: f"{number:{_DIGITS}}" if number else "" for name, number in numbers.items()},
            "flags": " ".join(flags),
            "problem": "",
            "source": source,
        }

    def _save(self) -> None:
        write_csv(self.out / TABLE, sorted(self.rows.values(), key=lambda row: (row["path"], row["source"])))


def _bad_row(source: str, error: VideoError) -> Row:
    return {**dict.fromkeys(COLUMNS, ""), "problem": str(error), "source": source}


def _check_folders(root: Path, out: Path, key_file: Path | None) -> None:
    if not root.is_dir():
        raise DataError(f"{printable(root)}: {'not a folder' if root.exists() else 'no such folder'}")
    source, target = root.resolve(), out.resolve()
    if source.is_relative_to(target) or target.is_relative_to(source):
        raise ConfigError(f"OUT is {printable(out)}; expected a folder outside of IN, which does not hold IN either")
    if key_file is not None and key_file.resolve().is_relative_to(target):
        raise ConfigError(f"--key is {printable(key_file)}; expected a file outside of OUT, which may be given away")


def _claim(out: Path, key_file: Path | None) -> bytes:
    """Make the folder this program's and return the key.

    Raises:
        ConfigError: the key cannot be used.
        OutputError: the folder holds something else, or was written with another key or by another version.
    """
    marker = out / MARKER
    with output_errors(out):
        new = is_unused(out, marker)
    if not new and not marker.is_file():
        raise OutputError(f"{printable(out)} is not empty and was not made by this program: choose a new folder")
    chosen = out.resolve().with_name(f"{out.resolve().name}.key") if key_file is None else key_file
    if new and key_file is None and not chosen.exists():
        with atomic_write(chosen, mode=0o600) as part:
            part.write_text(secrets.token_hex(32) + "\n")
    key = _read_key(chosen)
    settings = {"version": _VERSION, "reader": READER_VERSION, "key": pseudonym(key, "key", "")}
    if new:
        write_json(marker, {"kind": _KIND, **settings})
        return key
    found = read_json(marker, _KIND, dict, OutputError)
    if found != settings:
        what = "another version of this program" if found.get("key") == settings["key"] else "another key"
        raise OutputError(f"{printable(out)} was made with {what}: choose a new folder")
    return key


def _read_key(file: Path) -> bytes:
    try:
        key = file.read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"cannot read the key {printable(file)}: {error.strerror}") from None
    if len(key) < _SHORTEST_KEY:
        raise ConfigError(
            f"the key {printable(file)} has {len(key)} characters; expected at least {_SHORTEST_KEY}, drawn at random"
        )
    return key


def _files(root: Path) -> list[Path]:
    """The DICOM files in a folder and its subfolders, in order, and files that cannot be read.

    Links to folders are not followed.

    Raises:
        DataError: a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise DataError(f"{printable(root)}: a folder in it cannot be read: {error.strerror}") from None

    found = []
    for folder, _, names in os.walk(root, onerror=refuse):
        files = [path for path in (Path(folder, name) for name in names) if path.is_file()]
        found += [path for path in files if is_dicom(path) or not os.access(path, os.R_OK)]
    return sorted(found)


def _read_table(path: Path) -> dict[str, Row]:
    """The rows of an earlier run by their sources; none if the table is missing or is not this program's."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) != COLUMNS:
                return {}
            return {row["source"]: row for row in reader if None not in row and None not in row.values()}
    except (OSError, ValueError, csv.Error):
        return {}


def _encode(path: Path, cine: Cine, sector: Sector) -> None:
    """Write the frames of a cine as grey PNG in AVI. Raises VideoError if a frame cannot be decoded."""
    import av

    rate = max(Fraction(cine.header.fps).limit_denominator(1000), Fraction(1, 1000)) if cine.header.fps else _RATE
    with av.open(str(path), "w", format="avi", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("png", rate=rate)
        stream.width, stream.height, stream.pix_fmt = cine.header.width, cine.header.height, "gray"
        stream.thread_count = 1
        for frame in grey_frames(cine, sector):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="gray")))
        container.mux(stream.encode(None))


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 3 if a DICOM image could not be used, or there is none."""
    parser = CommandLine(
        prog="python -m cardiocaps.data.from_dicom",
        description="Convert a folder of DICOM files of ultrasound, with its subfolders, to grey videos without "
        "identifiers, and a table with a row for each file.",
        epilog="After an interruption, the same command goes on where it stopped.",
    )
    path, processes = options()["phantom_dir"].from_text, options()["threads"].from_text
    parser.add_argument("root", metavar="IN", type=path, help="folder of DICOM files; files of other kinds are ignored")
    parser.add_argument("out", metavar="OUT", type=path, help="new or empty folder, or an unfinished conversion")
    parser.add_argument(
        "--key",
        metavar="FILE",
        type=path,
        help="key of the hashes, at least 32 characters (default: OUT.key beside OUT, made if it is missing)",
    )
    parser.add_argument("--follow-links", action="store_true", help="files of IN may be links that leave it")
    parser.add_argument("--workers", metavar="N", type=processes, help="threads (default: one for each core)")
    given = parser.parse_args(arguments)

    def body(_: Interruption) -> None:
        done = convert(
            given.root,
            given.out,
            key_file=given.key,
            follow_links=given.follow_links,
            workers=given.workers,
            progress=True,
        )
        print_line(f"{given.out}: {done.videos} videos ({done.made} made now), and {TABLE}")
        for count, what in (
            (done.others, "DICOM files that are no images, such as reports (ignored)"),
            (done.copies, "files with an image that another file has too (ignored)"),
            (done.unlisted, f"videos that {TABLE} does not name, because their DICOM files are gone (kept)"),
        ):
            if count:
                print_line(f"note: {what}: {count}")
        if done.bad:
            raise DataError(
                f"{len(done.bad)} of {done.videos + len(done.bad)} images cannot be used; {TABLE} has a row for each:\n"
                f"{summarise(done.bad)}"
            )

    return run_program(body)


if __name__ == "__main__":
    sys.exit(main())
