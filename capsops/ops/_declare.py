"""How an operator is declared, called, differentiated and batched.

`Differentiable` registers the operator `name` and its gradient, the operator `name_backward`, with torch's dispatcher,
and lets `torch.func.vmap` take both. The public function of `name` calls it. Every call of `torch.ops.capsops.name` has
a gradient: from the public function, from a graph that was exported or traced, and in a transform of `torch.func`.

`torch.library.register_autograd` would be the usual way, but a call through it takes more than 25 µs longer, its
forward-mode derivative is silently 0, and `torch.func.grad` refuses it. The autograd kernel here works like those of
PyTorch's own operators: it records a node, then calls the operator again, below autograd. An eager call goes from the
public function straight to the autograd kernel and from there to the backend; it enters the dispatcher, which takes
20 µs, only where something else wants to see the operator (`_observed`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import new_class
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


_backend_kernels: dict[Any, Callable[..., Any]] = {}
"""operator -> the function that runs it on a compiled backend."""


def _define(schema: str, outputs: Callable[..., tuple[Tensor, ...]]) -> Any:
    """Define an operator and return it.

    Args:
        schema: as torch.library takes it. Where the last argument is called "wanted", it says which outputs, all of
            them gradients, a backend computes.
        outputs: checks the arguments and allocates the outputs. On real tensors a backend then fills these; for fake
            tensors it is the shape rule that torch.compile and torch.export use.
    """
    name = schema[: schema.index("(")]

    def allocate(*args: Any) -> Tensor | tuple[Tensor, ...]:
        out = outputs(*args)
        return out if several else out[0]

    def run(*args: Any) -> Tensor | tuple[Tensor, ...]:
        out = outputs(*args)
        filled: Sequence[Tensor | None] = out
        if has_wanted:
            *args, wanted = args  # type: ignore[assignment]
            filled = [x if want else None for x, want in zip(out, wanted, strict=True)]
        backends.compiled(_asked_for(name, weight, args), args[0]).run(name, names, (*filled, *args))
        return out if several else out[0]

    _LIBRARY.define(schema)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"capsops::{name}", allocate, lib=_LIBRARY)
    overload = getattr(torch.ops.capsops, name).default
    declared = overload._schema
    several = len(declared.returns) > 1
    names = [x.name for x in (*declared.returns, *declared.arguments)]
    weight = _optional_weight(declared)
    has_wanted = names[-1] == "wanted"
    names = names[:-1] if has_wanted else names
    _backend_kernels[overload] = run
    return overload


def _optional_weight(schema: Any) -> int | None:
    """The position of a weight that may be None, because the first argument is votes then; None if there is none."""
    for position, a in enumerate(schema.arguments):
        if a.name == "weight" and str(a.type) == "Optional[Tensor]":
            return position
    return None


def _asked_for(name: str, weight: int | None, args: Sequence[Any]) -> str:
    """What a backend is asked for to run the operator `name`; weight: as `_optional_weight` says."""
    return name if weight is None or args[weight] is not None else backends.of_votes(name)


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
        empty_gradient: allocates the gradient of an argument.
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
        empty_gradient: Callable[[Tensor], Tensor] = memory.empty_like,
    ) -> None:
        self.name, self.check, self.results = schema[: schema.index("(")], outputs, results
        name = self.name

        def allocate(*args: Any) -> tuple[Tensor, ...]:
            first: Tensor = args[0]
            return tuple([first.new_empty(shape, dtype=dtype) for _, shape, dtype in outputs(name, *args)])

        self.operator = _define(schema, allocate)
        arguments = self.operator._schema.arguments
        tensors = [a for a in arguments if "Tensor" in str(a.type)]
        # settle(*tensors) checks that they are tensors, or None where that is allowed, and applies the autocast rule.
        names = " ".join(a.name if str(a.type) == "Tensor" else f"{a.name}?" for a in tensors)
        self.settle = partial(settle, name, names)
        self.weight = _optional_weight(self.operator._schema)

        def allocate_gradients(*args: Any) -> tuple[Tensor, ...]:
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
            out = []
            for i, want in enumerate(wanted):
                if want and given[i] is None:
                    fail(op, f"{tensors[i].name} is None; expected a tensor, because wanted asks for its gradient")
                # A tensor without elements stands for a gradient that is not wanted.
                out.append(empty_gradient(given[i]) if want else first.new_empty(0))
            return tuple(out)

        gradient = _define(gradient_schema, allocate_gradients)
        count, gradients = len(self.operator._schema.returns), len(gradient._schema.returns)
        received = [a.name for a in gradient._schema.arguments[:count]]
        self.autograd_kernel = _register_gradient(self.operator, gradient, len(tensors), results)
        _register_batch_rule(self.operator, batch)
        _register_batch_rule(gradient, batch)
        axes = None if batch is None else (batch, *other_axes)
        declare_sharding(self.operator, axes)
        declare_sharding(gradient, axes)
        register_flops(self.operator.overloadpacket, flops)
        register_flops(gradient.overloadpacket, gradient_flops)

    def __call__(self, *args: Any) -> Any:
        """Run the operator on its backend; args: all of its arguments, the tensors settled.

        Returns:
            The results, without what is saved for backward: a tensor, or a tuple if there are several.
        """
        first: Tensor = args[0]
        name = _asked_for(self.name, self.weight, args)
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
            out = self.operator(*args)  # a tracer or a transform has to see the operator
        else:
            # The short way to the autograd kernel, which remembers the backend for the gradient.
            choice = None if backend == "meta" else (name, first.device, first.dtype, backends.COMPILED[backend])
            outer = backends.remember(choice)
            try:
                out = self.autograd_kernel(None, *args)
            finally:
                backends.remember(outer)
        if isinstance(out, Tensor):
            return out
        return out[0] if self.results == 1 else tuple(out[: self.results])


# ---- autograd ------------------------------------------------------------------------------------


def _name(operator: Any) -> str:
    return operator._schema.name.removeprefix("capsops::")


def _register_gradient(operator: Any, gradient: Any, tensors: int, results: int) -> Callable[..., Any]:
    """Give an operator whose first arguments are `tensors` tensors its gradient; return its autograd kernel."""
    name = _name(operator)
    gradients = len(gradient._schema.returns)
    no_gradients = [None] * (len(operator._schema.arguments) - gradients)

    def save(ctx: Any, args: Sequence[Any], out: Any) -> None:
        outputs = out if isinstance(out, tuple) else (out,)
        state = outputs[results:]
        ctx.mark_non_differentiable(*state)
        ctx.set_materialize_grads(False)  # otherwise the state, which may be large, gets a gradient of zeros
        ctx.save_for_backward(*state, *args[:tensors])
        ctx.options = args[tensors:]
        ctx.choice = backends.remembered()
        if results > 1:
            ctx.shapes = [x.shape for x in outputs[:results]]

    def backward(ctx: Any, wanted: list[bool], *g: Tensor | None) -> Sequence[Tensor | None]:
        g = g[:results]
        if None in [x if x is None else 0 for x in g]:
            some = next((x for x in g if x is not None), None)
            if some is None:
                return [None] * len(wanted)
            g = tuple([some.new_zeros(shape) if x is None else x for x, shape in zip(g, ctx.shapes, strict=True)])
        wanted = wanted[:gradients]
        last = (wanted,) if gradients > 1 else ()
        args = (*g, *ctx.saved_tensors, *ctx.options, *last)
        if forward_ad._current_level >= 0:
            _refuse_tangents(f"{name}_backward", args)
        outer = backends.remember(ctx.choice)
        try:
            # With create_graph the gradient's own autograd kernel is called too: it refuses to be differentiated.
            found = gradient(*args) if torch.is_grad_enabled() else _call_below_autograd(gradient, None, args)
        finally:
            backends.remember(outer)
        if gradients == 1:
            return (found, *no_gradients)
        return (*[x if want else None for want, x in zip(wanted, found, strict=True)], *no_gradients)

    def save_nothing(ctx: Any, args: Sequence[Any], out: Any) -> None:
        pass

    def refuse_second_derivative(ctx: Any, wanted: list[bool], *g: Tensor | None) -> NoReturn:
        raise RuntimeError(
            f"capsops.{name}: the compiled kernels cannot be differentiated twice (create_graph, hessian, grad of "
            f"grad); {_USE_REFERENCE}"
        )

    _register_autograd(gradient, save_nothing, refuse_second_derivative)
    return _register_autograd(operator, save, backward)


def _call_below_autograd(operator: Any, keys: Any, args: Sequence[Any]) -> Any:
    """Call an operator; keys are the dispatch keys with which its autograd kernel was called, None outside of one."""
    with torch._C._AutoDispatchBelowAutograd():
        if keys is None and not _observed(args):
            return _backend_kernels[operator](*args)
        register_shardings()  # the tensors may be DTensors
        return operator(*args) if keys is None else operator.redispatch(keys & torch._C._after_autograd_keyset, *args)


_ORDINARY = (Tensor, Parameter)


def _observed(args: Sequence[Any]) -> bool:
    """Whether something besides autograd has to see the call of an operator: a transform, a mode or the profiler, or
    a subclass of Tensor (a fake tensor, for example)."""
    if (
        torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._is_torch_function_mode_enabled()
        or torch._C._autograd._profiler_enabled()
    ):
        return True
    for x in args:
        if isinstance(x, Tensor) and type(x) not in _ORDINARY:
            return True
    return args[0].device.type == "meta"


def _register_autograd(
    operator: Any,
    save: Callable[[Any, Sequence[Any], Any], None],
    backward: Callable[..., Sequence[Tensor | None]],
) -> Callable[..., Any]:
    """Register an autograd kernel.

    Args:
        save: `save(ctx, arguments, outputs)`, called after forward.
        backward: `backward(ctx, which arguments want a gradient, *gradients of the outputs)`.

    Returns:
        The autograd kernel, `call(keys, *args)`; keys as in `_call_below_autograd`.
    """
    name = _name(operator)

    def forward(ctx: Any, keys: Any, *args: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            # A Function switches gradients off inside, but the outer transforms have yet to see this call.
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                out = _call_below_autograd(operator, keys, args)
        else:
            out = _call_below_autograd(operator, keys, args)
        save(ctx, args, out)
        return out

    def node_backward(ctx: Any, *g: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None, *backward(ctx, list(ctx.needs_input_grad[1:]), *g))

    title = "".join([word.title() for word in name.split("_")])  # autograd appends "Backward" to the node's name
    methods = {"forward": staticmethod(forward), "backward": staticmethod(node_backward)}
    node: Any = new_class(title, (Function,), exec_body=lambda body: body.update(methods))
    # Under a transform `Function.apply` would use the machinery for Functions above the dispatcher; this one is called
    # from inside the dispatcher.
    record = super(Function, node).apply

    def call(keys: Any, *args: Any) -> Any:
        if forward_ad._current_level >= 0:
            _refuse_tangents(name, args)
        if not torch.is_grad_enabled() or not torch._C._any_requires_grad(*args):
            return _call_below_autograd(operator, keys, args)
        if not torch._C._are_functorch_transforms_active():
            return record(keys, *args)
        with enable_single_level_autograd_function():
            return record(keys, *args)

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
