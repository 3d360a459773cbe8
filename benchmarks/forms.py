"""The contestants: capsops, the published formulations, and PyTorch formulations of the same routing.

A form computes one routing from `u` (em: `pose`), `weight` and the routing's other inputs, and returns its outputs as
a tuple. It may store the weight in an order of its own. The PyTorch forms are every way of making the votes with every
way of routing them that PyTorch is likely to be good at; `torch.compile` (inductor, static shapes, one graph) gets the
most promising of them. Symbols as in `capsops`: u [B, N, K], weight [N, K, J, D] or shared [K, J, D], votes
[B, N, J, D].
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import capsops

from .shapes import Case

Outputs = tuple[Tensor, ...]
Votes = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Form:
    """kind: "capsops", "published", "eager" or "compiled". layout: the order in which the weight is stored. backend: of
    capsops, if not the one it chooses."""

    name: str
    kind: str
    function: Callable[..., Outputs]
    layout: str = "NKJD"
    backend: str = ""

    def stored(self, weight: Tensor) -> Tensor:
        """A weight [N, K, J, D], [K, J, D] or [K, D] as this form stores it: a contiguous leaf."""
        return weight.detach().permute(_order("NKJD", self.layout, weight)).contiguous().requires_grad_()

    def arranged(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Inputs with the weight, if there is one, as this form stores it."""
        return {**inputs, "weight": self.stored(inputs["weight"])} if "weight" in inputs else inputs

    def restored(self, g_weight: Tensor) -> Tensor:
        """The gradient of a stored weight in the order [N, K, J, D]."""
        return g_weight.permute(_order(self.layout, "NKJD", g_weight))

    def compiled(self) -> Form:
        """This form under torch.compile.

        Dynamo keeps what it compiled by code object, of which it takes only so many versions; the forms share code, so
        each gets a copy.
        """
        f = self.function
        own = types.FunctionType(f.__code__.replace(), f.__globals__, f.__name__, f.__defaults__, f.__closure__)
        own.__kwdefaults__ = f.__kwdefaults__
        function = torch.compile(own, fullgraph=True, dynamic=False)
        return replace(self, name=f"compiled {self.name}", kind="compiled", function=function)


def _order(stored: str, wanted: str, weight: Tensor) -> list[int]:
    for axis in {4: "", 3: "N", 2: "NJ"}[weight.dim()]:
        stored, wanted = stored.replace(axis, ""), wanted.replace(axis, "")
    return [stored.index(axis) for axis in wanted]


# Votes


def votes_matmul(u: Tensor, weight: Tensor) -> Tensor:
    """Published: a vector-matrix product for every (b, i, j). matmul copies the weight for every batch item.

    weight [N, J, K, D]; u [B, N, K] or matrices [B, N, P, K].
    """
    if u.dim() == 4:
        votes = torch.matmul(u[:, :, None], weight[None].expand(u.shape[0], *weight.shape))
        return votes.flatten(3)
    return torch.matmul(u[:, :, None, None, :], weight[None].expand(u.shape[0], *weight.shape)).squeeze(3)


def votes_einsum(u: Tensor, weight: Tensor) -> Tensor:
    """One einsum. weight [N, K, J, D] or [K, J, D]."""
    if u.dim() == 4:
        return torch.einsum("bnpk,nkjd->bnjpd", u, weight).flatten(3)
    return torch.einsum("bnk,nkjd->bnjd" if weight.dim() == 4 else "bnk,kjd->bnjd", u, weight)


def votes_einsum_jndk(u: Tensor, weight: Tensor) -> Tensor:
    """One einsum on the order that most checkpoints have, [J, N, D, K]."""
    return torch.einsum("bnk,jndk->bnjd", u, weight)


def votes_bmm(u: Tensor, weight: Tensor) -> Tensor:
    """A matrix product for every capsule, [N, B, K] @ [N, K, J·D]; one product where the weight is shared."""
    J, D = weight.shape[-2:]
    if weight.dim() == 3:
        return (u.flatten(0, 1) @ weight.flatten(1)).view(*u.shape[:2], J, D)
    if u.dim() == 4:
        B, N, P, K = u.shape
        product = torch.bmm(u.transpose(0, 1).reshape(N, B * P, K), weight.flatten(2))
        return product.view(N, B, P, J, D).permute(1, 0, 3, 2, 4).flatten(3)
    return torch.bmm(u.transpose(0, 1), weight.flatten(2)).view(u.shape[1], u.shape[0], J, D).transpose(0, 1)


def votes_broadcast(u: Tensor, weight: Tensor) -> Tensor:
    """Multiply and sum over K, which a compiler can fuse into what follows."""
    if u.dim() == 4:
        return (u[:, :, None, :, :, None] * weight.transpose(1, 2)[None, :, :, None]).sum(4).flatten(3)
    return (u[..., None, None] * weight).sum(2)


# Squashes


def squash(s: Tensor) -> Tensor:
    """Sabour et al. 2017, eq. 1, with n² / (1 + n²) · s / n shortened."""
    n2 = s.square().sum(-1, keepdim=True)
    return s * (n2.sqrt() / (1 + n2))


def squash_published(s: Tensor) -> Tensor:
    """As most ports have it."""
    n2 = (s**2).sum(dim=-1, keepdim=True)
    return (n2 / (1 + n2)) * s / torch.sqrt(n2)


def squash_efficient(s: Tensor) -> Tensor:
    """Mazzia et al. 2021, eq. 4."""
    n = s.norm(dim=-1, keepdim=True)
    return (1 - torch.exp(-n)) * (s / n)


# Uniform routing: one pass


def uniform_published(votes: Tensor) -> Outputs:
    """The first iteration of procedure 1: a softmax of zeros."""
    c = F.softmax(votes.new_zeros(votes.shape[:3]), dim=2)
    return (squash_published((c[..., None] * votes).sum(dim=1)),)


def uniform_sum(votes: Tensor) -> Outputs:
    return (squash(votes.sum(dim=1) / votes.shape[2]),)


# Attention routing (CardioCaps, eq. 4)


def attention_published(votes: Tensor, attn_weight: Tensor, attn_bias: Tensor) -> Outputs:
    """As published: a 1×1 convolution whose channels are the output capsules, on [B, J, N, D]."""
    votes = votes.permute(0, 2, 1, 3)
    c = F.softmax(F.conv2d(votes, attn_weight[:, :, None, None], attn_bias), dim=1)
    return (squash_published((c * votes).sum(dim=2)),)


def attention_einsum(votes: Tensor, attn_weight: Tensor, attn_bias: Tensor) -> Outputs:
    c = (torch.einsum("kj,bnjd->bnkd", attn_weight, votes) + attn_bias[:, None]).softmax(dim=2)
    return (squash((c * votes).sum(dim=1)),)


def attention_broadcast(votes: Tensor, attn_weight: Tensor, attn_bias: Tensor) -> Outputs:
    """The J × J mixing as multiply and sum."""
    z = (attn_weight[:, :, None] * votes[:, :, None]).sum(dim=3) + attn_bias[:, None]
    return (squash((z.softmax(dim=2) * votes).sum(dim=1)),)


# Dynamic routing (Sabour et al. 2017, procedure 1)


def _softmax_axis(axis: str) -> int:
    """Of logits [B, N, J]."""
    return 1 if axis == "input" else 2


def dynamic_published(
    votes: Tensor, iterations: int, detach: bool, mask: Tensor | None = None, axis: str = "output"
) -> Outputs:
    """As the ports have it: a tensor b of logits, and the agreement as a matmul with v repeated for every capsule."""
    held = votes.detach() if detach else votes
    b = votes.new_zeros(*votes.shape[:3], 1)
    for iteration in range(iterations):
        c = F.softmax(b, dim=_softmax_axis(axis))
        if mask is not None:
            c = torch.where(mask[:, :, None, None], c, 0)
        if iteration == iterations - 1:
            return (squash_published((c * votes).sum(dim=1)),)
        v = squash_published((c * held).sum(dim=1, keepdim=True))
        b = b + torch.matmul(held[:, :, :, None], v.expand_as(held)[..., None]).squeeze(4)
    raise ValueError("iterations must be at least 1")


def dynamic_published_shared(
    u: Tensor,
    weight: Tensor,
    iterations: int,
    detach: bool,
    mask: Tensor | None = None,
    J: int = 0,
    logits: Tensor | None = None,
) -> Outputs:
    """As MIND's ports have it: the votes by one linear layer, then matmuls on [B, J, N, D].

    J: how many times the votes of a weight [K, D] are repeated.
    """
    votes = F.linear(u, weight.flatten(1).t())
    votes = votes[:, :, None].repeat(1, 1, J, 1) if J else votes.unflatten(2, weight.shape[1:])
    votes = votes.transpose(1, 2).contiguous()
    held = votes.detach() if detach else votes
    b = votes.new_zeros(*votes.shape[:3]) if logits is None else logits.transpose(1, 2)
    for iteration in range(iterations):
        c = F.softmax(b, dim=1)
        if mask is not None:
            c = torch.where(mask[:, None], c, 0)
        if iteration == iterations - 1:
            return (squash_published(torch.matmul(c[:, :, None], votes)).squeeze(2),)
        v = squash_published(torch.matmul(c[:, :, None], held))
        b = b + torch.matmul(held, v.transpose(2, 3)).squeeze(3)
    raise ValueError("iterations must be at least 1")


def dynamic_einsum(
    votes: Tensor, iterations: int, detach: bool, mask: Tensor | None = None, axis: str = "output"
) -> Outputs:
    return _dynamic(
        votes,
        iterations,
        detach,
        mask,
        _softmax_axis(axis),
        lambda c, votes: torch.einsum("bnj,bnjd->bjd", c, votes),
        lambda votes, v: torch.einsum("bnjd,bjd->bnj", votes, v),
    )


def dynamic_broadcast(
    votes: Tensor, iterations: int, detach: bool, mask: Tensor | None = None, axis: str = "output"
) -> Outputs:
    return _dynamic(
        votes,
        iterations,
        detach,
        mask,
        _softmax_axis(axis),
        lambda c, votes: (c[..., None] * votes).sum(dim=1),
        lambda votes, v: (votes * v[:, None]).sum(dim=-1),
    )


def _dynamic(
    votes: Tensor,
    iterations: int,
    detach: bool,
    mask: Tensor | None,
    dim: int,
    total: Callable[[Tensor, Tensor], Tensor],
    agreement: Callable[[Tensor, Tensor], Tensor],
) -> Outputs:
    """The first iteration without a softmax, for its couplings are equal; the agreement without a tensor of its own."""
    held = votes.detach() if detach else votes
    equal = 1 / votes.shape[dim]
    valid = None if mask is None else mask[:, :, None].to(votes.dtype)
    b = None
    for iteration in range(iterations):
        c = votes.new_full(votes.shape[:3], equal) if b is None else b.softmax(dim=dim)
        c = c if valid is None else c * valid
        if iteration == iterations - 1:
            return (squash(total(c, votes)),)
        logits = agreement(held, squash(total(c, held)))
        b = logits if b is None else b + logits
    raise ValueError("iterations must be at least 1")


# Dynamic routing by one matrix [K, D] (MIND): of votes [B, N, D], as all output capsules have the same


def one_matrix_product(u: Tensor, weight: Tensor, **options: Any) -> Outputs:
    """The votes are made once."""
    votes = u @ weight
    return _one_matrix(votes, votes, lambda s: s, **options)


def one_matrix_associative(u: Tensor, weight: Tensor, **options: Any) -> Outputs:
    """No votes: (u W) · V = u · (W V) and Σ c (u W) = (Σ c u) W."""
    return _one_matrix(u, u, lambda s: s @ weight, back=lambda v: v @ weight.t(), **options)


def _one_matrix(
    x: Tensor,
    y: Tensor,
    apply: Callable[[Tensor], Tensor],
    *,
    iterations: int,
    detach: bool,
    logits: Tensor,
    mask: Tensor,
    back: Callable[[Tensor], Tensor] = lambda v: v,
) -> Outputs:
    """x: what is summed. y: what agrees. apply, back: to the sums, and to the outputs before they agree."""
    b = logits.transpose(1, 2)
    for iteration in range(iterations):
        c = b.softmax(dim=1) * mask[:, None].to(b.dtype)
        if iteration == iterations - 1:
            return (squash(apply(torch.bmm(c, x))),)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not detach):
            v = squash(apply(torch.bmm(c, y)))
            b = b + torch.bmm(back(v), y.transpose(1, 2))
    raise ValueError("iterations must be at least 1")


# One step of dynamic routing, without its squash


def step_published(votes: Tensor, state: Tensor) -> Outputs:
    """An iteration of `dynamic_published`."""
    b = torch.matmul(votes[:, :, :, None], state[:, None].expand_as(votes)[..., None]).squeeze(4)
    return ((F.softmax(b, dim=2) * votes).sum(dim=1),)


def step_einsum(votes: Tensor, state: Tensor) -> Outputs:
    c = torch.einsum("bnjd,bjd->bnj", votes, state).softmax(dim=2)
    return (torch.einsum("bnj,bnjd->bjd", c, votes),)


def step_broadcast(votes: Tensor, state: Tensor) -> Outputs:
    c = (votes * state[:, None]).sum(dim=-1).softmax(dim=2)
    return ((c[..., None] * votes).sum(dim=1),)


# Self-attention routing (Efficient-CapsNet)


def self_attention_published(votes: Tensor, prior: Tensor) -> Outputs:
    """As the paper writes it: the N × N matrix of all products of two votes, summed along a row."""
    votes = votes.transpose(1, 2)  # [B, J, N, D]
    gram = torch.matmul(votes, votes.transpose(2, 3)) / votes.shape[3] ** 0.5
    c = F.softmax(gram.sum(dim=3, keepdim=True), dim=1) + prior.t()[:, :, None]
    return (squash_efficient((c * votes).sum(dim=2)),)


def self_attention_einsum(votes: Tensor, prior: Tensor) -> Outputs:
    """The published code's einsum over pairs, which torch collapses to a sum of the votes."""
    logits = torch.einsum("bnjd,bmjd->bnj", votes, votes) / votes.shape[3] ** 0.5
    c = logits.softmax(dim=2) + prior
    return (squash_efficient(torch.einsum("bnj,bnjd->bjd", c, votes)),)


def self_attention_broadcast(votes: Tensor, prior: Tensor) -> Outputs:
    """The sum of the votes first, then products with it."""
    logits = (votes * votes.sum(dim=1, keepdim=True)).sum(dim=3) / votes.shape[3] ** 0.5
    c = logits.softmax(dim=2) + prior
    return (squash_efficient((c[..., None] * votes).sum(dim=1)),)


# EM routing (Hinton et al. 2018, procedure 1)

_EPSILON = 1e-8
INVERSE_TEMPERATURE = 0.01


def em_published(votes: Tensor, activation: Tensor, beta_u: Tensor, beta_a: Tensor, iterations: int) -> Outputs:
    """As the ports have it: two-pass mean and variance with r kept as a tensor, and the logarithm of every density."""
    B, N, J, _ = votes.shape
    r = votes.new_full((B, N, J, 1), 1 / J)
    for t in range(iterations):
        r = r * activation[:, :, None, None]
        r_sum = r.sum(dim=1, keepdim=True)
        share = r / (r_sum + _EPSILON)
        mean = torch.sum(share * votes, dim=1, keepdim=True)
        variance = torch.sum(share * (votes - mean) ** 2, dim=1, keepdim=True) + _EPSILON
        cost = (beta_u[:, None] + 0.5 * torch.log(variance)) * r_sum
        a = torch.sigmoid(INVERSE_TEMPERATURE * (1 - 0.95 ** (t + 1)) * (beta_a - cost.sum(dim=3)))
        if t < iterations - 1:
            log_p = -0.5 * ((votes - mean) ** 2 / variance + torch.log(variance))
            r = F.softmax(log_p.sum(dim=3) + torch.log(a), dim=2)[..., None]
    return mean.squeeze(1), a.squeeze(1)


def em_einsum(votes: Tensor, activation: Tensor, beta_u: Tensor, beta_a: Tensor, iterations: int) -> Outputs:
    """Moments and distances as einsums."""
    B, N, J, _ = votes.shape
    w = (activation / J)[:, :, None].expand(B, N, J)
    for t in range(iterations):
        total = w.sum(dim=1)
        scale = 1 / (total + _EPSILON)[..., None]
        mean = torch.einsum("bnj,bnjh->bjh", w, votes) * scale
        centred = votes - mean[:, None]
        square = centred * centred
        variance = torch.einsum("bnj,bnjh->bjh", w, square) * scale + _EPSILON
        half_log = 0.5 * variance.log().sum(dim=2)
        cost = total * (beta_u * votes.shape[3] + half_log)
        z = INVERSE_TEMPERATURE * (1 - 0.95 ** (t + 1)) * (beta_a - cost)
        if t < iterations - 1:
            distance = torch.einsum("bnjh,bjh->bnj", square, 0.5 / variance)
            w = ((F.logsigmoid(z) - half_log)[:, None] - distance).softmax(dim=2) * activation[:, :, None]
    return mean, z.sigmoid()


def em_broadcast(votes: Tensor, activation: Tensor, beta_u: Tensor, beta_a: Tensor, iterations: int) -> Outputs:
    """Moments and distances as multiply and sum."""
    B, N, J, _ = votes.shape
    w = (activation / J)[:, :, None].expand(B, N, J)
    for t in range(iterations):
        total = w.sum(dim=1)
        scale = 1 / (total + _EPSILON)[..., None]
        mean = (w[..., None] * votes).sum(dim=1) * scale
        centred = votes - mean[:, None]
        variance = (w[..., None] * centred * centred).sum(dim=1) * scale + _EPSILON
        half_log = 0.5 * variance.log().sum(dim=2)
        cost = total * (beta_u * votes.shape[3] + half_log)
        z = INVERSE_TEMPERATURE * (1 - 0.95 ** (t + 1)) * (beta_a - cost)
        if t < iterations - 1:
            distance = (centred * centred * (0.5 / variance)[:, None]).sum(dim=3)
            w = ((F.logsigmoid(z) - half_log)[:, None] - distance).softmax(dim=2) * activation[:, :, None]
    return mean, z.sigmoid()


# Who takes part where


def contestants(case: Case, backends: Sequence[str] = ("",)) -> list[Form]:
    """capsops first, by each of the backends, then the PyTorch forms that are raced, then the compiled ones, the
    published one last. In low precision capsops alone."""
    ours = [replace(_capsops(case), name=f"capsops {b}".strip(), backend=b) for b in backends]
    if case.dtype != "float32":
        return ours
    published, eager = _pytorch(case)
    chosen = [form for form in eager if form.name in (_COMPILED_LADDER if case.ladder else _COMPILED)]
    if case.ladder:
        eager = [form for form in eager if form.name in _EAGER_LADDER]
    return [*ours, *eager, *(form.compiled() for form in chosen), published]


def reference(case: Case) -> Form:
    """The readable PyTorch that ships with capsops: the oracle."""
    form = _capsops(case)

    def run(**inputs: Tensor) -> Outputs:
        with capsops.use_backend("reference"):
            return form.function(**inputs)

    return Form("reference", "reference", run)


# Those of the eager forms that torch.compile gets: it fuses what is elementwise, and calls the same library for
# products of matrices, whether written as einsum or as bmm.
_COMPILED = (
    "broadcast, broadcast",
    "einsum, einsum",
    "einsum, broadcast",
    "einsum",
    "broadcast",
    "one product",
    "votes once",
    "no votes",
)
_EAGER_LADDER = ("bmm, broadcast", "bmm, einsum", "one product")
_COMPILED_LADDER = ("broadcast, broadcast", "einsum, broadcast", "one product")

# With more output capsules than that, mixing by broadcast holds [B, N, J, J, D].
_BROADCAST_MIXING = 16

_ROUTES: dict[str, dict[str, Callable[..., Outputs]]] = {
    "uniform": {"sum": uniform_sum},
    "attention": {"einsum": attention_einsum, "broadcast": attention_broadcast},
    "dynamic": {"einsum": dynamic_einsum, "broadcast": dynamic_broadcast},
    "step": {"einsum": step_einsum, "broadcast": step_broadcast},
    "self-attention": {"einsum": self_attention_einsum, "broadcast": self_attention_broadcast},
    "em": {"einsum": em_einsum, "broadcast": em_broadcast},
}
_PUBLISHED: dict[str, Callable[..., Outputs]] = {
    "uniform": uniform_published,
    "attention": attention_published,
    "dynamic": dynamic_published,
    "step": step_published,
    "self-attention": self_attention_published,
    "em": em_published,
}
_VOTES: dict[str, tuple[Votes, str]] = {
    "einsum": (votes_einsum, "NKJD"),
    "einsum JNDK": (votes_einsum_jndk, "JNDK"),
    "bmm": (votes_bmm, "NKJD"),
    "broadcast": (votes_broadcast, "NKJD"),
}


def _algorithm(case: Case) -> tuple[str, dict[str, int | bool | str]]:
    """The routing's name in the tables above, and its fixed options."""
    name, routing = case.routing.name, case.routing
    if name.startswith("dynamic"):
        axis: dict[str, int | bool | str] = {"axis": routing.axis} if routing.axis != "output" else {}
        return "dynamic", {"iterations": routing.iterations, "detach": routing.detach, **axis}
    return name, {"iterations": routing.iterations} if name == "em" else {}


def _pytorch(case: Case) -> tuple[Form, list[Form]]:
    """The published form, and the eager ones."""
    shape = case.shape
    algorithm, options = _algorithm(case)
    if shape.one_matrix or shape.given:

        def whole(name: str, kind: str, function: Callable[..., Outputs], **more: int) -> Form:
            return Form(name, kind, lambda u, **rest: function(u, **rest, **more, **options))

        if shape.given:
            eager = [whole(name, "eager", route) for name, route in _ROUTES[algorithm].items()]
            return whole("published", "published", _PUBLISHED[algorithm]), eager
        eager = [
            whole("votes once", "eager", one_matrix_product),
            whole("no votes", "eager", one_matrix_associative),
        ]
        return whole("published", "published", dynamic_published_shared, J=shape.J), eager

    def form(name: str, kind: str, votes: Votes, route: Callable[..., Outputs], layout: str) -> Form:
        P, D = shape.rows, shape.D

        def run(weight: Tensor, u: Tensor | None = None, pose: Tensor | None = None, **rest: Tensor) -> Outputs:
            capsules = u if pose is None else pose
            assert capsules is not None
            out = route(votes(capsules, weight), **rest, **options)
            return (out[0].unflatten(-1, (P, D)), *out[1:]) if P else out

        return Form(name, kind, run, layout)

    eager = []
    for votes, (make, layout) in _VOTES.items():
        if layout == "JNDK" and (shape.shared or shape.rows):
            continue  # only a checkpoint's order for vector capsules of the classical kind
        for name, route in _ROUTES[algorithm].items():
            if algorithm == "attention" and name == "broadcast" and shape.J > _BROADCAST_MIXING:
                continue
            second = "broadcast" if name == "sum" else name
            eager.append(form(f"{votes}, {second}", "eager", make, route, layout))
    if algorithm == "uniform":
        eager.append(Form("one product", "eager", _uniform_product))
    if shape.shared:

        def run_shared(u: Tensor, weight: Tensor, mask: Tensor | None = None) -> Outputs:
            return dynamic_published_shared(u, weight, mask=mask, **options)  # type: ignore[arg-type]

        return Form("published", "published", run_shared), eager
    return form("published", "published", votes_matmul, _PUBLISHED[algorithm], "NJKD"), eager


def _uniform_product(u: Tensor, weight: Tensor) -> Outputs:
    """Σ_i u_i W_i / J as one product of [B, N·K] and [N·K, J·D]: no votes at all."""
    J, D = weight.shape[-2:]
    return (squash((u.flatten(1) @ weight.view(-1, J * D)).view(-1, J, D) / J),)


def _capsops(case: Case) -> Form:
    routing = case.routing
    algorithm, options = _algorithm(case)
    functions: dict[str, Callable[..., Tensor | Outputs]] = {
        "uniform": lambda **inputs: capsops.dynamic_routing(**inputs, iterations=1),
        "attention": lambda **inputs: capsops.attention_routing(**inputs),
        "dynamic": lambda **inputs: capsops.dynamic_routing(**{"weight": None, **inputs}, **options),  # type: ignore
        "step": lambda **inputs: capsops.routing_step(**inputs),
        "self-attention": lambda **inputs: capsops.self_attention_routing(**inputs),
        "em": lambda **inputs: capsops.em_routing(
            **inputs, iterations=routing.iterations, inverse_temperature=INVERSE_TEMPERATURE
        ),
    }
    function = functions[algorithm]

    def run(**inputs: Tensor) -> Outputs:
        out = function(**inputs)
        return out if isinstance(out, tuple) else (out,)

    return Form("capsops", "capsops", run)
