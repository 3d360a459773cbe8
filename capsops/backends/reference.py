"""The routings in plain PyTorch: readable, differentiated by autograd; the votes are materialised.

The tests compare everything with it, and the benchmarks call it the "naive routing". It runs on any device and with any
floating dtype. Symbols: u [B, N, K] input capsules, W [N, K, J, D] or [K, J, D], û [B, N, J, D] votes, c couplings,
v [B, J, D] output capsules. Where W may be None, u is the votes then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Keeps the divisions and logarithms of EM routing finite. The kernels use the same value.
EM_EPSILON = 1e-8


def squash(s: Tensor, kind: str = "sabour") -> Tensor:
    """v = f(n) s with n = ‖s‖ along the last dimension. float16 and bfloat16 are computed in float32.

    sabour: f = n / (1 + n²) (Sabour et al. 2017, eq. 1). efficient: f = (1 − e^{−n}) / n (Mazzia et al. 2021, eq. 4).
    In a routing also none: v = s; and layer_norm: s with the mean 0 and the variance 1.
    """
    if kind == "none":
        return s
    x = s.float() if s.dtype in (torch.float16, torch.bfloat16) else s
    if not x.shape[-1]:
        return s.clone()
    if kind == "layer_norm":
        return torch.nn.functional.layer_norm(x, x.shape[-1:]).to(s.dtype)
    largest = x.detach().abs().amax(dim=-1, keepdim=True)
    zero = largest == 0
    # Scaled to a largest component of 1, so that no square overflows or vanishes. The scale is a constant for autograd,
    # because the length does not depend on it. torch.sum adds pairwise; linalg.vector_norm does not.
    scale = torch.where(zero, 1, largest)
    ratio = x / scale
    root = torch.where(zero, 1, ratio.square().sum(dim=-1, keepdim=True)).sqrt()
    # Where the length itself might overflow, v is the direction of s to the last digit, in either formula. Every
    # torch.where below evaluates both sides, so each side gets only lengths for which it is finite.
    huge = largest > (2.0**500 if x.dtype == torch.float64 else 2.0**60)
    n = torch.where(zero, 0, torch.where(huge, 1, scale) * root)
    if kind == "sabour":
        # Written as 1/(n + 1/n) where n² could overflow.
        long = n > 1
        factor = 1 / (torch.where(long, n, 1) + 1 / torch.where(long, n, 1))
        short = torch.where(long, 1, n)
        factor = torch.where(long, factor, short / (1 + short * short))
    else:
        small = n < 1e-3
        safe = torch.where(small, 1, n)
        near_0 = torch.where(small, n, 0)
        series = 1 - near_0 / 2 + near_0**2 / 6 - near_0**3 / 24
        factor = torch.where(small, series, -torch.expm1(-safe) / safe)
    return torch.where(huge, ratio / root, x * factor).to(s.dtype)


def primary_capsules(features: Tensor, types: int, legacy: bool = False, kind: str = "sabour") -> Tensor:
    """u = squash of the features [B, C, H, W] read as capsules [B, N, K] (Sabour et al. 2017, section 4)."""
    B, C, height, width = features.shape
    K, pixels = C // types, height * width
    u = features if legacy else features.reshape(B, types, K, pixels).transpose(2, 3)
    return squash(u.reshape(B, types * pixels, K), kind)


def affine_votes(u: Tensor, weight: Tensor | None, mask: Tensor | None = None) -> Tensor:
    """û_ij = u_i W_ij; 0 where the mask is False, so that a masked value (even a NaN) has no effect.

    The vote of a capsule that is a matrix [P, K] is a matrix [P, D]. Without a weight u is the votes.
    """
    if weight is None:
        return _masked(u, mask)
    if mask is not None:
        u = _masked(u, mask)
        if weight.dim() == 4:
            weight = torch.where(mask.any(dim=0)[:, None, None, None], weight, 0)
    return torch.einsum("bn...k,nkjd->bnj...d" if weight.dim() == 4 else "bn...k,kjd->bnj...d", u, weight)


def attention_couplings(votes: Tensor, attn_weight: Tensor, attn_bias: Tensor | None) -> Tensor:
    """c [B, N, J, D]: a 1×1 convolution over the output capsules and a softmax over them (CardioCaps, eq. 4)."""
    z = torch.einsum("kj,bnjd->bnkd", attn_weight, votes)
    if attn_bias is not None:
        z = z + attn_bias[:, None]
    return z.softmax(dim=2)


def dynamic_couplings(agreement: Tensor, leaky: bool, logits: Tensor | None = None) -> Tensor:
    """c [B, N, J]: a softmax over the output capsules, with one more logit, 0, if leaky.

    logits [B, N, J] are added to the agreement; c is 0 where one is −∞, even if all are.
    """
    if logits is not None:
        removed = logits == -torch.inf
        # The lowest number in place of −∞, because the softmax of nothing but −∞ is NaN.
        agreement = torch.where(removed, torch.finfo(agreement.dtype).min, agreement + logits)
    if leaky:
        leak = torch.zeros_like(agreement[:, :, :1])
        c = torch.cat([leak, agreement], dim=2).softmax(dim=2)[:, :, 1:]
    else:
        c = agreement.softmax(dim=2)
    return c if logits is None else c.masked_fill(removed, 0)


def input_couplings(agreement: Tensor, logits: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """c [B, N, J]: a softmax over the input capsules, without masked ones and pairs whose logit is −∞."""
    removed = torch.zeros_like(agreement, dtype=torch.bool) if mask is None else ~mask[:, :, None].expand_as(agreement)
    if logits is not None:
        removed = removed | (logits == -torch.inf)
        agreement = agreement + logits
    least = torch.finfo(agreement.dtype).min
    return torch.where(removed, least, agreement).softmax(dim=1).masked_fill(removed, 0)


def step_couplings(votes: Tensor, state: Tensor, logits: Tensor | None = None) -> Tensor:
    """c [B, N, J]: how far a vote agrees with the state [B, J, D]; logits as in `dynamic_couplings`."""
    return dynamic_couplings(torch.einsum("bnjd,bjd->bnj", votes, state), False, logits)


def self_attention_couplings(votes: Tensor, total: Tensor, prior: Tensor | None, scale: float) -> Tensor:
    """c [B, N, J]: how far a vote agrees with total [B, J, D], the sum of all votes (Mazzia et al. 2021).

    The paper only uses the row sums of its N×N matrix of products of votes, and û_i · Σ_k û_k is such a sum.
    """
    c = (torch.einsum("bnjd,bjd->bnj", votes, total) * scale).softmax(dim=2)
    return c if prior is None else c + prior


def em_responsibilities(votes: Tensor, mean: Tensor, variance: Tensor, log_activation: Tensor) -> Tensor:
    """r [B, N, J], the E-step: how well each output capsule explains each vote [B, N, J, H] (Hinton et al. 2018)."""
    return em_logits(votes, mean, variance, log_activation).softmax(dim=2)


def em_logits(votes: Tensor, mean: Tensor, variance: Tensor, log_activation: Tensor) -> Tensor:
    """The logits of `em_responsibilities`, [B, N, J]."""
    deviation = (votes - mean[:, None]).square() / variance[:, None]
    return log_activation[:, None] - 0.5 * (deviation.sum(dim=-1) + variance.log().sum(dim=-1)[:, None])


def em_cost(support: Tensor, variance: Tensor, beta_u: Tensor) -> Tensor:
    """[B, J], in the M-step: the cost of describing the votes by an output capsule (Hinton et al. 2018)."""
    return support * (beta_u[:, None] + 0.5 * variance.log()).sum(dim=-1)


def _weighed(c: Tensor, input_weight: Tensor | None, mask: Tensor | None) -> Tensor:
    """c [B, N, …], multiplied by the weights of the input capsules [B, N]."""
    if input_weight is None:
        return c
    return c * _masked(input_weight, mask).reshape(*input_weight.shape, *[1] * (c.dim() - 2))


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """x [B, N, …] with 0 where the mask is False."""
    return x if mask is None else torch.where(mask.reshape(*mask.shape, *[1] * (x.dim() - 2)), x, 0)


def attention_routing(
    u: Tensor,
    weight: Tensor | None,
    attn_weight: Tensor,
    attn_bias: Tensor | None = None,
    input_weight: Tensor | None = None,
    mask: Tensor | None = None,
    kind: str = "sabour",
) -> Tensor:
    """v = squash(Σ_i w_i c_i · û_i), elementwise in D (CardioCaps, eq. 4), w = input_weight [B, N]."""
    votes = affine_votes(u, weight, mask)
    c = _masked(attention_couplings(votes, attn_weight, attn_bias), mask)
    return squash((_weighed(c, input_weight, mask) * votes).sum(dim=1), kind)


def _route(
    votes: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    iterations: int,
    detach: bool,
    kind: str,
    couplings: Callable[[Tensor], Tensor],
    input_weight: Tensor | None = None,
) -> Tensor:
    """The iterations of routing by agreement; couplings(b) are those of the agreements b [B, N, J] so far."""
    agreeing = votes.detach() if detach else votes
    agreement = torch.zeros_like(votes[..., 0])
    for iteration in range(iterations):
        through = iteration == iterations - 1 or not detach  # whether votes, bias and weights have a gradient
        c = _masked(couplings(agreement), mask)
        if input_weight is not None:
            c = _weighed(c, input_weight if through else input_weight.detach(), mask)
        s = torch.einsum("bnj,bnjd->bjd", c, votes if through else agreeing)
        if bias is not None:
            s = s + (bias if through else bias.detach())
        v = squash(s, kind)
        if iteration < iterations - 1:
            agreement = agreement + torch.einsum("bnjd,bjd->bnj", agreeing, v)
    return v


def dynamic_routing(
    u: Tensor,
    weight: Tensor | None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    iterations: int = 3,
    leaky: bool = False,
    detach: bool = False,
    kind: str = "sabour",
) -> Tensor:
    """Routing by agreement (Sabour et al. 2017, procedure 1); bias [J, D] is added inside the squash."""
    votes = affine_votes(u, weight, mask)
    return _route(votes, bias, mask, iterations, detach, kind, lambda b: dynamic_couplings(b, leaky))


def dynamic_routing_with_logits(
    u: Tensor,
    weight: Tensor | None,
    logits: Tensor | None = None,
    input_weight: Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    iterations: int = 3,
    leaky: bool = False,
    detach: bool = False,
    kind: str = "sabour",
) -> Tensor:
    """The same with logits [B, N, J] added to the agreements of every iteration, and the couplings of an input capsule
    multiplied by its weight; input_weight [B, N]."""
    votes, added = _votes_for(u, weight, mask, logits, detach)
    return _route(
        votes, bias, mask, iterations, detach, kind, lambda b: dynamic_couplings(b, leaky, added), input_weight
    )


def _votes_for(
    u: Tensor, weight: Tensor | None, mask: Tensor | None, logits: Tensor | None, detach: bool
) -> tuple[Tensor, Tensor | None]:
    """The votes [B, N, J, D], and the logits as they are added to the agreements.

    Votes [B, N, 1, D] are the same for all output capsules, of which the logits tell the number.
    """
    votes = affine_votes(u, weight, mask)
    if logits is None:
        return votes, None
    return votes.expand(-1, -1, logits.shape[2], -1), _masked(logits.detach() if detach else logits, mask)


def dynamic_routing_over_inputs(
    u: Tensor,
    weight: Tensor | None,
    logits: Tensor | None = None,
    input_weight: Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    iterations: int = 3,
    detach: bool = False,
    kind: str = "sabour",
) -> Tensor:
    """Dynamic routing with the softmax over the input capsules; logits [B, N, J] are added to the agreements."""
    votes, added = _votes_for(u, weight, mask, logits, detach)
    return _route(votes, bias, mask, iterations, detach, kind, lambda b: input_couplings(b, added, mask), input_weight)


def routing_step(u: Tensor, weight: Tensor | None, state: Tensor, mask: Tensor | None = None) -> Tensor:
    """s = Σ_i c_i û_i with c = softmax_j(û · state): one pass of dynamic routing, without its squash."""
    votes = affine_votes(u, weight, mask)
    return torch.einsum("bnj,bnjd->bjd", _masked(step_couplings(votes, state), mask), votes)


def routing_step_with_logits(
    u: Tensor,
    weight: Tensor | None,
    state: Tensor,
    logits: Tensor | None = None,
    input_weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """The same with c = w softmax_j(û · state + logits); logits [B, N, J], w = input_weight [B, N]."""
    votes = affine_votes(u, weight, mask)
    c = step_couplings(votes, state, None if logits is None else _masked(logits, mask))
    return torch.einsum("bnj,bnjd->bjd", _weighed(_masked(c, mask), input_weight, mask), votes)


def routing_step_over_inputs(
    u: Tensor,
    weight: Tensor | None,
    state: Tensor,
    logits: Tensor | None = None,
    input_weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """The same with c = w softmax_i(û · state + logits)."""
    votes = affine_votes(u, weight, mask)
    agreement = torch.einsum("bnjd,bjd->bnj", votes, state)
    c = input_couplings(agreement, None if logits is None else _masked(logits, mask), mask)
    return torch.einsum("bnj,bnjd->bjd", _weighed(c, input_weight, mask), votes)


def self_attention_routing(
    u: Tensor,
    weight: Tensor | None,
    prior: Tensor | None = None,
    input_weight: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """v = squash(Σ_i w_i c_i û_i) (Mazzia et al. 2021); prior [N, J] is added to the couplings, w = input_weight
    [B, N]. The couplings do not depend on the weights."""
    votes = affine_votes(u, weight, mask)
    c = _masked(self_attention_couplings(votes, votes.sum(dim=1), prior, scale), mask)
    return squash(torch.einsum("bnj,bnjd->bjd", _weighed(c, input_weight, mask), votes), "efficient")


def em_routing(
    pose: Tensor,
    activation: Tensor,
    weight: Tensor | None,
    beta_u: Tensor,
    beta_a: Tensor,
    mask: Tensor | None = None,
    inverse_temperatures: Sequence[float] = (0.01,),
) -> tuple[Tensor, Tensor]:
    """EM routing (Hinton et al. 2018, procedure 1), an iteration for each inverse temperature.

    It fits a mixture of Gaussians with diagonal covariance to the votes. The votes are computed in their own dtype, the
    rest in float32 at least, because float16 has no number as small as ε.
    """
    return _em(affine_votes(pose, weight, mask), activation, beta_u, beta_a, mask, inverse_temperatures)


def em_routing_over_positions(
    pose: Tensor,
    activation: Tensor,
    weight: Tensor | None,
    beta_u: Tensor,
    beta_a: Tensor,
    places: Tensor,
    mask: Tensor | None = None,
    inverse_temperatures: Sequence[float] = (0.01,),
) -> tuple[Tensor, Tensor]:
    """EM routing where the output capsules of all windows [B, M, N, …] of a grid compete for an input capsule.

    The E-step is r_imj = softmax over (m, j) of the logits. That is the softmax over j in each window m, times the
    softmax over the windows that contain i of log Σ_j exp(logit).
    """
    B, M, N = pose.shape[:3]
    flat = None if mask is None else mask.flatten(0, 1)
    # One place more, for capsules that lie in fewer windows than others.
    index = torch.where(places >= 0, places, M * N).flatten().expand(B, -1)

    def at_places(x: Tensor) -> Tensor:
        """[B, G, W] -> [B · M, N], 0 at a place that no capsule has."""
        return x.new_zeros(B, M * N + 1).scatter(1, index, x.flatten(1))[:, :-1].reshape(B * M, N)

    def shares(log_sums: Tensor) -> Tensor:
        """[B · M, N], the share of a window in an input capsule, from log Σ_j exp(logit)."""
        lowest = torch.finfo(log_sums.dtype).min
        present = log_sums if flat is None else log_sums.masked_fill(~flat, lowest)
        of_places = torch.nn.functional.pad(present.reshape(B, M * N), (0, 1), value=lowest)
        return at_places(of_places.gather(1, index).unflatten(1, places.shape).softmax(dim=2))

    votes = affine_votes(pose.flatten(0, 1), weight, flat)
    own = at_places(activation[:, :, None].expand(-1, -1, places.shape[1]))
    out, probability = _em(votes, own, beta_u, beta_a, flat, inverse_temperatures, shares)
    return out.unflatten(0, (B, M)), probability.unflatten(0, (B, M))


def _em(
    matrices: Tensor,
    activation: Tensor,
    beta_u: Tensor,
    beta_a: Tensor,
    mask: Tensor | None,
    inverse_temperatures: Sequence[float],
    shares: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """EM routing of votes [B, N, J, …].

    shares: from log Σ_j exp(logit) [B, N], a factor [B, N] of the responsibilities; by default 1.
    """
    dtype = matrices.dtype
    votes, activation, beta_u, beta_a = (
        x.float() if dtype in (torch.float16, torch.bfloat16) else x
        for x in (matrices.flatten(start_dim=3), _masked(activation, mask), beta_u, beta_a)
    )
    r = torch.full_like(votes[..., 0], 1 / votes.shape[2])
    if shares is not None:
        r = r * shares(torch.zeros_like(r[..., 0]))[..., None]
    for iteration, inverse_temperature in enumerate(inverse_temperatures):
        w = r * activation[:, :, None]
        support = w.sum(dim=1)
        share = w / (support + EM_EPSILON)[:, None]
        mean = torch.einsum("bnj,bnjh->bjh", share, votes)
        variance = torch.einsum("bnj,bnjh->bjh", share, (votes - mean[:, None]).square()) + EM_EPSILON
        logit = inverse_temperature * (beta_a - em_cost(support, variance, beta_u))
        if iteration + 1 < len(inverse_temperatures):
            logits = em_logits(votes, mean, variance, torch.nn.functional.logsigmoid(logit))
            r = logits.softmax(dim=2)
            if shares is not None:
                r = r * shares(logits.logsumexp(dim=2))[..., None]
    B, _, *sizes = matrices.shape
    return mean.reshape(B, *sizes).to(dtype), logit.sigmoid().to(dtype)
