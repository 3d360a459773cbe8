"""Pages to look at, in HTML. A page loads nothing from a network, and names its use at the top and on paper."""

from __future__ import annotations

from base64 import b64encode
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cardiocaps import DISCLAIMER
from cardiocaps.runtime.files import write_text

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_HEIGHT = 144  # pixels of a picture of a video: twice what a page shows, for fine screens


def write_page(path: Path, template: str, **values: Any) -> None:
    """Render a template of this folder, `template.html.jinja`, with `values`, into a file. Raises OutputError."""
    from jinja2 import Environment, FunctionLoader

    folder = files(__package__)
    environment = Environment(
        autoescape=True, loader=FunctionLoader(lambda name: folder.joinpath(name).read_text(encoding="utf-8"))
    )
    text = environment.get_template(f"{template}.html.jinja").render(use=DISCLAIMER, **values)
    write_text(path, text.encode("utf-8", "replace").decode())


def jpeg(frame: NDArray[np.uint8], aspect: float) -> bytes:
    """A frame of a video, uint8 [3, S, S], as a JPEG of the video's aspect (width / height)."""
    from PIL import Image

    image = Image.fromarray(frame.transpose(1, 2, 0).copy())
    width = min(max(round(_HEIGHT * aspect), 8), 8 * _HEIGHT)
    content = BytesIO()
    image.resize((width, _HEIGHT), Image.Resampling.LANCZOS).save(content, format="JPEG", quality=85)
    return content.getvalue()


def inline(content: bytes, kind: str) -> str:
    """An image as an address that holds it, so that a page needs no second file; kind: "png" or "jpeg"."""
    return f"data:image/{kind};base64,{b64encode(content).decode()}"
