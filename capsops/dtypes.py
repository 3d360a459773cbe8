"""The dtypes of capsules, and of the sums over them."""

import torch

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LOW_PRECISION = (torch.bfloat16, torch.float16)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are kept in: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32
