"""What the tests of capsops run under."""

import os

import torch

# Where there is no GPU, Triton's kernels run in its interpreter, which has to be said before they are loaded.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
