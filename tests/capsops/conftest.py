"""The environment of the tests of capsops."""

import os

import pytest
import torch

# Without a GPU Triton's kernels run in its interpreter. The variable must be set before they are imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def no_call_is_remembered() -> None:
    """Some tests change which backends can run here, or what an operator does with its arguments."""
    from capsops.ops._declare import forget_calls

    forget_calls()
