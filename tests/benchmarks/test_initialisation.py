"""The trial of initial weights: that it runs and writes what it says. Its accuracies are no test."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from benchmarks import initialisation


def test_writes_a_row_for_every_rule_and_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert initialisation.main(["--steps", "1", "--seeds", "2", "--out", str(tmp_path / "new")]) == 0
    with (tmp_path / "new" / "accuracy.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["rule"], row["seed"]) for row in rows] == [(rule, s) for rule in initialisation.RULES for s in "01"]
    assert float(rows[0]["sigma"]) == pytest.approx(0.833, abs=1e-3)
    assert 0.35 < float(rows[-1]["sigma"]) < 0.45
    assert "learning rate 0.01, σ = default: " in capsys.readouterr().out


def test_refuses_what_is_no_number_of_steps() -> None:
    with pytest.raises(SystemExit) as exit_:
        initialisation.main(["--steps", "0"])
    assert exit_.value.code == 2
