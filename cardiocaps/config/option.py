"""One setting: its type, its bounds, and the check of a value."""

import argparse
import difflib
import math
import os
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cardiocaps.errors import ConfigError

_LONGEST_TEXT = 100

_NUMBER = re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")

# Line ends of every kind among them, which YAML would not give back; and bytes that are no text.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


Affects = Literal["result", "shape", "length", "rounding", "machine", "display", "place"]
"""What a setting affects:

* `result`: the numbers that a run computes.
* `shape`: also what the parameters of the network mean, so that a checkpoint fits no other value.
* `length`: how long a run trains. A run that is resumed may have another value.
* `rounding`: the kernels and the memory layout, so only the last digits of a result.
* `machine`: where a run computes and where its data lie. Results keep their value, up to rounding.
* `display`: what is shown while a run goes on.
* `place`: the folder of a run.
"""


def setting(
    default: Any,
    group: str,
    text: str,
    *,
    affects: Affects = "result",
    low: float | None = None,
    high: float | None = None,
) -> Any:
    """A field of TrainConfig, with its section in the help, its help, what it affects, and its inclusive bounds."""
    return field(default=default, metadata={"group": group, "help": text, "affects": affects, "low": low, "high": high})


@dataclass(frozen=True)
class Option:
    """One setting, read off its field in TrainConfig."""

    name: str
    kind: type  # bool, int, float, str, Path, or dict: a number for each of some names, which are the choices
    optional: bool
    choices: tuple[str, ...]
    default: Any
    group: str
    help: str
    affects: Affects
    low: float | None
    high: float | None

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def allowed(self) -> str:
        if self.kind is dict:
            one, some = self.choices[0], ", ".join(self.choices)
            what = f"numbers from {self.low:.10g} to {self.high:.10g} for some of {some} ({one}=X; in YAML {one}: X)"
        elif self.choices:
            what = f"one of {', '.join(self.choices)}"
        elif self.kind is str:
            what = f"text of 1 to {_LONGEST_TEXT} characters without control characters"
        elif self.kind is bool:
            what = "true or false"
        elif self.kind is Path:
            what = "a path without control characters (~ is the home folder)"
        else:
            number = "an integer" if self.kind is int else "a number"
            what = f"{number} from {self.low:.10g} to {self.high:.10g}"
        return what + (" or null" if self.optional else "")

    def check(self, value: Any, where: str) -> Any:
        """`value` in the setting's own type. Raises ConfigError, beginning with `where`."""
        if not self.takes(value):
            raise ConfigError(f"{where}: {shown(value)} is not allowed; give {self.allowed}")
        return self._converted(value)

    def takes(self, value: Any) -> bool:
        """Whether `check` takes the value."""
        return (value is None and self.optional) or self._converted(value) is not None

    def from_text(self, text: str) -> Any:
        """The value that `text` on the command line stands for. Raises argparse's error, which names the
        option."""
        value: Any = text
        if self.kind is int and re.fullmatch(r"[-+]?[0-9]{1,20}", text):
            value = int(text)
        if self.kind is dict:
            name, _, number = text.partition("=")
            value = {name: number}
        try:
            return self.check(value, where="")
        except ConfigError as error:
            message = str(error).removeprefix(": ").removesuffix(" or null")
            if self.kind is dict:
                message = message.replace(shown(value), shown(text), 1)
            raise argparse.ArgumentTypeError(message) from None

    def _converted(self, value: Any) -> Any:
        """`value` in the setting's own type, None where that is impossible."""
        if self.kind is dict:
            if not isinstance(value, Mapping) or not value or not set(value) <= set(self.choices):
                return None
            numbers = {name: self._inside(as_float(value[name])) for name in self.choices if name in value}
            return None if None in numbers.values() else numbers
        if self.choices:  # precision: 32 in YAML is a number
            text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
            return text if isinstance(text, str) and text in self.choices else None
        if self.kind is bool:
            return value if isinstance(value, bool) else None
        if self.kind is Path:
            # Path("") is the working folder, which nobody means.
            if not isinstance(value, str | Path) or not str(value).strip() or _CONTROL.search(str(value)):
                return None
            # What no file system takes (Linux: NAME_MAX, PATH_MAX) would fail later, and less clearly.
            path = as_path(value) if isinstance(value, str) else value
            lengths = [4096] if path is None else [len(os.fsencode(part)) for part in path.parts]
            return path if max(lengths, default=0) <= 255 and sum(lengths) < 4096 else None
        if self.kind is str:
            fits = isinstance(value, str) and 0 < len(value) <= _LONGEST_TEXT and not _CONTROL.search(value)
            return value if fits and value.strip() else None
        if self.kind is int:
            return self._inside(value if isinstance(value, int) and not isinstance(value, bool) else None)
        return self._inside(as_float(value))

    def _inside(self, number: Any) -> Any:
        """`number` where it is within the bounds, else None."""
        inside = number is not None and first(self.low, -math.inf) <= number <= first(self.high, math.inf)
        return number if inside else None


def as_float(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    # No repeated part can match what another could, and none is long.
    if isinstance(value, str) and not (len(value) <= _LONGEST_TEXT and _NUMBER.fullmatch(value)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def did_you_mean(word: str, known: Mapping[str, Any]) -> str:
    completed = [name for name in known if len(word) > 3 and name.startswith(word)]
    close = completed or difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def first(value: Any, otherwise: Any) -> Any:
    return otherwise if value is None else value


def as_path(text: str) -> Path | None:
    """The path that a user means, None where nobody has the home folder that it begins with."""
    try:
        return Path(text).expanduser() if text.startswith("~") else Path(text)
    except RuntimeError:
        return None


def path_text(path: Path) -> str:
    """`path` as text that means the same path to `as_path`."""
    return f"./{path}" if str(path).startswith("~") else str(path)


def same_path(one: Path, other: Path) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def shown(value: Any) -> str:
    return repr(str(value)) if isinstance(value, Path) else reprlib.repr(value)
