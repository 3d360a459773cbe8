"""How the operators are differentiated and batched: what autograd, forward mode and `torch.func` need to know of them.

An operator `name` has its gradient in the operator `name_backward`, which has none itself. Both are registered with
torch's dispatcher. So every call of `torch.ops.capsops.name` has its gradient: from `functional.py`, from a graph that
was exported or traced, and inside a transform of `torch.func`.

`torch.library.register_autograd` would be the usual way. But a call through it takes more than 25 µs longer, its
forward-mode derivative is 0 without a word, and `torch.func.grad` refuses it. The autograd kernel here works like those
of PyTorch's own operators: it records a node, then calls the operator again, below autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import new_class
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import Function, forward_ad

# Of an operator's tensors, the axis of B, by name; a tensor that is not named has none. A gradient g_x has that of x.
# None for an operator on rows: its tensors have any number of axes before the last, and all of them are a batch.
BatchAxes = Mapping[str, int] | None

_WAY_OUT = '`with capsops.use_backend("reference"):` around the forward pass gives one'


def differentiable(library: torch.library.Library, name: str, results: int, batch: BatchAxes) -> Callable[..., Any]:
    """Register the gradient and the batch rules of the operator `name`; both it and `name_backward` are declared.

    name_backward takes the gradients of the first `results` outputs of name; its other outputs, which are saved for it
    and have no gradient; its arguments, the tensors first; and, where it returns several gradients, a list of those
    that are wanted.

    Returns:
        The operator, as `functional.py` should call it.
    """
    operator, gradient = _overload(name), _overload(f"{name}_backward")
    tensors = len([a for a in operator._schema.arguments if "Tensor" in str(a.type)])
    gradients = len(gradient._schema.returns)
    no_gradients = [None] * (len(operator._schema.arguments) - gradients)

    def save(ctx: Any, args: Sequence[Any], out: Any) -> None:
        outputs = out if isinstance(out, tuple) else (out,)
        state = outputs[results:]
        ctx.mark_non_differentiable(*state)
        ctx.set_materialize_grads(False)  # or the state, which may be large, gets a gradient of 0
        ctx.save_for_backward(*state, *args[:tensors])
        ctx.options = args[tensors:]
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
        # With create_graph, also its own autograd kernel is asked, which refuses to be differentiated.
        found = gradient(*args) if torch.is_grad_enabled() else _call_below_autograd(gradient, None, args)
        if gradients == 1:
            return (found, *no_gradients)
        return (*[x if want else None for want, x in zip(wanted, found, strict=True)], *no_gradients)

    def save_nothing(ctx: Any, args: Sequence[Any], out: Any) -> None:
        pass

    def second_derivative(ctx: Any, wanted: list[bool], *g: Tensor | None) -> NoReturn:
        raise RuntimeError(
            f"capsops.{name}: the compiled kernels cannot be differentiated twice (create_graph, hessian, grad of "
            f"grad); {_WAY_OUT}"
        )

    call = _register_autograd(library, name, save, backward)
    _register_autograd(library, f"{name}_backward", save_nothing, second_derivative)
    _register_batch_rule(library, name, batch)
    _register_batch_rule(library, f"{name}_backward", batch)

    def call_operator(*args: Any) -> Any:
        # Eager calls take the short way to the autograd kernel; what records or transforms sees the operator.
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return operator(*args)
        return call(None, *args)

    return call_operator


def _overload(name: str) -> Any:
    return getattr(torch.ops.capsops, name).default


# ---- autograd ------------------------------------------------------------------------------------


def _call_below_autograd(operator: Any, keys: Any, args: Sequence[Any]) -> Any:
    """Call an operator; keys are the dispatch keys with which its autograd kernel was called, None outside of one."""
    with torch._C._AutoDispatchBelowAutograd():
        if keys is None:
            return operator(*args)
        return operator.redispatch(keys & torch._C._after_autograd_keyset, *args)


def _register_autograd(
    library: torch.library.Library,
    name: str,
    save: Callable[[Any, Sequence[Any], Any], None],
    backward: Callable[..., Sequence[Tensor | None]],
) -> Callable[..., Any]:
    """Give an operator a gradient.

    save(ctx, arguments, outputs); backward(ctx, which arguments want a gradient, *gradients of the outputs).

    Returns:
        The autograd kernel, call(keys, *args); keys as in `_call_below_autograd`.
    """
    operator = _overload(name)

    def forward(ctx: Any, keys: Any, *args: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            # Inside a Function nothing is differentiated, but the transforms further out have yet to see this call.
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                out = _call_below_autograd(operator, keys, args)
        else:
            out = _call_below_autograd(operator, keys, args)
        save(ctx, args, out)
        return out

    def node_backward(ctx: Any, *g: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None, *backward(ctx, list(ctx.needs_input_grad[1:]), *g))

    title = "".join([word.title() for word in name.split("_")])  # the node is called so, with "Backward" behind
    methods = {"forward": staticmethod(forward), "backward": staticmethod(node_backward)}
    node: Any = new_class(title, (Function,), exec_body=lambda body: body.update(methods))
    # Function.apply would hand a call under a transform to machinery for Functions that stand above the dispatcher;
    # this one stands inside.
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

    library.impl(name, call, "Autograd", with_keyset=True)
    return call


def _refuse_tangents(name: str, args: Sequence[Any]) -> None:
    for x in args:
        if isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
            raise RuntimeError(
                f"capsops.{name}: the compiled kernels have no forward-mode derivative (jvp, jacfwd, hessian); "
                f"{_WAY_OUT}"
            )


# ---- batch rules ---------------------------------------------------------------------------------


def _register_batch_rule(library: torch.library.Library, name: str, batch: BatchAxes) -> None:
    """Let `torch.func.vmap` take an operator, in one call if B can hold the further batch, else in one for each item.

    B cannot where an operand without B (a weight, say) differs from item to item, nor where the gradient of one is
    wanted, for that is a sum over B.
    """
    operator = _overload(name)
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

    torch.library.register_vmap(f"capsops::{name}", rule, lib=library)


def _expanded(x: Tensor, axis: int, size: int) -> Tensor:
    """x with one more axis, along which it is the same."""
    return x.unsqueeze(axis).expand(*x.shape[:axis], size, *x.shape[axis:])


def _items(size: int, dims: Sequence[int | None], args: Sequence[Any]) -> list[list[Any]]:
    """The arguments of every item of a batch; of one made of zeros if there is none, for the shapes of the outputs."""
    if size == 0:
        shapes = [
            None if dim is None else (*x.shape[:dim], *x.shape[dim + 1 :]) for x, dim in zip(args, dims, strict=True)
        ]
        return [[x if shape is None else x.new_zeros(shape) for x, shape in zip(args, shapes, strict=True)]]
    return [[x if dim is None else x.select(dim, i) for x, dim in zip(args, dims, strict=True)] for i in range(size)]
