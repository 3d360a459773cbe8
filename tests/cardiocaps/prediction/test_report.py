"""The page of a prediction."""

from __future__ import annotations

import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from .test_predict import rows, run


class Page(HTMLParser):
    """The texts of the cells of the videos, the pictures, and whatever else the page would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cells: list[list[str]] = []
        self.pictures: list[dict[str, str | None]] = []
        self.loaded: list[str] = []
        self.text = ""
        self.open: list[str] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        if tag not in ("meta", "img", "input", "br", "line", "polyline"):
            self.open.append(tag)
        self.inside |= found.get("id") == "videos"
        if tag == "tr" and self.inside:
            self.cells.append([])
        if tag == "td" and self.inside:
            self.cells[-1].append("")
        if tag == "img":
            self.pictures.append(found)
        self.loaded += [x for name, x in attributes if name in ("src", "href", "srcset", "action") and x]

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, "well formed"
        self.inside &= tag != "table"

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.inside and self.open[-1] != "tr" and self.cells and self.cells[-1]:
            self.cells[-1][-1] += data.strip()


@pytest.fixture(scope="module")
def folder(runs: list[Path], phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Predictions for three videos, one of which cannot be read; names that are markup."""
    root = tmp_path_factory.mktemp("reported")
    videos = root / '<script>alert("1")<!-- & videos'
    videos.mkdir()
    for number, path in enumerate(sorted((phantom / "Batch1").iterdir())[:2]):
        shutil.copy(path, videos / f"{number}.avi")
    (videos / "<b>.avi").write_bytes(b"RIFF")
    assert run(runs[0], videos, "--out", root / "out", "--report") == 0
    return root / "out"


def test_the_page_has_a_row_for_each_video(folder: Path) -> None:
    page = Page((folder / "report.html").read_text())
    assert not page.open
    cells = {row[0]: row for row in page.cells if row}
    predicted = {Path(row["input"]).name: row for row in rows(folder / "predictions.csv")}
    assert cells.keys() == predicted.keys() == {"0.avi", "1.avi", "<b>.avi"}
    for name, row in predicted.items():
        if row["status"] == "failed":
            assert cells[name][2] == f"not read: {row['reason']}"
            continue
        assert cells[name][2] == ("▲ abnormal" if row["decision"] == "1" else "● normal")
        for number, column in enumerate(("probability", "calibrated_probability", "width_cm"), 3):
            assert float(cells[name][number]) == pytest.approx(float(row[column]), abs=6e-4)
    assert "Research use only. Not a medical device." in page.text
    assert "in " in page.text and '<script>alert("1")<!-- & videos/' in page.text


def test_it_loads_nothing_but_its_pictures(folder: Path, phantom: Path) -> None:
    page = Page((folder / "report.html").read_text())
    assert len(page.loaded) == len(page.pictures) == 2
    for picture in page.pictures:
        assert picture["loading"] == "lazy" and picture["alt"]
        with Image.open(folder / str(picture["src"])) as image:
            assert image.height == 144 and image.getextrema() != ((0, 0),) * 3
            assert int(str(picture["width"])) == round(72 * image.width / image.height)
    assert "http" not in (folder / "report.html").read_text().replace("http-equiv", "")


def test_the_same_command_makes_the_page_again(
    folder: Path, runs: list[Path], phantom: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (folder / "report.html").read_bytes()
    (folder / "report.html").unlink()
    (videos,) = (path for path in folder.parent.iterdir() if path != folder)
    assert run(runs[0], videos, "--out", folder, "--report") == 0
    assert (folder / "report.html").read_bytes() == before
    assert run(runs[0], videos, "--out", folder) == 4  # its rows would have no pictures
    assert "predictions with other report" in capsys.readouterr().err
