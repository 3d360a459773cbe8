"""The share of routing in a training step of CardioCaps: `python -m benchmarks.training_step [--preset tiny]`.

One optimisation step on random images, in float32 and channels last: forward, loss, backward, Adam. The routing is the
capsule layer; its time is taken between hooks before and after its forward and its backward, which on a CPU runs in one
thread, node after node, and on a GPU on one stream.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

from .device import CPU, Device

ROUTINGS = ("attention",)  # the paper's
# fused: kernels of capsops. naive: the reference, which stores the votes. fused, TF32: kernels of capsops, with
# TensorFloat-32 in the other layers (GPU only).
FUSED, NAIVE, FUSED_TF32 = "fused", "naive", "fused, TF32"

_PARTS = ("forward", "backward", "optimiser")


def measure(
    preset: str = "paper",
    steps: int = 2,
    routings: tuple[str, ...] = ROUTINGS,
    ways: tuple[str, ...] = (FUSED,),
    device: Device = CPU,
) -> Iterator[dict[str, Any]]:
    """After one step for warming up, the median seconds of a step and of its parts, for each routing and way; on a GPU
    the peak memory too, and what failed with its reason."""
    from . import worker

    for routing in routings:
        for way in ways:
            row: dict[str, Any] = {"preset": preset, "routing": routing, "way": way, "status": "ok", "reason": ""}
            try:
                row |= _step(preset, steps, routing, way, device)
            except Exception as error:
                if not device.on_gpu:
                    raise
                row["status"] = "out of memory" if worker.is_out_of_memory(error) else "failed"
                row["reason"] = f"{type(error).__name__}: {error}"[:500]
                if not device.recover():
                    yield row
                    return
            yield row


def _step(preset: str, steps: int, routing: str, way: str, device: Device) -> dict[str, Any]:
    import torch
    from torch import Tensor

    import capsops
    from cardiocaps.config import PRESETS
    from cardiocaps.models.cardiocaps import CardioCaps
    from cardiocaps.models.losses import CardioCapsLoss, class_weights
    from cardiocaps.models.prediction import CLASSES, IN_CHANNELS, RECONSTRUCTED_CHANNELS

    device.prepare()
    if device.on_gpu:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = way == FUSED_TF32
    sizes = PRESETS[preset]
    g = torch.Generator().manual_seed(0)
    image = torch.rand(sizes.batch_size, IN_CHANNELS, sizes.size, sizes.size, generator=g).to(device.type)
    image = image.to(memory_format=torch.channels_last)
    label = torch.arange(sizes.batch_size, device=device.type) % CLASSES
    width = torch.rand(sizes.batch_size, generator=g).to(device.type)
    torch.manual_seed(0)
    model = CardioCaps(sizes, routing=routing).to(device.type).to(memory_format=torch.channels_last)
    loss = CardioCapsLoss(class_weights(torch.tensor([3, 1])), reconstruction_weight=0.0005, regression_weight=0.05)
    loss.to(device.type)
    optimiser = torch.optim.Adam(model.parameters(), lr=sizes.learning_rate)
    clock: dict[str, list[Any]] = {
        f"routing_{part}_{end}": [] for part in ("forward", "backward") for end in ("begins", "ends")
    }
    layer = model.classes
    layer.register_forward_pre_hook(lambda *_: clock["routing_forward_begins"].append(device.mark()))
    layer.register_forward_hook(lambda *_: clock["routing_forward_ends"].append(device.mark()))
    layer.register_full_backward_pre_hook(lambda *_: clock["routing_backward_begins"].append(device.mark()))
    layer.register_full_backward_hook(lambda *_: clock["routing_backward_ends"].append(device.mark()))

    marks: list[list[Any]] = []
    with capsops.use_backend("reference") if way == NAIVE else nullcontext():
        for step in range(steps + 1):
            if step == 1:
                device.start_peak()
            at = [device.mark()]
            out = model(image, label)
            losses: dict[str, Tensor] = loss(
                out.scores, label, out.reconstruction, image[:, :RECONSTRUCTED_CHANNELS], out.regression, width
            )
            at.append(device.mark())
            losses["loss"].backward()
            at.append(device.mark())
            optimiser.step()
            optimiser.zero_grad()
            at.append(device.mark())
            device.synchronize()
            marks.append(at)

    def median(begins: Sequence[Any], ends: Sequence[Any]) -> float:
        return statistics.median(device.between(a, b) for a, b in list(zip(begins, ends, strict=True))[1:])

    columns = list(zip(*marks, strict=True))
    medians = {part: median(columns[i], columns[i + 1]) for i, part in enumerate(_PARTS)}
    for part in ("routing_forward", "routing_backward"):
        medians[part] = median(clock[f"{part}_begins"], clock[f"{part}_ends"])
    step_seconds = median(columns[0], columns[-1])
    share = (medians["routing_forward"] + medians["routing_backward"]) / step_seconds
    peak = device.peak_bytes()
    return {
        "batch": sizes.batch_size,
        "step": step_seconds,
        **medians,
        "routing_share": share,
        "peak_MB": "" if peak is None else peak / 1e6,
    }


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
