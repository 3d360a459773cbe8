"""`python -m benchmarks` from the gate to the figures, at toy shapes on one thread. Nothing here depends on a time."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as program
from benchmarks import forms, machine, memory, plots, race, tables, worker
from benchmarks.program import write_csv
from benchmarks.shapes import BOTH, CASES, FORWARD, QUICK_CASES

ROOT = Path(__file__).resolve().parents[2]
QUICK = ("--quick", "--no-compile", "--only", "recommender")


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "new" / "results"
    with start(*QUICK, "--only", "ladder", "--only", "overhead", "--out", str(folder)) as run:
        output = run.communicate(timeout=120)[0]
    assert run.returncode == 0, output
    return folder


def test_results_are_complete(results: Path) -> None:
    assert content(results).keys() == {"results.csv", "results.md", "environment.json", "overhead.csv"}
    assert not list(results.parent.glob(".*"))
    with (results / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    expected = [(c, d) for c in QUICK_CASES if c.ladder or c.shape.name == "recommender" for d in c.directions]
    for case, direction in expected:
        found = [
            row
            for row in rows
            if (row["shape"], row["routing"], row["direction"]) == (case.shape.name, case.routing.name, direction)
        ]
        names = {form.name for form in forms.contestants(case) if form.kind != "compiled"}
        assert {row["form"] for row in found} == names
        by = {row["contestant"]: row for row in found}
        assert {"capsops", "published", "best eager"} <= by.keys()
        assert float(by["capsops"]["ratio_to_capsops"]) == 1
        for row in (by["capsops"], by["published"], by["best eager"]):
            assert row["status"] == "ok"
            assert 0 < float(row["quartile1_s"]) <= float(row["median_s"]) <= float(row["quartile3_s"])
            assert float(row["extra_MB"]) >= 0
        assert float(by["best eager"]["floor_s"]) > 0
    environment = json.loads((results / "environment.json").read_text())
    assert environment["machine"]["read"] > 0
    assert all(row["commit"] == (environment["commit"] or "") and row["threads"] == "1" for row in rows)
    text = (results / "results.md").read_text()
    assert "## recommender: B=4, N=10" in text
    assert "nan" not in text


def test_figures_come_from_the_csv_alone(results: Path, tmp_path: Path) -> None:
    (tmp_path / "results.csv").write_bytes((results / "results.csv").read_bytes())
    assert plots.main([str(tmp_path)]) == 0
    for name in ("speed.png", "scaling.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert plots.main([str(tmp_path / "elsewhere")]) == 3
    (tmp_path / "results.csv").write_text("a,b\n1,2\n")
    assert plots.main([str(tmp_path)]) == 3


def _row(shape: str, routing: str, contestant: str, ratio: float, N: int = 50) -> dict[str, str]:
    values = {"shape": shape, "routing": routing, "contestant": contestant, "N": N, "ratio_to_capsops": ratio}
    values |= {"family": "ladder" if shape.startswith("ladder") else shape, "median_s": ratio / 1000, "extra_MB": 2.0}
    values |= {"direction": "forward + backward", "size": f"N={N}", "status": "ok", "commit": "0123456789"}
    return {**{name: str(value) for name, value in values.items()}, "device": "a GPU", "torch": "2"}


def _texts(figure: Any) -> list[str]:
    from matplotlib.text import Text

    return [text.get_text() for text in figure.findobj(Text)]


def test_the_bars_stand_by_shape_on_a_line_that_is_capsops() -> None:
    contestants = (("capsops", 1.0), ("published", 20.0), ("best eager", 0.5))
    shapes = (("mnist", "dynamic"), ("em", "em"), ("mnist", "attention"))  # as measured: a shape comes twice
    figure = plots.speed([_row(shape, routing, *c) for shape, routing in shapes for c in contestants])
    assert figure is not None
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.get_yticklabels()] == [
        *("mnist", "dynamic, forward + backward", "attention, forward + backward"),
        *("em", "forward + backward"),
    ]
    assert axes.get_xlim()[0] < 0.5, "capsops' line is not the frame"
    number = next(text for text in axes.texts if text.get_text() == "0.5")
    assert number.get_ha() == "right" and number.get_position()[0] < 0.5, "beyond the end of its bar"


def test_each_routing_has_its_panels_in_milliseconds() -> None:
    contestants = (("capsops", 1.0), ("published", 20.0), ("best eager", 5.0))
    rows = [
        _row(f"ladder-{N}", routing, name, ratio * N, N)
        for routing in ("uniform", "dynamic")
        for N in (64, 128)
        for name, ratio in contestants
    ]
    figure = plots.scaling(rows)
    assert figure is not None
    times = figure.axes[0]
    assert [axes.get_title() for axes in figure.axes[:2]] == ["dynamic, 3 iterations", "uniform, one pass"]
    published = next(line for line in times.lines if line.get_label() == "published")
    assert list(published.get_ydata()) == pytest.approx([20 * 64, 20 * 128])
    assert "milliseconds" in times.get_ylabel()
    # A colour and a marker tell the forms apart: no line but the guide needs its dashes.
    drawn = [line for axes in figure.axes for line in axes.lines if "N²" not in line.get_label()]
    assert {line.get_linestyle() for line in drawn} == {"-"}
    figure.canvas.draw()
    assert not [text for text in _texts(figure) if "10^" in text or "times" in text]
    assert "1,000" in _texts(figure)


def test_tables_have_readable_numbers(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", [{"name": "a", "s": 0.12345678901234567, "n": 12345678, "share": math.nan}])
    assert (tmp_path / "a.csv").read_text() == "name,s,n,share\na,0.123457,12345678,\n"


def test_earlier_results_are_not_overwritten_unasked(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = content(results)
    assert program.main([*QUICK, "--out", str(results)]) == 4
    assert "--overwrite" in capsys.readouterr().err
    assert content(results) == before


def test_what_no_run_has_written_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    assert program.main([*QUICK, "--overwrite", "--out", str(tmp_path)]) == 4
    assert content(tmp_path) == {"thesis.txt": b"mine"}


def test_an_interrupted_run_leaves_the_old_files(results: Path) -> None:
    before = content(results)
    with start(*QUICK, "--overwrite", "--out", str(results)) as run:
        while not list(results.parent.glob(".results.*.new")):
            assert run.poll() is None
            time.sleep(0.01)
        run.send_signal(signal.SIGINT)
        output = run.communicate(timeout=60)[0]
    assert run.returncode == 128 + signal.SIGINT, output
    assert content(results) == before
    assert not list(results.parent.glob(".*"))


def in_this_process(work, *arguments: object, limit: float = 0) -> Iterator[object]:
    return work(*arguments)


def test_a_red_gate_stops_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = forms.squash
    monkeypatch.setattr(worker, "events", in_this_process)
    monkeypatch.setattr(forms, "squash", lambda s: right(s) * 1.01)
    assert program.main([*QUICK, "--out", str(tmp_path / "results")]) == 1
    error = capsys.readouterr().err
    assert "gate" in error
    assert "bmm, broadcast" in error
    assert "published" not in error
    assert not list(tmp_path.iterdir())


def test_help_answers_without_torch() -> None:
    code = "import sys, benchmarks.__main__ as m\ntry: m.main(['--help'])\nfinally: assert 'torch' not in sys.modules"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=True).stdout
    assert "efficient-capsnet" in out


def test_a_wrong_option_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        program.main(["--only", "imagenet"])
    assert stop.value.code == 2


def test_files_are_swapped_whole(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "speed.png").write_text("old")
    with pytest.raises(RuntimeError, match="halfway"), tables.replacing(folder, overwrite=True) as new:
        (new / "results.csv").write_text("half")
        raise RuntimeError("halfway")
    assert content(folder) == {"speed.png": b"old"}
    with tables.replacing(folder, overwrite=True) as new:
        (new / "results.csv").write_text("whole")
    assert content(folder) == {"results.csv": b"whole"}
    assert [path.name for path in tmp_path.iterdir()] == ["results"]

    (folder / "a gpu").mkdir()
    (folder / "a gpu" / "environment.json").write_text("its own")
    (folder / "gpu_counts.md").write_text("counted")
    with tables.replacing(folder, overwrite=True) as new:
        (new / "results.csv").write_text("again")
    assert (folder / "results.csv").read_text() == "again"
    assert (folder / "a gpu" / "environment.json").read_text() == "its own"
    assert (folder / "gpu_counts.md").read_text() == "counted"
    assert [path.name for path in tmp_path.iterdir()] == ["results"]


def test_floors_of_the_paper() -> None:
    case = CASES[0]
    u, weight = 4 * 8 * 460_800 * 8, 4 * 460_800 * 8 * 2 * 16
    forward, both = machine.floor(case, FORWARD), machine.floor(case, BOTH)
    assert (forward.read_bytes, forward.emit_bytes) == (u + weight, 0)
    assert (both.read_bytes, both.emit_bytes) == (u + weight, 2 * (u + weight))
    rates = machine.Machine(read=2e9, copy=4e9, fma=1e15)
    assert both.seconds(rates) == pytest.approx((u + weight) / 2e9 + 2 * (u + weight) / 4e9)
    assert both.seconds(machine.Machine(read=1e15, copy=1e15, fma=1e9)) == both.operations / 1e9
    (full,) = [c for c in CASES if c.shape.name == "paper" and c.routing.name == "dynamic"]
    assert machine.floor(full, BOTH).bytes == 7 * (u + weight)  # five passes that read, one that reads and writes


def killed() -> Iterator[str]:
    yield "begun"
    os.kill(os.getpid(), signal.SIGKILL)


def silent() -> Iterator[str]:
    time.sleep(60)
    yield "too late"


def broken() -> Iterator[str]:
    yield "begun"
    raise ValueError("no such thing")


@pytest.mark.parametrize(
    ("work", "failure"), [(killed, worker.OutOfMemory), (silent, worker.TooSlow), (broken, worker.MeasurementError)]
)
def test_a_measurement_that_ends_badly_takes_nothing_with_it(work, failure: type[Exception]) -> None:
    with pytest.raises(failure):
        list(worker.events(work, limit=30 if work is not silent else 0.2))


def test_a_form_that_ends_its_process_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    case = QUICK_CASES[0]

    def contest(*arguments: object, limit: float) -> Iterator[str | race.Timing]:
        excluded = arguments[-1]
        yield "capsops"
        if "bmm, einsum" not in excluded:
            yield "bmm, einsum"
            raise worker.OutOfMemory
        yield race.Timing("capsops", race.CAPSOPS, case.shape.N, [1.0, 2.0, 3.0])

    monkeypatch.setattr(worker, "events", contest)
    ours, lost = race.run(case, FORWARD, race.Budget())
    assert (ours.form, ours.median, ours.quartiles) == ("capsops", 2.0, (1.5, 2.5))
    assert (lost.form, lost.status, lost.seconds) == ("bmm, einsum", "out of memory", [])


def test_memory_beyond_inputs_and_results() -> None:
    case = QUICK_CASES[0].at(20_000)
    votes = 4 * case.shape.vote_numbers
    published = memory.extra_bytes(case, "published", limit=60)[BOTH]
    ours = memory.extra_bytes(case, "capsops", limit=60)[BOTH]
    assert published is not None and ours is not None
    assert ours < votes < published
