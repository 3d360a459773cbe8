"""YAML text with the scalars of YAML 1.2: 1e-4 is a number, 010 is not eight, yes and no are text.

PyYAML reads YAML 1.1; its loader and dumper get the resolvers of YAML 1.2's core schema here.
"""

import re
from typing import Any, ClassVar

import yaml

from cardiocaps.config.option import shown

_DIGITS = [*"-+0123456789"]

_SCALARS = (
    ("null", r"~|null|", ["~", "n", ""]),
    ("bool", r"true|false", ["t", "f"]),
    ("int", r"[-+]?(0|[1-9][0-9]*)", _DIGITS),
    ("float", r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", [*_DIGITS, "."]),
)
"""Type, pattern, and the characters that a scalar of the type can begin with."""


class _Loader(yaml.SafeLoader):
    """A safe loader that refuses repeated keys and keys that are not text."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str) or key in mapping:
                problem = "is given twice" if isinstance(key, str) else "is not the name of a setting"
                raise yaml.constructor.ConstructorError(None, None, f"{shown(key)} {problem}", key_node.start_mark)
            mapping[key] = self.construct_object(value_node, deep=deep)
        return mapping


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]


for _kind, _pattern, _first in _SCALARS:
    for _side in (_Loader, _Dumper):
        _side.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_pattern})$"), _first)


def dump(settings: dict[str, Any]) -> str:
    text: str = yaml.dump(settings, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)
    return text


def load(content: bytes) -> Any:
    """The content of a YAML file, without running any code from it.

    Raises:
        ValueError: it is not valid YAML. The message gives the reason and the position but quotes no line: the file
            may be another one than the user meant, such as a table with patients' names.
    """
    try:
        return yaml.load(content, Loader=_Loader)  # a SafeLoader
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    # An explicit tag that does not fit its scalar (`!!bool perhaps`) makes PyYAML raise one of the other types.
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError) as error:
        problem = getattr(error, "problem", None) or getattr(error, "context", None) or error
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"{' '.join(str(problem).split())[:200]}{place}") from error
