"""Reads YAML with PyYAML: no code is run, no setting may be repeated, and a mistake is one line."""

from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """Refuses repeated keys, of which PyYAML would take the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep)
        keys = [key.value for key, _ in node.value]
        if len(mapping) < len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise yaml.constructor.ConstructorError(None, None, f"{twice!r} is given twice", node.start_mark)
        return mapping


def load(content: bytes) -> Any:
    """The content of a YAML file.

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
