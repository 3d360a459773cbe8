"""The operators under the transforms of `torch.func`: gradients, batches, ensembles, unsupported transforms."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

import capsops
from capsops import nn
from capsops.backends import extension

from .routings import OPERATORS, Arguments, Routing, each

by_operator = pytest.mark.parametrize("routing", OPERATORS, ids=lambda r: r.name)
B, SHAPE = 2, (2, 5, 3, 2, 4)

# The arguments that have a batch dimension.
BATCHED = ("u", "pose", "activation", "state", "logits", "input_weight")


def _loss(routing: Routing) -> Callable[[Arguments], Tensor]:
    """A number that depends on every output, with a gradient that is not constant."""
    return lambda arguments: torch.stack([x.sin().sum() for x in each(routing.call(**arguments))]).sum()


def _gradients(routing: Routing, arguments: Arguments) -> Arguments:
    """The gradients by eager autograd."""
    leaves = {n: x.detach().clone().requires_grad_() for n, x in arguments.items()}
    _loss(routing)(leaves).backward()
    return {n: x.grad for n, x in leaves.items()}


def _assert_same(got: object, expected: object) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def _stack(items: list[Arguments]) -> Arguments:
    return {n: torch.stack([item[n] for item in items]) for n in items[0]}


def _several(routing: Routing, count: int = 3) -> list[Arguments]:
    return [routing.arguments(SHAPE, seed=seed) for seed in range(count)]


@contextmanager
def _counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the kernels that run inside, in order."""
    calls: list[str] = []
    run = extension.call_kernel
    monkeypatch.setattr(extension, "call_kernel", lambda op, *args, **kw: (calls.append(op), run(op, *args, **kw))[1])
    yield calls
    monkeypatch.undo()


@by_operator
def test_grad_is_the_eager_gradient(routing: Routing) -> None:
    arguments = routing.arguments(SHAPE)
    _assert_same(grad(_loss(routing))(arguments), _gradients(routing, arguments))


@by_operator
def test_vjp_is_the_eager_gradient(routing: Routing) -> None:
    arguments = routing.arguments(SHAPE)
    out, pull = vjp(lambda a: each(routing.call(**a)), arguments)
    g = tuple(torch.randn_like(x) for x in out)
    leaves = {n: x.clone().requires_grad_() for n, x in arguments.items()}
    eager = each(routing.call(**leaves))
    _assert_same(out, tuple(x.detach() for x in eager))
    torch.autograd.backward(eager, g)
    _assert_same(pull(g)[0], {n: x.grad for n, x in leaves.items()})


@by_operator
def test_jacrev(routing: Routing) -> None:
    arguments = routing.arguments(SHAPE)

    def jacobian() -> object:
        return jacrev(lambda a: each(routing.call(**a)))(arguments)

    with capsops.use_backend("reference"):
        expected = jacobian()
    torch.testing.assert_close(jacobian(), expected)


@by_operator
def test_a_batch_of_capsules_is_one_call(routing: Routing, monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch of vmap is folded into B, forward and backward, whichever axis of the tensor it is."""
    arguments = routing.arguments(SHAPE)
    batch = {n: _stack(_several(routing))[n] for n in arguments if n in BATCHED}
    shared = {n: x for n, x in arguments.items() if n not in BATCHED}

    def call(capsules: Arguments) -> tuple[Tensor, ...]:
        return each(routing.call(**capsules, **shared))

    def gradient(capsules: Arguments) -> Arguments:
        return grad(lambda c: _loss(routing)({**c, **shared}))(capsules)

    moved = {n: x.movedim(0, -1) for n, x in batch.items()}
    with _counted(monkeypatch) as calls:
        out = vmap(call)(batch)
        from_last = vmap(call, in_dims=-1, out_dims=1)(moved)
        gradients = vmap(gradient)(batch)
    name = calls[0]
    assert calls == [name, name, name, f"{name}_backward"]
    items = [{n: x[i] for n, x in batch.items()} for i in range(3)]
    expected = [torch.stack(x) for x in zip(*[call(item) for item in items], strict=True)]
    torch.testing.assert_close(list(out), expected)
    torch.testing.assert_close([x.transpose(0, 1) for x in from_last], expected)
    torch.testing.assert_close(gradients, _stack([gradient(item) for item in items]))


@by_operator
def test_a_batch_of_everything_is_a_call_for_each(routing: Routing, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in an ensemble: the results are bitwise those of the single calls."""
    several = _several(routing)
    with _counted(monkeypatch) as calls:
        out = vmap(lambda a: each(routing.call(**a)))(_stack(several))
        gradients = vmap(grad(_loss(routing)))(_stack(several))
    assert len(calls) == 9
    _assert_same(list(out), [torch.stack(x) for x in zip(*[each(routing.call(**a)) for a in several], strict=True)])
    _assert_same(gradients, _stack([_gradients(routing, a) for a in several]))


@by_operator
def test_gradients_of_every_sample(routing: Routing) -> None:
    """vmap(grad) over the batch items of one network."""
    arguments = routing.arguments((4, 5, 3, 2, 4))
    shared = {n: x for n, x in arguments.items() if n not in BATCHED}

    def of_one(shared: Arguments, capsules: Arguments) -> Tensor:
        return _loss(routing)({**{n: x[None] for n, x in capsules.items()}, **shared})

    capsules = {n: x for n, x in arguments.items() if n in BATCHED}
    got = vmap(grad(of_one), in_dims=(None, 0))(shared, capsules)
    items = [{n: x[i : i + 1] for n, x in capsules.items()} for i in range(4)]
    expected = _stack([{n: _gradients(routing, {**shared, **item})[n] for n in shared} for item in items])
    torch.testing.assert_close(got, expected)


@by_operator
def test_a_gradient_through_vmap(routing: Routing) -> None:
    """grad of vmap, and eager autograd of vmap, where no tensor visible to Python requires a gradient."""
    several = _several(routing)
    expected = _stack([_gradients(routing, a) for a in several])
    _assert_same(grad(lambda a: vmap(_loss(routing))(a).sum())(_stack(several)), expected)
    leaves = {n: x.requires_grad_() for n, x in _stack(several).items()}
    vmap(_loss(routing))(leaves).sum().backward()
    _assert_same({n: x.grad for n, x in leaves.items()}, expected)


@by_operator
def test_vmap_inside_vmap_and_of_nothing(routing: Routing) -> None:
    several = [_stack(_several(routing, 2)), _stack(_several(routing, 2))]
    out = vmap(vmap(_loss(routing)))(_stack(several))
    _assert_same(out, torch.stack([vmap(_loss(routing))(a) for a in several]))
    none = {n: x[:0] for n, x in several[0].items()}
    assert vmap(_loss(routing))(none).shape == (0,)
    assert {n: x.shape for n, x in vmap(grad(_loss(routing)))(none).items()} == {n: x.shape for n, x in none.items()}


@pytest.mark.parametrize("routing", ["attention", "dynamic", "self-attention", "em"])
def test_an_ensemble_of_layers_trains(routing: str) -> None:
    """stack_module_state and vmap give every model the gradient that it has on its own."""
    torch.manual_seed(0)
    layers = [
        nn.EMCapsules(7, 4, 3, 5) if routing == "em" else nn.CapsuleLayer(7, 4, 3, 5, routing, shared=False)
        for _ in range(3)
    ]
    u = (torch.randn(2, 7, 4), torch.rand(2, 7)) if routing == "em" else (torch.randn(2, 7, 4),)
    parameters, buffers = stack_module_state(layers)
    empty = layers[0]
    out = vmap(lambda p, b: each(functional_call(empty, (p, b), u)))(parameters, buffers)
    sum(x.square().sum() for x in out).backward()
    for i, layer in enumerate(layers):
        alone = each(layer(*u))
        _assert_same([x[i] for x in out], list(alone))
        sum(x.square().sum() for x in alone).backward()
        for name, parameter in layer.named_parameters():
            assert parameter.grad.abs().max() > 0
            _assert_same(parameters[name].grad[i], parameter.grad)


def test_primary_capsules_and_squash() -> None:
    features, s = torch.randn(3, 2, 6, 3, 4, dtype=torch.float64), torch.randn(3, 2, 5, dtype=torch.float64)
    images = features.flatten(0, 1).to(memory_format=torch.channels_last).unflatten(0, (3, 2))

    def primary(x: Tensor) -> Tensor:
        return capsops.primary_capsules(x, 2, layout="legacy")

    for call, x in ((primary, features), (primary, images), (capsops.squash, s), (capsops.squash, s[0])):
        one = x[0]
        eager = one.clone().requires_grad_()
        call(eager).sin().sum().backward()
        _assert_same(grad(lambda x, call=call: call(x).sin().sum())(one), eager.grad)
        if x.dim() > 1:
            _assert_same(vmap(call)(x), torch.stack([call(item) for item in x]))
            both = vmap(grad(lambda x, call=call: call(x).sin().sum()))(x)
            _assert_same(both[0], eager.grad)
            with capsops.use_backend("reference"):
                expected = jacrev(call)(one)
            torch.testing.assert_close(jacrev(call)(one), expected)


def test_vmap_takes_a_mask_and_low_precision() -> None:
    u, weight = torch.randn(3, 2, 7, 4).bfloat16(), torch.randn(7, 4, 2, 5).bfloat16()
    mask = torch.rand(3, 2, 7) < 0.5
    for routing in (capsops.dynamic_routing, capsops.self_attention_routing):
        for dim, masks in ((0, mask), (None, mask[0])):
            got = vmap(lambda u, m, f=routing: f(u, weight, mask=m), in_dims=(0, dim))(u, masks)
            expected = [routing(u[i], weight, mask=mask[i if dim == 0 else 0]) for i in range(3)]
            torch.testing.assert_close(got, torch.stack(expected))


@pytest.mark.parametrize("routing", [r for r in OPERATORS if not r.detached], ids=lambda r: r.name)
@pytest.mark.parametrize("transform", ["jvp", "jacfwd", "hessian", "grad of grad", "jacrev of grad", "dual"])
def test_unsupported_transforms_raise(routing: Routing, transform: str) -> None:
    arguments = routing.arguments((1, 3, 2, 2, 2))
    loss = _loss(routing)
    second = "grad of grad", "jacrev of grad"

    def run() -> object:
        if transform == "jvp":
            return jvp(loss, (arguments,), (arguments,))
        if transform == "jacfwd":
            return jacfwd(loss)(arguments)
        if transform == "hessian":
            return hessian(loss)(arguments)
        if transform == "grad of grad":
            return grad(lambda a: sum(x.square().sum() for x in grad(loss)(a).values()))(arguments)
        if transform == "jacrev of grad":
            return jacrev(grad(loss))(arguments)
        with torch.autograd.forward_ad.dual_level():
            dual = {n: torch.autograd.forward_ad.make_dual(x, x) for n, x in arguments.items()}
            return torch.autograd.forward_ad.unpack_dual(loss(dual)).tangent

    message = "differentiated twice" if transform in second else "no forward-mode derivative"
    with pytest.raises(RuntimeError, match=rf"capsops\.\w+: .*{message}.*use_backend\(\"reference\"\)"):
        run()
    with capsops.use_backend("reference"):
        assert run() is not None


@by_operator
def test_operators_called_directly_are_transformed_too(routing: Routing) -> None:
    """An exported graph calls the operators directly."""
    arguments = routing.arguments(SHAPE)
    graph = torch.fx.experimental.proxy_tensor.make_fx(_loss(routing))(arguments)
    assert any("capsops" in str(node.target) for node in graph.graph.nodes)
    _assert_same(grad(graph)(arguments), _gradients(routing, arguments))
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        jvp(graph, (arguments,), (arguments,))
    several = _several(routing)
    _assert_same(vmap(grad(graph))(_stack(several)), _stack([_gradients(routing, a) for a in several]))


@by_operator
def test_a_second_derivative_outside_of_a_transform(routing: Routing) -> None:
    """Eager autograd cannot differentiate the gradient of a transform; that raises instead of giving no gradient."""
    leaves = {n: x.requires_grad_() for n, x in routing.arguments(SHAPE).items()}
    inner = grad(_loss(routing))(leaves)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        inner[routing.capsules].sum().backward()


def test_a_tangent_that_arrives_with_a_gradient_is_refused() -> None:
    """The call itself had no tangent; the gradient that its backward receives has one."""
    s = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def run() -> torch.Tensor | None:
        with torch.autograd.forward_ad.dual_level():
            factor = torch.autograd.forward_ad.make_dual(torch.ones_like(s), torch.ones_like(s))
            (g,) = torch.autograd.grad((capsops.squash(s) * factor).sum(), s)
            return torch.autograd.forward_ad.unpack_dual(g).tangent

    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        run()
    with capsops.use_backend("reference"):
        assert run() is not None
