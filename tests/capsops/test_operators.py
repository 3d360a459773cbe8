"""The operators in torch: opcheck, torch.compile, autocast, double backward, poisoned memory."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import capsops
from capsops import nn

from .routings import ATTENTION, EXAMPLES, OPERATORS, Routing, each

by_operator = pytest.mark.parametrize("routing", OPERATORS, ids=lambda r: r.name)
OPS = torch.ops.capsops


def test_examples_cover_every_operator() -> None:
    declared = {
        n.split("::")[1].split(".")[0] for n in torch._C._dispatch_get_all_op_names() if n.startswith("capsops::")
    }
    assert declared == set(EXAMPLES)


def _asking(arguments: tuple) -> tuple:
    """The arguments; all that can have a gradient require one."""
    return tuple(
        x.clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments
    )


@pytest.mark.parametrize("name", list(EXAMPLES))
def test_opcheck(name: str) -> None:
    torch.library.opcheck(getattr(OPS, name).default, EXAMPLES[name])


@pytest.mark.parametrize("name", list(EXAMPLES))
def test_opcheck_with_gradients(name: str) -> None:
    """Every operator is registered with autograd; forward operators have gradients, under torch.compile too."""
    # A backward operator has none: its autograd kernel raises whenever it is differentiated.
    tests = {"test_utils": "test_autograd_registration"} if name.endswith("_backward") else {}
    torch.library.opcheck(getattr(OPS, name).default, _asking(EXAMPLES[name]), **tests)


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name.endswith("_backward")])
def test_a_backward_operator_refuses_to_be_differentiated(name: str) -> None:
    out = getattr(OPS, name)(*_asking(EXAMPLES[name]))
    some = out[0] if isinstance(out, tuple) else out
    with pytest.raises(RuntimeError, match=rf"capsops.{name.removesuffix('_backward')}: .* differentiated twice"):
        some.sum().backward()


def test_new_tensors_are_poisoned() -> None:
    """The other tests rely on this to detect an output that was not written."""
    assert torch.ones(3).new_empty(64).isnan().all()
    assert torch.empty(64, dtype=torch.bfloat16).isnan().all()


@by_operator
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_fullgraph(routing: Routing, dynamic: bool) -> None:
    arguments = {n: x.float() for n, x in routing.arguments((3, 11, 4, 2, 5)).items()}
    torch._dynamo.reset()

    def step(**leaves: Tensor) -> tuple[Tensor, ...]:
        leaves = {n: x.clone().requires_grad_() for n, x in leaves.items()}
        out = each(call(**leaves))
        sum(x.square().sum() for x in out).backward()
        return *(x.detach() for x in out), *(x.grad for x in leaves.values())

    call = routing.call
    expected = step(**arguments)
    call = torch.compile(routing.call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for got, y in zip(step(**arguments), expected, strict=True):
        torch.testing.assert_close(got, y)


def test_compile_a_network_with_inductor() -> None:
    """A whole training step through the default compiler, with other sizes on the second call."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(nn.PrimaryCapsules(1, 4, 4, kernel_size=3), nn.CapsuleLayer(4 * 36, 4, 3, 5, "attention"))
    compiled = torch.compile(net, fullgraph=True)
    for batch in (2, 5):
        x = torch.randn(batch, 1, 14, 14)
        gradients = []
        for module in (net, compiled):
            net.zero_grad()
            module(x).norm(dim=-1).sum().backward()
            gradients.append([p.grad.clone() for p in net.parameters()])
        for got, expected in zip(*gradients, strict=True):
            torch.testing.assert_close(got, expected)


@by_operator
@pytest.mark.parametrize("mixed", [False, True], ids=["half", "mixed"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_autocast_runs_in_float32(routing: Routing, mixed: bool, backend: str) -> None:
    arguments = {n: x.float().requires_grad_() for n, x in routing.arguments((2, 9, 4, 3, 5)).items()}
    lower = {n: x.detach().bfloat16() if n == routing.capsules or not mixed else x for n, x in arguments.items()}
    lower = {n: x.requires_grad_() for n, x in lower.items()}
    with capsops.use_backend(backend):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = each(routing.call(**lower))
        assert all(x.dtype == torch.float32 for x in out)
        expected = each(routing.call(**{n: x.float() for n, x in lower.items()}))
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    sum(x.sum() for x in out).backward()
    for x in lower.values():
        assert x.grad is not None
        assert x.grad.dtype == x.dtype


def test_autocast_layers() -> None:
    net = torch.nn.Sequential(nn.PrimaryCapsules(1, 4, 4, kernel_size=3), nn.CapsuleLayer(4 * 36, 4, 3, 5, "dynamic"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = net(torch.randn(2, 1, 14, 14))
    assert out.dtype == torch.float32
    out.sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters())


def test_mixed_dtypes_without_autocast_are_refused() -> None:
    with pytest.raises(ValueError, match=r"weight has dtype torch.float32; expected torch.bfloat16, the dtype of u"):
        capsops.dynamic_routing(torch.randn(2, 3, 4).bfloat16(), torch.randn(3, 4, 2, 5))


@by_operator
@pytest.mark.parametrize("of", [Tensor.sum, lambda v: v.square().sum()], ids=["linear", "square"])
def test_double_backward_is_refused_by_the_kernels(routing: Routing, of) -> None:
    arguments = {n: x.requires_grad_() for n, x in routing.arguments((2, 5, 3, 2, 4)).items()}
    for i in range(routing.outputs):
        out = each(routing.call(**arguments))[i]
        (g,) = torch.autograd.grad(of(out), arguments[routing.capsules], create_graph=True)
        assert g.requires_grad
        with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
            g.square().sum().backward()


@pytest.mark.parametrize("of", [Tensor.sum, lambda v: v.square().sum()], ids=["linear", "square"])
def test_double_backward_of_squash_is_refused_too(of) -> None:
    s = torch.randn(3, 4, requires_grad=True)
    (g,) = torch.autograd.grad(of(capsops.squash(s)), s, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        g.sum().backward()


@pytest.mark.parametrize("routing", [r for r in OPERATORS if not r.detached], ids=lambda r: r.name)
def test_double_backward_of_the_reference(routing: Routing) -> None:
    arguments = {n: x.requires_grad_() for n, x in routing.arguments((1, 3, 2, 2, 3)).items()}
    with capsops.use_backend("reference"):
        assert torch.autograd.gradgradcheck(
            lambda *x: routing.call(**dict(zip(arguments, x, strict=True))), tuple(arguments.values())
        )


def test_backward_checks_saved_tensors() -> None:
    """Hooks may return a saved tensor with other strides, or with another dtype, which has to be refused."""
    u, weight = torch.randn(3, 7, 4, requires_grad=True), torch.randn(7, 4, 2, 5, requires_grad=True)
    attn_weight = torch.randn(2, 2, requires_grad=True)
    leaves = (u, weight, attn_weight)
    activation, beta = torch.rand(3, 7), torch.randn(2)
    calls = [
        lambda: capsops.attention_routing(u, weight, attn_weight),
        lambda: capsops.dynamic_routing(u, weight) + attn_weight.sum(),
        lambda: capsops.self_attention_routing(u, weight) + attn_weight.sum(),
        lambda: capsops.em_routing(u, activation, weight, beta, beta)[0] + attn_weight.sum(),
    ]

    def restrided(x: Tensor) -> Tensor:
        return x.transpose(0, -1).contiguous().transpose(0, -1)

    for call in calls:
        expected = torch.autograd.grad(call().square().sum(), leaves)
        with torch.autograd.graph.saved_tensors_hooks(restrided, lambda x: x):
            out = call()
        torch.testing.assert_close(torch.autograd.grad(out.square().sum(), leaves), expected)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x.half() if x.dim() > 2 else x, lambda x: x):
            out = call()
        with pytest.raises(ValueError, match="backward: "):
            torch.autograd.grad(out.sum(), leaves)


def test_errors_under_compile() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(capsops.dynamic_routing, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=r"weight has shape \[8, 4, 3, 5\]"):
        compiled(torch.zeros(2, 7, 4), torch.zeros(8, 4, 3, 5))


def test_no_graph_without_grad() -> None:
    u, weight = torch.randn(2, 5, 3), torch.randn(5, 3, 2, 4, requires_grad=True)
    with torch.no_grad():
        assert not capsops.dynamic_routing(u, weight).requires_grad
    with torch.inference_mode():
        assert not capsops.dynamic_routing(u, weight).requires_grad


class _SeenByDispatchMode(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func.name()))
        return func(*args, **(kwargs or {}))


class _SeenByFunctionMode(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name() if isinstance(func, torch._ops.OpOverload) else "")
        return func(*args, **(kwargs or {}))


class _SeenByProfiler(torch.autograd.profiler.profile):
    @property
    def names(self) -> set[str]:
        return {event.name for event in self.function_events}


class _SeenBySubclass(Tensor):
    names: ClassVar[set[str]] = set()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.names.add(func.name() if isinstance(func, torch._ops.OpOverload) else "")
        return super().__torch_function__(func, types, args, kwargs)


@pytest.mark.parametrize("observer", [_SeenByDispatchMode, _SeenByFunctionMode, _SeenByProfiler])
def test_an_eager_call_is_seen_by_what_observes_it(observer: Any) -> None:
    """An eager call leaves out torch's dispatcher, but not where a mode or the profiler watches it."""
    arguments = {n: x.requires_grad_() for n, x in ATTENTION.arguments((2, 7, 5, 3, 4)).items()}
    with observer() as seen:
        capsops.attention_routing(**arguments).square().sum().backward()
    names = {"capsops::attention_routing"}
    if observer is not _SeenByFunctionMode:  # torch runs backward passes outside of it
        names.add("capsops::attention_routing_backward")
    assert names <= seen.names


def test_an_eager_call_is_seen_by_a_subclass_of_tensor() -> None:
    s = torch.randn(3, 4).as_subclass(_SeenBySubclass)
    assert type(capsops.squash(s)) is _SeenBySubclass
    assert "capsops::squash" in _SeenBySubclass.names


def test_an_eager_call_on_fake_tensors_gives_fake_tensors() -> None:
    with FakeTensorMode() as mode:
        s = torch.empty(3, 4)
    assert isinstance(capsops.squash(s), FakeTensor) and s.fake_mode is mode


def test_meta_tensors_give_shapes() -> None:
    out = capsops.attention_routing(
        torch.empty(8, 460_800, 8, device="meta"),
        torch.empty(460_800, 8, 2, 16, device="meta"),
        torch.empty(2, 2, device="meta"),
    )
    assert out.shape == (8, 2, 16)
    assert out.device.type == "meta"


def test_a_forward_mode_derivative_is_an_error_rather_than_nothing() -> None:
    u, weight = torch.randn(2, 3, 4), torch.randn(3, 4, 2, 5)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(u, torch.ones_like(u))
        with pytest.raises(RuntimeError, match="jvp"):
            capsops.dynamic_routing(dual, weight)
