"""squash, primary capsules and votes on Triton: each program takes a block of rows."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def squash_factors(n, sabour: tl.constexpr):
    """The factors of v = f(n) s and of g_s = f g_v + radial (ŝ·g_v) ŝ, as in csrc/math/squash.h."""
    if sabour:
        inverse = 1 / n
        scale = 1 / (inverse + n)
        ratio = tl.where(n > 1, (inverse - n) / (inverse + n), (1 - n * n) / (1 + n * n))
        return scale, scale * ratio
    # A series where n is small: the closed forms lose digits there, by cancellation.
    short = tl.minimum(n, 1.0)
    term = tl.full(n.shape, 1.0, n.dtype)
    near = term
    near_radial = tl.zeros_like(n)
    for m in tl.static_range(1, 19):
        term *= -short / (m + 1)  # (−n)^m / (m + 1)!
        near += term
        near_radial += m * term
    e = tl.exp(-n)
    far = (1 - e) / n
    return tl.where(n < 1, near, far), tl.where(n < 1, near_radial, e - far)


@triton.jit
def blocked_sum(x):
    """The sum along the last axis, which is kept. In blocks of 32, because a thread adds its own numbers one by one."""
    rows: tl.constexpr = x.shape[0]
    for _ in tl.static_range(4):
        if x.shape[1] > 32:
            x = tl.sum(tl.reshape(x, [rows, x.shape[1] // 32, 32]), 2)
    return tl.sum(x, 1, keep_dims=True)


@triton.jit
def length(s):
    """shrink, and the length of s · shrink along the last axis, which is kept; as in csrc/math/squash.h."""
    double: tl.constexpr = s.dtype == tl.float64
    huge: tl.constexpr = 2.0**500 if double else 2.0**60
    small: tl.constexpr = 2.0**-496 if double else 2.0**-56
    largest = tl.max(tl.abs(s), 1, keep_dims=True)
    ordinary = (largest > 0) & (largest < float("inf"))
    ratio = s / tl.where(ordinary, largest, 1.0)
    shrink = tl.where(ordinary & (largest > huge), small, 1.0).to(s.dtype)
    n = largest * shrink * tl.sqrt(blocked_sum(ratio * ratio))
    # The sum keeps a NaN, which the maximum may lose.
    return tl.where(ordinary, n, tl.sum(tl.abs(s), 1, keep_dims=True)), shrink


@triton.jit
def shrunk_factors(n, shrink, sabour: tl.constexpr):
    """squash_factors for s · shrink; a vector that has to be shrunk is so long that both formulas give the length 1."""
    scale, radial = squash_factors(n, sabour)
    return tl.where(shrink < 1, 1 / n, scale), tl.where(shrink < 1, -1 / n, radial)


@triton.jit
def squashed(s, sabour: tl.constexpr):
    n, shrink = length(s)
    scale, _ = shrunk_factors(n, shrink, sabour)
    return scale * (s * shrink)


@triton.jit
def squashed_backward(g_v, s, sabour: tl.constexpr):
    n, shrink = length(s)
    scale, radial = shrunk_factors(n, shrink, sabour)
    direction = s * shrink / tl.where(n == 0, 1.0, n)
    return (scale * g_v + radial * blocked_sum(direction * g_v) * direction) * shrink


@triton.jit
def squash_kernel(
    s, v, rows, dim: tl.constexpr, RB: tl.constexpr, DP: tl.constexpr, A: tl.constexpr, sabour: tl.constexpr
):
    r = tl.program_id(0).to(tl.int64) * RB + tl.arange(0, RB)[:, None]
    d = tl.arange(0, DP)[None, :]
    inside = (r < rows) & (d < dim)
    x = tl.load(s + r * dim + d, mask=inside, other=0.0).to(A)
    tl.store(v + r * dim + d, squashed(x, sabour).to(v.dtype.element_ty), mask=inside)


@triton.jit
def squash_backward_kernel(
    g_v, s, g_s, rows, dim: tl.constexpr, RB: tl.constexpr, DP: tl.constexpr, A: tl.constexpr, sabour: tl.constexpr
):
    r = tl.program_id(0).to(tl.int64) * RB + tl.arange(0, RB)[:, None]
    d = tl.arange(0, DP)[None, :]
    inside = (r < rows) & (d < dim)
    x = tl.load(s + r * dim + d, mask=inside, other=0.0).to(A)
    g = tl.load(g_v + r * dim + d, mask=inside, other=0.0).to(A)
    tl.store(g_s + r * dim + d, squashed_backward(g, x, sabour).to(g_s.dtype.element_ty), mask=inside)


@triton.jit
def primary_capsules_kernel(
    features,  # strided, storage
    u,  # [B, outer, inner, K] storage
    g_u,  # as u; None in the forward pass
    g_features,  # strided as features, storage, or None
    outer, inner, batch_stride, outer_stride, inner_stride, component_stride,
    K: tl.constexpr, CB: tl.constexpr, KP: tl.constexpr, A: tl.constexpr, sabour: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(inner, CB)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    capsule = tl.program_id(0).to(tl.int64) % blocks * CB + tl.arange(0, CB)[:, None]
    k = tl.arange(0, KP)[None, :]
    inside = (capsule < inner) & (k < K)
    strided = row // outer * batch_stride + row % outer * outer_stride + capsule * inner_stride + k * component_stride
    dense = (row * inner + capsule) * K + k
    x = tl.load(features + strided, mask=inside, other=0.0).to(A)
    if g_u is None:
        tl.store(u + dense, squashed(x, sabour).to(u.dtype.element_ty), mask=inside)
    else:
        g = tl.load(g_u + dense, mask=inside, other=0.0).to(A)
        tl.store(g_features + strided, squashed_backward(g, x, sabour).to(g_features.dtype.element_ty), mask=inside)


@triton.jit
def votes_kernel(u, weight, votes, N, JD, size, weight_stride, K: tl.constexpr, XB: tl.constexpr, A: tl.constexpr):
    x = tl.program_id(0).to(tl.int64) * XB + tl.arange(0, XB)
    pair, jd = x // JD, x % JD
    inside = x < size
    total = tl.zeros([XB], A)
    for k in range(K):
        a = tl.load(u + pair * K + k, mask=inside, other=0.0).to(A)
        total += a * tl.load(weight + pair % N * weight_stride + k * JD + jd, mask=inside, other=0.0).to(A)
    tl.store(votes + x, total.to(votes.dtype.element_ty), mask=inside)
