"""The couplings of each routing and their gradients, from tiles of votes: called by the loops in `stream.py`.

The mathematics is that of csrc/math. A tile of votes is [NB, BB, JP, PP, DP]: input capsules, batch items, output
capsules, rows of a matrix capsule (1 for vectors) and components, padded to powers of two. States of the output
capsules are [1, BB, JP, PP, DP]. The padding of votes and states is 0.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def over_components(x):
    """The sum over the components of a vote, [NB, BB, JP, 1, 1]."""
    return tl.sum(tl.sum(x, 4, keep_dims=True), 3, keep_dims=True)


@triton.jit
def over_capsules(x):
    """The sum over the output capsules."""
    return tl.sum(x, 2, keep_dims=True)


@triton.jit
def with_logits(agreement, logits):
    """b, an agreement and an initial logit; −∞, which removes a pair, whatever the agreement is."""
    return tl.where(logits == float("-inf"), float("-inf"), agreement + logits)


@triton.jit
def finite(largest):
    """A number to subtract from numbers whose maximum is given, before exp: 0 where all of them are −∞."""
    return tl.where(largest == float("-inf"), 0.0, largest)


@triton.jit
def softmax(z, is_capsule, leaky: tl.constexpr, some_removed: tl.constexpr):
    """c_j over the output capsules; leaky adds a logit that is always 0, whose share is dropped.

    some_removed: whether z may be −∞, where c is 0, even if all are.
    """
    z = tl.where(is_capsule, z, float("-inf"))
    largest = tl.max(z, 2, keep_dims=True)
    if leaky:
        largest = tl.maximum(largest, 0.0)
    if some_removed:
        largest = finite(largest)
    e = tl.exp(z - largest)
    total = over_capsules(e)
    if leaky:
        total += tl.exp(-largest)
    if some_removed:
        total = tl.where(total == 0.0, 1.0, total)
    return e / total


@triton.jit
def softmax_backward(c, e):
    """δ_j = c_j (e_j − Σ_k c_k e_k), the gradient of the logits; e is the gradient of the couplings."""
    return c * (e - over_capsules(c * e))


@triton.jit
def online_softmax(z, largest, mass):
    """A step of the softmax over the input capsules.

    largest and mass, Σ exp(z − largest), belong to the z so far.

    Returns:
        largest and mass with this z; exp(z − largest); the factor for other sums of exp(z − largest) so far.
    """
    larger = tl.maximum(largest, z)
    base = finite(larger)
    e, kept = tl.exp(z - base), tl.exp(largest - base)
    return larger, mass * kept + e, e, kept


@triton.jit
def mixed(matrix, x, j, J: tl.constexpr, row_stride: tl.constexpr, column_stride: tl.constexpr):
    """Σ_k matrix_jk x_k over the output capsules, for each component; matrix [J, J] is read with these strides."""
    out = tl.zeros_like(x)
    for k in range(J):
        own = over_capsules(tl.where(j == k, x, 0.0))
        out += tl.load(matrix + j * row_stride + k * column_stride, mask=j < J, other=0.0) * own
    return out


@triton.jit
def attention(v, attn_weight, attn_bias, j, J: tl.constexpr, has_bias: tl.constexpr):
    """c = softmax_k(Σ_j A_kj û_j + a_k), for each component separately (CardioCaps, eq. 4)."""
    z = mixed(attn_weight, v, j, J, J, 1)
    if has_bias:
        z += tl.load(attn_bias + j, mask=j < J, other=0.0)
    return softmax(z, j < J, False, False)


@triton.jit
def attention_gradient(
    v, g_s, attn_weight, attn_bias, a, j, valid,
    J: tl.constexpr, has_bias: tl.constexpr, to_weight: tl.constexpr,
):  # fmt: skip
    """g_û,j = w c_j g_s,j + Σ_k A_kj dz_k, and dz_k = w c_k (q_k − Σ_j c_j q_j) with q = g_s û.

    a is the weight w of the input capsules, or None. If to_weight also its gradient, Σ_jd c_j q_j.
    """
    c = tl.where(valid, attention(v, attn_weight, attn_bias, j, J, has_bias), 0.0)
    g_a = tl.zeros([v.shape[0], v.shape[1], 1, 1, 1], v.dtype)
    if to_weight:
        g_a += over_capsules(over_components(c * g_s * v))
    if a is not None:
        g_s *= a
    dz = softmax_backward(c, g_s * v)
    return c * g_s + mixed(attn_weight, dz, j, J, 1, J), dz, g_a


@triton.jit
def gaussian_logits(v, mean, quadratic, constant):
    """The logits of the E-step: constant + Σ_h quadratic_h (û − mean)² (Hinton et al. 2018)."""
    x = v - mean
    return constant + over_components(quadratic * x * x)


@triton.jit
def gaussian_adjoint(v, mean, linear, quadratic, constant):
    """e, the gradient of the weight of a vote in the M-step: constant + Σ_h (linear x + quadratic x²)."""
    x = v - mean
    return constant + over_components((linear + quadratic * x) * x)
