"""A hook of MkDocs: adds the files outside docs/ that pages link to, and makes links to them work in the site.

Links in pages are those of a code host: `docs/limits.md` in README.md, `../benchmarks/results/results.md` in
docs/benchmarks.md. In the site a file has the same path, but without `docs/`. MkDocs checks the rewritten links: a link
to a file that `OUTSIDE` lacks is an error.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
OUTSIDE = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "CITATION.cff",
    "LICENSE",
    "benchmarks/results/**/*.*",  # pages, figures and the numbers behind them
    "examples/*.py",
    ".github/workflows/ci.yml",
)
LINK = re.compile(r"\]\(([^)\s#:]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files outside docs/ to the site."""
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite the links of a page to files of the repository."""
    source = Path(page.file.abs_src_path or "").relative_to(ROOT).as_posix()
    here = posixpath.dirname(page.file.src_uri)

    def rewritten(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link[1]))
        if not (ROOT / target).exists():  # a broken link, or no link but code: MkDocs decides
            return link[0]
        return f"]({posixpath.relpath(target.removeprefix('docs/'), here or '.')}{link[2] or ''})"

    return LINK.sub(rewritten, markdown)
