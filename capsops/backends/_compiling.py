"""Marks functions that torch.compile must not trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable[..., object])


def constant_when_compiled(function: F) -> F:
    """Let torch.compile call the function once and use the result as a constant, instead of tracing it.

    For functions that query the machine, which cannot be traced. This sets the same mark as
    `torch.compiler.assume_constant_result`, without importing the compiler, which takes seconds.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
