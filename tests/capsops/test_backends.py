"""The choice of a backend, and what `info` says of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch

import capsops
from capsops import backends

U, WEIGHT = torch.randn(2, 5, 3), torch.randn(5, 3, 2, 4)


def _python(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, env=env, check=False)


def test_the_extension_is_built_and_chosen() -> None:
    assert backends.select("squash", torch.device("cpu"), torch.float32) == "cpu"
    assert capsops.info().backends["cpu"] == "yes"


def test_use_backend_holds_inside_and_is_undone() -> None:
    with capsops.use_backend("reference"):
        assert capsops.info().forced == "reference"
        with capsops.use_backend("cpu"):
            assert backends.select("squash", torch.device("cpu"), torch.float32) == "cpu"
        assert backends.select("squash", torch.device("cpu"), torch.float32) == "reference"
    with pytest.raises(ZeroDivisionError), capsops.use_backend("reference"):
        raise ZeroDivisionError
    assert capsops.info().forced is None


def test_unknown_backend() -> None:
    with (
        pytest.raises(capsops.BackendError, match="'gpu'; expected one of cpu, cuda, triton, reference"),
        capsops.use_backend("gpu"),
    ):
        pass


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("CAPSOPS_BACKEND", r"CAPSOPS_BACKEND is 'gpu\\x1b'; expected one of cpu, cuda, triton, reference"),
        ("CAPSOPS_ISA", r"CAPSOPS_ISA is 'gpu\\x1b'; expected one of auto, .*baseline, which run here"),
    ],
)
def test_an_environment_that_names_what_there_is_not(name: str, message: str) -> None:
    """Programs say so in one line; importing is no error, every operator is one."""
    wrong = {name: "gpu\x1b"}
    for program in ("capsops.info", "cardiocaps.train"):
        run = _python("-W", "ignore", "-m", program, **wrong)
        assert run.returncode == 2
        assert run.stdout == ""
        assert re.fullmatch(f"error: {message}\n", run.stderr)
    script = "import capsops, torch; print('imported'); capsops.use_backend('cpu').__enter__(); x = torch.zeros(2); "
    for call in ("capsops.squash(x)", "torch.ops.capsops.squash(x, 'sabour')", "capsops.info()"):
        run = _python("-c", script + call, **wrong)
        assert (run.returncode, run.stdout) == (1, "imported\n")
        assert re.fullmatch(f"capsops.backends.BackendError: {message}", run.stderr.splitlines()[-1])


def test_environment_variable() -> None:
    run = _python("-c", "import capsops; print(capsops.info().forced)", CAPSOPS_BACKEND="reference")
    assert run.stdout.strip() == "reference"


def test_a_missing_extension_is_said_once_and_not_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(backends.extension, "_C", None)
    monkeypatch.setattr(backends.extension, "MISSING", "no such file")
    monkeypatch.setattr(backends, "_warned", set())
    with pytest.warns(RuntimeWarning, match=r"slow reference backend.*no such file"):
        slow = capsops.dynamic_routing(U, WEIGHT)
    assert "no such file" in str(capsops.info())
    with capsops.use_backend("cpu"), pytest.raises(capsops.BackendError, match="no such file"):
        capsops.dynamic_routing(U, WEIGHT)
    monkeypatch.undo()
    torch.testing.assert_close(slow, capsops.dynamic_routing(U, WEIGHT))


def test_forced_backend_that_cannot() -> None:
    with capsops.use_backend("cpu"), pytest.raises(capsops.BackendError, match="does not run on meta"):
        capsops.dynamic_routing(U.to("meta"), WEIGHT.to("meta"))


def test_overlapping_blocks_leave_nothing_forced() -> None:
    """As two threads would begin and end them."""
    first, second = capsops.use_backend("reference"), capsops.use_backend("cpu")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert capsops.info().forced == "cpu"
    second.__exit__(None, None, None)
    assert capsops.info().forced is None


def test_info_is_a_function_and_a_module() -> None:
    run = _python("-c", "import capsops, capsops.info; print(capsops.info())")
    assert "backend cpu" in run.stdout, run.stderr


def test_info_program() -> None:
    run = _python("-m", "capsops.info")
    assert run.returncode == 0
    assert run.stderr == ""
    for word in (capsops.__version__, torch.__version__, "backend cpu", "backend reference"):
        assert word in run.stdout
    assert repr(capsops.info()) == str(capsops.info())


def test_instruction_set_can_be_forced() -> None:
    names = backends.cpu.instruction_sets()
    assert names[-1] == "baseline"
    for name in names:
        run = _python("-c", "import capsops; print(capsops.info().instruction_set)", CAPSOPS_ISA=name)
        assert run.stdout.startswith(name), run.stderr
    with pytest.raises(ValueError, match="CAPSOPS_ISA is 'mmx'; expected one of auto, "):
        backends.cpu.use_instruction_set("mmx")
