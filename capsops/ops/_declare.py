"""How an operator is declared, called, differentiated and batched.

`Differentiable` registers the operator `name` and its gradient, the operator `name_backward`, with torch's dispatcher,
and lets `torch.func.vmap` take both. The public function of `name` calls it. Every call of `torch.ops.capsops.name` has
a gradient: from the public function, from a graph that was exported or traced, and in a transform of `torch.func`.

`torch.library.register_autograd` would be the usual way, but a call through it takes more than 25 µs longer, its
forward-mode derivative is silently 0, and `torch.func.grad` refuses it. The autograd kernel here works like those of
PyTorch's own operators: it records a node, then calls the operator again, below autograd.

Of a small call the kernel is the least part, so an eager call takes a short way: from the public function to the
autograd kernel, and from there to the backend. What the checks, the choice of the backend and the sizes of the outputs
came to is remembered for the next call with the same shapes, strides, dtypes, devices and options (`_Call`). Where
something else wants to see the operator (`_observed`), it is called through the dispatcher.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType, new_class
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import Function, forward_ad
from torch.jit._trace import is_tracing
from torch.nn import Parameter

from .. import backends, memory
from ..backends import reference
from ..dtypes import LOW_PRECISION
from ._checks import check_floating, check_shape, check_tensors, fail
from ._flops import Formula, register_flops
from ._sharding import Axes, declare_sharding, register_shardings

_LIBRARY = torch.library.Library("capsops", "DEF")

_USE_REFERENCE = '`with capsops.use_backend("reference"):` around the forward pass allows it'

Output = tuple[str, Sequence[int], torch.dtype]
"""An output of an operator: the names of its axes, for messages, its shape and its dtype."""

BatchAxes = Axes | None
"""Where the axis B is. None stands for an operator on rows: all axes of its tensors but the last are batch axes."""


Allocate = tuple[int, Callable[[Tensor], Tensor]]
"""How an output of an operator is allocated: a function, and the position of the argument that it takes."""

_MOST_CALLS = 256
"""For so many signatures an operator remembers a `_Call`; then it starts over."""


class _Operator:
    """An operator that torch's dispatcher knows.

    Args:
        schema: as torch.library takes it. Where the last argument is called "wanted", it says which outputs, all of
            them gradients, a backend computes.
        check: checks the arguments and returns for each output how to allocate it, or None if it is a gradient that
            is not wanted. On real tensors a backend then fills the outputs; for fake tensors this is the shape rule
            that torch.compile and torch.export use.

    Attributes:
        overload: the operator as a function of torch.ops.
        names: of the outputs and then of the arguments, without "wanted".
        count: the number of arguments, without "wanted".
        tensors: how many of them are tensors; these come first.
        calls: signature -> how to run the operator on arguments that have it.
    """

    def __init__(self, schema: str, check: Callable[..., Sequence[Allocate | None]]) -> None:
        self.name, self.check = schema[: schema.index("(")], check
        self.calls: dict[Any, _Call] = {}
        _LIBRARY.define(schema)
        self.overload = getattr(torch.ops.capsops, self.name).default
        declared = self.overload._schema
        self._several = len(declared.returns) > 1
        arguments = [a.name for a in declared.arguments if a.name != "wanted"]
        self.names, self.count = [*[r.name for r in declared.returns], *arguments], len(arguments)
        self.tensors = sum("Tensor" in str(a.type) for a in declared.arguments)
        _LIBRARY.impl(self.name, self._run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"capsops::{self.name}", self._allocate, lib=_LIBRARY)
        _operators.append(self)

    def signature(self, first: Any, args: Sequence[Any]) -> Any:
        """All that the checks depend on, and what decides the backend, as a key; None if a tensor has no strides.

        Args:
            first: the backend, or the name of the forced one.
        """
        tensors = self.tensors
        try:
            # The layout too, because the strides of a sparse tensor may be those of an expanded one.
            of_tensors = [
                None if x is None else (x.shape, x.stride(), x.dtype, x.device, x.layout) for x in args[:tensors]
            ]
        except RuntimeError:
            return None  # for some sparse tensors, which the checks refuse
        return (first, *of_tensors, *args[tensors:])

    def call(self, backend: ModuleType, args: Sequence[Any], signature: Any) -> _Call:
        """How to run on these arguments. They are checked, unless earlier ones had the same signature."""
        call = self.calls.get(signature)
        if call is None:
            call = _Call(self, args, backend)
            if signature is not None:
                if len(self.calls) >= _MOST_CALLS:
                    self.calls.clear()
                self.calls[signature] = call
        return call

    def _run(self, *args: Any) -> Tensor | tuple[Tensor, ...]:
        return self._returned(args, _Call(self, args)(args))

    def _allocate(self, *args: Any) -> Tensor | tuple[Tensor, ...]:
        return self._returned(args, [None if x is None else x[1](args[x[0]]) for x in self.check(*args)])

    def _returned(self, args: Sequence[Any], out: Sequence[Tensor | None]) -> Tensor | tuple[Tensor, ...]:
        # A tensor without elements stands for a gradient that is not wanted.
        tensors = tuple([args[0].new_empty(0) if x is None else x for x in out])
        return tensors if self._several else tensors[0]


_operators: list[_Operator] = []


def forget_calls() -> None:
    """Check arguments and choose backends anew from now on: for tests that change which backends can run."""
    for operator in _operators:
        operator.calls.clear()


class _Call:
    """How to run an operator on arguments of one signature, which are checked here.

    Args:
        backend: where; by default `backends.compiled` decides.

    Attributes:
        choice: as in `backends.remember`.
        notes: what the backend has worked out from the signature; see `extension.run`.
    """

    def __init__(self, operator: _Operator, args: Sequence[Any], backend: ModuleType | None = None) -> None:
        self.operator, self.allocate = operator, operator.check(*args)
        name, first = operator.name, args[0]
        self.backend = backend or backends.compiled(name, first)
        self.choice = (name, first.device, first.dtype, self.backend)
        self.notes: dict[str, Any] = {}

    def __call__(self, args: Sequence[Any]) -> list[Tensor | None]:
        """Run it; the outputs, None for a gradient that is not wanted."""
        operator = self.operator
        out = [None if x is None else x[1](args[x[0]]) for x in self.allocate]
        self.backend.run(operator.name, operator.names, (*out, *args[: operator.count]), self.notes)
        return out


def _empty(shape: Sequence[int], dtype: torch.dtype) -> Allocate:
    sizes = tuple(shape)  # with torch.Size, new_empty takes longer
    return 0, lambda x: x.new_empty(sizes, dtype=dtype)


def float32(x: Tensor) -> torch.autocast:
    """Switch autocast off inside; `settle` has cast up the arguments already."""
    return torch.autocast(x.device.type, enabled=False)


def settle(op: str, names: str, *tensors: Any) -> tuple[Any, ...]:
    """Apply the autocast rule: where autocast is on, tensors of low precision become float32.

    Raises:
        TypeError: an argument is not a tensor; see `check_tensors`.
    """
    check_tensors(op, names, *tensors)
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    return tuple([x.float() if x is not None and x.dtype in LOW_PRECISION else x for x in tensors])


class Differentiable:
    """An operator `name`, with its gradient, the operator `name_backward`, and batch rules for both.

    Args:
        schema: of name. There is a function of this name, with these arguments, in `backends.reference`.
        gradient_schema: of name_backward. It takes, in this order: the gradients of the results; the other outputs of
            name, which are saved for it and have no gradient; the arguments of name, the tensors first; and, where it
            returns several gradients, "bool[n] wanted". It returns gradients of the first arguments.
        outputs: `outputs(op, *arguments)` checks the arguments of name and returns the `Output`s.
        results: how many outputs users get.
        batch: see `BatchAxes`.
        other_axes: axes besides B along which name can be split over devices.
        flops: counts the floating-point operations of name, from its arguments, with shapes in place of tensors; see
            `_flops`.
        gradient_flops: the same for name_backward.
        empty_gradient: from an argument, the function that allocates gradients of arguments like it.
    """

    def __init__(
        self,
        schema: str,
        gradient_schema: str,
        outputs: Callable[..., Sequence[Output]],
        *,
        results: int = 1,
        batch: BatchAxes,
        flops: Formula,
        gradient_flops: Formula,
        other_axes: Sequence[Axes] = (),
        empty_gradient: Callable[[Tensor], Callable[[Tensor], Tensor]] = memory.allocator,
    ) -> None:
        self.name, self.check, self.results = schema[: schema.index("(")], outputs, results
        name = self.name

        def check(*args: Any) -> list[Allocate | None]:
            return [_empty(shape, dtype) for _, shape, dtype in outputs(name, *args)]

        self.operator = operator = _Operator(schema, check)
        arguments = operator.overload._schema.arguments
        tensors = [a for a in arguments if "Tensor" in str(a.type)]
        # settle(*tensors) checks that they are tensors, or None where that is allowed, and applies the autocast rule.
        names = " ".join(a.name if str(a.type) == "Tensor" else f"{a.name}?" for a in tensors)
        self.settle = partial(settle, name, names)

        def check_gradient(*args: Any) -> list[Allocate | None]:
            op, given, wanted = f"{name}_backward", args[count:], [True]
            if gradients > 1:
                *given, wanted = given  # type: ignore[assignment]
            expected, first = outputs(op, *given), given[0]
            for i, (x, (axes, shape, dtype)) in enumerate(zip(args, expected, strict=False)):
                if i < results:
                    check_floating(op, f"{tensors[0].name} {received[i]}", first, x)
                check_shape(op, received[i], x, axes, *shape)
                if i >= results and (x.dtype != dtype or x.device != first.device or x.layout != torch.strided):
                    found = f"{x.dtype} on {x.device}, {x.layout}"
                    fail(op, f"{received[i]} is {found}; expected {dtype} on {first.device}, {torch.strided}")
            if len(wanted) != gradients:
                fail(op, f"wanted has {len(wanted)} values; expected {gradients}, one for each gradient")
            for i, want in enumerate(wanted):
                if want and given[i] is None:
                    fail(op, f"{tensors[i].name} is None; expected a tensor, because wanted asks for its gradient")
            return [(count + i, empty_gradient(given[i])) if want else None for i, want in enumerate(wanted)]

        gradient = _Operator(gradient_schema, check_gradient)
        count, gradients = len(operator.overload._schema.returns), len(gradient.overload._schema.returns)
        received = [a.name for a in gradient.overload._schema.arguments[:count]]
        self.autograd_kernel = _register_gradient(operator, gradient, len(tensors), results)
        axes = None if batch is None else (batch, *other_axes)
        for overload, formula in ((operator.overload, flops), (gradient.overload, gradient_flops)):
            _register_batch_rule(overload, batch)
            declare_sharding(overload, axes)
            register_flops(overload.overloadpacket, formula)

    def __call__(self, *args: Any) -> Any:
        """Run the operator on its backend; args: all of its arguments, the tensors settled.

        Returns:
            The results, without what is saved for backward: a tensor, or a tuple if there are several.
        """
        if torch.compiler.is_compiling() or _observed(args):
            out = self._choose_and_run(args, True)
        else:
            signature = self.operator.signature(backends.forced(), args)
            call = self.operator.calls.get(signature)
            out = self._choose_and_run(args, False, signature) if call is None else self.autograd_kernel(call, *args)
        if isinstance(out, Tensor):
            return out
        return out[0] if self.results == 1 else tuple(out[: self.results])

    def _choose_and_run(self, args: Sequence[Any], observed: bool, signature: Any = None) -> Any:
        """Choose a backend and run there. Where the call is not observed, remember both under the signature."""
        first: Tensor = args[0]
        name = self.operator.name
        compiling = torch.compiler.is_compiling()
        if is_tracing() or (compiling and torch.onnx.is_in_onnx_export()):
            backend = "reference"  # the graph is for programs without these operators: TorchScript and ONNX
        else:
            backend = backends.select(name, first.device, first.dtype)
        if backend == "reference":
            self.check(self.name, *args)
            with float32(first):
                return getattr(reference, self.name)(*args)
        if compiling or torch._C._are_functorch_transforms_active():
            return self.operator.overload(*args)  # a tracer or a transform has to see the operator
        if not observed:
            return self.autograd_kernel(self.operator.call(backends.COMPILED[backend], args, signature), *args)
        choice = None if backend == "meta" else (name, first.device, first.dtype, backends.COMPILED[backend])
        outer = backends.remember(choice)  # also for the gradient
        try:
            return self.autograd_kernel(None, *args)
        finally:
            backends.remember(outer)


# ---- autograd ------------------------------------------------------------------------------------


def _register_gradient(operator: _Operator, gradient: _Operator, tensors: int, results: int) -> Callable[..., Any]:
    """Give an operator whose first arguments are `tensors` tensors its gradient; return its autograd kernel."""
    name = operator.name
    gradients = len(gradient.overload._schema.returns)
    no_gradients = [None] * (len(operator.overload._schema.arguments) - gradients)

    def save(ctx: Any, way: Any, args: Sequence[Any], out: Any) -> Any:
        outputs = (out,) if isinstance(out, Tensor) else out
        state = outputs[results:]
        ctx.set_materialize_grads(False)  # otherwise the state, which may be large, gets a gradient of zeros
        ctx.save_for_backward(*state, *args[:tensors])
        ctx.options, ctx.way = args[tensors:], way
        if results > 1:
            ctx.shapes = [x.shape for x in outputs[:results]]
        if type(way) is _Call:
            return outputs[0] if results == 1 else tuple(outputs[:results])  # users do not get the state
        ctx.choice = backends.remembered()
        ctx.mark_non_differentiable(*state)
        return out

    def backward(ctx: Any, wanted: Sequence[bool], *g: Tensor | None) -> Sequence[Tensor | None]:
        g = g[:results]
        there = [x for x in g if x is not None]
        if len(there) < results:
            if not there:
                return [None] * len(wanted)
            some = there[0]
            g = tuple([some.new_zeros(shape) if x is None else x for x, shape in zip(g, ctx.shapes, strict=True)])
        wanted = wanted[:gradients]
        last = (wanted,) if gradients > 1 else ()
        args = (*g, *ctx.saved_tensors, *ctx.options, *last)
        if forward_ad._current_level >= 0:
            _refuse_tangents(gradient.name, args)
        way = ctx.way
        short = type(way) is _Call
        if short and not torch.is_grad_enabled() and not _observed(args):
            call = gradient.call(way.backend, args, gradient.signature(way.backend, args))
            return (*call(args), *no_gradients)
        outer = backends.remember(way.choice if short else ctx.choice)
        try:
            # With create_graph the gradient's own autograd kernel is called too: it refuses to be differentiated.
            found = gradient.overload(*args) if torch.is_grad_enabled() else _call_below_autograd(gradient, None, args)
        finally:
            backends.remember(outer)
        if gradients == 1:
            return (found, *no_gradients)
        return (*[x if want else None for want, x in zip(wanted, found, strict=True)], *no_gradients)

    def save_nothing(ctx: Any, way: Any, args: Sequence[Any], out: Any) -> Any:
        return out

    def refuse_second_derivative(ctx: Any, wanted: Sequence[bool], *g: Tensor | None) -> NoReturn:
        raise RuntimeError(
            f"capsops.{name}: the compiled kernels cannot be differentiated twice (create_graph, hessian, grad of "
            f"grad); {_USE_REFERENCE}"
        )

    _register_autograd(gradient, save_nothing, refuse_second_derivative)
    return _register_autograd(operator, save, backward)


def _call_below_autograd(operator: _Operator, way: Any, args: Sequence[Any]) -> Any:
    """Call an operator without its autograd kernel.

    Args:
        way: a `_Call` to run; or the dispatch keys with which the autograd kernel was called; or None, to enter the
            dispatcher anew.
    """
    if type(way) is _Call:
        return way(args)
    register_shardings()  # the tensors may be DTensors
    with torch._C._AutoDispatchBelowAutograd():
        if way is None:
            return operator.overload(*args)
        return operator.overload.redispatch(way & torch._C._after_autograd_keyset, *args)


# Types of arguments of which nothing besides autograd has to know.
_ORDINARY = frozenset((Tensor, Parameter, type(None), bool, int, float, str, list, tuple))


def _observed(args: Sequence[Any]) -> bool:
    """Whether something besides autograd has to see the call of an operator: a transform, a mode, a tracer or the
    profiler, or a subclass of Tensor (a fake tensor, for example)."""
    return (
        not _ORDINARY.issuperset(map(type, args))
        or args[0].is_meta
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._is_torch_function_mode_enabled()
        or torch._C._autograd._profiler_enabled()
        or torch._C._is_tracing()
    )


def _register_autograd(
    operator: _Operator,
    save: Callable[[Any, Any, Sequence[Any], Any], Any],
    backward: Callable[..., Sequence[Tensor | None]],
) -> Callable[..., Any]:
    """Register an autograd kernel.

    Args:
        save: `save(ctx, way, arguments, outputs)`, called after forward; returns what the call returns.
        backward: `backward(ctx, which arguments want a gradient, *gradients of the outputs)`.

    Returns:
        The autograd kernel, `call(way, *args)`; way as in `_call_below_autograd`. With a `_Call` it returns the results
        alone where it records a node, and otherwise all outputs.
    """
    name = operator.name

    def forward(ctx: Any, way: Any, *args: Any) -> Any:
        if type(way) is _Call:
            out = way(args)
        elif torch._C._are_functorch_transforms_active():
            # A Function switches gradients off inside, but the outer transforms have yet to see this call.
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                out = _call_below_autograd(operator, way, args)
        else:
            out = _call_below_autograd(operator, way, args)
        return save(ctx, way, args, out)

    def node_backward(ctx: Any, *g: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None, *backward(ctx, ctx.needs_input_grad[1:], *g))

    title = "".join([word.title() for word in name.split("_")])  # autograd appends "Backward" to the node's name
    methods = {"forward": staticmethod(forward), "backward": staticmethod(node_backward)}
    node: Any = new_class(title, (Function,), exec_body=lambda body: body.update(methods))
    # Under a transform `Function.apply` would use the machinery for Functions above the dispatcher; this one is called
    # from inside the dispatcher.
    record = super(Function, node).apply

    def call(way: Any, *args: Any) -> Any:
        if forward_ad._current_level >= 0:
            _refuse_tangents(name, args)
        if not torch.is_grad_enabled() or not torch._C._any_requires_grad(*args):
            return _call_below_autograd(operator, way, args)
        if not torch._C._are_functorch_transforms_active():
            return record(way, *args)
        with enable_single_level_autograd_function():
            return record(way, *args)

    _LIBRARY.impl(name, call, "Autograd", with_keyset=True)
    return call


def _refuse_tangents(name: str, args: Sequence[Any]) -> None:
    for x in args:
        if isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
            raise RuntimeError(
                f"capsops.{name}: the compiled kernels have no forward-mode derivative (jvp, jacfwd, hessian); "
                f"{_USE_REFERENCE}"
            )


# ---- batch rules ---------------------------------------------------------------------------------


def _register_batch_rule(operator: Any, batch: BatchAxes) -> None:
    """Let `torch.func.vmap` take an operator: in one call if B can hold the new batch, else in one call for each item.

    B cannot hold it where a tensor without B (a weight, for example) differs from item to item, nor where the gradient
    of such a tensor is wanted, which is a sum over B.
    """
    arguments = [a.name for a in operator._schema.arguments]
    returns = [r.name for r in operator._schema.returns]

    def axis_of(tensor: str) -> int | None:
        return 0 if batch is None else batch.get(tensor.removeprefix("g_"))

    def rule(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
        size = info.batch_size
        dims = [dim if isinstance(x, Tensor) else None for x, dim in zip(args, in_dims, strict=True)]
        wanted = args[-1] if arguments[-1] == "wanted" else [True] * len(returns)
        batched = [a for a, dim in zip(arguments, dims, strict=True) if dim is not None]
        written = [r for r, want in zip(returns, wanted, strict=True) if want]
        if any(axis_of(tensor) is None for tensor in (*batched, *written)):
            each = [operator(*item) for item in _items(size, dims, args)]
            if isinstance(each[0], Tensor):
                return torch.stack(each)[:size], 0
            return tuple([torch.stack(x)[:size] for x in zip(*each, strict=True)]), (0,) * len(returns)
        folded, B = [], 0
        for tensor, x, dim in zip(arguments, args, dims, strict=True):
            axis = axis_of(tensor)
            if isinstance(x, Tensor) and axis is not None:
                x = _expanded(x, axis, size) if dim is None else x.movedim(dim, axis)
                if batch is not None:
                    B = x.shape[axis + 1]
                    x = x.flatten(axis, axis + 1)
            folded.append(x)
        out = operator(*folded)
        axes = [axis_of(r) if want else None for r, want in zip(returns, wanted, strict=True)]
        outputs = [
            x if axis is None or batch is None else x.unflatten(axis, (size, B))
            for x, axis in zip(out if isinstance(out, tuple) else (out,), axes, strict=True)
        ]
        return (tuple(outputs), tuple(axes)) if isinstance(out, tuple) else (outputs[0], axes[0])

    torch.library.register_vmap(operator._schema.name, rule, lib=_LIBRARY)


def _expanded(x: Tensor, axis: int, size: int) -> Tensor:
    """x with a new axis of this size, expanded without a copy."""
    return x.unsqueeze(axis).expand(*x.shape[:axis], size, *x.shape[axis:])


def _items(size: int, dims: Sequence[int | None], args: Sequence[Any]) -> list[list[Any]]:
    """The arguments of each item of a batch; of one item of zeros if the batch is empty, for the outputs' shapes."""
    if size == 0:
        shapes = [
            None if dim is None else (*x.shape[:dim], *x.shape[dim + 1 :]) for x, dim in zip(args, dims, strict=True)
        ]
        return [[x if shape is None else x.new_zeros(shape) for x, shape in zip(args, shapes, strict=True)]]
    return [[x if dim is None else x.select(dim, i) for x, dim in zip(args, dims, strict=True)] for i in range(size)]
