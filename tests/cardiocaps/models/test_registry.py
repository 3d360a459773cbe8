"""The registry of networks, and what the settings say of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cardiocaps.config import TrainConfig, options
from cardiocaps.errors import ConfigError
from cardiocaps.models import MODELS, Model, title


def test_the_settings_allow_what_is_registered() -> None:
    assert options()["model"].choices == tuple(MODELS)


@pytest.mark.parametrize("missing", ["", " "])
def test_a_model_without_a_title_is_no_model(missing: str) -> None:
    row = MODELS["unet"]
    with pytest.raises(ValueError, match=r"Model: title is '.*'; expected the name that tables show"):
        Model(missing, row.build, row.loss)
    with pytest.raises(TypeError, match="title"):
        Model(build=row.build, loss=row.loss)  # type: ignore[call-arg]


def test_every_model_has_a_title_of_its_own() -> None:
    titles = [title(TrainConfig(model=name)) for name in MODELS]  # type: ignore[arg-type]
    assert titles[:2] == ["CardioCaps", "EM-CapsNet"] and len(set(titles)) == len(MODELS)
    assert title(TrainConfig(routing="dynamic", affine="constant")) == "DR-CapsNet, constant affine map"
    assert title(TrainConfig(model="unet", form="published")) == "U-Net, as published"


@pytest.mark.parametrize("owner", MODELS)
def test_no_other_model_takes_settings_of_one(owner: str) -> None:
    for name in MODELS[owner].settings:
        option = options()[name]
        choices = option.choices or (False, True)
        other = next(choice for choice in choices if choice != option.default)
        for model in MODELS:
            given = {"model": model, name: other}
            if model == owner:
                TrainConfig(**given)  # type: ignore[arg-type]
                continue
            with pytest.raises(ConfigError, match=f"{name}.*{model}"):
                TrainConfig(**given)  # type: ignore[arg-type]


def test_the_registry_imports_no_torch() -> None:
    code = "import sys, cardiocaps.models; print('torch' in sys.modules)"
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
