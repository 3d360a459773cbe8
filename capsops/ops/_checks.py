"""The checks that several operators share.

They run on every call, so each is one cheap condition; the error message is worked out only on failure. A message reads
"op: name is VALUE; expected WHAT".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NoReturn

import torch.fx
from torch import Tensor

from ..dtypes import FLOATING

Sizes = tuple[int, int, int, int, int]
"""B, N, K, J, D."""


def fail(op: str, message: str) -> NoReturn:
    """Raise ValueError."""
    raise ValueError(f"{op}: {message}")


def shape_of(x: Tensor) -> str:
    """The shape of x for a message, as in "[2, 3]"; the sizes may be symbolic."""
    return f"[{', '.join([str(n) for n in x.shape])}]"


def check_tensors(op: str, names: str, *tensors: object) -> None:
    """Raise TypeError unless all are tensors. names: as in "u weight? mask?"; one that ends with "?" may be None."""
    for x, name in zip(tensors, names.split(), strict=True):
        # The first two conditions are for speed: of None, isinstance asks the metaclass of Tensor, which takes long.
        if type(x) is not Tensor and not (x is None and name[-1] == "?") and not isinstance(x, Tensor):
            hint = ""
            if isinstance(x, torch.fx.Proxy):
                hint = (
                    f". torch.fx.symbolic_trace records a call of `capsops.{op}`; where the function is imported by "
                    f'its name, it needs `torch.fx.wrap("{op}")` in that module'
                )
            raise TypeError(f"{op}: {name.removesuffix('?')} is a {type(x).__name__}; expected a torch.Tensor{hint}")


def check_floating(op: str, names: str, first: Tensor, *others: Tensor | None) -> None:
    """Require one floating dtype, one device and strided tensors. names: as in "u weight bias"; None is skipped."""
    dtype, device = first.dtype, first.device
    good = dtype in FLOATING and first.layout == torch.strided
    for x in others:
        if x is not None and (x.dtype != dtype or x.device != device or x.layout != torch.strided):
            good = False
    if not good:
        _refuse_floating(op, names.split(), first, *others)


def _refuse_floating(op: str, names: Sequence[str], first: Tensor, *others: Tensor | None) -> None:
    for name, x in zip(names, (first, *others), strict=False):
        if x is None:
            continue
        if x.layout != torch.strided:
            fail(op, f"{name} has layout {x.layout}; expected a dense (strided) tensor")
        if x.dtype not in FLOATING:
            fail(op, f"{name} has dtype {x.dtype}; expected float32, float64, bfloat16 or float16")
        if x.dtype != first.dtype:
            fail(op, f"{name} has dtype {x.dtype}; expected {first.dtype}, the dtype of {names[0]}")
        if x.device != first.device:
            fail(op, f"{name} is on {x.device}; expected {first.device}, the device of {names[0]}")


def check_shape(op: str, name: str, x: Tensor, axes: str, *sizes: int) -> None:
    """Require x [*sizes]; axes: their names, as in "B, N"."""
    if x.shape != sizes:
        wanted = ", ".join([str(n) for n in sizes])
        fail(op, f"{name} has shape {shape_of(x)}; expected [{axes}] = [{wanted}]")


def check_vectors(op: str, u: Tensor, weight: Tensor | None) -> None:
    """Require u [B, N, K], or votes [B, N, J, D] if the weight is None."""
    if weight is None:
        if u.dim() != 4:
            fail(op, f"u has shape {shape_of(u)} and weight is None; expected votes, 4 dimensions, [B, N, J, D]")
    elif u.dim() != 3:
        hint = "" if u.dim() != 4 else ", or weight None if these are votes [B, N, J, D]"
        fail(op, f"u has shape {shape_of(u)}; expected 3 dimensions, [B, N, K]{hint}")


def vote_sizes(u: Tensor | Sequence[int], weight: Tensor | Sequence[int] | None) -> tuple[int, int]:
    """J and D, from tensors or their shapes: of the weight, or of u if the weight is None and u is the votes."""
    shape = u if weight is None else weight
    sizes = shape.shape if isinstance(shape, Tensor) else shape
    return (sizes[2], sizes[-1]) if weight is None else (sizes[-2], sizes[-1])


def check_votes(op: str, u: Tensor, weight: Tensor | None, mask: Tensor | None = None, name: str = "u") -> Sizes:
    """Check the shapes of u [B, N, (P,) K] (called `name`), weight [(N,) K, J, D] and mask [B, N]; return the sizes.

    If the weight is None, u is the votes [B, N, J, (P,) D], and K is 1.
    """
    if weight is None:
        B, N, K = u.shape[0], u.shape[1], 1
    else:
        B, N, K = _check_matrices(op, u, weight, name)
    J, D = vote_sizes(u, weight)
    if K == 0 or J == 0 or D == 0:
        empty = "K" if K == 0 else "J" if J == 0 else "D"
        operands = "" if weight is None else f", weight {shape_of(weight)}"
        fail(op, f"{empty} is 0 ({name} {shape_of(u)}{operands}); expected at least 1")
    if mask is not None and (
        mask.dtype != torch.bool or mask.shape != (B, N) or mask.device != u.device or mask.layout != torch.strided
    ):
        if mask.layout != torch.strided:
            fail(op, f"mask has layout {mask.layout}; expected a dense (strided) tensor")
        if mask.dtype != torch.bool:
            fail(op, f"mask has dtype {mask.dtype}; expected torch.bool (True where there is a capsule)")
        if mask.device != u.device:
            fail(op, f"mask is on {mask.device}; expected {u.device}, the device of {name}")
        check_shape(op, "mask", mask, "B, N", B, N)
    return B, N, K, J, D


def _check_matrices(op: str, u: Tensor, weight: Tensor, name: str) -> tuple[int, int, int]:
    """Check the shape of the weight for u; return B, N, K."""
    sizes, matrices = u.shape, weight.shape
    B, N, K = sizes[0], sizes[1], sizes[-1]
    if matrices[:-2] != ((N, K) if len(matrices) == 4 else (K,)):
        if len(matrices) not in (3, 4):
            fail(op, f"weight has shape {shape_of(weight)}; expected [N, K, J, D], or [K, J, D] to share it")
        axes = "[B, N, K]" if len(sizes) == 3 else "[B, N, P, K]"
        wanted = f"[{N}, {K}, J, D] or [T, {K}, J, D], T a divisor of N," if len(matrices) == 4 else f"[{K}, J, D]"
        fail(op, f"weight has shape {shape_of(weight)}; expected {wanted} for {name} {axes} = {shape_of(u)}")
    return B, N, K


def of_every_capsule(u: Tensor, weight: Tensor | None) -> Tensor | None:
    """Matrices [T, K, J, D] by type as those of the input capsules, [N, K, J, D]; any other weight as it is.

    N / T input capsules that follow one another are of one type, as `primary_capsules` orders them. The matrices are
    repeated in memory; autograd adds up their gradients.
    """
    if weight is None or weight.dim() != 4 or u.dim() < 3:
        return weight
    T, N = weight.shape[0], u.shape[1]
    if T == N or T == 0 or N % T != 0:
        return weight
    return weight[0] if T == 1 else weight.unsqueeze(1).expand(-1, N // T, -1, -1, -1).flatten(0, 1)


def check_one_matrix(op: str, u: Tensor, weight: Tensor) -> None:
    """Require u [B, N, K] and a matrix [K, D] that all capsules share."""
    check_floating(op, "u weight", u, weight)
    check_vectors(op, u, weight)
    K, D = weight.shape
    if u.shape[2] != K or D == 0:
        fail(op, f"weight has shape {shape_of(weight)}; expected [{u.shape[2]}, D] for u [B, N, K] = {shape_of(u)}")


def outputs_of(u: Tensor, weight: Tensor | None, axis: int, x: Tensor | None) -> int:
    """J, where votes [B, N, 1, D] are the same for all output capsules: then x tells their number, along an axis."""
    J = vote_sizes(u, weight)[0]
    return x.shape[axis] if weight is None and J == 1 and x is not None and x.dim() >= 2 else J


def of_every_item(op: str, logits: Tensor, u: Tensor, J: int) -> Tensor:
    """Require logits [N, J], [1, N, J] or [B, N, J]; return a view [B, N, J]. u has been checked."""
    check_floating(op, "u logits", u, logits)
    B, N = u.shape[:2]
    # Tuples of several lengths are not compared with one another: an exported program would then refuse B = N.
    batches = logits.shape[:-2]
    if logits.dim() < 2 or logits.shape[-2:] != (N, J) or (batches and batches not in ((B,), (1,))):
        fail(
            op,
            f"logits has shape {shape_of(logits)}; expected [N, J] = [{N}, {J}], [1, N, J], or [B, N, J] with B = {B}",
        )
    return logits.expand(B, N, J)


def check_pairs(op: str, logits: Tensor | None, input_weight: Tensor | None, u: Tensor, J: int) -> None:
    """Require logits [B, N, J] and weights of the input capsules [B, N], each or None. u has been checked."""
    check_floating(op, "u logits input_weight", u, logits, input_weight)
    B, N = u.shape[:2]
    if logits is not None:
        check_shape(op, "logits", logits, "B, N, J", B, N, J)
    if input_weight is not None:
        check_shape(op, "input_weight", input_weight, "B, N", B, N)


def check_axis(op: str, axis: object, leaky: bool = False) -> None:
    """Require an axis of the softmax, and the one over the output capsules where it is leaky."""
    if axis not in ("output", "input"):
        fail(op, f"axis is {axis!r}; expected 'output' or 'input', the capsules over which the couplings add up to 1")
    if leaky and axis == "input":
        fail(op, "axis is 'input'; expected 'output', because leaky gives the softmax over the output capsules a logit")


def refuse_scripting(name: str) -> NoReturn:
    """Raise RuntimeError: TorchScript's compiler takes none of our functions and layers."""
    raise RuntimeError(
        f"{name}: torch.jit.script cannot compile it; expected torch.export.export or torch.jit.trace, which record "
        "its calls"
    )


def check_at_least(op: str, least: int, **values: object) -> None:
    """Require integers of at least `least`."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            fail(op, f"{name} is {value!r}; expected an integer of at least {least}")


def check_iterations(op: str, iterations: object) -> None:
    """Require an integer that a kernel can take as a number of iterations."""
    if isinstance(iterations, bool) or not isinstance(iterations, int) or not 1 <= iterations < 2**31:
        fail(op, f"iterations is {iterations!r}; expected an integer of at least 1 (and below 2³¹)")


def check_flag(op: str, name: str, flag: object) -> None:
    """Require a bool."""
    if not isinstance(flag, bool):
        fail(op, f"{name} is {flag!r}; expected True or False")


def check_number(op: str, name: str, value: object) -> None:
    """Require a finite number."""
    numbers = (int, float, torch.SymInt, torch.SymFloat)  # a tuple: Dynamo of torch 2.8 does not know unions
    if isinstance(value, bool) or not isinstance(value, numbers) or not -math.inf < value < math.inf:
        fail(op, f"{name} is {value!r}; expected a finite number")


def check_choice(op: str, name: str, value: str, allowed: Sequence[str]) -> None:
    """Require one of the allowed strings."""
    if value not in allowed:
        fail(op, f"{name} is {value!r}; expected one of {', '.join(map(repr, allowed))}")
