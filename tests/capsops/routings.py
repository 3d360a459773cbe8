"""The test matrix of the routings: every operator with fresh random arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from zlib import crc32

import torch
from torch import Tensor

import capsops
from capsops.backends import reference

from .grids import overlapping

# B, N, K, J, D: ones; primes; one more than a vector width; J and D of the paper and of MNIST; two output capsules,
# with votes of one and of two vectors, and with as many batch items as fit into registers, and more; batches that fill
# vectors, the last vector in part, with more input capsules than one step takes.
SHAPES = [
    (1, 1, 1, 1, 1),
    (2, 7, 5, 3, 11),
    (3, 129, 8, 2, 16),
    (2, 65, 9, 17, 1),
    (5, 33, 8, 10, 17),
    (9, 1, 3, 2, 5),
    (11, 20, 9, 2, 16),
    (15, 4, 11, 2, 30),
    (13, 37, 8, 10, 16),
    (45, 50, 3, 5, 3),
]

Arguments = dict[str, Tensor]


@dataclass(frozen=True)
class Routing:
    """One operator with fixed options: `call(**arguments)`, and the sizes of its small arguments from B, N, J, D."""

    name: str
    call: Callable[..., Tensor | tuple[Tensor, Tensor]]
    parameters: Callable[[int, int, int, int], dict[str, tuple[int, ...]]]
    detached: bool = False
    rows: int | None = None  # for EM routing; 0 for capsules that are vectors
    inverse_temperature: float | tuple[float, ...] = 0.01  # for EM routing

    @property
    def em(self) -> bool:
        """Whether the inputs and the outputs are a pose and an activation."""
        return self.rows is not None

    @property
    def capsules(self) -> str:
        """The name of the argument [B, N, …, K]."""
        return "pose" if self.em else "u"

    @property
    def over_inputs(self) -> bool:
        """Whether the couplings add up to 1 over the input capsules."""
        return self.name.endswith("-inputs")

    @property
    def outputs(self) -> int:
        return 2 if self.em else 1

    def arguments(self, shape: tuple[int, ...], *, shared: bool = False, seed: int = 0) -> Arguments:
        """Random arguments in float64, with votes of about unit length."""
        B, N, K, J, D = shape
        g = torch.Generator().manual_seed(crc32(repr((self.name, shape, shared, seed)).encode()))

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=g, dtype=torch.float64)

        u = normal(B, N, *[self.rows] * bool(self.rows), K) / K**0.5
        weight = normal(*((K, J, D) if shared else (N, K, J, D))) / D**0.5
        small = {n: normal(*size) for n, size in self.parameters(B, N, J, D).items()}
        # Positive, as activations are; test_routing_options.py has weights that are 0 or negative.
        positive = ["activation"] if self.em else [n for n in small if n == "input_weight"]
        for name in positive:
            small[name] = 0.1 + 0.8 * torch.rand(B, N, generator=g, dtype=torch.float64)
        return {self.capsules: u, "weight": weight, **small}


def _dynamic(
    iterations: int, *, detach: bool, leaky: bool, bias: bool, logits: bool = False, axis: str = "output"
) -> Routing:
    def call(**arguments: Tensor) -> Tensor:
        return capsops.dynamic_routing(iterations=iterations, detach=detach, leaky=leaky, axis=axis, **arguments)

    def parameters(B: int, N: int, J: int, D: int) -> dict[str, tuple[int, ...]]:
        return ({"logits": (B, N, J)} if logits else {}) | ({"bias": (J, D)} if bias else {})

    name = f"dynamic{iterations}" + "-detach" * detach + "-leaky" * leaky + "-bias" * bias + "-logits" * logits
    return Routing(name + "-inputs" * (axis == "input"), call, parameters, detach)


def _self_attention(*, prior: bool, scale: float | None, weights: bool = False) -> Routing:
    def call(**arguments: Tensor) -> Tensor:
        return capsops.self_attention_routing(scale=scale, **arguments)

    def parameters(B: int, N: int, J: int, D: int) -> dict[str, tuple[int, ...]]:
        return ({"prior": (N, J)} if prior else {}) | ({"input_weight": (B, N)} if weights else {})

    name = "self-attention" + "-prior" * prior + "-scale" * (scale is not None) + "-weights" * weights
    return Routing(name, call, parameters)


def _em(
    iterations: int, rows: int, inverse_temperature: float | tuple[float, ...], renormalise: bool = False
) -> Routing:
    # At these temperatures the activations are saturated for some shapes and not for others.
    def call(**arguments: Tensor) -> tuple[Tensor, Tensor]:
        return capsops.em_routing(
            iterations=iterations, inverse_temperature=inverse_temperature, renormalise=renormalise, **arguments
        )

    name = f"em{iterations}" + f"-rows{rows}" * bool(rows) + "-renormalise" * renormalise
    return Routing(name, call, lambda B, N, J, D: {"beta_u": (J,), "beta_a": (J,)}, False, rows, inverse_temperature)


def _em_over_positions(
    iterations: int, rows: int, inverse_temperature: float | tuple[float, ...], renormalise: bool = False
) -> Routing:
    """Up to five batch items of the arguments are the windows of a grid."""

    def call(
        pose: Tensor, activation: Tensor, weight: Tensor | None = None, mask: Tensor | None = None, **small: Tensor
    ) -> tuple[Tensor, Tensor]:
        B, N = activation.shape
        if mask is not None:
            activation = torch.where(mask, activation, 0)
        windows = next(n for n in (5, 3, 2, 1) if B % n == 0)
        pose, mask = (None if x is None else x.unflatten(0, (B // windows, windows)) for x in (pose, mask))
        places = overlapping(windows, N).to(activation.device)
        of_grids = activation.reshape(B // windows, windows * N)[:, : len(places)]
        out = capsops.em_routing(
            pose, of_grids, weight, iterations=iterations, inverse_temperature=inverse_temperature,
            renormalise=renormalise, mask=mask, places=places, **small,
        )  # fmt: skip
        return out[0].flatten(0, 1), out[1].flatten(0, 1)

    name = f"em{iterations}-positions" + f"-rows{rows}" * bool(rows) + "-renormalise" * renormalise
    return Routing(name, call, lambda B, N, J, D: {"beta_u": (J,), "beta_a": (J,)}, False, rows, inverse_temperature)


ATTENTION = Routing(
    "attention", capsops.attention_routing, lambda B, N, J, D: {"attn_weight": (J, J), "attn_bias": (J,)}
)
ATTENTION_WEIGHTS = Routing(
    "attention-weights",
    capsops.attention_routing,
    lambda B, N, J, D: {"attn_weight": (J, J), "attn_bias": (J,), "input_weight": (B, N)},
)
SELF_ATTENTION_WEIGHTS = _self_attention(prior=True, scale=None, weights=True)
DYNAMIC_LOGITS = _dynamic(3, detach=False, leaky=False, bias=True, logits=True)
DYNAMIC_INPUTS = _dynamic(2, detach=False, leaky=False, bias=True, logits=True, axis="input")
LOGITS = Routing("step-logits", capsops.routing_step, lambda B, N, J, D: {"state": (B, J, D), "logits": (B, N, J)})
STEP = Routing("step", capsops.routing_step, lambda B, N, J, D: {"state": (B, J, D)})
STEP_INPUTS = Routing(
    "step-logits-inputs",
    lambda **arguments: capsops.routing_step(axis="input", **arguments),
    lambda B, N, J, D: {"state": (B, J, D), "logits": (B, N, J)},
)
ROUTINGS = [
    ATTENTION,
    Routing("attention-no-bias", capsops.attention_routing, lambda B, N, J, D: {"attn_weight": (J, J)}),
    ATTENTION_WEIGHTS,
    _dynamic(1, detach=False, leaky=False, bias=False),
    _dynamic(3, detach=False, leaky=False, bias=False),
    _dynamic(3, detach=True, leaky=False, bias=True),
    _dynamic(2, detach=False, leaky=True, bias=True),
    _dynamic(5, detach=True, leaky=True, bias=False),
    DYNAMIC_LOGITS,
    DYNAMIC_INPUTS,
    STEP,
    LOGITS,
    STEP_INPUTS,
    _self_attention(prior=True, scale=None),
    _self_attention(prior=False, scale=0.3),
    SELF_ATTENTION_WEIGHTS,
    _self_attention(prior=False, scale=0.3, weights=True),
    _em(1, 0, 1.0),
    _em(2, 4, 0.05, renormalise=True),
    _em(3, 0, (0.01, 0.02, 0.03)),
    _em(3, 3, 1.0),
]
# Of these, batch items are not independent.
OVER_POSITIONS = [
    _em_over_positions(1, 0, 1.0),
    _em_over_positions(2, 3, 0.02, renormalise=True),
    _em_over_positions(3, 0, (0.01, 0.02, 0.03)),
]
VOTES = Routing("votes", capsops.affine_votes, lambda B, N, J, D: {})
OPERATORS = [*ROUTINGS, VOTES]


def each(out: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """The outputs of an operator as a tuple."""
    return out if isinstance(out, tuple) else (out,)


def device_of(backend: str) -> torch.device:
    """The device for the tensors of a backend: for the backends of GPUs a GPU, if there is one."""
    on_gpu = backend in ("cuda", "triton") and torch.cuda.is_available()
    return torch.device("cuda" if on_gpu else "cpu")


def with_votes(routing: Routing, shape: tuple[int, ...]) -> tuple[Routing, Arguments]:
    """The routing without a weight, and its arguments with the votes in place of u."""
    arguments = routing.arguments(shape)
    arguments[routing.capsules] = reference.affine_votes(arguments[routing.capsules], arguments.pop("weight"))
    return replace(routing, call=partial(routing.call, weight=None)), arguments


def run(routing: Routing, arguments: Arguments, dtype: torch.dtype, backend: str, **fixed: Tensor) -> list[Tensor]:
    """The outputs and, for fixed random gradients of them, the gradients of all arguments; in float64 on the CPU."""
    device = device_of(backend)
    leaves = {n: x.detach().to(device, dtype, copy=True).requires_grad_() for n, x in arguments.items()}
    fixed = {n: x.to(device) for n, x in fixed.items()}
    generator = torch.Generator().manual_seed(1)
    with capsops.use_backend(backend):
        out = each(routing.call(**leaves, **fixed))
        assert all(x.dtype == dtype for x in out)
        # As bfloat16 holds them, so that they are the same numbers in every dtype.
        g = [torch.randn(x.shape, generator=generator, dtype=torch.float64).bfloat16().to(device, dtype) for x in out]
        torch.autograd.backward(out, g)
    return [x.detach().double().cpu() for x in out] + [x.grad.double().cpu() for x in leaves.values()]


def relative_error(got: Tensor, expected: Tensor) -> float:
    """The largest difference, divided by the largest expected number."""
    if expected.numel() == 0:
        assert got.shape == expected.shape
        return 0.0
    scale = expected.abs().max().clamp(min=1e-30)
    return float(((got - expected).abs().max() / scale).nan_to_num(nan=float("inf")))


def _examples() -> dict[str, tuple]:
    """Arguments for every operator, forward and backward."""
    B, N, K, J, D = 2, 7, 3, 4, 5
    u, weight, shared = torch.randn(B, N, K), torch.randn(N, K, J, D), torch.randn(K, J, D)
    a, bias, full = torch.randn(J, J), torch.randn(J), torch.randn(J, D)
    mask = torch.rand(B, N) < 0.7
    v, s = torch.randn(B, J, D), torch.randn(3, B, J, D)
    pose, activation, beta = torch.randn(B, N, 2, K), torch.rand(B, N), torch.randn(J)
    features = torch.randn(B, 6, 4, 5).to(memory_format=torch.channels_last)
    prior, temperatures = torch.randn(N, J), [0.1, 0.3]
    M = 3
    windows, places = torch.randn(B, M, N, 2, K), overlapping(M, N)
    # Above 0, as the variances are after forward.
    state = torch.rand(2, B, J, 3 * 2 * D + 2) + 0.1
    return {
        "squash": (u, "sabour"),
        "squash_backward": (torch.randn(B, N, K), u, "efficient"),
        "affine_votes": (u, shared),
        "affine_votes_backward": (torch.randn(B, N, J, D), u, weight, [True, False]),
        "attention_routing": (u, weight, a, bias, activation, mask, "efficient"),
        "attention_routing_backward": (
            v,
            s[0],
            u,
            weight,
            a,
            None,
            None,
            None,
            "layer_norm",
            [True, True, False, False, False],
        ),
        "dynamic_routing": (u, weight, full, mask, 3, True, False, "none"),
        "dynamic_routing_backward": (v, s, u, shared, full, mask, 3, False, False, "sabour", [True, True, True]),
        "routing_step": (u, weight, v, mask),
        "routing_step_backward": (s[0], u, shared, v, None, [True, True, True]),
        "routing_step_with_logits": (u, weight, v, torch.randn(B, N, J), None, mask),
        "routing_step_with_logits_backward": (s[0], u, shared, v, torch.randn(B, N, J), activation, None, [True] * 5),
        "dynamic_routing_with_logits": (
            u,
            weight,
            torch.randn(B, N, J),
            activation,
            full,
            mask,
            3,
            True,
            False,
            "sabour",
        ),
        "dynamic_routing_with_logits_backward": (
            v,
            s,
            u,
            shared,
            torch.randn(B, N, J),
            activation,
            full,
            mask,
            3,
            False,
            False,
            "none",
            [True] * 5,
        ),
        "dynamic_routing_over_inputs": (u, weight, None, activation, full, mask, 3, False, "layer_norm"),
        "dynamic_routing_over_inputs_backward": (
            v,
            s,
            torch.randn(3, B, J),
            u,
            shared,
            torch.randn(B, N, J),
            activation,
            full,
            mask,
            3,
            False,
            "efficient",
            [True] * 5,
        ),
        "routing_step_over_inputs": (u, weight, v, torch.randn(B, N, J), activation, mask),
        "routing_step_over_inputs_backward": (
            s[0],
            s[1],
            torch.randn(B, J),
            u,
            shared,
            v,
            None,
            None,
            None,
            [True, True, True, False, False],
        ),
        "primary_capsules": (features, 2, False, "efficient"),
        "primary_capsules_backward": (torch.randn(B, 60, 2), features, 3, True, "sabour"),
        "self_attention_routing": (u, weight, prior, None, mask, 0.5),
        "self_attention_routing_backward": (
            v,
            s[0],
            s[1],
            u,
            shared,
            None,
            activation,
            mask,
            0.5,
            [True, True, False, True],
        ),
        "em_routing": (pose, activation, weight, beta, beta + 1, mask, temperatures),
        "em_routing_backward": (
            torch.randn(B, J, 2, D),
            torch.randn(B, J),
            state,
            pose,
            activation,
            shared,
            beta,
            beta + 1,
            None,
            temperatures,
            [True, False, True, True, False],
        ),
        "em_routing_over_positions": (
            windows,
            torch.rand(B, len(places)),
            weight,
            beta,
            beta + 1,
            places,
            torch.rand(B, M, N) < 0.7,
            temperatures,
        ),
        "em_routing_over_positions_backward": (
            torch.randn(B, M, J, 2, D),
            torch.randn(B, M, J),
            torch.rand(2, B, M, J, 3 * 2 * D + 2) + 0.1,
            windows,
            torch.rand(B, len(places)),
            shared,
            beta,
            beta + 1,
            places,
            None,
            temperatures,
            [True, True, False, True, False],
        ),
    }


EXAMPLES = _examples()
