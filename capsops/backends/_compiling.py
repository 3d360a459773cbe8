"""What torch.compile must not look into."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable[..., object])


def constant_when_compiled(function: F) -> F:
    """Let torch.compile call the function once and take the result for a constant, instead of tracing it.

    For functions that ask the machine: what they call cannot be traced. This is the mark that
    `torch.compiler.assume_constant_result` sets; that one would import the compiler, which takes seconds.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
