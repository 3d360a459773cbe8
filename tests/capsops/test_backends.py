"""The choice of a backend, and the report of `info`."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import capsops
from capsops import backends
from tests.forked_python import forked_python

U, WEIGHT = torch.randn(2, 5, 3), torch.randn(5, 3, 2, 4)


def _python(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    return subprocess.run([*forked_python(), *args], capture_output=True, text=True, env=env, check=False)


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
def test_a_wrong_environment_variable(name: str, message: str) -> None:
    """Programs report it in one line (cardiocaps too: see its test_train.py). Importing succeeds; operators raise."""
    wrong = {name: "gpu\x1b"}
    for program in ("capsops info", "capsops.info"):
        run = _python("-m", *program.split(), **wrong)
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


def test_a_missing_extension_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
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
    """The blocks begin and end in the order in which two threads might do so."""
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


@pytest.mark.parametrize("program", ["capsops info", "capsops.info"])
def test_info_program(program: str) -> None:
    run = _python("-m", *program.split())
    assert run.returncode == 0
    assert run.stderr == ""
    for word in (capsops.__version__, torch.__version__, "backend cpu", "backend reference"):
        assert word in run.stdout
    assert repr(capsops.info()) == str(capsops.info())


def test_program() -> None:
    assert _python("-m", "capsops", "--version").stdout == f"capsops {capsops.__version__}\n"
    run = _python("-m", "capsops")
    assert run.returncode == 2
    assert "usage: capsops" in run.stderr


@pytest.mark.skipif(backends.extension._C is None, reason="there is no extension")
def test_info_says_which_gpu_code_there_is_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    built = SimpleNamespace(
        cuda_architectures="80 90 90-virtual", cuda_reason="for the GPUs that were seen", compiler="GNU 12.2.0"
    )
    monkeypatch.setattr(backends.extension, "_C", built)
    assert backends.extension.built() == (
        "built by GNU 12.2.0; CUDA kernels: 80, 90, PTX of 90 (for the GPUs that were seen)"
    )
    built.cuda_architectures, built.cuda_reason = None, "CAPSOPS_CUDA=0"
    assert backends.extension.built() == "built by GNU 12.2.0; no CUDA kernels (CAPSOPS_CUDA=0)"


def test_a_copy_without_the_extension_warns_once_and_computes(tmp_path: Path) -> None:
    """As it is installed by CAPSOPS_EXTENSION=0 or without a compiler.

    An editable installation has an import hook of its own, which would find the extension of the other copy.
    """
    source = Path(capsops.__file__).parent
    shutil.copytree(source, tmp_path / "capsops", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    program = (
        "import sys\n"
        "sys.meta_path = [hook for hook in sys.meta_path if not hook.__module__.startswith('__editable__')]\n"
        "import capsops, torch\n"
        "for _ in range(2): v = capsops.dynamic_routing(torch.ones(2, 5, 3), torch.ones(5, 3, 2, 4))\n"
        "print(*v.shape, capsops.info().extension)"
    )
    environment = {"PYTHONPATH": str(tmp_path), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", program]  # not a fork of a process that has imported capsops
    run = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}, cwd=tmp_path, check=False
    )
    assert run.stdout == "2 2 4 not built\n", run.stderr
    assert run.stderr.count("RuntimeWarning: capsops runs dynamic_routing on its slow reference backend") == 1
    assert "there is no extension capsops._C: capsops was installed with CAPSOPS_EXTENSION=0" in run.stderr


@pytest.mark.parametrize(
    ("found", "others", "said"),
    [
        (False, [], "there is no extension capsops._C: capsops was installed with CAPSOPS_EXTENSION=0 or without a C"),
        (False, ["_C.cpython-38-sparc.so"], "only for another Python or platform: _C.cpython-38-sparc.so; install "),
        (True, ["_C.cpython-38-sparc.so"], "the extension capsops._C does not load (wrong ELF class); install capsops"),
    ],
)
def test_why_there_is_no_extension(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: bool, others: list[str], said: str
) -> None:
    for name in others:
        (tmp_path / name).touch()
    monkeypatch.setattr(backends.extension, "__file__", str(tmp_path / "backends" / "extension.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found or None)
    assert said in backends.extension._why_missing(ImportError("wrong ELF class"))


def test_instruction_set_can_be_forced() -> None:
    names = backends.cpu.instruction_sets()
    assert names[-1] == "baseline"
    for name in names:
        run = _python("-c", "import capsops; print(capsops.info().instruction_set)", CAPSOPS_ISA=name)
        assert run.stdout.startswith(name), run.stderr
    with pytest.raises(ValueError, match="CAPSOPS_ISA is 'mmx'; expected one of auto, "):
        backends.cpu.use_instruction_set("mmx")


@pytest.mark.skipif(not backends.triton._installed(), reason="Triton is not installed")
@pytest.mark.parametrize("lacking", ["em_routing", "em_routing_backward"])
def test_an_operator_that_triton_lacks_is_a_fallback(monkeypatch: pytest.MonkeyPatch, lacking: str) -> None:
    """An operator without its gradient counts as lacking too: forward would otherwise find no kernel for backward."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(backends.extension, "MISSING", "no such file")
    monkeypatch.setattr(backends, "_warned", set())
    monkeypatch.delattr(backends.triton, lacking)
    assert backends.select("dynamic_routing", U.device, U.dtype) == "triton"
    activation, beta = torch.rand(2, 5), torch.zeros(2)
    weight = WEIGHT.clone().requires_grad_()
    arguments = (U, activation, weight, beta, beta)
    with pytest.warns(RuntimeWarning, match="slow reference backend.*triton: it has no kernel for em_routing"):
        pose, _ = capsops.em_routing(*arguments)
    pose.sum().backward()
    assert weight.grad is not None
    message = "cannot run em_routing here: triton: it has no kernel for em_routing"
    with capsops.use_backend("triton"), pytest.raises(capsops.BackendError, match=message):
        capsops.em_routing(*arguments)
    message = "em_routing: no compiled backend .*triton: it has no kernel for em_routing"
    with pytest.raises(capsops.BackendError, match=message):
        torch.ops.capsops.em_routing(*arguments, None, [0.1])


def test_an_operator_that_the_extension_lacks_is_a_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(backends, "_warned", set())
    assert {"dynamic_routing", "dynamic_routing_backward"} <= backends.extension.OPERATORS["cpu"]
    monkeypatch.setitem(backends.extension.OPERATORS, "cpu", frozenset({"squash", "squash_backward"}))
    weight = WEIGHT.clone().requires_grad_()
    with pytest.warns(RuntimeWarning, match="slow reference backend.*cpu: it has no kernel for dynamic_routing"):
        v = capsops.dynamic_routing(U, weight)
    v.sum().backward()
    assert weight.grad is not None
    with capsops.use_backend("cpu"), pytest.raises(capsops.BackendError, match="cpu: it has no kernel for dynamic"):
        capsops.dynamic_routing(U, weight)


def test_a_gradient_runs_on_the_backend_of_its_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is chosen once, also where another one is forced when backward runs."""
    seen: list[tuple[str, str]] = []
    for name, module in backends.COMPILED.items():
        run = module.run
        monkeypatch.setattr(module, "run", lambda op, *a, run=run, name=name: (seen.append((name, op)), run(op, *a))[1])
    weight = WEIGHT.clone().requires_grad_()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    on = "triton" if backends.triton._installed() else "cpu"
    with capsops.use_backend(on):
        v = capsops.dynamic_routing(U, weight)
    monkeypatch.setattr(backends, "select", None)  # nothing chooses again
    monkeypatch.setattr(backends, "_first", None)
    v.sum().backward()
    assert seen == [(on, "dynamic_routing"), (on, "dynamic_routing_backward")]
    assert backends.remembered() is None
