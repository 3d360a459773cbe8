"""The share of routing in a training step of CardioCaps: `python -m benchmarks.training_step [--preset tiny]`.

One optimisation step on random images, in float32 and channels last: forward, loss, backward, Adam. The routing is the
capsule layer; its time is taken between hooks before and after its forward and its backward, which on a CPU runs in one
thread, node after node.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from typing import Any

ROUTINGS = ("attention",)  # the paper's


def measure(preset: str = "paper", steps: int = 2, routings: tuple[str, ...] = ROUTINGS) -> Iterator[dict[str, Any]]:
    """After one step for warming up, the median seconds of a step and of its parts, for each routing."""
    import torch
    from torch import Tensor

    from cardiocaps.config import PRESETS
    from cardiocaps.losses import CardioCapsLoss, class_weights
    from cardiocaps.models.cardiocaps import CLASSES, IN_CHANNELS, RECONSTRUCTED_CHANNELS, CardioCaps

    sizes = PRESETS[preset]
    g = torch.Generator().manual_seed(0)
    image = torch.rand(sizes.batch_size, IN_CHANNELS, sizes.size, sizes.size, generator=g)
    image = image.to(memory_format=torch.channels_last)
    label = torch.arange(sizes.batch_size) % CLASSES
    width = torch.rand(sizes.batch_size, generator=g)
    for routing in routings:
        torch.manual_seed(0)
        model = CardioCaps(sizes, routing=routing).to(memory_format=torch.channels_last)
        loss = CardioCapsLoss(class_weights(torch.tensor([3, 1])), reconstruction_weight=0.0005, regression_weight=0.05)
        optimiser = torch.optim.Adam(model.parameters(), lr=sizes.learning_rate)
        clock: dict[str, list[float]] = {"routing_forward": [], "routing_backward": []}

        def begin(part: str, clock: dict[str, list[float]] = clock) -> None:
            clock[part].append(-time.perf_counter())

        def end(part: str, clock: dict[str, list[float]] = clock) -> None:
            clock[part][-1] += time.perf_counter()

        layer = model.classes
        layer.register_forward_pre_hook(lambda *_, begin=begin: begin("routing_forward"))
        layer.register_forward_hook(lambda *_, end=end: end("routing_forward"))
        layer.register_full_backward_pre_hook(lambda *_, begin=begin: begin("routing_backward"))
        layer.register_full_backward_hook(lambda *_, end=end: end("routing_backward"))

        parts: dict[str, list[float]] = {"forward": [], "backward": [], "optimiser": []}
        for _ in range(steps + 1):
            start = time.perf_counter()
            out = model(image, label)
            losses: dict[str, Tensor] = loss(
                out.lengths, label, out.reconstruction, image[:, :RECONSTRUCTED_CHANNELS], out.regression, width
            )
            forward = time.perf_counter()
            losses["loss"].backward()
            backward = time.perf_counter()
            optimiser.step()
            optimiser.zero_grad()
            for part, since, until in (
                ("forward", start, forward),
                ("backward", forward, backward),
                ("optimiser", backward, time.perf_counter()),
            ):
                parts[part].append(until - since)
        medians = {name: statistics.median(times[1:]) for name, times in {**parts, **clock}.items()}
        step = statistics.median(sum(times) for times in list(zip(*parts.values(), strict=True))[1:])
        share = (medians["routing_forward"] + medians["routing_backward"]) / step
        batch = sizes.batch_size
        row = {"preset": preset, "batch": batch, "routing": routing, "step": step, **medians, "routing_share": share}
        del model, optimiser, layer, out, losses
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_step", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--preset", choices=("tiny", "small", "paper"), default="paper")
    parser.add_argument("--steps", type=int, default=2, help="measured, after one more for warming up")
    arguments = parser.parse_args()

    from . import worker

    for row in worker.events(measure, arguments.preset, max(1, arguments.steps), limit=3600):
        print(
            f"{row['preset']}, batch {row['batch']}, {row['routing']}: {row['step']:.3f} s a step (forward "
            f"{row['forward']:.3f}, backward {row['backward']:.3f}, optimiser {row['optimiser']:.3f}); routing "
            f"{row['routing_forward']:.4f} + {row['routing_backward']:.4f} s, {row['routing_share']:.2%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
