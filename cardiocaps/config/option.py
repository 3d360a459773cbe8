"""One setting: its type, its bounds, its help text, and the check of a value.

The dataclass `TrainConfig` declares the settings with `setting`; `Option` is what is read off such a field. Values
come from Python, from YAML and from the command line, so the check is strict: no bool for an int, no 1.0 for an int,
no NaN, no control characters.
"""

import argparse
import difflib
import math
import re
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cardiocaps.errors import ConfigError

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

_LONGEST_TEXT = 100
_NUMBER = re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")

# Control characters, all line separators (YAML would not give them back unchanged), and surrogates, which stand for
# bytes that are not valid text.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def setting(
    default: Any, text: str, *, affects: Affects = "result", bounds: tuple[float, float] = (-math.inf, math.inf)
) -> Any:
    """A field of `TrainConfig`, with its help text, what it affects and its bounds, which are allowed values."""
    return field(default=default, metadata={"help": text, "affects": affects, "low": bounds[0], "high": bounds[1]})


@dataclass(frozen=True)
class Option:
    """One setting. Its `kind` is bool, int, float, str, Path or dict; a dict maps names to numbers."""

    name: str
    kind: type
    optional: bool
    choices: tuple[str, ...]
    default: Any
    group: str
    help: str
    affects: Affects
    low: float
    high: float

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def allowed(self) -> str:
        """The values that are allowed besides None, in words."""
        bounds = f"from {self.low:.10g} to {self.high:.10g}"
        if self.kind is dict:
            return f"numbers {bounds} for names (NAME=X; in YAML NAME: X)"
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        return {
            bool: "true or false",
            int: f"an integer {bounds}",
            float: f"a number {bounds}",
            str: f"text of 1 to {_LONGEST_TEXT} characters without control characters",
            Path: "a path without control characters (~ is the home folder)",
        }[self.kind]

    def check(self, value: Any, where: str) -> Any:
        """`value` in the setting's own type. Raises ConfigError, which begins with `where`."""
        if value is None and self.optional:
            return None
        converted = self._converted(value)
        if converted is None:
            raise ConfigError(f"{where} is {shown(value)}; expected {self.allowed}{' or null' * self.optional}")
        return converted

    def from_text(self, text: str) -> Any:
        """The value of a text on the command line. Raises argparse's error, to which argparse adds the flag."""
        value: Any = text
        if self.kind is int and re.fullmatch(r"[-+]?[0-9]{1,20}", text):
            value = int(text)
        elif self.kind is dict:
            name, _, number = text.rpartition("=")  # a column's name may have the sign itself
            value = {name: number}
        converted = self._converted(value)
        if converted is None:
            raise argparse.ArgumentTypeError(
                f"is {shown(text if self.kind is dict else value)}; expected {self.allowed}"
            )
        return converted

    def _converted(self, value: Any) -> Any:
        """`value` in the setting's own type; None where that is impossible."""
        is_int = isinstance(value, int) and not isinstance(value, bool)
        if self.kind is dict:
            if not isinstance(value, Mapping) or not value or not all(as_text(name) for name in value):
                return None
            numbers = {name: self._inside(as_float(value[name])) for name in sorted(value)}
            return None if None in numbers.values() else numbers
        if self.choices:  # `precision: 32` in YAML is an integer
            text = str(value) if is_int else value
            return text if isinstance(text, str) and text in self.choices else None
        if self.kind is bool:
            return value if isinstance(value, bool) else None
        if self.kind is Path:
            return as_path(value)
        if self.kind is str:
            return as_text(value)
        if self.kind is int:
            return self._inside(value if is_int else None)
        return self._inside(as_float(value))

    def _inside(self, number: Any) -> Any:
        return number if number is not None and self.low <= number <= self.high else None


def as_text(value: Any) -> str | None:
    """`value` as a text that a setting can have; None where it is none."""
    fits = isinstance(value, str) and len(value) <= _LONGEST_TEXT and not _CONTROL.search(value)
    return value if fits and value.strip() else None


def as_float(value: Any) -> float | None:
    """`value` as a finite number; None where it is none. Text is accepted: in YAML, 5e-2 may stand in quotes."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    if isinstance(value, str) and not (len(value) <= _LONGEST_TEXT and _NUMBER.fullmatch(value)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def as_path(value: Any) -> Path | None:
    """`value` as a path, a leading ~ of a text replaced by the home folder; None where no file can have that path."""
    if not isinstance(value, str | Path) or not str(value).strip() or _CONTROL.search(str(value)):
        return None
    try:
        return Path(value).expanduser() if isinstance(value, str) and value.startswith("~") else Path(value)
    except RuntimeError:  # no such user
        return None


def path_text(path: Path) -> str:
    """The text that `as_path` turns back into `path`."""
    return f"./{path}" if str(path).startswith("~") else str(path)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A suggestion that an error message can end with; empty where no known name is similar."""
    names = list(known)
    alike = [name for name in names if name.lower() == word.lower()]
    completed = [name for name in names if len(word) > 3 and name.startswith(word)]
    close = alike or completed or difflib.get_close_matches(word, names, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def shown(value: Any) -> str:
    """A value in an error message: its repr, shortened."""
    return repr(str(value)) if isinstance(value, Path) else reprlib.repr(value)
