"""YAML 1.2's scalars for PyYAML."""

import re
from functools import cache
from typing import Any, ClassVar

from cardiocaps.config.option import shown


@cache
def yaml_types() -> tuple[Any, Any]:
    """A safe loader that refuses repeated keys, and a dumper, both with the scalars of YAML 1.2's core
    schema."""
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            mapping = {}
            for key_node, value_node in node.value:
                key = self.construct_object(key_node, deep=True)
                if not isinstance(key, str):
                    raise yaml.constructor.ConstructorError(
                        None, None, f"{shown(key)} is not the name of a setting", key_node.start_mark
                    )
                if key in mapping:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"{shown(key)} is given twice", key_node.start_mark
                    )
                mapping[key] = self.construct_object(value_node, deep=deep)
            return mapping

    class Dumper(yaml.SafeDumper):
        yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]

    digits = "-+0123456789"
    for kind, pattern, first in (
        ("null", r"~|null|", ["~", "n", ""]),
        ("bool", r"true|false", list("tf")),
        ("int", r"[-+]?(0|[1-9][0-9]*)", list(digits)),
        (
            "float",
            r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan",
            list(digits + "."),
        ),
    ):
        for side in (Loader, Dumper):
            side.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", re.compile(f"^(?:{pattern})$"), first)
    return Loader, Dumper
