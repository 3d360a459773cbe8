"""`python -m benchmarks.gpu` without a GPU: on the CPU at toy shapes, and on a device that pretends to be one."""

import csv
import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import forms, gpu, gpu_checks, gpu_kernels, gpu_results, race, worker
from benchmarks.device import Device
from benchmarks.gpu_checks import Done
from benchmarks.gpu_results import BEST_COMPILED, CAPSOPS, OTHER, PUBLISHED, Goal, Results, goals
from benchmarks.shapes import BOTH, CASES, FORWARD, QUICK_CASES, Case, for_gpus

ROOT = Path(__file__).resolve().parents[2]
QUICK = ("--device", "cpu", "--quick", "--without", "compiled")
PART = ("--only", "recommender")


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open() as file:
        return list(csv.DictReader(file))


# What machines with a GPU seldom have, though cardiocaps needs it.
MISSING = ("lightning", "monai", "av", "imblearn", "xgboost", "pydicom")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rehearsal: the one command for a machine with a GPU, here on the CPU, without what is missing there."""
    blocker = tmp_path_factory.mktemp("blocker")
    (blocker / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({MISSING!r}))\n")
    python = tmp_path_factory.mktemp("bin") / "python3"
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    folder = tmp_path_factory.mktemp("gpu") / "results"
    command = [str(ROOT / "benchmarks" / "gpu_slot.sh"), str(folder), "9", "--device", "cpu", "--quick", *PART]
    command += [x for part in ("training-step", "profiler", "sanitizer", "ncu") for x in ("--only", part)]
    paths = [str(blocker), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    environment["PATH"] = os.pathsep.join([str(python.parent), os.environ["PATH"]])
    done = subprocess.run(command, cwd=folder.parent, env=environment, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "recommender, dynamic, detached, forward + backward: capsops" in done.stderr
    return folder


@pytest.fixture
def results(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "results"))


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing but the work itself, in one thread: no processes, no figures, few sets of inputs."""

    def events(work, *arguments: object, limit: float = 0) -> Iterator[object]:
        return work(*arguments)

    monkeypatch.setattr(worker, "events", events)
    monkeypatch.setattr(gpu, "draw", lambda results: None)
    monkeypatch.setattr(Device, "cache_bytes", lambda self: 1 << 14)
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = torch.get_num_threads(), products.allow_tf32, convolutions.allow_tf32
    torch.set_num_threads(1)
    yield
    threads, products.allow_tf32, convolutions.allow_tf32 = before
    torch.set_num_threads(threads)


def test_files_are_complete_and_well_formed(finished: Path) -> None:
    names = {"results.csv", "results.md", "environment.json", "training_step.csv", "kernels.csv", "speed.png"}
    assert content(finished).keys() == names
    rows = rows_of(finished)
    assert {(row["routing"], row["direction"]) for row in rows} == {("dynamic, detached", d) for d in (FORWARD, BOTH)}
    for direction in (FORWARD, BOTH):
        by = {row["contestant"]: row for row in rows if row["direction"] == direction}
        assert {CAPSOPS, PUBLISHED, "best eager"} <= by.keys()
        assert by[CAPSOPS]["backend"] == "cpu"
        assert float(by[CAPSOPS]["ratio_to_capsops"]) == 1
        for row in (by[CAPSOPS], by[PUBLISHED]):
            assert row["status"] == "ok"
            assert 0 < float(row["quartile1_s"]) <= float(row["median_s"]) <= float(row["quartile3_s"])
            assert float(row["copy_GB_per_s"]) > 0
    with (finished / "training_step.csv").open() as file:
        steps = list(csv.DictReader(file))
    assert [step["way"] for step in steps] == ["fused", "naive"]
    assert all(0 < float(step["routing_share"]) < 1 and float(step["step"]) > 0 for step in steps)
    environment = json.loads((finished / "environment.json").read_text())
    assert environment["finished"] == ["recommender", "training-step", "profiler", "sanitizer", "ncu"]
    assert environment["quick"] is True
    text = (finished / "results.md").read_text()
    assert text.index("## Goals") < text.index("## recommender") < text.index("## A training step")
    assert "the numbers mean nothing" in text
    assert environment["machine"]["device"] in text.splitlines()[2]
    assert "Not measured to their end: tests, paper, " in text
    assert "nan" not in text


def test_the_report_comes_from_the_files_alone(results: Path) -> None:
    before = content(results)
    (results / "results.md").unlink()
    assert gpu_results.main([str(results)]) == 0
    assert content(results) == before
    assert gpu_results.main([str(results / "elsewhere")]) == 3


def test_earlier_results_are_not_overwritten_unasked(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = content(results)
    assert gpu.main([*QUICK, *PART, "--out", str(results)]) == 4
    assert "recommender" in capsys.readouterr().err
    assert content(results) == before


def test_results_of_another_program_are_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "results.csv").write_text("mine")
    assert gpu.main([*QUICK, "--overwrite", "--out", str(tmp_path)]) == 4
    assert content(tmp_path) == {"results.csv": b"mine"}


@pytest.mark.usefixtures("one_process")
def test_parts_are_added_continued_and_replaced(results: Path) -> None:
    first = rows_of(results)
    assert gpu.main([*QUICK, *PART, "--only", "em", "--out", str(results)]) == 0
    rows = rows_of(results)
    assert rows[: len(first)] == first
    assert {row["family"] for row in rows[len(first) :]} == {"em"}

    # Cut off after the forward direction of em.
    environment = json.loads((results / "environment.json").read_text())
    environment["finished"].remove("em")
    (results / "environment.json").write_text(json.dumps(environment))
    kept = [row for row in rows if row["family"] != "em" or row["direction"] == FORWARD]
    with (results / "results.csv").open("w") as file:
        writer = csv.DictWriter(file, kept[0])
        writer.writeheader()
        writer.writerows(kept)
    assert gpu.main([*QUICK, "--only", "em", "--out", str(results)]) == 0
    again = rows_of(results)
    assert again[: len(kept)] == kept
    assert {(row["family"], row["direction"]) for row in again[len(kept) :]} == {("em", BOTH)}

    assert gpu.main([*QUICK, *PART, "--overwrite", "--out", str(results)]) == 0
    assert rows_of(results)[: len(again) - len(first)] == again[len(first) :]
    assert len(rows_of(results)) == len(again)


@pytest.mark.usefixtures("one_process")
def test_a_red_gate_reports_no_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = forms.squash
    monkeypatch.setattr(forms, "squash", lambda s: right(s) * 1.01)
    parts = (*PART, "--only", "em")
    assert gpu.main([*QUICK, *parts, "--out", str(tmp_path / "results")]) == 1
    assert "bmm, broadcast" in capsys.readouterr().err
    rows = rows_of(tmp_path / "results")
    wrong = [row for row in rows if row["family"] == "recommender"]
    assert [(row["status"], row["median_s"], row["ratio_to_capsops"]) for row in wrong] == [("gate red", "", "")] * 2
    assert all(row["status"] == "ok" for row in rows if row["family"] == "em")  # which has no squash
    assert "gate red" in (tmp_path / "results" / "results.md").read_text()


@pytest.mark.usefixtures("one_process")
def test_what_fails_is_reported_and_the_rest_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = race.run

    def run(case: Case, *arguments: object) -> list[race.Timing]:
        if case.shape.name == "em":
            raise worker.MeasurementError("the kernel went away")
        return real(case, *arguments)

    monkeypatch.setattr(race, "run", run)
    assert gpu.main([*QUICK, *PART, "--only", "em", "--out", str(tmp_path / "results")]) == 3
    by = {row["family"]: row for row in rows_of(tmp_path / "results") if row["contestant"] == CAPSOPS}
    assert (by["em"]["status"], by["em"]["reason"]) == ("failed", "the kernel went away")
    assert by["recommender"]["status"] == "ok"


@pytest.mark.usefixtures("one_process")
def test_what_there_is_no_time_for_is_named_and_measured_later(tmp_path: Path) -> None:
    out = ("--out", str(tmp_path / "results"))
    assert gpu.main([*QUICK, *PART, "--minutes", "0.00001", *out]) == 0
    assert [row["status"] for row in rows_of(tmp_path / "results")] == ["left out"] * 2
    assert "recommender" in (tmp_path / "results" / "results.md").read_text().split("Not measured to their end:")[1]
    assert gpu.main([*QUICK, *PART, *out]) == 0
    assert {row["status"] for row in rows_of(tmp_path / "results")} == {"ok"}


def test_without_a_gpu_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path / "results")]) == 5
    error = capsys.readouterr().err
    assert error.startswith("error: there is no GPU that torch sees")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrong", [["--only", "imagenet"], ["--device", "tpu"], ["--minutes", "0"], ["--minutes", "x"]])
def test_a_wrong_option_is_refused(wrong: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        gpu.main(["--out", str(tmp_path), *wrong])
    assert stop.value.code == 2


def test_help_answers_without_torch() -> None:
    code = "import sys, benchmarks.gpu as m\ntry: m.main(['--help'])\nfinally: assert 'torch' not in sys.modules"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=True).stdout
    assert all(part in "".join(out.split()) for part in gpu_results.PARTS)


def test_no_figures_without_matplotlib(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    gpu.draw(Results.read(results))
    assert "python -m benchmarks.plots" in capsys.readouterr().err


# ---- goals ---------------------------------------------------------------------------------------


def row(shape: str, routing: str, direction: str, contestant: str, median: float | None, **more: Any) -> dict[str, Any]:
    return {
        "shape": shape,
        "routing": routing,
        "direction": direction,
        "contestant": contestant,
        "status": "ok" if median else "out of memory",
        "median_s": "" if median is None else str(median),
        "GB_per_s": "",
        "copy_GB_per_s": "3000",
        "extra_MB": "",
        **more,
    }


def test_goals_are_computed_from_the_rows() -> None:
    rows = [
        row("paper", "attention", FORWARD, CAPSOPS, 0.25e-3, GB_per_s="2400", extra_MB="12.5"),
        row("paper", "attention", BOTH, CAPSOPS, 1e-3, GB_per_s="1500", extra_MB="63"),
        row("paper", "attention", FORWARD, BEST_COMPILED, 2.5e-3),
        row("paper", "attention", BOTH, BEST_COMPILED, 5e-3),
        row("paper", "attention", FORWARD, PUBLISHED, 20e-3),
        row("paper", "attention", BOTH, PUBLISHED, None),
        row("paper", "attention, bfloat16", FORWARD, CAPSOPS, 0.125e-3),
        row("paper", "dynamic", BOTH, CAPSOPS, 2e-3, extra_MB="20"),
        row("paper", "dynamic", BOTH, BEST_COMPILED, 10e-3),
        row("mnist", "dynamic", FORWARD, OTHER, 1e-3, extra_MB="900"),
        row("mnist", "dynamic", FORWARD, BEST_COMPILED, 9e-3),
    ]
    steps = [
        {"preset": "paper", "way": "naive", "status": "ok", "routing_share": "0.5"},
        {"preset": "paper", "way": "fused", "status": "ok", "routing_share": "0.04"},
    ]
    found = {(goal.what, goal.where): goal for goal in goals(rows, steps)}

    def of(what: str, where: str) -> tuple[float | None, bool | None]:
        goal = next(g for (w, at), g in found.items() if w.endswith(what) and at.startswith(where))
        return goal.measured, goal.reached

    assert of("copy bandwidth", "paper, attention, forward") == (pytest.approx(0.8), True)
    assert of("bandwidth floor", "paper, attention, forward + backward") == (pytest.approx(0.5), False)
    assert of("compiled form", "paper, attention, forward") == (pytest.approx(10), True)
    assert of("compiled form", "paper, attention, forward + backward") == (pytest.approx(5), False)
    assert of("published formulation", "paper, attention, forward") == (pytest.approx(80), True)
    assert of("published formulation", "paper, attention, forward + backward") == (None, None)
    assert of("compiled form", "paper, dynamic, forward + backward") == (pytest.approx(5), True)
    assert of("compiled form", "mnist, dynamic, forward") == (None, None)  # of the backend that is not chosen
    assert of("in float32", "paper, attention, bfloat16, forward") == (pytest.approx(2), True)
    assert of("inputs and results", "paper, attention, forward + backward") == (63, True)
    assert of("training step", "preset paper") == (pytest.approx(0.04), True)
    (lost,) = [g for g in found.values() if g.wanted == 50 and g.where.endswith(BOTH)]
    assert lost.cells()[2:] == ["not measured: published: out of memory", "≥ 50 ×", "–"]
    assert Goal("", "", 70, 64, "MB", at_most=True).cells()[2:] == ["70.0 MB", "≤ 64.0 MB", "no"]


def test_nothing_measured_reaches_nothing() -> None:
    assert {goal.reached for goal in goals([], [])} == {None}


def test_the_faster_backend_is_named_for_every_case() -> None:
    sizes = {"B": 2, "N": 3, "J": 4, "D": 5, "rows": 0}
    rows = [
        row("mnist", "dynamic", BOTH, CAPSOPS, 2e-3, backend="cuda", **sizes),
        row("mnist", "dynamic", BOTH, OTHER, 1e-3, backend="triton", **sizes),
        row("em", "em", BOTH, CAPSOPS, 1e-3, backend="triton", **sizes),
    ]
    (line,) = [line for line in gpu_results._backends(rows) if line.startswith("| mnist")]
    assert line == "| mnist | dynamic | forward + backward | 120 | 2 | 1 | 0.5 | triton |"


# ---- what needs a GPU ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Pretend(Device):
    """The CPU with the manners of a GPU: rounds of several calls, two backends, memory measured with the time."""

    answers: bool = True

    @property
    def on_gpu(self) -> bool:
        return True

    def prepare(self) -> None:
        pass

    def backends(self, case: Case) -> list[str]:
        return ["cpu", "reference"]

    def cache_bytes(self) -> int:
        return 1 << 16

    def synchronize(self) -> None:
        pass

    def mark(self) -> float:
        return time.perf_counter()

    def between(self, start: float, end: float) -> float:
        return end - start

    def extra_bytes(self, call: Any) -> int:
        return sum(x.nbytes for x in call())

    def start_peak(self) -> None:
        pass

    def peak_bytes(self) -> int:
        return 12_000_000

    def recover(self) -> bool:
        return self.answers


@pytest.mark.usefixtures("one_process")
def test_the_whole_program_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(name="Pretend 100", major=9, minor=0, multi_processor_count=1, total_memory=1 << 30)
    monkeypatch.setattr(gpu, "Device", lambda kind: Pretend())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.setattr(Pretend, "why_not", lambda self: {"cuda": None, "triton": "it is not installed"})
    folder = tmp_path / "results"
    parts = [f"--only={part}" for part in ("paper", "training-step", "sanitizer")]
    monkeypatch.setattr(gpu_checks, "find_tool", lambda name: None)
    assert gpu.main(["--quick", "--no-build", *parts, "--out", str(folder)]) == 0
    rows = rows_of(folder)
    assert {row["device"] for row in rows} == {"Pretend 100"}
    chosen = [row for row in rows if row["contestant"] == CAPSOPS]
    others = [row for row in rows if row["contestant"] == OTHER]
    assert len(chosen) == len(others) == 2 * len([c for c in for_gpus(QUICK_CASES) if c.shape.name == "paper"])
    assert {row["backend"] for row in chosen} == {"cpu"}
    assert {row["backend"] for row in others} == {"reference"}
    assert all(float(row["extra_MB"]) > 0 for row in chosen)
    with (folder / "training_step.csv").open() as file:
        steps = list(csv.DictReader(file))
    assert [(step["way"], step["peak_MB"]) for step in steps] == [
        (way, "12") for way in ("fused", "naive", "fused, TF32")
    ]
    text = (folder / "results.md").read_text()
    assert text.splitlines()[2].startswith("Pretend 100, driver ")
    assert "tf32" in text
    assert "Backend triton: it is not installed." in text
    assert "| memory beyond inputs and results | paper, " in text
    assert "compute-sanitizer memcheck: not run: it was not found" in text


def contest(case: Case, device: Device, excluded: Sequence[str] = ()) -> list[race.Timing]:
    budget = race.Budget(race=0.01, final=0.02, compile=False)
    return [x for x in race.contest(case, FORWARD, budget, list(excluded), device) if isinstance(x, race.Timing)]


def test_backends_are_timed_side_by_side() -> None:
    by = {timing.role: timing for timing in contest(QUICK_CASES[0], Pretend())}
    assert (by[CAPSOPS].form, by[OTHER].form) == ("capsops cpu", "capsops reference")
    assert {CAPSOPS, OTHER, PUBLISHED, "best eager"} <= by.keys()
    for timing in by.values():
        assert timing.median > 0
        assert timing.extra == 4 * 2 * 2 * 16  # v [B, J, D]


def test_a_backend_that_fails_is_reported_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(case: Case) -> forms.Form:
        form = ours(case)

        def run(**inputs: torch.Tensor) -> forms.Outputs:
            if next(turn) == 0:
                raise RuntimeError("no kernel image")
            return form.function(**inputs)

        return forms.replace(form, function=run)

    ours, turn = forms._capsops, itertools.count()
    monkeypatch.setattr(forms, "_capsops", fails)
    by = {timing.role: timing for timing in contest(QUICK_CASES[0], Pretend())}
    assert (by[CAPSOPS].status, by[CAPSOPS].reason) == ("failed", "RuntimeError: no kernel image")
    assert by[OTHER].median > 0
    assert by[PUBLISHED].median > 0
    turn = itertools.count()
    with pytest.raises(worker.Broken, match="no kernel image"):
        contest(QUICK_CASES[0], Pretend(answers=False))


def test_a_form_that_breaks_the_gpu_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def events(work, case, direction, budget, excluded, device, limit: float) -> Iterator[str | race.Timing]:
        for name, role in (("capsops cuda", CAPSOPS), ("capsops triton", OTHER)):
            if name not in excluded:
                yield name
                if role == CAPSOPS:
                    raise worker.Broken("RuntimeError: an illegal memory access")
                yield race.Timing(name, role, case.shape.N, [1.0])

    monkeypatch.setattr(worker, "events", events)
    triton, cuda = race.run(QUICK_CASES[0], FORWARD, race.Budget(), Pretend())
    assert (triton.role, triton.median) == (OTHER, 1.0)
    assert (cuda.role, cuda.status, cuda.reason) == (CAPSOPS, "failed", "RuntimeError: an illegal memory access")


def test_what_decides_most_comes_first_and_nothing_is_lost() -> None:
    cases = for_gpus(CASES)
    assert [str(case) for case in cases[:3]] == ["paper, attention", "paper, attention, bfloat16", "mnist, dynamic"]
    assert set(CASES) < set(cases)
    assert len(cases) == len(CASES) + 1


@pytest.mark.parametrize(
    ("why", "form", "nvcc", "expected", "builds"),
    [
        (None, "machine code", "/cuda/nvcc", "the extension was there, with machine code for 9.0", False),
        (None, "PTX", "/cuda/nvcc", "for compute capability 9.0 alone", True),
        (None, "PTX", None, "the extension was there, with PTX for 9.0", False),
        ("the extension capsops._C does not load", None, "/cuda/nvcc", "for compute capability 9.0 alone", True),
        ("there is no extension capsops._C", None, "/cuda/nvcc", "for compute capability 9.0 alone", True),
        ("the extension was built without CUDA kernels", None, None, "Triton is measured alone", False),
        ("its driver takes programs up to CUDA 11.8", None, "/cuda/nvcc", "would not help", False),
    ],
)
def test_what_is_built(
    why: str | None,
    form: str | None,
    nvcc: str | None,
    expected: str,
    builds: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    commands: list[tuple[Sequence[str], Any]] = []

    def run(command: Sequence[str], limit: float, log: Path, title: str, settings: Any = None) -> Done:
        commands.append((command, settings))
        return Done(0, "a warning\n" + json.dumps([9, 0, why, form]))

    monkeypatch.setattr(gpu_checks, "run_program", run)
    monkeypatch.setattr(gpu_checks, "find_tool", lambda name: nvcc)
    assert expected in gpu_checks.build(Results(tmp_path), limit=60, rebuild=False)
    assert len(commands) == 1 + builds
    if builds:
        assert commands[1][0][1:] == ["setup.py", "build_ext", "--inplace"]
        assert commands[1][1] == {"CAPSOPS_CUDA": "1", "CAPSOPS_CUDA_ARCHS": "90", "CUDACXX": nvcc}


@pytest.mark.parametrize(
    ("status", "output", "expected"),
    [
        (0, "every operator ran: 376 calls\n========= ERROR SUMMARY: 0 errors", "no errors (ERROR SUMMARY: 0 errors"),
        (99, "========= Invalid read\n========= ERROR SUMMARY: 3 errors", "ERRORS: ERROR SUMMARY: 3 errors"),
        (255, "========= Error: Device not supported", "did not run to its end (exit status 255)"),
        (0, "========= Target application terminated before first instrumented API call", "did not run to its end"),
        (None, "", "not at its end after 240 s"),
        (None, "========= Invalid __global__ read of size 4 bytes\n", "ERRORS: Invalid __global__ read"),
    ],
)
def test_what_compute_sanitizer_says(status: int | None, output: str, expected: str) -> None:
    assert gpu_checks.sanitized(status, output, 240).startswith(expected)


def test_sanitizers_watch_our_kernels_alone_and_share_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[list[str], float]] = []

    def run(command: list[str], limit: float, log: Path, title: str, settings: Any = None) -> Done:
        calls.append((command, limit))
        return Done(0, "every operator ran: 3 calls\n========= ERROR SUMMARY: 0 errors")

    monkeypatch.setattr(gpu_checks, "run_program", run)
    monkeypatch.setattr(gpu_checks, "find_tool", lambda name: f"/cuda/{name}")
    results = Results(tmp_path)
    assert gpu_checks.sanitize(results, Pretend(), 60) == []
    assert [command[2] for command, _ in calls] == ["memcheck", "racecheck", "synccheck"]
    assert all(command[command.index("--kernel-name") + 1] == "kns=capsops" for command, _ in calls)
    assert [limit for _, limit in calls] == pytest.approx([20, 30, 60], rel=0.05)
    assert "sanitizer" in results.finished


@pytest.mark.parametrize(
    ("part", "printed", "red"),
    [("tests", "begun", True), ("tests-triton", "....s. [ 12%]", False), ("tests-triton", "..F.s. [ 12%]", True)],
)
def test_a_test_run_that_is_stopped(
    part: str, printed: str, red: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sleeping = ["sh", "-c", f"echo '{printed}'; exec sleep 60"]
    real = gpu_checks.run_program
    monkeypatch.setattr(
        gpu_checks,
        "run_program",
        lambda command, limit, log, title: real(sleeping, limit, log, title),
    )
    results = Results(tmp_path)
    assert bool(gpu_checks.test(results, part, 2)) == red
    (outcome,) = results.checks[part].values()
    assert outcome == f"not at their end after 2 s, and stopped: {printed}"
    assert (tmp_path / "checks.log").read_text() == f"== {part}\n{printed}\n"
    assert part not in results.finished


def test_programs_end_with_the_one_that_started_them(tmp_path: Path) -> None:
    """Programs end, with their own children, even if the program that started them is killed."""
    grandchild = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grandchild!r}])"
    log = tmp_path / "log"
    program = (
        "import sys; from pathlib import Path; from benchmarks.gpu_checks import run_program\n"
        f"run_program([sys.executable, '-c', {child!r}], 60, Path({str(log)!r}), 'a program')"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    try:
        deadline = time.monotonic() + 60
        while not log.exists() or len(log.read_text().splitlines()) < 2:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        sleeper = int(log.read_text().splitlines()[1])
        assert Path(f"/proc/{sleeper}").exists()
    finally:
        process.kill()
        process.wait()
    while _runs(sleeper):
        assert time.monotonic() < deadline, "the program outlived the one that started it"
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# ---- stages --------------------------------------------------------------------------------------


def test_what_a_stage_leaves_goes_to_those_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = gpu.Clock(540, list(gpu.STAGES))
    assert clock.begin("build") == pytest.approx(540 * 0.16)
    now[0] = 10  # the extension was there
    assert clock.begin("tests") == pytest.approx(530 * 12 / 84)
    now[0] = 500
    assert clock.begin("ncu") == pytest.approx(40 * 6 / 12)
    now[0] = 539
    assert clock.begin("tests-triton") == pytest.approx(1)
    now[0] = 600
    assert clock.left() < 0
    assert gpu.Clock(60, ["sanitizer"]).begin("sanitizer") == pytest.approx(60)


@pytest.mark.usefixtures("one_process")
def test_compiled_forms_come_after_the_eager_ones(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are timed beside capsops, whose rows are there already."""
    excluded: list[list[str]] = []

    def run(
        case: Case, direction: str, budget: race.Budget, device: Device, without: Sequence[str]
    ) -> list[race.Timing]:
        assert budget.compile
        excluded.append(list(without))
        roles = {"capsops": CAPSOPS, "compiled bmm": BEST_COMPILED}
        return [
            race.Timing(form, role, case.shape.N, [0.001 * (1 + n)]) for n, (form, role) in enumerate(roles.items())
        ]

    before = rows_of(results)
    monkeypatch.setattr(race, "run", run)
    command = ["--device", "cpu", "--quick", "--only", "compiled", "--out", str(results)]
    assert gpu.main(command) == 0
    rows = rows_of(results)
    assert rows[: len(before)] == before
    added = rows[len(before) :]
    assert [(row["shape"], row["direction"], row["form"]) for row in added] == [
        ("recommender", direction, "compiled bmm") for direction in (FORWARD, BOTH)
    ]
    assert {row["ratio_to_capsops"] for row in added} == {"2"}
    assert PUBLISHED in excluded[0] and not any(name.startswith(("compiled", "capsops")) for name in excluded[0])
    assert gpu.main([*command, "--overwrite"]) == 0
    assert [(row["form"], row["median_s"]) for row in rows_of(results)] == [
        (row["form"], row["median_s"]) for row in rows
    ]


# ---- kernels -------------------------------------------------------------------------------------

NCU_OUTPUT = """==PROF== Connected to process 7
"ID","Process ID","Process Name","Host Name","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"
"0","7","python3","host","REDUCE","GPU Speed Of Light Throughput","Duration","us","26.50"
"0","7","python3","host","REDUCE","Occupancy","Achieved Occupancy","%","61.2"
"1","7","python3","host","REDUCE","Occupancy","Achieved Occupancy","%","60.0"
"2","7","python3","host","capsops::emit_kernel(Args)","Launch Statistics","Registers Per Thread","register","1,064"
"2","7","python3","host","capsops::emit_kernel(Args)","","","",""
""".replace("REDUCE", "void capsops::reduce_kernel<float>(Args)")


def test_kernels_are_counted_once_a_case_and_nobody_is_named() -> None:
    rows = gpu_kernels.read_ncu(NCU_OUTPUT, CASES[0])
    assert [(row["kernel"].split("(")[0], row["metric"], row["value"]) for row in rows] == [
        ("void capsops::reduce_kernel<float>", "GPU Speed Of Light Throughput: Duration", "26.50"),
        ("void capsops::reduce_kernel<float>", "Occupancy: Achieved Occupancy", "61.2"),
        ("capsops::emit_kernel", "Launch Statistics: Registers Per Thread", "1064"),
    ]
    assert "host" not in str(rows)
    assert gpu_kernels.read_ncu("==ERROR== no permission\n", CASES[0]) == []
    text = "\n".join(gpu_results._counts(rows))
    assert "| reduce_kernel<float>(Args) | 26.50 us |" in text
    assert "| 61.2 |" in text


def test_every_case_that_ncu_looks_at_exists() -> None:
    assert set(gpu_kernels.NCU_CASES) <= {str(case) for case in for_gpus(CASES)}
    command = gpu_kernels.ncu_command("ncu", CASES[0], Path("report"))
    assert command[command.index("--clock-control") + 1] == "none"


def test_the_profile_names_the_operators_of_capsops(finished: Path) -> None:
    with (finished / "kernels.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["direction"] for row in rows} == {FORWARD, BOTH}
    times = {row["kernel"]: float(row["value"]) for row in rows if row["metric"] == "time a call"}
    assert times["capsops::dynamic_routing"] > 0
    assert "## Microseconds a kernel" in (finished / "results.md").read_text()
