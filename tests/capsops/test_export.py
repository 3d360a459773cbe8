"""Graphs of the operators: exported and traced graphs train like the module they come from.

ONNX and TorchScript get the reference.
"""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import capsops
from capsops import nn

BATCH = torch.export.Dim("batch", min=1, max=64)


class Network(torch.nn.Module):
    """A network with every operator."""

    def __init__(self) -> None:
        super().__init__()
        self.primary = nn.PrimaryCapsules(1, 4, 4, kernel_size=3)
        self.attention = nn.CapsuleLayer(36, 4, 5, 6, "attention")
        self.dynamic = nn.CapsuleLayer(36, 4, 5, 6, "dynamic", iterations=2, leaky=True)
        self.logits = nn.CapsuleLayer(36, 4, 5, 6, "dynamic", iterations=2, logits=True)
        self.inputs = nn.CapsuleLayer(36, 4, 5, 6, "dynamic", iterations=2, axis="input")
        self.self_attention = nn.CapsuleLayer(36, 4, 5, 6, "self-attention")
        self.em = nn.EMCapsules(36, 4, 5, 6, iterations=2)

    def forward(self, images: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        u = self.primary(images)
        a = u.norm(dim=-1)
        pose, activation = self.em(u, a, mask)
        votes = capsops.affine_votes(u, self.dynamic.weight)
        step = capsops.routing_step(u, self.dynamic.weight, votes.mean(dim=1), mask=mask)
        routed = (
            self.attention(u, mask, input_weight=a),
            self.dynamic(u, mask),
            self.self_attention(u, mask, input_weight=a),
        )
        return (
            *routed,
            self.logits(u, mask),
            self.inputs(u, mask),
            pose,
            activation,
            step,
            capsops.squash(votes.mean(dim=1)),
        )


@pytest.fixture(scope="module")
def network() -> Network:
    torch.manual_seed(0)
    return Network()


def _images(batch: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(batch)
    return torch.randn(batch, 1, 8, 8, generator=g), torch.rand(batch, 36, generator=g) < 0.7


def _results(
    call: Callable[..., tuple[Tensor, ...]], parameters: dict[str, Tensor], *inputs: Tensor
) -> dict[str, Tensor]:
    """The outputs, and the gradient of every parameter."""
    for parameter in parameters.values():
        parameter.grad = None
    out = call(*inputs)
    sum(x.sin().sum() for x in out).backward()
    return {str(i): x.detach() for i, x in enumerate(out)} | {n: p.grad for n, p in parameters.items()}


def _assert_trains_like(module: torch.nn.Module, network: Network, *inputs: Tensor) -> None:
    """The same outputs and gradients, bit for bit."""
    expected = _results(network, dict(network.named_parameters()), *inputs)
    assert all(x.abs().max() > 0 for x in expected.values())
    got = _results(module, dict(module.named_parameters()), *inputs)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_an_exported_module_trains(network: Network, strict: bool, tmp_path: Path) -> None:
    program = torch.export.export(network, _images(3), dynamic_shapes=({0: BATCH}, {0: BATCH}), strict=strict)
    kernels = {str(node.target) for node in program.graph.nodes if "capsops" in str(node.target)}
    assert len(kernels) == 10
    for batch in (1, 3, 5):
        _assert_trains_like(program.module(), network, *_images(batch))
    again = [copy.deepcopy(program), torch.export.export(program.module(), _images(3)), program.run_decompositions()]
    if not strict:
        torch.export.save(program, tmp_path / "program.pt2")
        again.append(torch.export.load(tmp_path / "program.pt2"))
    for same in again:
        _assert_trains_like(same.module(), network, *_images(3))
    _assert_trains_like(copy.deepcopy(program.module()), network, *_images(3))


@pytest.mark.parametrize("pre_dispatch", [False, True], ids=["aten", "pre-dispatch"])
@pytest.mark.parametrize("mode", ["real", "symbolic"])
def test_a_graph_of_make_fx_has_gradients(network: Network, pre_dispatch: bool, mode: str) -> None:
    parameters = dict(network.named_parameters())

    def call(parameters: dict[str, Tensor], images: Tensor) -> tuple[Tensor, ...]:
        return functional_call(network, parameters, (images,))

    (images, _), expected = _images(3), None
    graph = make_fx(call, tracing_mode=mode, pre_dispatch=pre_dispatch)(parameters, images)
    expected = _results(network, parameters, images)
    leaves = {n: p.detach().clone().requires_grad_() for n, p in parameters.items()}
    torch.testing.assert_close(_results(lambda x: graph(leaves, x), leaves, images), expected, rtol=0, atol=0)


def test_torch_fx_traces_the_layers(network: Network) -> None:
    traced = torch.fx.symbolic_trace(network)
    names = [node.name for node in traced.graph.nodes if node.op == "call_function"]
    assert {"primary_capsules", "attention_routing", "em_routing", "affine_votes", "squash"} <= set(names)
    for module in (traced, copy.deepcopy(traced)):
        _assert_trains_like(module, network, *_images(3))


def test_torch_fx_says_how_to_call_a_function_that_is_imported_by_its_name() -> None:
    squash = capsops.functional.squash
    message = r"^squash: s is a Proxy; .*capsops\.squash.*torch\.fx\.wrap\(\"squash\"\)"
    with pytest.raises(TypeError, match=message):
        torch.fx.symbolic_trace(lambda s: squash(s))
    traced = torch.fx.symbolic_trace(lambda u, w: capsops.coupling_coefficients("dynamic", u, w))
    u, weight = torch.randn(2, 7, 4), torch.randn(7, 4, 3, 5)
    torch.testing.assert_close(traced(u, weight), capsops.coupling_coefficients("dynamic", u, weight))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", capsops.functional.FUNCTIONS)
def test_torch_jit_script_refuses_a_function(name: str) -> None:
    with pytest.raises(RuntimeError, match=rf"^{name}: torch\.jit\.script cannot compile it; .*torch\.export"):
        torch.jit.script(getattr(capsops, name))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torch_jit_script_refuses_a_network_with_a_layer(network: Network) -> None:
    layers = [nn.ConvCapsules(1, 4, 2, 4), network.em, network.primary, network.dynamic]
    for layer in layers:
        with pytest.raises(RuntimeError, match=rf"^{type(layer).__name__}: torch\.jit\.script cannot compile it"):
            torch.jit.script(torch.nn.Sequential(torch.nn.ReLU(), layer))


def test_an_exported_module_compiles(network: Network) -> None:
    torch._dynamo.reset()
    module = torch.export.export(network, _images(3)).module()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    expected = _results(module, dict(module.named_parameters()), *_images(3))
    got = _results(compiled, dict(module.named_parameters()), *_images(3))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(network: Network, reentrant: bool) -> None:
    images, mask = _images(3)
    parameters = dict(network.named_parameters())
    expected = _results(network, parameters, images, mask)
    images = images.requires_grad_()
    got = _results(lambda *x: checkpoint(network, *x, use_reentrant=reentrant), parameters, images, mask)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_aot_inductor(tmp_path: Path) -> None:
    """A package runs without the module that it comes from, for any batch, on the kernels."""
    torch.manual_seed(0)
    module = nn.CapsuleLayer(6, 4, 3, 5, "dynamic").eval()
    u = torch.randn(3, 6, 4)
    with torch.no_grad():
        program = torch.export.export(module, (u,), dynamic_shapes=({0: BATCH},))
        path = torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(tmp_path / "layer.pt2"),
            # Compiles faster for one small program.
            inductor_configs={
                "aot_inductor.compile_wrapper_opt_level": "O0",
                "aot_inductor.precompile_headers": False,
            },
        )
        loaded = torch._inductor.aoti_load_package(path)
        for batch in (1, 3, 5):
            u = torch.randn(batch, 6, 4)
            torch.testing.assert_close(loaded(u), module(u), rtol=0, atol=0)


def test_distributed_data_parallel(network: Network, tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(copy.deepcopy(network))
        got = _results(parallel, dict(parallel.module.named_parameters()), *_images(3))
    finally:
        torch.distributed.destroy_process_group()
    expected = _results(network, dict(network.named_parameters()), *_images(3))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_a_call_leaves_out_what_has_no_gradient(network: Network) -> None:
    """One of two outputs may be unused; the state that is saved for backward has no gradient."""
    pose, activation = torch.randn(2, 7, 4), torch.rand(2, 7)
    weight, beta = torch.randn(7, 4, 3, 5, requires_grad=True), torch.zeros(3)
    out = torch.ops.capsops.em_routing(pose, activation, weight, beta, beta, None, [0.1, 0.2])
    assert [x.requires_grad for x in out] == [True, True, False]
    for which in (0, 1):
        (got,) = torch.autograd.grad(out[which].sum(), weight, retain_graph=True)
        with capsops.use_backend("reference"):
            other = capsops.em_routing(pose, activation, weight, beta, beta, 2, inverse_temperature=[0.1, 0.2])[which]
        torch.testing.assert_close(got, torch.autograd.grad(other.sum(), weight)[0])

    class Nothing(torch.autograd.Function):
        """A function whose backward gives no gradient."""

        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, g: Tensor) -> None:
            return None

    (got,) = torch.autograd.grad(Nothing.apply(out[0]).sum(), weight, retain_graph=True, allow_unused=True)
    assert got is None


def test_onnx(network: Network, tmp_path: Path) -> None:
    """The exporter records the reference; onnxruntime computes the same values as the kernels for any batch."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    path = tmp_path / "network.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of the exporter itself
        shapes = ({0: BATCH}, {0: BATCH})
        program = torch.onnx.export(network.eval(), _images(3), dynamic_shapes=shapes, optimize=False, verbose=False)
    program.save(path)
    session = onnxruntime.InferenceSession(path)
    names = [x.name for x in session.get_inputs()]
    for batch in (1, 3, 8):
        inputs = _images(batch)
        got = session.run(None, {n: x.numpy() for n, x in zip(names, inputs, strict=True)})
        torch.testing.assert_close(
            [torch.from_numpy(x) for x in got], [x.detach() for x in network(*inputs)], rtol=0, atol=1e-6
        )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torch_jit_trace(network: Network) -> None:
    """A traced module holds the reference, for any batch. In float64, so that rounding hides no error."""
    network = copy.deepcopy(network).double()

    def inputs_of(batch: int) -> tuple[Tensor, Tensor]:
        images, mask = _images(batch)
        return images.double(), mask

    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning, module=r"capsops\.")
        traced = torch.jit.trace(network, inputs_of(3), check_trace=False)
    assert "capsops::" not in str(traced.inlined_graph)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    for batch in (1, 3, 8):
        inputs = inputs_of(batch)
        expected = _results(network, dict(network.named_parameters()), *inputs)
        got = _results(loaded, dict(loaded.named_parameters()), *inputs)
        torch.testing.assert_close(got, expected)
