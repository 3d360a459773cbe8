"""Every operator refuses arguments that it cannot take, and the error names the argument."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import capsops

from .grids import overlapping
from .routings import EXAMPLES, OPERATORS, ROUTINGS, Routing

by_operator = pytest.mark.parametrize("routing", OPERATORS, ids=lambda r: r.name)
CPU = torch.device("cpu")
by_backend = pytest.mark.parametrize(
    "backend",
    [n for n, m in capsops.backends.COMPILED.items() if not m.why_not("squash", CPU, torch.float32)] + ["reference"],
)


def _arguments(routing: Routing) -> dict[str, torch.Tensor]:
    return {n: x.float() for n, x in routing.arguments((2, 7, 4, 3, 5)).items()}


@by_operator
@by_backend
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": torch.zeros(2, 7)}, r"u has shape \[2, 7\]; expected 3 "),
        ({"u": torch.zeros(2, 7, 9)}, r"weight has shape \[7, 4, 3, 5\].*expected \[7, 9, J, D\]"),
        ({"weight": torch.zeros(8, 4, 3, 5)}, r"weight has shape \[8, 4, 3, 5\].*expected \[7, 4, J, D\]"),
        ({"weight": torch.zeros(5)}, r"weight has shape \[5\]"),
        ({"weight": torch.zeros(3, 3, 5)}, r"weight has shape \[3, 3, 5\].*expected \[4, J, D\]"),
        ({"weight": torch.zeros(7, 4, 0, 5)}, "J is 0"),
        ({"weight": torch.zeros(7, 4, 3, 0)}, "D is 0"),
        ({"u": torch.zeros(2, 7, 0), "weight": torch.zeros(7, 0, 3, 5)}, "K is 0"),
        ({"u": torch.zeros(2, 7, 4, dtype=torch.int64)}, "u has dtype torch.int64; expected float32"),
        ({"u": torch.zeros(2, 7, 4, dtype=torch.complex64)}, "u has dtype torch.complex64"),
        (
            {"weight": torch.zeros(7, 4, 3, 5, dtype=torch.float64)},
            "weight has dtype torch.float64; expected torch.float32, the dtype of u",
        ),
        ({"weight": torch.zeros(7, 4, 3, 5, device="meta")}, "weight is on meta; expected cpu, the device of u"),
        ({"u": torch.zeros(2, 7, 4).to_sparse()}, "u has layout torch.sparse_coo"),
    ],
    ids=lambda x: (
        "" if isinstance(x, str) else "-".join(f"{n}{tuple(t.shape)}{t.dtype}{t.device}" for n, t in x.items())
    ),
)
def test_votes(routing: Routing, backend: str, change: dict[str, torch.Tensor], message: str) -> None:
    if routing.em:
        change = {routing.capsules if n == "u" else n: x for n, x in change.items()}
        message = re.sub(r"\bu( has|$)", r"pose\1", message)
    arguments = {n: x.float() for n, x in routing.arguments((2, 7, 4, 3, 5)).items()}
    if routing.em:  # vectors, because the changes are vectors
        arguments["pose"] = torch.zeros(2, 7, 4)
    with capsops.use_backend(backend), pytest.raises(ValueError, match=message):
        routing.call(**{**arguments, **change})


@by_operator
@by_backend
@pytest.mark.parametrize(
    ("name", "value"),
    [("u", [1.0]), ("u", None), ("u", 3), ("weight", [1.0]), ("weight", 3)],  # without a weight: test_given_votes.py
    ids=repr,
)
def test_not_a_tensor(routing: Routing, backend: str, name: str, value: object) -> None:
    kind, name = type(value).__name__, routing.capsules if name == "u" else name
    with (
        capsops.use_backend(backend),
        pytest.raises(TypeError, match=rf"{name} is a {kind}; expected a torch.Tensor"),
    ):
        routing.call(**{**_arguments(routing), name: value})


@pytest.mark.parametrize("routing", ROUTINGS, ids=lambda r: r.name)
@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2, 7), "mask has dtype torch.float32; expected torch.bool"),
        (torch.ones(7, dtype=torch.bool), r"mask has shape \[7\]; expected \[B, N\] = \[2, 7\]"),
        (torch.ones(2, 8, dtype=torch.bool), r"mask has shape \[2, 8\]"),
        (torch.ones(2, 7, dtype=torch.bool, device="meta"), "mask is on meta"),
    ],
    ids=["float", "flat", "long", "meta"],
)
def test_mask(routing: Routing, mask: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        routing.call(**_arguments(routing), mask=mask)


@by_backend
def test_attention(backend: str) -> None:
    u, weight = torch.zeros(2, 7, 4), torch.zeros(7, 4, 3, 5)
    with capsops.use_backend(backend):
        with pytest.raises(
            ValueError, match=r"attention_routing: attn_weight has shape \[3, 4\]; expected \[J, J\] = \[3, 3\]"
        ):
            capsops.attention_routing(u, weight, torch.zeros(3, 4))
        with pytest.raises(ValueError, match=r"attn_bias has shape \[3, 5\]; expected \[J\]"):
            capsops.attention_routing(u, weight, torch.zeros(3, 3), torch.zeros(3, 5))
        with pytest.raises(ValueError, match=r"attn_weight has dtype torch.float64"):
            capsops.attention_routing(u, weight, torch.zeros(3, 3).double())


def test_more_than_a_tensor_is_asked_for() -> None:
    u, weight = torch.zeros(2, 7, 4), torch.zeros(7, 4, 3, 5)
    with pytest.raises(TypeError, match="mask is a list"):
        capsops.dynamic_routing(u, weight, mask=[True])
    with pytest.raises(ValueError, match=r"mask has layout torch.sparse_coo"):
        capsops.dynamic_routing(u, weight, mask=torch.ones(2, 7, dtype=torch.bool).to_sparse())
    with pytest.raises(TypeError, match="attn_weight is a NoneType"):
        capsops.attention_routing(u, weight, None)
    with pytest.raises(TypeError, match="s is a NoneType"):
        capsops.squash(None)


@by_backend
@pytest.mark.parametrize("flag", ["leaky", "detach"])
def test_flags(backend: str, flag: str) -> None:
    with capsops.use_backend(backend), pytest.raises(ValueError, match=f"{flag} is 'no'; expected True or False"):
        capsops.dynamic_routing(torch.zeros(2, 7, 4), torch.zeros(7, 4, 3, 5), **{flag: "no"})


@by_backend
@pytest.mark.parametrize("iterations", [0, -1, 1.5, "3", True, None, 2**31])
def test_iterations(backend: str, iterations: object) -> None:
    with (
        capsops.use_backend(backend),
        pytest.raises(ValueError, match=f"iterations is {iterations!r}; expected an integer"),
    ):
        capsops.dynamic_routing(torch.zeros(2, 7, 4), torch.zeros(7, 4, 3, 5), iterations)  # type: ignore[arg-type]


@by_backend
def test_bias(backend: str) -> None:
    with (
        capsops.use_backend(backend),
        pytest.raises(ValueError, match=r"bias has shape \[5\]; expected \[J, D\] = \[3, 5\]"),
    ):
        capsops.dynamic_routing(torch.zeros(2, 7, 4), torch.zeros(7, 4, 3, 5), bias=torch.zeros(5))


@by_backend
def test_squash(backend: str) -> None:
    with capsops.use_backend(backend):
        with pytest.raises(ValueError, match="kind is 'hinton'; expected one of 'sabour', 'efficient'"):
            capsops.squash(torch.zeros(3), kind="hinton")
        with pytest.raises(ValueError, match="dim is 2; expected -2 … 1, because s has 2 dimensions"):
            capsops.squash(torch.zeros(3, 4), dim=2)
        with pytest.raises(ValueError, match=r"dim is 1\.0; expected -2 … 1"):
            capsops.squash(torch.zeros(3, 4), dim=1.0)
        with pytest.raises(ValueError, match="s has 0 dimensions"):
            capsops.squash(torch.tensor(1.0))
        with pytest.raises(ValueError, match=r"s has dtype torch.int64"):
            capsops.squash(torch.zeros(3, dtype=torch.long))


@by_backend
def test_self_attention(backend: str) -> None:
    u, weight = torch.zeros(2, 7, 4), torch.zeros(7, 4, 3, 5)
    with capsops.use_backend(backend):
        with pytest.raises(ValueError, match=r"prior has shape \[3, 7\]; expected \[N, J\] = \[7, 3\]"):
            capsops.self_attention_routing(u, weight, torch.zeros(3, 7))
        with pytest.raises(ValueError, match=r"prior has dtype torch.float64; expected torch.float32, the dtype of u"):
            capsops.self_attention_routing(u, weight, torch.zeros(7, 3).double(), scale=1.0)
        with pytest.raises(TypeError, match="prior is a float"):
            capsops.self_attention_routing(u, weight, 0.5)  # type: ignore[arg-type]
        for scale in ("1", float("nan"), float("inf"), True, torch.ones(())):
            with pytest.raises(ValueError, match=r"scale is .*; expected a finite number"):
                capsops.self_attention_routing(u, weight, scale=scale)  # type: ignore[arg-type]


@by_backend
def test_step(backend: str) -> None:
    u, weight, state = torch.zeros(2, 7, 4), torch.zeros(7, 4, 3, 5), torch.zeros(2, 3, 5)
    with capsops.use_backend(backend):
        with pytest.raises(
            ValueError, match=r"routing_step: state has shape \[3, 5\]; expected \[B, J, D\] = \[2, 3, 5\]"
        ):
            capsops.routing_step(u, weight, state[0])
        with pytest.raises(ValueError, match=r"routing_step: state has dtype torch\.float64; expected torch\.float32"):
            capsops.routing_step(u, weight, state.double())
        for logits in (torch.zeros(7), torch.zeros(3, 7), torch.zeros(3, 7, 3), torch.zeros(2, 1, 3)):
            with pytest.raises(
                ValueError, match=r"routing_step: logits has shape .*; expected \[N, J\] = \[7, 3\], \[1, N, J\], or"
            ):
                capsops.routing_step(u, weight, state, logits)
        with pytest.raises(ValueError, match=r"routing_step: logits has dtype torch\.float16; expected torch\.float32"):
            capsops.routing_step(u, weight, state, torch.zeros(7, 3).half())
        with pytest.raises(TypeError, match="routing_step: state is a NoneType"):
            capsops.routing_step(u, weight, None)  # type: ignore[arg-type]


@by_backend
def test_axis(backend: str) -> None:
    u, weight, state = torch.zeros(2, 7, 4), torch.zeros(7, 4, 3, 5), torch.zeros(2, 3, 5)
    leaky = "axis is 'input'; expected 'output', because leaky gives"
    with capsops.use_backend(backend):
        for call in (
            partial(capsops.dynamic_routing, u, weight),
            partial(capsops.routing_step, u, weight, state),
            partial(capsops.coupling_coefficients, "dynamic", u, weight),
            partial(capsops.coupling_coefficients, "step", u, weight, state=state),
            partial(capsops.nn.CapsuleLayer, 7, 4, 3, 5, "dynamic"),
        ):
            for axis in ("inputs", 1, None):
                with pytest.raises(ValueError, match=f"axis is {axis!r}; expected 'output' or 'input'"):
                    call(axis=axis)
        for call in (
            partial(capsops.dynamic_routing, u, weight),
            partial(capsops.coupling_coefficients, "dynamic", u, weight),
            partial(capsops.nn.CapsuleLayer, 7, 4, 3, 5, "dynamic"),
        ):
            with pytest.raises(ValueError, match=leaky):
                call(axis="input", leaky=True)
    with pytest.raises(ValueError, match="axis is 'input'; expected 'output', because routing is 'uniform' and not"):
        capsops.nn.CapsuleLayer(7, 4, 3, 5, "uniform", axis="input")


@by_backend
def test_initial_logits(backend: str) -> None:
    u, weight = torch.zeros(2, 7, 4), torch.zeros(7, 4, 3, 5)
    expected = r"expected \[N, J\] = \[7, 3\], \[1, N, J\], or \[B, N, J\] with B = 2"
    with capsops.use_backend(backend):
        for logits in (torch.zeros(7), torch.zeros(3, 7), torch.zeros(3, 7, 3), torch.zeros(2, 1, 3)):
            for call in (capsops.dynamic_routing, partial(capsops.coupling_coefficients, "dynamic")):
                with pytest.raises(ValueError, match=rf"logits has shape .*; {expected}"):
                    call(u, weight, logits=logits)
        with pytest.raises(ValueError, match=r"dynamic_routing: logits has dtype torch\.float16; expected"):
            capsops.dynamic_routing(u, weight, logits=torch.zeros(7, 3).half())
        with pytest.raises(TypeError, match="dynamic_routing: logits is a list"):
            capsops.dynamic_routing(u, weight, logits=[0.0])  # type: ignore[arg-type]
        layer = capsops.nn.CapsuleLayer(7, 4, 3, 5, "dynamic")
        with pytest.raises(ValueError, match=rf"CapsuleLayer: logits has shape \[7\]; {expected}"):
            layer(u, logits=torch.zeros(7))
        with pytest.raises(ValueError, match="CapsuleLayer: logits is given; expected None, because routing is 'att"):
            capsops.nn.CapsuleLayer(7, 4, 3, 5, "attention")(u, logits=torch.zeros(7, 3))
    for options, reason in (
        ({"routing": "uniform"}, "routing is 'uniform' and not 'dynamic'"),
        ({"routing": "dynamic", "shared": True}, "shared matrices take any number of capsules"),
        ({"routing": "dynamic", "detach": True}, "with detach they would get no gradient"),
    ):
        with pytest.raises(ValueError, match=f"CapsuleLayer: logits is True; expected False, because {reason}"):
            capsops.nn.CapsuleLayer(7, 4, 3, 5, logits=True, **options)


@by_backend
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pose": torch.zeros(2, 7, 3, 1, 4)}, r"pose has shape \[2, 7, 3, 1, 4\]; expected 3 or 4 dimensions"),
        ({"pose": torch.zeros(2, 7, 0, 4)}, r"P is 0 \(pose \[2, 7, 0, 4\]\)"),
        ({"pose": torch.zeros(2, 7, 3, 5)}, r"weight has shape .* for pose \[B, N, P, K\] = \[2, 7, 3, 5\]"),
        ({"activation": torch.zeros(2, 7, 1)}, r"activation has shape \[2, 7, 1\]; expected \[B, N\] = \[2, 7\]"),
        ({"activation": torch.zeros(2, 8)}, r"activation has shape \[2, 8\]"),
        (
            {"activation": torch.zeros(2, 7).double()},
            "activation has dtype torch.float64; expected torch.float32, the dtype of pose",
        ),
        ({"activation": torch.zeros(2, 7, device="meta")}, "activation is on meta; expected cpu, the device of pose"),
        ({"beta_u": torch.zeros(4)}, r"beta_u has shape \[4\]; expected \[J\] = \[3\]"),
        ({"beta_a": torch.zeros(3, 1)}, r"beta_a has shape \[3, 1\]; expected \[J\] = \[3\]"),
        ({"beta_a": torch.zeros(3).half()}, "beta_a has dtype torch.float16"),
        ({"inverse_temperature": -0.1}, r"inverse_temperature is -0\.1; expected nothing below 0"),
        ({"inverse_temperature": (0.1, 0.2)}, "inverse_temperature has 2 numbers; expected 3"),
        ({"inverse_temperature": (0.1, 0.2, -1)}, r"inverse_temperature is \(0.1, 0.2, -1\); expected nothing below 0"),
        ({"inverse_temperature": float("inf")}, "inverse_temperature is inf; expected a finite number"),
        ({"inverse_temperature": [1, 1, None]}, "inverse_temperature is None; expected a finite number"),
        ({"inverse_temperature": "1.0"}, "inverse_temperature is '1.0'; expected a finite number"),
        ({"iterations": 0}, "iterations is 0; expected an integer"),
        ({"iterations": 2.0}, r"iterations is 2\.0; expected an integer"),
        ({"renormalise": 1}, "renormalise is 1; expected True or False"),
        ({"mask": torch.ones(2, 7)}, "mask has dtype torch.float32"),
    ],
    ids=lambda x: "" if isinstance(x, str) else next(iter(x)),
)
def test_em(backend: str, change: dict[str, object], message: str) -> None:
    arguments = {
        "pose": torch.zeros(2, 7, 4),
        "activation": torch.zeros(2, 7),
        "weight": torch.zeros(7, 4, 3, 5),
        "beta_u": torch.zeros(3),
        "beta_a": torch.zeros(3),
    }
    with capsops.use_backend(backend), pytest.raises(ValueError, match=message):
        capsops.em_routing(**{**arguments, **change})
    for name in set(arguments) - {"weight"}:
        with capsops.use_backend(backend), pytest.raises(TypeError, match=f"{name} is a NoneType"):
            capsops.em_routing(**{**arguments, name: None})


@by_backend
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pose": torch.zeros(2, 7, 4)}, r"pose has shape \[2, 7, 4\]; expected 4 or 5 dimensions, \[B, M, N"),
        ({"pose": torch.zeros(2, 0, 7, 4)}, r"pose has shape \[2, 0, 7, 4\]; .* with M > 0"),
        ({"pose": torch.zeros(2, 2, 7, 4), "weight": None}, "expected 5 or 6 dimensions"),
        ({"activation": torch.zeros(2, 2, 7)}, r"activation has shape \[2, 2, 7\]; expected \[B, G\] = \[2, 10\]"),
        ({"weight": torch.zeros(5, 4, 3, 5)}, r"weight has shape \[5, 4, 3, 5\]; expected \[7, 4, J, D\]"),
        ({"mask": torch.ones(2, 7, dtype=torch.bool)}, r"mask has shape \[2, 7\]; expected \[B, M, N\]"),
        ({"mask": torch.ones(2, 2, 7)}, "mask has dtype torch.float32"),
        ({"places": torch.zeros(10, 3)}, r"places is torch.float32, \[10, 3\].*; expected torch.int64, \[G, W\]"),
        ({"places": torch.zeros(10, dtype=torch.int64)}, r"places is torch.int64, \[10\]"),
        ({"places": torch.zeros(10, 3, dtype=torch.int64, device="meta")}, "places is on meta; expected cpu"),
        ({"inverse_temperature": -0.1}, r"inverse_temperature is -0\.1; expected nothing below 0"),
        ({"renormalise": 1}, "renormalise is 1; expected True or False"),
    ],
    ids=lambda x: "" if isinstance(x, str) else next(iter(x)),
)
def test_em_over_positions(backend: str, change: dict[str, object], message: str) -> None:
    with capsops.use_backend(backend), pytest.raises(ValueError, match=message):
        capsops.em_routing(**{**_over_positions(), **change})


@pytest.mark.parametrize("place", [-2, 14, 2**40, 0])  # place 0 is that of another capsule
def test_em_over_places_that_cannot_be(place: int) -> None:
    arguments = _over_positions()
    arguments["places"][3, 1] = place
    with capsops.use_backend("cpu"), pytest.raises(ValueError, match="em_routing_over_positions: the kernel does not"):
        capsops.em_routing(**arguments)


def _over_positions() -> dict[str, torch.Tensor]:
    return {
        "pose": torch.zeros(2, 2, 7, 4),
        "activation": torch.zeros(2, 10),
        "weight": torch.zeros(7, 4, 3, 5),
        "beta_u": torch.zeros(3),
        "beta_a": torch.zeros(3),
        "places": overlapping(2, 7),
    }


@by_backend
@pytest.mark.parametrize(
    ("shape", "types", "options", "message"),
    [
        ((2, 8, 15), 2, {}, r"features has shape \[2, 8, 15\]; expected 4 dimensions, \[B, C, H, W\]"),
        ((2, 8, 3, 5), 3, {}, r"8 channels; expected a multiple of types = 3"),
        ((2, 0, 3, 5), 3, {}, r"0 channels; expected a multiple of types = 3"),
        ((2, 8, 3, 5), 0, {}, "types is 0; expected an integer of at least 1"),
        ((2, 8, 3, 5), 2.0, {}, r"types is 2\.0; expected an integer"),
        ((2, 8, 3, 5), True, {}, "types is True; expected an integer"),
        ((2, 8, 3, 5), 2, {"layout": "rows"}, "layout is 'rows'; expected one of 'channels', 'legacy'"),
        ((2, 8, 3, 5), 2, {"squash": "relu"}, "squash is 'relu'; expected one of 'sabour', 'efficient'"),
    ],
)
def test_primary_capsules(
    backend: str, shape: tuple[int, ...], types: int, options: dict[str, str], message: str
) -> None:
    with capsops.use_backend(backend):
        with pytest.raises(ValueError, match=message):
            capsops.primary_capsules(torch.zeros(shape), types, **options)
        with pytest.raises(ValueError, match=r"features has dtype torch.int64"):
            capsops.primary_capsules(torch.zeros(2, 8, 3, 5, dtype=torch.long), 2)
        with pytest.raises(TypeError, match="features is a NoneType"):
            capsops.primary_capsules(None, 2)  # type: ignore[arg-type]


def test_coupling_coefficients() -> None:
    u, weight = torch.zeros(2, 7, 4), torch.zeros(7, 4, 3, 5)
    with pytest.raises(ValueError, match="routing is 'sda'; expected one of 'attention', 'dynamic', 'em', "):
        capsops.coupling_coefficients("sda", u, weight)
    with pytest.raises(ValueError, match="attn_weight is None"):
        capsops.coupling_coefficients("attention", u, weight)
    activation, beta = torch.zeros(2, 7), torch.zeros(3)
    with pytest.raises(ValueError, match="activation is None; expected a tensor for EM routing"):
        capsops.coupling_coefficients("em", u, weight, beta_u=beta, beta_a=beta)
    with pytest.raises(ValueError, match="beta_a is None; expected a tensor for EM routing"):
        capsops.coupling_coefficients("em", u, weight, activation=activation, beta_u=beta)
    with pytest.raises(ValueError, match="inverse_temperature is -1"):
        capsops.coupling_coefficients(
            "em", u, weight, activation=activation, beta_u=beta, beta_a=beta, inverse_temperature=-1
        )
    with pytest.raises(ValueError, match=r"prior has shape \[3\]"):
        capsops.coupling_coefficients("self-attention", u, weight, prior=beta)
    with pytest.raises(ValueError, match="state is None; expected a tensor for a routing step"):
        capsops.coupling_coefficients("step", u, weight)
    with pytest.raises(ValueError, match="scale is nan"):
        capsops.coupling_coefficients("self-attention", u, weight, scale=float("nan"))


def test_backward_operators_check_too() -> None:
    u, weight, a = torch.zeros(2, 7, 4), torch.zeros(7, 4, 3, 5), torch.zeros(3, 3)
    good, wrong = torch.zeros(2, 3, 5), torch.zeros(2, 3, 6)
    wanted = [True] * 5
    with pytest.raises(ValueError, match=r"attention_routing_backward: g_v has shape \[2, 3, 6\]"):
        torch.ops.capsops.attention_routing_backward(wrong, good, u, weight, a, None, None, None, "sabour", wanted)
    with pytest.raises(ValueError, match=r"dynamic_routing_backward: s has shape \[2, 2, 3, 5\]"):
        s = torch.zeros(2, 2, 3, 5)
        torch.ops.capsops.dynamic_routing_backward(
            good, s, u, weight, None, None, 3, False, False, "sabour", wanted[:3]
        )

    with pytest.raises(ValueError, match=r"self_attention_routing_backward: total has shape \[2, 3, 6\]"):
        torch.ops.capsops.self_attention_routing_backward(
            good, wrong, good, u, weight, None, None, None, 1.0, wanted[:4]
        )
    activation, beta = torch.zeros(2, 7), torch.zeros(3)
    em = (u, activation, weight, beta, beta, None, [0.1, 0.2], [True] * 5)
    with pytest.raises(ValueError, match=r"em_routing_backward: g_activation has shape \[2, 3, 5\]; expected \[B, J\]"):
        torch.ops.capsops.em_routing_backward(good, good, torch.zeros(2, 2, 3, 12), *em)
    with pytest.raises(ValueError, match=r"em_routing_backward: state has shape \[3, 2, 3, 12\]"):
        torch.ops.capsops.em_routing_backward(good, torch.zeros(2, 3), torch.zeros(3, 2, 3, 12), *em)
    with pytest.raises(ValueError, match=r"primary_capsules_backward: g_u has shape \[2, 3, 5\]; expected \[B, N, K\]"):
        torch.ops.capsops.primary_capsules_backward(good, torch.zeros(2, 4, 3, 3), 2, False, "sabour")


@pytest.mark.parametrize("name", list(EXAMPLES))
def test_operators_called_directly_check_every_tensor(name: str) -> None:
    """Each tensor in turn gets another shape, dtype, device or layout: it is refused by name, or is valid too."""
    operator, arguments = getattr(torch.ops.capsops, name), EXAMPLES[name]
    refused = 0
    for i, x in enumerate(arguments):
        if not isinstance(x, torch.Tensor):
            continue
        argument = operator.default._schema.arguments[i].name
        others = {
            "longer": x.new_zeros(x.shape[0] + 1, *x.shape[1:]),
            "wider": x.new_zeros(*x.shape[:-1], x.shape[-1] + 1),
            "flatter": x.new_zeros(x.shape[1:]),
            "deeper": x.new_zeros(*x.shape, 2),
            "another dtype": x.to(torch.float16 if x.dtype != torch.float16 else torch.float32),
            "integers": x.to(torch.int32),
            "elsewhere": x.to("meta"),
            "sparse": x.to_sparse(),
        }
        for what, other in others.items():
            # Still valid: rows of any shape and dtype; another D, a shared weight, another B.
            free = (
                (name in ("squash", "primary_capsules") and what not in ("integers", "sparse"))
                or (argument == "weight" and what in ("flatter", "wider"))
                or (name, what) == ("affine_votes", "longer")
            )
            try:
                operator(*arguments[:i], other, *arguments[i + 1 :])
            except ValueError as error:
                refused += 1
                # What the places are the kernel says, which begins with the package.
                assert str(error).removeprefix("capsops.").startswith(f"{name}: "), (i, what)
            else:
                assert free, (i, what)
    assert refused >= 2


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("squash", {1: "relu"}, "kind is 'relu'"),
        ("squash_backward", {2: "relu"}, "kind is 'relu'"),
        ("primary_capsules", {1: -2}, "types is -2"),
        ("primary_capsules_backward", {2: 0}, "types is 0"),
        ("dynamic_routing", {4: 0}, "iterations is 0"),
        ("dynamic_routing", {7: "relu"}, "squash is 'relu'"),
        ("attention_routing_backward", {8: "relu"}, "squash is 'relu'"),
        ("dynamic_routing", {4: -1}, "iterations is -1"),
        ("dynamic_routing", {4: 2**31}, f"iterations is {2**31}"),
        ("dynamic_routing_backward", {6: -1}, "iterations is -1"),
        ("dynamic_routing_backward", {6: 2**30}, rf"s has shape \[3, 2, 4, 5\]; expected .* = \[{2**30}, 2, 4, 5\]"),
        ("dynamic_routing_backward", {10: [True] * 4}, "wanted has 4 values; expected 3"),
        ("dynamic_routing_backward", {10: []}, "wanted has 0 values; expected 3"),
        (
            "attention_routing_backward",
            {9: [True] * 5},
            "attn_bias is None; expected a tensor, because wanted asks for its gradient",
        ),
        ("self_attention_routing", {5: float("nan")}, "scale is nan"),
        ("self_attention_routing_backward", {8: float("inf")}, "scale is inf"),
        ("attention_routing", {4: torch.zeros(2, 8)}, r"input_weight has shape \[2, 8\]; expected \[B, N\] = \[2, 7\]"),
        (
            "self_attention_routing_backward",
            {6: None},
            "input_weight is None; expected a tensor, because wanted asks for its gradient",
        ),
        ("em_routing", {6: []}, r"inverse_temperatures is \[\]"),
        ("em_routing", {6: [0.1, -0.1]}, "inverse_temperatures has -0.1"),
        ("em_routing", {6: [float("nan")]}, "inverse_temperatures has nan"),
        ("em_routing_backward", {9: []}, r"inverse_temperatures is \[\]"),
        ("em_routing_backward", {9: [0.1]}, r"state has shape .*; expected .* = \[1, 2, 4, 32\]"),
        ("em_routing_backward", {9: [], 2: torch.zeros(0, 2, 4, 32)}, r"inverse_temperatures is \[\]"),
        ("em_routing_backward", {9: [0.1, float("inf")]}, "inverse_temperatures has inf"),
        ("em_routing_backward", {10: [True] * 6}, "wanted has 6 values; expected 5"),
        ("em_routing_over_positions", {7: []}, r"inverse_temperatures is \[\]"),
        ("em_routing_over_positions_backward", {10: [0.1]}, r"state has shape .*; expected .* = \[1, 2, 3, 4, 32\]"),
    ],
)
def test_operators_called_directly_check_every_option(name: str, change: dict[int, object], message: str) -> None:
    arguments = [change.get(i, x) for i, x in enumerate(EXAMPLES[name])]
    for device in ("cpu", "meta"):
        moved = [x.to(device) if isinstance(x, torch.Tensor) else x for x in arguments]
        with pytest.raises(ValueError, match=f"{name}: {message}"):
            getattr(torch.ops.capsops, name)(*moved)


@given(shape=st.lists(st.integers(0, 4), min_size=0, max_size=5), which=st.sampled_from(["u", "weight"]))
def test_any_other_shape_is_refused_or_right(shape: list[int], which: str) -> None:
    arguments = {"u": torch.randn(2, 3, 4), "weight": torch.randn(3, 4, 2, 3), which: torch.randn(shape)}
    try:
        got = capsops.dynamic_routing(**arguments)
    except ValueError as error:
        assert which in str(error) or " is 0" in str(error)
    else:
        with capsops.use_backend("reference"):
            torch.testing.assert_close(got, capsops.dynamic_routing(**arguments))
