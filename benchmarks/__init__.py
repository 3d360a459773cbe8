"""Capsule routing measured against PyTorch, side by side: `python -m benchmarks`, `.memory`, `.plots`; `pytest benchmarks`.

`shapes` says what is measured, `forms` by whom, `gate` checks them, `race` times them, `memory` weighs them, `machine`
says what the machine could do at best.
"""
