"""The device of a run. No test here needs a GPU: where one matters, torch's functions are replaced."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cardiocaps.config import TrainConfig
from cardiocaps.data.views import base_side, three_views
from cardiocaps.errors import ConfigError
from cardiocaps.models.losses import CardioCapsLoss
from cardiocaps.runtime.device import Gpu, Machine, compilation_errors, decide, machine_for, visible_gpu
from cardiocaps.training.fit import make_trainer
from cardiocaps.training.module import Classifier

NEW, OLD = Gpu("NVIDIA A100", bfloat16=True), Gpu("Tesla T4", bfloat16=False)
ON_CPU = Machine(device="cpu", gpu=None, precision="32", tf32=False, channels_last=True, compile=False, backend="auto")
ON_GPU = replace(ON_CPU, device="cuda", gpu="NVIDIA A100")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes torch report one GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)


def network(**settings: Any) -> Classifier:
    torch.manual_seed(0)
    return Classifier(TrainConfig(**settings).resolved(), torch.tensor([3, 1]), 50.0)


def a_batch(items: int = 4, device: str = "cpu", last: bool = False) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(1)
    order = torch.channels_last if last else torch.contiguous_format
    batch = {
        "image": torch.rand(items, 9, 64, 64, generator=rng).contiguous(memory_format=order),
        "label": torch.arange(items) % 2,
        "target": 50 + torch.rand(items, generator=rng),
        "clip": torch.arange(items),
    }
    return {name: x.to(device) for name, x in batch.items()}


@pytest.mark.parametrize(
    ("settings", "there", "expected"),
    [
        ({}, None, ON_CPU),
        ({}, NEW, ON_GPU),
        ({"device": "cpu"}, NEW, ON_CPU),
        ({"device": "cuda"}, OLD, replace(ON_GPU, gpu="Tesla T4")),
        ({"precision": "bf16"}, None, replace(ON_CPU, precision="bf16")),
        ({"precision": "bf16"}, NEW, replace(ON_GPU, precision="bf16")),
        ({"precision": "bf16", "device": "cpu"}, OLD, replace(ON_CPU, precision="bf16")),
        ({"tf32": True}, NEW, replace(ON_GPU, tf32=True)),
        ({"tf32": True}, None, ON_CPU),
        ({"channels_last": False}, NEW, replace(ON_GPU, channels_last=False)),
        ({"compile": True}, None, replace(ON_CPU, compile=True)),
    ],
)
def test_decide(settings: dict[str, Any], there: Gpu | None, expected: Machine) -> None:
    machine = decide(TrainConfig(**settings), there)
    assert machine == expected
    assert machine.pin_memory == (expected.device == "cuda")


def test_what_the_gpu_cannot_do_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"^device is 'cuda'; expected auto or cpu, because torch sees no GPU$"):
        decide(TrainConfig(device="cuda"), None)
    with pytest.raises(ConfigError, match=r"^precision is .bf16.; expected 32, because Tesla T4 does not "):
        decide(TrainConfig(precision="bf16"), OLD)


def test_a_machine_in_words() -> None:
    assert str(ON_CPU) == "cpu, float32, channels_last"
    machine = replace(ON_GPU, precision="bf16", tf32=True, channels_last=False, compile=True)
    assert str(machine) == "cuda (NVIDIA A100), bfloat16 autocast, TF32, compiled"


def test_auto_never_takes_an_apple_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert visible_gpu() is None
    with machine_for(TrainConfig()) as machine:
        trainer = make_trainer(TrainConfig().resolved(), machine)
    assert trainer.strategy.root_device == torch.device("cpu")


@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_the_trainer_on_a_gpu(precision: str, gpu: None) -> None:
    config = TrainConfig(precision=precision).resolved()  # type: ignore[arg-type]
    machine = decide(config, visible_gpu())
    assert machine == replace(ON_GPU, precision=precision)
    trainer = make_trainer(config, machine)
    assert trainer.strategy.root_device == torch.device("cuda", 0)
    assert trainer.precision == {"32": "32-true", "bf16": "bf16-mixed"}[precision]
    assert getattr(trainer.precision_plugin, "device", "cuda") == "cuda"
    assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark


def _tf32() -> tuple[bool, ...]:
    """All of torch's ways to ask for TF32 agree, and none raises: Lightning and torch.compile use them."""
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    return (
        products.allow_tf32,
        products.fp32_precision == "tf32",
        torch.get_float32_matmul_precision() == "high",
        convolutions.allow_tf32,
        convolutions.conv.fp32_precision == "tf32",
    )


def test_tf32_holds_inside_the_block_and_not_after_it(gpu: None) -> None:
    assert _tf32() == (False, False, False, True, True), "torch's own choice: convolutions only"
    with machine_for(TrainConfig()):
        assert not any(_tf32())
        with machine_for(TrainConfig(tf32=True)):
            assert all(_tf32())
        assert not any(_tf32())
        with machine_for(TrainConfig(tf32=True, device="cpu")):
            assert not any(_tf32())
    with pytest.raises(ZeroDivisionError), machine_for(TrainConfig(tf32=True)):
        _ = 1 / 0
    assert _tf32() == (False, False, False, True, True)


def test_a_run_on_the_cpu_leaves_the_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("torch was asked for a GPU"))
    with machine_for(TrainConfig(device="cpu")) as machine:
        assert machine == ON_CPU


def test_threads_hold_inside_the_block_and_not_after_it() -> None:
    before = torch.get_num_threads()
    with machine_for(TrainConfig(threads=3)):
        assert torch.get_num_threads() == 3
        with machine_for(TrainConfig()):
            assert torch.get_num_threads() == 3
    assert torch.get_num_threads() == before


def test_matrix_products_on_a_gpu_repeat(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with machine_for(TrainConfig()):
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


@pytest.mark.parametrize("routing", ["attention", "dynamic", "uniform"])
def test_a_step_asks_the_device_for_nothing(routing: str) -> None:
    """Meta tensors stand in for those of a GPU: reading a value fails, and so does mixing them with the CPU's."""
    net = network(routing=routing).to("meta")
    batch = a_batch(device="meta")
    base = torch.empty(4, 3, base_side(64), base_side(64), dtype=torch.uint8, device="meta")
    batch["image"] = three_views(base, 64, torch.empty(4, 3, 4, device="meta"), torch.empty(4, 2, device="meta"))
    losses = net.training_step(batch, 0)
    losses["loss"].backward()
    assert all(losses[part].device.type == "meta" for part in CardioCapsLoss.parts)
    assert all(p.grad is not None and p.grad.device.type == "meta" for p in net.parameters())
    assert net.predict_step(batch, 0)["probability"].device.type == "meta"


@pytest.mark.parametrize("layout", ["channels", "legacy"])
def test_channels_last_changes_the_rounding_only(layout: str) -> None:
    results = []
    for last in (False, True):
        net = network(primary_layout=layout)
        replace(ON_CPU, channels_last=last).lay_out(net.model)
        weight = net.model.primary.conv.weight
        assert weight.is_contiguous(memory_format=torch.channels_last) == last
        assert net.model.classes.weight.is_contiguous()
        losses = net.training_step(a_batch(last=last), 0)
        losses["loss"].backward()
        results.append([*losses.values(), *(p.grad for p in net.parameters())])
    for plain, other in zip(*results, strict=True):
        torch.testing.assert_close(plain, other, rtol=1e-4, atol=1e-5)


def test_losses_under_autocast_are_float32() -> None:
    net = network(regression_target="ef")
    plain = net.training_step(a_batch(), 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = net.training_step(a_batch(), 0)
        prediction = net.predict_step(a_batch(), 0)
    for part in CardioCapsLoss.parts:
        assert losses[part].dtype == torch.float32
        torch.testing.assert_close(losses[part], plain[part], rtol=0.05, atol=1e-3)
    assert prediction["regression"].dtype == prediction["probability"].dtype == torch.float32
    regression = prediction["regression"]
    assert not torch.equal(regression, regression.bfloat16().float()), "an ejection fraction finer than bfloat16"


@pytest.mark.parametrize(("routing", "precision"), [("attention", "32"), ("attention", "bf16"), ("dynamic", "32")])
def test_the_network_compiles_without_a_break(routing: str, precision: str) -> None:
    """The network compiles to one graph with its backward pass, for batches of several sizes, and keeps its names."""
    torch.compiler.reset()
    plain, compiled = network(routing=routing), network(routing=routing)
    compiled.model.compile(fullgraph=True, backend="aot_eager")
    assert list(compiled.state_dict()) == list(plain.state_dict())
    for items in (4, 3):
        results = []
        for net in (plain, compiled):
            net.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
                losses = net.training_step(a_batch(items), 0)
                with torch.inference_mode():
                    probability = net.predict_step(a_batch(items), 0)["probability"]
            losses["loss"].backward()
            results.append([*losses.values(), probability, *(p.grad for p in net.parameters())])
        for one, other in zip(*results, strict=True):
            tolerance = {"rtol": 1e-3, "atol": 1e-4} if precision == "32" else {"rtol": 0.02, "atol": 1e-3}
            torch.testing.assert_close(one, other, **tolerance)


def test_what_keeps_torch_from_compiling_is_said_in_a_line() -> None:
    torch.compiler.reset()

    def failing(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        raise FileNotFoundError("no compiler here")

    with (
        pytest.raises(ConfigError, match=r"^compile: torch could not compile the network \(.+\); leave out --compile$"),
        compilation_errors(),
    ):
        torch.compile(lambda x: x + 1, backend=failing)(torch.ones(2))
    with pytest.raises(KeyError), compilation_errors():
        _ = {}[1]
