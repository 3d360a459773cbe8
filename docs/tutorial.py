"""Makes the page docs/tutorial.md from the notebook docs/tutorial.ipynb: `python docs/tutorial.py`."""

from __future__ import annotations

import json
from pathlib import Path

FOLDER = Path(__file__).parent


def cells() -> list[tuple[str, str]]:
    """The kind of each cell, "markdown" or "code", and its text."""
    notebook = json.loads((FOLDER / "tutorial.ipynb").read_text(encoding="utf-8"))
    return [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]


def page() -> str:
    """The cells as Markdown, and after the title where the notebook is."""
    parts = [text if kind == "markdown" else f"```python\n{text}\n```" for kind, text in cells()]
    parts.insert(1, "This page is the notebook [tutorial.ipynb](tutorial.ipynb), which can be run as it is.")
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    (FOLDER / "tutorial.md").write_text(page(), encoding="utf-8")
