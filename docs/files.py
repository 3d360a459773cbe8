"""Writes docs/files.md: what each source file holds, by the first paragraph of its docstring or comment."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = {
    "capsops": "the operators and layers in Python",
    "csrc": "the compiled kernels",
    "cardiocaps": "the network, its data, training, evaluation and experiments",
    "benchmarks": "speed",
}
SUFFIXES = {".py", ".cpp", ".h", ".cu", ".cuh"}
HEAD = """# What each file holds

Made from the first comment of each file by `python docs/files.py`. [Architecture](architecture.md) has the layers and a
table of where to change what.
"""


def first_paragraph(path: Path) -> str:
    """The first paragraph of a file's docstring, or of its first comment in C++, on one line."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        comment = ast.get_docstring(ast.parse(text)) or ""
    else:
        lines = re.match(r"(?://[^\n]*\n)*", text)
        comment = re.sub(r"^// ?", "", lines[0] if lines else "", flags=re.MULTILINE)
    return " ".join(comment.split("\n\n")[0].split())


def sources() -> list[Path]:
    """All source files, sorted."""
    return sorted(x for folder in FOLDERS for x in (ROOT / folder).rglob("*") if x.suffix in SUFFIXES)


def page() -> str:
    """The text of docs/files.md."""
    parts, folder = [HEAD], ""
    for path in sources():
        name = path.relative_to(ROOT)
        if name.parts[0] != folder:
            folder = name.parts[0]
            parts.append(f"\n## {folder}: {FOLDERS[folder]}\n\n| file | |\n|---|---|\n")
        if found := first_paragraph(path):
            found = found.replace("|", "\\|").replace("<", "&lt;")
            parts.append(f"| `{name.as_posix()}` | {found} |\n")
    return "".join(parts)


if __name__ == "__main__":
    (ROOT / "docs" / "files.md").write_text(page(), encoding="utf-8")
