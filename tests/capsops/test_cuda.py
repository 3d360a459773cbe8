"""The CUDA backend on a machine without a GPU: when it is chosen, and the errors of a launch that fails."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import capsops
from capsops import backends
from capsops.backends import cuda, extension, triton

DEVICE = torch.device("cuda", 0)
FLOAT = torch.float32

needs_kernels = pytest.mark.skipif(
    extension._C is None or extension._C.cuda_architectures is None, reason="the extension has no CUDA kernels"
)


@pytest.fixture(autouse=True)
def fresh_answers() -> Iterator[None]:
    for unfit in (cuda.unfit, triton.unfit):
        unfit.cache_clear()
    yield
    for unfit in (cuda.unfit, triton.unfit):
        unfit.cache_clear()


def _machine(
    monkeypatch: pytest.MonkeyPatch,
    *,
    built: str | None = "80 90 100 100-virtual",
    capability: tuple[int, int] = (9, 0),
    driver: int = 13010,
    runtime: int = 13000,
    gpu: bool = True,
    hip: str | None = None,
) -> None:
    """Pretend to be a machine with this GPU, driver and extension."""
    kernels = SimpleNamespace(
        cuda_architectures=built, cuda_reason="CAPSOPS_CUDA=0", cuda_runtime=runtime, cuda_driver=lambda: driver
    )
    monkeypatch.setattr(extension, "_C", kernels)
    monkeypatch.setattr(extension, "MISSING", None)
    monkeypatch.setattr(extension, "DTYPES", {FLOAT: 0})
    operators = {"squash", "dynamic_routing"}
    monkeypatch.setitem(extension.OPERATORS, "cuda", operators | {f"{name}_backward" for name in operators})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Invented GPU")
    monkeypatch.setattr(torch.version, "hip", hip)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)])
def test_runs_from_the_oldest_architecture_on(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    """Machine code of the same major version, or PTX of the newest."""
    _machine(monkeypatch, capability=capability)
    assert backends.select("dynamic_routing", DEVICE, FLOAT) == "cuda"


@pytest.mark.parametrize(
    ("machine", "reason"),
    [
        ({"built": None}, r"built without CUDA kernels \(CAPSOPS_CUDA=0\)"),
        (
            {"capability": (7, 5)},
            "has compute capability 7.5, and the kernels were built for 80, 90, 100, PTX of 100",
        ),
        ({"capability": (9, 0), "built": "80 80-virtual"}, None),
        ({"capability": (9, 0), "built": "80-virtual"}, None),
        ({"built": "80-virtual", "driver": 13010, "runtime": 13020}, r"compiles PTX of CUDA up to 13.1, and CUDA 13.2"),
        ({"built": "90 90-virtual", "driver": 13010, "runtime": 13020}, None),  # by the machine code
        ({"capability": (9, 0), "built": "80"}, "has compute capability 9.0"),
        ({"capability": (8, 0), "built": "86 100 100-virtual"}, "has compute capability 8.0"),
        ({"driver": 12080}, r"runs CUDA up to 12.8, and the kernels were built by CUDA 13.0"),
        ({"driver": 0}, "runs CUDA up to 0.0"),
        ({"hip": "7.0"}, "it needs an NVIDIA GPU"),
        ({"gpu": False}, "torch sees no GPU"),
    ],
)
def test_why_not(monkeypatch: pytest.MonkeyPatch, machine: dict[str, Any], reason: str | None) -> None:
    _machine(monkeypatch, **machine)
    said = cuda.why_not("dynamic_routing", DEVICE, FLOAT)
    if reason is None:
        assert said is None
        return
    assert said is not None
    with capsops.use_backend("cuda"), pytest.raises(capsops.BackendError, match=reason):
        backends.select("dynamic_routing", DEVICE, FLOAT)
    if machine.get("gpu", True) and triton._installed():
        assert backends.select("dynamic_routing", DEVICE, FLOAT) == "triton"


def test_an_operator_without_a_cuda_kernel_runs_on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    _machine(monkeypatch)
    monkeypatch.setattr(triton, "_installed", lambda: True)
    monkeypatch.setitem(
        extension.OPERATORS, "cpu", frozenset({"dynamic_routing", "em_routing", "em_routing_backward", "squash"})
    )
    assert backends.select("em_routing", DEVICE, FLOAT) == "triton"
    assert backends._chosen(DEVICE) == "cuda"
    assert backends._state(cuda) == "yes, without em_routing"
    assert backends.select("dynamic_routing", DEVICE, FLOAT) == "cuda"


def test_without_any_backend_for_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    _machine(monkeypatch, built=None)
    monkeypatch.setattr(triton, "_installed", lambda: False)
    monkeypatch.setattr(backends, "_warned", set())
    with pytest.warns(RuntimeWarning, match=r"built without CUDA kernels.*Triton is not installed"):
        assert backends.select("squash", DEVICE, FLOAT) == "reference"


def _on_gpu(*tensors: torch.Tensor) -> list[Any]:
    """Stand-ins with the attributes that a call reads, as if the tensors were on a GPU."""
    return [SimpleNamespace(device=DEVICE, is_cpu=False, shape=x.shape, dtype=x.dtype) for x in tensors]


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Allocate on the CPU where a GPU is asked for; returns the sizes of the workspaces."""
    sizes: list[int] = []
    empty = torch.empty

    def allocate(size: int, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        assert device == DEVICE
        sizes.append(size)
        return empty(size, dtype=dtype)

    monkeypatch.setattr(torch, "empty", allocate)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: DEVICE.index, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: 0, raising=False)
    return sizes


@needs_kernels
@pytest.mark.skipif(torch.cuda.is_available(), reason="a launch would not fail here")
def test_a_failed_launch_raises_the_message_of_cuda(pretended: list[int]) -> None:
    # So many input capsules that there are several blocks, whose sums are in a workspace.
    u, weight, A = torch.randn(2, 2000, 3), torch.randn(2000, 3, 2, 4), torch.randn(2, 2)
    capsules = extension.Capsules(u, weight)
    v, s = torch.zeros(2, 2, 4), torch.zeros(2, 2, 4)
    operands = A.data_ptr(), 0, 0, extension._C.SquashKind.sabour, v.data_ptr(), s.data_ptr()
    said = r"attention_routing: a kernel could not be launched \(shapes \[2, 2000, 3\], \[2000, 3, 2, 4\], .*\): .*CUDA"
    for _ in range(2):  # the process survives it
        with pytest.raises(RuntimeError, match=said):
            extension.call_kernel("attention_routing", _on_gpu(u, weight), capsules.struct, *operands)
    assert len(pretended) == 2
    assert pretended[0] % 256 == 0


@needs_kernels
def test_no_kernel_for_matrix_poses(pretended: list[int]) -> None:
    pose, weight = torch.randn(2, 5, 4, 3), torch.randn(5, 3, 2, 4)
    capsules = extension.Capsules(pose, weight)
    with pytest.raises(RuntimeError, match=r"affine_votes: no kernel for shapes \[2, 5, 4, 3\]"):
        votes = torch.zeros(2, 5, 2, 4, 4)
        extension.call_kernel("affine_votes", _on_gpu(pose, weight), capsules.struct, votes.data_ptr())


@pytest.mark.skipif(extension._C is None, reason="there is no extension")
def test_the_size_of_a_workspace_is_asked_for_once(pretended: list[int]) -> None:
    contexts: list[str] = []

    def kernel(context: Any) -> Any:
        contexts.append(type(context).__name__)
        return extension._C.Status.ok

    notes: dict[str, Any] = {}
    for _ in range(2):
        assert extension._call_on_gpu(kernel, DEVICE, (), notes) == extension._C.Status.ok
    assert contexts == ["WorkspaceQuery", "ExecutionContext", "ExecutionContext"]
    assert pretended == []  # it needs none
    extension._call_on_gpu(kernel, DEVICE, (), {"workspace": 512})
    assert pretended == [512]


@needs_kernels
def test_the_workspace_follows_the_shape(pretended: list[int]) -> None:
    """It holds partial sums and states, not votes, and does not grow with the iterations."""

    some = torch.zeros(1).data_ptr()  # nothing is read or written there

    def workspace_bytes(B: int, N: int, iterations: int = 3) -> int:
        query, kind = extension._C.WorkspaceQuery(0), extension._C.SquashKind.sabour
        struct = extension._C.Capsules(some, some, 0, B, N, 8, 2, 16, 1, 8 * 2 * 16, extension._C.Dtype.float32)
        status = extension._C.dynamic_routing(query, struct, 0, iterations, False, kind, some, some)
        assert status == extension._C.Status.ok
        return int(query.bytes)

    assert 0 < workspace_bytes(8, 1000) <= workspace_bytes(8, 460_800) < 32_000_000
    assert workspace_bytes(8, 1000) == workspace_bytes(8, 1000, 100)
    assert not pretended


def test_info_reports_what_was_built() -> None:
    info = capsops.info()
    assert set(info.backends) == {"cpu", "cuda", "triton", "reference"}
    assert info.chosen["cpu"] == "cpu"
    if not torch.cuda.is_available():
        assert info.backends["cuda"].startswith("no: ")
        assert "none that torch sees" in str(info)
