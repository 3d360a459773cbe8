"""The streaming loops on Triton, like those of csrc/cuda/engine/stream.cuh in CUDA.

    reduce   Σ_i c_i û_bi with the couplings c of a routing; for EM routing Σ_i w_i (1, x, x²) with x = û − shift
    emit     g_u,bi = g_û,bi W_iᵀ;  g_W,i = Σ_b u_biᵀ g_û,bi

Without W u is the votes, and g_u is g_û; if they are the same for all output capsules (one_vote), g_u is its sum over
these. Couplings, a prior included, are multiplied by the weights w_i of the input capsules: their activations in EM
routing.

A program loops over a run of input capsules, NB at a time, and holds the votes of BB batch items in registers. reduce
has a program for each run and tile of the batch. emit has a program for each run, which loops over the tiles of the
batch too, because it sums g_W over them. There are no atomics: every program writes sums of its own, which torch adds
in a fixed order.

All sizes but B and N are known at compile time. Padded and masked pairs have votes of 0.

States, [B, J, P, D] each, and scalars, [B, J] each, that the routings read:

    agreement   x; in emit the x of all iterations, then the g_s of all, then, if has_addend, an addend of g_û
    over_inputs x. The sums are Σ_i w_i e_i û_bi, Σ_i e_i and m, with e_i = exp(b_i − m) and m the largest logit b_i
    adjoint     x, y
    em          mean and quadratic of the E-step, shift; scalar: constant of the E-step
    em_adjoint  mean and quadratic of the E-step; mean, linear and quadratic of the gradient of the M-step; scalars:
                both constants. The sums are of x = û − the first mean. In emit, each of these for all iterations.

With shares, a number for each pair and iteration, the responsibilities of EM routing are multiplied by them; with means
their gradient δ is r (e − mean). These are for windows that compete: the share of a window in the input capsule, and
Σ r e over the output capsules of all windows.

With scalars agreement in emit, and adjoint, are for couplings over the input capsules, c_ij = exp(b_ij − log_sum_j):
the scalars are log_sum and Σ_i c_ij e_ij with e_ij = w_i û_ij · y_j, in emit the first for all iterations, then the
second.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .couplings import (
    attention,
    attention_gradient,
    finite,
    gaussian_adjoint,
    gaussian_logits,
    online_softmax,
    over_capsules,
    over_components,
    softmax,
    softmax_backward,
    with_logits,
)


@triton.jit
def axis(size: tl.constexpr, number: tl.constexpr):
    """0 … size − 1 along one of the five axes of a tile."""
    x = tl.arange(0, size)
    if number == 0:
        x = x[:, None, None, None, None]
    elif number == 1:
        x = x[None, :, None, None, None]
    elif number == 2:
        x = x[None, None, :, None, None]
    elif number == 3:
        x = x[None, None, None, :, None]
    else:
        x = x[None, None, None, None, :]
    return x.to(tl.int64)


@triton.jit
def present(mask, i, b, end, B, N, has_mask: tl.constexpr):
    """Which pairs of input capsule and batch item exist and are not masked, [NB, BB, 1, 1, 1]."""
    valid = (i < end) & (b < B)
    if has_mask:
        valid = valid & (tl.load(mask + b * N + i, mask=valid, other=0) != 0)
    return valid


@triton.jit
def capsule(u, i, b, p, k, valid, N, K: tl.constexpr, P: tl.constexpr, A: tl.constexpr):
    """Component k of u, [NB, BB, 1, PP, 1]."""
    return tl.load(u + ((b * N + i) * P + p) * K + k, mask=valid & (p < P), other=0.0).to(A)


@triton.jit
def matrix(
    weight, i, j, d, k, end, K: tl.constexpr, J: tl.constexpr, D: tl.constexpr, shared: tl.constexpr, A: tl.constexpr
):
    """Row k of W, [NB, 1, JP, 1, DP]; [1, 1, JP, 1, DP] if all input capsules share it."""
    if shared:
        return tl.load(weight + (k * J + j) * D + d, mask=(j < J) & (d < D), other=0.0).to(A)
    else:  # noqa: RET505  (without else Triton compiles both branches)
        return tl.load(weight + ((i * K + k) * J + j) * D + d, mask=(i < end) & (j < J) & (d < D), other=0.0).to(A)


@triton.jit
def make_votes(
    u, weight, i, b, j, p, d, valid, end, N,
    K: tl.constexpr, J: tl.constexpr, D: tl.constexpr, P: tl.constexpr, shared: tl.constexpr, one_vote: tl.constexpr,
    A: tl.constexpr,
):  # fmt: skip
    """û = u W, or u itself, [NB, BB, JP, PP, DP]."""
    if weight is None:
        to, inside = given_vote(u, i, b, j, p, d, valid, N, J, D, P, one_vote)
        return tl.where(j < J, tl.load(to, mask=inside, other=0.0).to(A), 0.0)
    else:  # noqa: RET505  (without else Triton compiles both branches)
        v = tl.zeros([i.shape[0], b.shape[1], j.shape[2], p.shape[3], d.shape[4]], A)
        for k in tl.range(0, K, loop_unroll_factor=4):
            v += capsule(u, i, b, p, k, valid, N, K, P, A) * matrix(weight, i, j, d, k, end, K, J, D, shared, A)
        return v


@triton.jit
def given_vote(u, i, b, j, p, d, valid, N, J: tl.constexpr, D: tl.constexpr, P: tl.constexpr, one_vote: tl.constexpr):
    """Where a vote that is given is, and whether it exists, [NB, BB, JP, PP, DP]; [NB, BB, 1, PP, DP] if one_vote."""
    inside = valid & (p < P) & (d < D)
    if one_vote:
        return u + ((b * N + i) * P + p) * D + d, inside
    else:  # noqa: RET505
        return u + (((b * N + i) * J + j) * P + p) * D + d, inside & (j < J)


@triton.jit
def state(states, n, b, j, p, d, B, J: tl.constexpr, D: tl.constexpr, P: tl.constexpr):
    """State n of the output capsules, of states [·, B, J, P, D]."""
    at = (((n * B + b) * J + j) * P + p) * D + d
    return tl.load(states + at, mask=(b < B) & (j < J) & (p < P) & (d < D), other=0.0)


@triton.jit
def scalar(scalars, n, b, j, B, J: tl.constexpr):
    """Number n of the output capsules, of scalars [·, B, J]."""
    return tl.load(scalars + (n * B + b) * J + j, mask=(b < B) & (j < J), other=0.0)


@triton.jit
def agreement(v, x, logits, i, b, j, valid, N, J: tl.constexpr, same_logits: tl.constexpr):
    """b = û · x + logits, [NB, BB, JP, 1, 1]."""
    z = over_components(v * x)
    if logits is not None:
        # The masks of old versions of Triton are not larger than the addresses.
        pair = i + 0 * b if same_logits else b * N + i
        own = tl.load(logits + pair * J + j, mask=valid & (j < J), other=0.0).to(z.dtype)
        z = with_logits(z, own)
    return z


@triton.jit
def coupling(z, scalars, n, b, j, valid, B, J: tl.constexpr, leaky: tl.constexpr, some_removed: tl.constexpr):
    """c, over the output capsules, or over the input capsules if there are scalars: number n is their log-sum."""
    if scalars is None:
        return softmax(z, j < J, leaky, some_removed)
    else:  # noqa: RET505
        return tl.where(valid & (j < J), tl.exp(z - scalar(scalars, n, b, j, B, J)), 0.0)


@triton.jit
def coupling_backward(c, e, scalars, n, b, j, B, J: tl.constexpr):
    """δ, the gradient of the logits; over the input capsules number n is Σ_i c_i e_i."""
    if scalars is None:
        return softmax_backward(c, e)
    else:  # noqa: RET505
        return c * (e - scalar(scalars, n, b, j, B, J))


@triton.jit
def responsibilities(z, shares, t, i, b, j, valid, B, N, J: tl.constexpr):
    """r, over the output capsules; times the shares of iteration t, of shares [·, B, N]."""
    r = softmax(z, j < J, False, False)
    if shares is not None:
        r *= tl.load(shares + (t * B + b) * N + i, mask=valid, other=0.0)
    return r


@triton.jit
def responsibilities_backward(r, e, means, t, i, b, valid, B, N):
    """δ, the gradient of the logits; with means [·, B, N] number t is Σ r e."""
    if means is None:
        return softmax_backward(r, e)
    else:  # noqa: RET505
        return r * (e - tl.load(means + (t * B + b) * N + i, mask=valid, other=0.0))


@triton.jit
def from_prior(prior, i, j, end, J: tl.constexpr):
    return tl.load(prior + i * J + j, mask=(i < end) & (j < J), other=0.0)


@triton.jit
def reduce_kernel(
    u,  # [B, N, P, K] storage; without weight the votes, [B, N, J, P, D], or [B, N, 1, P, D] if one_vote
    weight,  # [N, K, J, D] storage; [K, J, D] if shared; or None
    mask,  # [B, N] uint8, or None
    states,  # [·, B, J, P, D] accumulation, as listed above, or None
    scalars,  # [·, B, J] accumulation, as described above, or None
    attn_weight,  # [J, J] accumulation, of attention
    attn_bias,  # [J] accumulation, of attention, or None
    prior,  # [N, J] accumulation, of agreement, or None
    logits,  # [B, N, J] storage, of agreement, over_inputs and adjoint; [N, J] if same_logits; or None
    input_weight,  # [B, N] storage or accumulation, of the same, attention and EM routing, or None
    shares,  # [·, B, N] accumulation, of EM routing, or None
    means,  # [·, B, N] accumulation, of em_adjoint and of em in emit; None if shares are
    partial,  # [runs, B, J, row] accumulation; row: P·D; for over_inputs P·D, 1 and 1; for EM routing P·D, P·D and 1
    B, N, run,
    K: tl.constexpr, J: tl.constexpr, D: tl.constexpr, P: tl.constexpr, shared: tl.constexpr, one_vote: tl.constexpr,
    same_logits: tl.constexpr,
    NB: tl.constexpr, BB: tl.constexpr, JP: tl.constexpr, DP: tl.constexpr, PP: tl.constexpr, A: tl.constexpr,
    routing: tl.constexpr, leaky: tl.constexpr,
):  # fmt: skip
    # Tiles of the batch run side by side, because they read the same matrices.
    tiles = tl.cdiv(B, BB)
    program = (tl.program_id(0) // tiles).to(tl.int64)
    first = program * run
    end = tl.minimum(first + run, N)
    b = (tl.program_id(0) % tiles).to(tl.int64) * BB + axis(BB, 1)
    j, p, d = axis(JP, 2), axis(PP, 3), axis(DP, 4)
    em: tl.constexpr = routing == "em" or routing == "em_adjoint"
    total = tl.zeros([NB, BB, JP, PP, DP], A)
    if routing == "agreement" or routing == "adjoint" or routing == "over_inputs":
        x = state(states, 0, b, j, p, d, B, J, D, P)
    if routing == "adjoint":
        y = state(states, 1, b, j, p, d, B, J, D, P)
    if em:
        shift = state(states, 2 if routing == "em" else 0, b, j, p, d, B, J, D, P)
        squares = tl.zeros([NB, BB, JP, PP, DP], A)
    if em or routing == "over_inputs":
        mass = tl.zeros([NB, BB, JP, 1, 1], A)
    if routing == "over_inputs":
        largest = tl.full([NB, BB, JP, 1, 1], float("-inf"), A)
    for start in range(first, end, NB):
        i = start + axis(NB, 0)
        valid = present(mask, i, b, end, B, N, mask is not None)
        v = make_votes(u, weight, i, b, j, p, d, valid, end, N, K, J, D, P, shared, one_vote, A)
        if input_weight is not None:
            a = tl.load(input_weight + b * N + i, mask=valid, other=0.0).to(A)
        if routing == "sum":
            total += v
        elif routing == "agreement":
            c = softmax(agreement(v, x, logits, i, b, j, valid, N, J, same_logits), j < J, leaky, logits is not None)
            if prior is not None:
                c += from_prior(prior, i, j, end, J)
            if input_weight is not None:
                c *= a
            total += c * v
        elif routing == "over_inputs":
            z = agreement(v, x, logits, i, b, j, valid, N, J, same_logits)
            z = tl.where(valid & (j < J), z, float("-inf"))
            largest, mass, e, kept = online_softmax(z, largest, mass)
            if input_weight is not None:
                e *= a
            total = total * kept + e * v
        elif routing == "adjoint":
            z = agreement(v, x, logits, i, b, j, valid, N, J, same_logits)
            c = coupling(z, scalars, 0, b, j, valid, B, J, leaky, logits is not None)
            e = over_components(v * y)
            if input_weight is not None:
                e *= a
            total += coupling_backward(c, e, scalars, 1, b, j, B, J) * v
        elif routing == "attention":
            c = attention(v, attn_weight, attn_bias, j, J, attn_bias is not None)
            if input_weight is not None:
                c *= a
            total += c * v
        else:
            before, width = state(states, 0, b, j, p, d, B, J, D, P), state(states, 1, b, j, p, d, B, J, D, P)
            z = gaussian_logits(v, before, width, scalar(scalars, 0, b, j, B, J))
            w = responsibilities(z, shares, 0, i, b, j, valid, B, N, J)
            if routing == "em_adjoint":
                _, _, mean, linear, quadratic = em_states(states, 0, b, j, p, d, B, J, D, P)
                e = gaussian_adjoint(v, mean, linear, quadratic, scalar(scalars, 1, b, j, B, J))
                w = responsibilities_backward(w, e, means, 0, i, b, valid, B, N)
            w *= a
            x = v - shift
            mass += w
            total += w * x
            squares += w * x * x
    if routing == "over_inputs":
        # Each row of the tile has a maximum of its own.
        m = tl.max(largest, 0, keep_dims=True)
        kept = tl.exp(largest - finite(m))
        total *= kept
        mass *= kept
    row: tl.constexpr = 2 * P * D + 1 if em else P * D + 2 if routing == "over_inputs" else P * D
    to = partial + ((program * B + b) * J + j) * row
    exists = (b < B) & (j < J)
    tl.store(to + p * D + d, tl.sum(total, 0, keep_dims=True), mask=exists & (p < P) & (d < D))
    if em:
        tl.store(to + P * D + p * D + d, tl.sum(squares, 0, keep_dims=True), mask=exists & (p < P) & (d < D))
        tl.store(to + 2 * P * D, tl.sum(mass, 0, keep_dims=True), mask=exists)
    if routing == "over_inputs":
        tl.store(to + P * D, tl.sum(mass, 0, keep_dims=True), mask=exists)
        tl.store(to + P * D + 1, m, mask=exists)


@triton.jit
def pair_sums_kernel(
    u, weight, mask, states, scalars,  # as in reduce_kernel, of em_adjoint; of the first two states without means
    largest,  # [B, N] accumulation: the largest logit; −∞ where there is no capsule
    sums,  # [B, N] accumulation: Σ_j exp(logit − largest)
    means,  # [B, N] accumulation: Σ_j softmax_j(logit) e_j; or None
    B, N, run,
    K: tl.constexpr, J: tl.constexpr, D: tl.constexpr, P: tl.constexpr, shared: tl.constexpr, one_vote: tl.constexpr,
    NB: tl.constexpr, BB: tl.constexpr, JP: tl.constexpr, DP: tl.constexpr, PP: tl.constexpr, A: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(B, BB)
    first = (tl.program_id(0) // tiles).to(tl.int64) * run
    end = tl.minimum(first + run, N)
    b = (tl.program_id(0) % tiles).to(tl.int64) * BB + axis(BB, 1)
    j, p, d = axis(JP, 2), axis(PP, 3), axis(DP, 4)
    for start in range(first, end, NB):
        i = start + axis(NB, 0)
        valid = present(mask, i, b, end, B, N, mask is not None)
        v = make_votes(u, weight, i, b, j, p, d, valid, end, N, K, J, D, P, shared, one_vote, A)
        before, width = state(states, 0, b, j, p, d, B, J, D, P), state(states, 1, b, j, p, d, B, J, D, P)
        z = gaussian_logits(v, before, width, scalar(scalars, 0, b, j, B, J))
        z = tl.where(j < J, z, float("-inf"))
        most = tl.max(z, 2, keep_dims=True)
        share = tl.exp(z - most)
        total = over_capsules(share)
        exists = (i < end) & (b < B)
        tl.store(largest + b * N + i, tl.where(valid, most, float("-inf")), mask=exists)
        tl.store(sums + b * N + i, total, mask=exists)
        if means is not None:
            _, _, mean, linear, quadratic = em_states(states, 0, b, j, p, d, B, J, D, P)
            e = gaussian_adjoint(v, mean, linear, quadratic, scalar(scalars, 1, b, j, B, J))
            tl.store(means + b * N + i, tl.where(valid, over_capsules(share * e) / total, 0.0), mask=exists)


@triton.jit
def plus(to, x, inside):
    """*to + x."""
    # Several threads may hold the same number, and one of them stores it: no thread may load after that store.
    tl.debug_barrier()
    x += tl.load(to, mask=inside, other=0.0).to(x.dtype)
    tl.debug_barrier()
    return x


@triton.jit
def add_to(to, x, inside, again):
    """*to = x; *to += x if this program has written there before."""
    tl.debug_barrier()
    if again:
        x += tl.load(to, mask=inside, other=0.0)
    tl.debug_barrier()
    tl.store(to, x, mask=inside)
    return x


@triton.jit
def agreement_gradient(
    v, states, scalars, prior, logits, a, i, b, j, p, d, valid, end, B, N, iterations,
    J: tl.constexpr, D: tl.constexpr, P: tl.constexpr,
    leaky: tl.constexpr, detach: tl.constexpr, has_addend: tl.constexpr, same_logits: tl.constexpr,
    to_logits: tl.constexpr, to_weight: tl.constexpr,
):  # fmt: skip
    """g_û = Σ_t [w c^t g^t + δ^t x^t]; if to_logits also Σ_t δ^t, and if to_weight Σ_t Σ_j c^t e^t, e^t = û · g^t.

    a is the weight w of the input capsules, or None. A prior belongs to c, but δ is without it.
    """
    g = tl.zeros_like(v)
    g_z = tl.zeros([v.shape[0], v.shape[1], v.shape[2], 1, 1], v.dtype)
    g_a = tl.zeros([v.shape[0], v.shape[1], 1, 1, 1], v.dtype)
    if has_addend:
        g += state(states, 2 * iterations, b, j, p, d, B, J, D, P)
    for t in range(iterations):
        x, g_t = state(states, t, b, j, p, d, B, J, D, P), state(states, iterations + t, b, j, p, d, B, J, D, P)
        z = agreement(v, x, logits, i, b, j, valid, N, J, same_logits)
        c = coupling(z, scalars, t, b, j, valid, B, J, leaky, logits is not None)
        e = over_components(v * g_t)
        added = c
        if prior is not None:
            added += from_prior(prior, i, j, end, J)
        if to_weight:
            g_a += over_capsules(added * e)
        if a is not None:
            e *= a
            added *= a
        if not detach:
            delta = coupling_backward(c, e, scalars, iterations + t, b, j, B, J)
            g += delta * x
            if to_logits:
                g_z += delta
        g += added * g_t
    return g, g_z, g_a


@triton.jit
def em_gradient(
    v, states, scalars, shares, means, a, i, b, j, p, d, valid, B, N, iterations,
    J: tl.constexpr, D: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """g_û = Σ_t [w^t (linear^t + 2 quadratic^t (û − μ^t)) − δ^t (û − μ^{t−1})/σ²^{t−1}] and Σ_t Σ_j r^t e^t."""
    g = tl.zeros_like(v)
    g_a = tl.zeros_like(a)
    for t in range(iterations):
        before, width, mean, linear, quadratic = em_states(states, 5 * t, b, j, p, d, B, J, D, P)
        z = gaussian_logits(v, before, width, scalar(scalars, 2 * t, b, j, B, J))
        r = responsibilities(z, shares, t, i, b, j, valid, B, N, J)
        e = gaussian_adjoint(v, mean, linear, quadratic, scalar(scalars, 2 * t + 1, b, j, B, J))
        delta = responsibilities_backward(r, e, means, t, i, b, valid, B, N)
        g += a * (r * (linear + 2 * quadratic * (v - mean)) + 2 * delta * width * (v - before))
        g_a += over_capsules(r * e)
    return g, g_a


@triton.jit
def em_states(states, n, b, j, p, d, B, J: tl.constexpr, D: tl.constexpr, P: tl.constexpr):
    """For the gradient of EM routing: mean and quadratic of the E-step, mean, linear and quadratic of the M-step."""
    return (
        state(states, n, b, j, p, d, B, J, D, P),
        state(states, n + 1, b, j, p, d, B, J, D, P),
        state(states, n + 2, b, j, p, d, B, J, D, P),
        state(states, n + 3, b, j, p, d, B, J, D, P),
        state(states, n + 4, b, j, p, d, B, J, D, P),
    )


@triton.jit
def write(to, x, inside, more: tl.constexpr):
    """*to = x; *to += x if more."""
    if more:
        x = plus(to, x, inside)
    tl.store(to, x.to(to.dtype.element_ty), mask=inside)


@triton.jit
def write_g_u(
    g, g_u, weight, i, b, j, p, d, end, B, N,
    K: tl.constexpr, J: tl.constexpr, D: tl.constexpr, P: tl.constexpr, shared: tl.constexpr, one_vote: tl.constexpr,
    A: tl.constexpr, more: tl.constexpr,
):  # fmt: skip
    """g_u,bi = g_û,bi W_iᵀ, or g_û,bi without W."""
    if weight is None:
        to, inside = given_vote(g_u, i, b, j, p, d, (i < end) & (b < B), N, J, D, P, one_vote)
        if one_vote:
            g = over_capsules(g)
        write(to, g, inside, more)
    else:
        inside = (i < end) & (b < B) & (p < P)
        for k in tl.range(0, K, loop_unroll_factor=4):
            own = over_capsules(tl.sum(g * matrix(weight, i, j, d, k, end, K, J, D, shared, A), 4, keep_dims=True))
            write(g_u + ((b * N + i) * P + p) * K + k, own, inside, more)


@triton.jit
def write_g_weight(
    g, u, g_weight, sums, n, i, b, j, p, d, valid, end, program, N, again, last,
    K: tl.constexpr, J: tl.constexpr, D: tl.constexpr, P: tl.constexpr, NB: tl.constexpr, shared: tl.constexpr,
    A: tl.constexpr, more: tl.constexpr,
):  # fmt: skip
    """g_W,i = Σ_b u_biᵀ g_û,bi over a tile of the batch; n: the number of the input capsule, 0 … NB − 1."""
    for k in tl.range(0, K, loop_unroll_factor=4):
        own = capsule(u, i, b, p, k, valid, N, K, P, A) * g
        own = tl.sum(tl.sum(own, 3, keep_dims=True), 1, keep_dims=True)
        if shared:
            own = tl.sum(own, 0, keep_dims=True)
            add_to(sums + ((program * K + k) * J + j) * D + d, own, (j < J) & (d < D), again)
        else:
            inside = (i < end) & (j < J) & (d < D)
            if sums is not None:
                own = add_to(sums + (((program * NB + n) * K + k) * J + j) * D + d, own, inside, again)
            write(g_weight + ((i * K + k) * J + j) * D + d, own, inside & last, more)


@triton.jit
def emit_kernel(
    # As in reduce_kernel.
    u, weight, mask, states, scalars, attn_weight, attn_bias, prior, logits, input_weight, shares, means,
    g_votes,  # [B, N, J, D] storage, for affine votes
    g_u,  # as u, or None
    g_weight,  # as weight, or None; not written if shared
    sums,  # [programs, NB or 1, K, J, D] accumulation: the g_W of a program; None if it writes g_weight directly
    g_attn_weight,  # [programs, J, J] accumulation, or None
    g_attn_bias,  # [programs, J] accumulation, or None
    g_prior,  # [N, J] accumulation, or None
    g_logits,  # [B, N, J] storage, or None
    g_input_weight,  # [B, N] storage or accumulation, or None
    B, N, run, iterations,
    K: tl.constexpr, J: tl.constexpr, D: tl.constexpr, P: tl.constexpr, shared: tl.constexpr, one_vote: tl.constexpr,
    same_logits: tl.constexpr,
    NB: tl.constexpr, BB: tl.constexpr, JP: tl.constexpr, DP: tl.constexpr, PP: tl.constexpr, A: tl.constexpr,
    routing: tl.constexpr, leaky: tl.constexpr, detach: tl.constexpr, has_addend: tl.constexpr,
    more: tl.constexpr,  # add to g_u, g_weight, g_logits and g_input_weight
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    begin = program * run
    end = tl.minimum(begin + run, N)
    j, p, d = axis(JP, 2), axis(PP, 3), axis(DP, 4)
    if routing == "attention":
        # Sums over all pairs; g_A,kj [1, 1, JP, 1, JP] has k along the output capsules and j along the last axis.
        params = tl.zeros([1, 1, JP, 1, JP], A)
        biases = tl.zeros([1, 1, JP, 1, 1], A)
    for start in range(begin, end, NB):
        i = start + axis(NB, 0)
        for first in range(0, B, BB):
            b = first + axis(BB, 1)
            valid = present(mask, i, b, end, B, N, mask is not None)
            pair = b * N + i
            if routing == "stored":
                inside = valid & (j < J) & (d < D) & (p < P)
                g = tl.load(g_votes + (pair * J + j) * D + d, mask=inside, other=0.0).to(A)
            else:
                v = make_votes(u, weight, i, b, j, p, d, valid, end, N, K, J, D, P, shared, one_vote, A)
            a = None
            if input_weight is not None:
                a = tl.load(input_weight + pair, mask=valid, other=0.0).to(A)
            if routing == "agreement":
                g, g_z, g_a = agreement_gradient(
                    v, states, scalars, prior, logits, a, i, b, j, p, d, valid, end, B, N, iterations,
                    J, D, P, leaky, detach, has_addend, same_logits, g_logits is not None, g_input_weight is not None,
                )  # fmt: skip
                if g_logits is not None:
                    exists = (i < end) & (b < B) & (j < J)
                    write(g_logits + pair * J + j, tl.where(valid, g_z, 0.0), exists, more)
                if g_prior is not None:
                    e = over_components(v * state(states, iterations, b, j, p, d, B, J, D, P))
                    if input_weight is not None:
                        e *= a
                    e = tl.sum(tl.where(valid, e, 0.0), 1, keep_dims=True)
                    add_to(g_prior + i * J + j, e, (i < end) & (j < J), first > 0)
            elif routing == "em":
                g, g_a = em_gradient(
                    v, states, scalars, shares, means, a, i, b, j, p, d, valid, B, N, iterations, J, D, P
                )
            elif routing == "attention":
                g_s = state(states, 0, b, j, p, d, B, J, D, P)
                g, dz, g_a = attention_gradient(
                    v, g_s, attn_weight, attn_bias, a, j, valid, J, attn_bias is not None, g_input_weight is not None
                )
                if g_attn_weight is not None:
                    for k in range(J):
                        column = over_components(dz * over_capsules(tl.where(j == k, v, 0.0)))
                        column = tl.sum(tl.sum(column, 0, keep_dims=True), 1, keep_dims=True)
                        params += tl.where(axis(JP, 4) == k, column, 0.0)
                if g_attn_bias is not None:
                    biases += tl.sum(tl.sum(over_components(dz), 0, keep_dims=True), 1, keep_dims=True)
            if g_input_weight is not None:
                write(g_input_weight + pair, tl.where(valid, g_a, 0.0), (i < end) & (b < B), more)
            g = tl.where(valid, g, 0.0)
            if g_u is not None:
                write_g_u(g, g_u, weight, i, b, j, p, d, end, B, N, K, J, D, P, shared, one_vote, A, more)
            if g_weight is not None:
                again = (first > 0) | (start > begin) if shared else first > 0
                write_g_weight(
                    g, u, g_weight, sums, axis(NB, 0), i, b, j, p, d, valid, end, program, N, again, first + BB >= B,
                    K, J, D, P, NB, shared, A, more,
                )  # fmt: skip
    if routing == "attention":
        m = axis(JP, 4)
        if g_attn_weight is not None:
            tl.store(g_attn_weight + (program * J + j) * J + m, params, mask=(j < J) & (m < J))
        if g_attn_bias is not None:
            tl.store(g_attn_bias + program * J + j, biases, mask=j < J)
