"""The notebook of the tutorial: its cells run, it holds no output, and its page is current."""

from __future__ import annotations

import csv
import json
import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
TUTORIAL = runpy.run_path(str(ROOT / "docs" / "tutorial.py"))


def test_the_cells_lead_from_a_table_to_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from matplotlib.figure import Figure

    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **_: file.write(b""))  # drawing takes seconds
    monkeypatch.setenv("CARDIOCAPS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TUTORIAL_VIDEOS", "40")
    monkeypatch.setenv("TUTORIAL_EPOCHS", "1")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for number, (kind, text) in enumerate(TUTORIAL["cells"]()):
        if kind == "code":
            exec(compile(text, f"cell {number}", "exec"), names)
    said = capsys.readouterr().out
    assert "8 test videos, 1 dilated" in said and "mean absolute error" in said
    with (tmp_path / "tutorial" / "predicted" / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10 and all(row["EF_percentage points"] for row in rows)
    assert all(said.count(Path(row["input"]).name) == 1 for row in rows)
    for page in ("run", "predicted"):
        assert "Research use only" in (tmp_path / "tutorial" / page / "report.html").read_text()
    assert len(list((tmp_path / "tutorial" / "predicted" / "maps").iterdir())) == 10


def test_the_notebook_has_no_output_and_its_page_is_current() -> None:
    notebook = json.loads((ROOT / "docs" / "tutorial.ipynb").read_text())
    assert (notebook["nbformat"], len({cell["id"] for cell in notebook["cells"]})) == (4, len(notebook["cells"]))
    for cell in notebook["cells"]:
        assert cell["cell_type"] == "markdown" or (cell["outputs"], cell["execution_count"]) == ([], None)
    assert (ROOT / "docs" / "tutorial.md").read_text() == TUTORIAL["page"](), "run python docs/tutorial.py"
