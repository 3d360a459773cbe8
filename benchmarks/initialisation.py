"""Whether a layer of many capsules learns from the weights it starts with: `python -m benchmarks.initialisation`.

40 classes, the digits of scikit-learn (8 × 8 pixels) turned by 0, 90, 180 and 270 degrees. A convolution, 144 primary
capsules, dynamic routing to 40 capsules of dimension 16; 300 steps of Adam with margin loss. Three standard deviations
of the matrices side by side, at the same learning rates and seeds, otherwise with the same weights and batches:
that for which s has the length 1 where all couplings are equal, J / √(N D); 0.1; and the default of
`capsops.nn.CapsuleLayer`. A fifth of the digits, in all their rotations, is not trained on.

Measured (benchmarks/results/initialisation), at a learning rate of 0.01, accuracies of three seeds: J / √(N D) 0.683,
0.836, 0.893; 0.1 0.916, 0.921, 0.926; the default 0.926, 0.923, 0.930.

Exit status: 0 done; 2 wrong option; 4 output not writable; 128 + n stopped by signal n.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .program import print_line, run_program

N, K, J, D = 144, 8, 40, 16
RULES = {"J / √(N D)": J / math.sqrt(N * D), "0.1": 0.1, "default": None}


def accuracy(sigma: float | None, seed: int, learning_rate: float, steps: int = 300) -> tuple[float, float]:
    """Train once; σ of the first matrices (None: as the layer has it), and the accuracy on digits not trained on."""
    import torch
    from sklearn.datasets import load_digits
    from torch import nn
    from torch.nn.functional import one_hot

    from capsops.nn import CapsuleLayer, PrimaryCapsules

    torch.manual_seed(seed)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32) / 16
    kind = torch.tensor(digits.target)
    x = torch.cat([torch.rot90(images, turn, (1, 2)) for turn in range(4)])[:, None]
    y = torch.cat([4 * kind + turn for turn in range(4)])
    held_out = torch.zeros(len(images), dtype=torch.bool)
    held_out[torch.randperm(len(images))[: len(images) // 5]] = True
    held_out = held_out.repeat(4)
    train_x, train_y, test_x, test_y = x[~held_out], y[~held_out], x[held_out], y[held_out]

    layer = CapsuleLayer(N, K, J, D, "dynamic", bias=False)
    default = layer.weight.std().item()
    if sigma is not None:
        with torch.no_grad():
            layer.weight.mul_(sigma / default)
    net = nn.Sequential(nn.Conv2d(1, 64, 3), nn.ReLU(), PrimaryCapsules(64, 16, K, kernel_size=4, stride=1), layer)
    optimiser = torch.optim.Adam(net.parameters(), learning_rate)
    for _ in range(steps):
        batch = torch.randint(len(train_x), (64,))
        lengths, present = net(train_x[batch]).norm(dim=-1), one_hot(train_y[batch], J)
        # The margin loss of Sabour et al. 2017, eq. 4.
        margins = present * (0.9 - lengths).clamp(min=0) ** 2 + 0.5 * (1 - present) * (lengths - 0.1).clamp(min=0) ** 2
        loss = margins.sum(dim=1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        right = net(test_x).norm(dim=-1).argmax(dim=1) == test_y
    return default if sigma is None else sigma, right.float().mean().item()


def run(arguments: argparse.Namespace) -> None:
    """Every rule, learning rate and seed. Raises OutputError."""
    import platform

    import sklearn
    import torch

    from .program import output_errors, write_csv, write_json

    rows: list[dict[str, Any]] = []
    for learning_rate in arguments.learning_rates:
        for rule, sigma in RULES.items():
            trials = [accuracy(sigma, seed, learning_rate, arguments.steps) for seed in range(arguments.seeds)]
            found = [right for _, right in trials]
            print_line(f"learning rate {learning_rate:g}, σ = {rule}: " + ", ".join(f"{right:.3f}" for right in found))
            rows += [
                {"learning_rate": learning_rate, "rule": rule, "sigma": used, "seed": seed, "accuracy": right}
                for seed, (used, right) in enumerate(trials)
            ]
    with output_errors(arguments.out):
        arguments.out.mkdir(parents=True, exist_ok=True)
        write_csv(arguments.out / "accuracy.csv", rows)
        versions = {"python": platform.python_version(), "torch": torch.__version__, "sklearn": sklearn.__version__}
        write_json(arguments.out / "environment.json", {**versions, "steps": arguments.steps, "N": N, "J": J, "D": D})
    print_line(f"results: {arguments.out}")


def _at_least_one(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.initialisation", description=__doc__, allow_abbrev=False
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--steps", type=_at_least_one, default=300)
    parser.add_argument("--seeds", type=_at_least_one, default=3, help="how many (default %(default)s)")
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[0.01], metavar="RATE")
    out = Path("benchmarks/results/initialisation")
    parser.add_argument("--out", type=Path, default=out, help="folder (default %(default)s)")
    arguments = parser.parse_args(argv)
    return run_program(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
