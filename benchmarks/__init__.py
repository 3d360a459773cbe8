"""Capsule routing measured against PyTorch, side by side: `python -m benchmarks`, `python -m pytest benchmarks`;
on a GPU `python -m benchmarks.gpu`.

`shapes` says what is measured, `forms` the contestants; `gate` checks them, `race` times them, `memory` weighs them,
`machine` says what could be had at best.
"""
