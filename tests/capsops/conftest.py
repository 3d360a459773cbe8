"""The environment of the tests of capsops."""

import os

import torch

# Without a GPU Triton's kernels run in its interpreter. The variable must be set before they are imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
