"""The features that are recorded of a network are those that its output is computed from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cardiocaps.config import TrainConfig
from cardiocaps.experiments.exhibits import EXHIBITS
from cardiocaps.experiments.exhibits.robustness import Robustness
from cardiocaps.experiments.plan import FIRST_SEED, SYSTEMS, configure
from cardiocaps.experiments.robustness.scoring import _record
from cardiocaps.models import build


def _networks() -> list[str]:
    exhibit = EXHIBITS["robustness"]
    assert isinstance(exhibit, Robustness)
    return [key for key in exhibit.shifted if "classifier" not in SYSTEMS[key].settings]


@pytest.mark.parametrize("key", _networks())
def test_the_output_follows_from_the_features(key: str) -> None:
    torch.manual_seed(FIRST_SEED)
    config = configure(TrainConfig(seed=FIRST_SEED), SYSTEMS[key], FIRST_SEED, Path("folder"))
    model = build(config).eval()
    images = [torch.rand(2, 9, model.size, model.size) for _ in range(2)]  # type: ignore[arg-type, call-overload]
    parts: list[Tensor] = []
    with torch.no_grad():
        hook = _record(model, parts)
        out = [model(image) for image in images]
        hook.remove()
        model(images[0])
    assert len(parts) == 2 and all(len(part) == 2 for part in parts)
    for features, said in zip(parts, out, strict=True):
        if said.capsules is not None:
            torch.testing.assert_close(features.view_as(said.capsules), said.capsules)
            continue
        last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
        with torch.no_grad():
            torch.testing.assert_close(last(features), said.scores)
