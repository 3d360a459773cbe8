"""The training losses, all with the same class weights.

CardioCaps has a weighted margin loss, a reconstruction loss and an auxiliary regression loss (eq. 1 and 2 of the
paper). The networks that it is compared with have spread loss or cross-entropy.

A loss is a module that is called with (scores, labels, reconstruction, image, prediction, target); the last four are
optional. It returns a dict of scalars, in which "loss" is minimised; its attribute `parts` names all of them. The loss
of a sample is multiplied by the weight of its class; the weights do not divide the mean.

Inputs are converted to float32, because the squares of small margins underflow in half precision. Autocast does not
lower any operation used here. No function reads a value from a GPU, which would stall the training step, so values (a
label out of range, an infinite target) are checked on CPU tensors only.
"""

from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

ClassWeight = Literal["balanced", "proportion", "none"]


def margin_loss(
    lengths: Tensor,
    labels: Tensor,
    *,
    m_plus: float = 0.9,
    m_minus: float = 0.1,
    lam: float = 0.5,
    class_weight: Tensor | None = None,
) -> Tensor:
    """Margin loss: the sum over classes of eq. 1, weighted by the class of the sample (eq. 2), averaged over the batch.

    Source: Sabour et al. 2017, eq. 4; CardioCaps, eq. 1 and 2.

    Args:
        lengths: floating [B, J], lengths of the class capsules.
        labels: int64 [B] in 0 … J-1.
        m_plus: length from which a capsule of the true class has no loss.
        m_minus: length up to which another capsule has no loss.
        lam: weight of the other classes.
        class_weight: [J], or None for ones.

    Returns:
        A scalar of float32 (float64 for float64).

    Raises:
        ValueError: a wrong shape or type; for CPU tensors also a label out of range. (On a GPU such a label triggers an
            assertion of the device.)
    """
    _check_scores("lengths", lengths, labels, class_weight)
    lengths = _at_least_float32(lengths)
    present = torch.zeros_like(lengths).scatter(1, labels[:, None], 1.0)
    too_short = (m_plus - lengths).clamp(min=0).square()
    too_long = (lengths - m_minus).clamp(min=0).square()
    loss = (present * too_short + lam * (1 - present) * too_long).sum(dim=1)
    return _weighted_mean(loss, labels, class_weight)


def spread_loss(
    activations: Tensor, labels: Tensor, *, margin: float = 0.9, class_weight: Tensor | None = None
) -> Tensor:
    """Spread loss: Σ_{i≠t} max(0, margin − (a_t − a_i))² with t the class of the sample, averaged over the batch.

    Source: Hinton et al. 2018, eq. 3. `activations` is floating [B, J]; all else as in `margin_loss`.
    """
    _check_scores("activations", activations, labels, class_weight)
    activations = _at_least_float32(activations)
    too_close = (margin - (activations.gather(1, labels[:, None]) - activations)).clamp(min=0).square()
    others = torch.ones_like(activations).scatter(1, labels[:, None], 0.0)
    return _weighted_mean((too_close * others).sum(dim=1), labels, class_weight)


def cross_entropy_loss(logits: Tensor, labels: Tensor, *, class_weight: Tensor | None = None) -> Tensor:
    """Cross-entropy averaged over the batch.

    `logits` is floating [B, J]; all else as in `margin_loss`. (`torch.nn.functional.cross_entropy` with `weight`
    divides by the weights of the batch, so a batch of only one class would weigh as much as one of the other class.)
    """
    _check_scores("logits", logits, labels, class_weight)
    loss = nn.functional.cross_entropy(_at_least_float32(logits), labels, reduction="none")
    return _weighted_mean(loss, labels, class_weight)


def class_weights(counts: Tensor, mode: ClassWeight = "balanced") -> Tensor:
    """Weight of each class, float32 [J], from its number of training samples `counts` [J].

    Args:
        counts: [J].
        mode: "balanced": n / (J n_c), so that every class has the same total weight; "proportion": n_c / n, eq. 2 as it
            is printed, which favours the larger class; "none": ones.

    Raises:
        ValueError: counts that are not finite, negative or all zero; a class without a sample if "balanced".
    """
    if mode not in get_args(ClassWeight):
        raise ValueError(f"mode is {mode!r}; expected one of {', '.join(get_args(ClassWeight))}")
    if counts.ndim != 1 or counts.numel() == 0:
        raise ValueError(f"counts is {_describe(counts)}; expected a non-empty [J] tensor")
    count = counts.double()
    if not bool((count.isfinite() & (count >= 0)).all()) or float(count.sum()) == 0:
        raise ValueError(f"counts is {counts.tolist()}; expected finite, not negative and not all zero")
    if mode == "none":
        weight = torch.ones_like(count)
    elif mode == "proportion":
        weight = count / count.sum()
    elif bool((count == 0).any()):
        raise ValueError(f"counts is {counts.tolist()}; expected a sample of every class for balanced weights")
    else:
        weight = count.sum() / (count.numel() * count)
    return weight.float()


def reconstruction_loss(reconstruction: Tensor, image: Tensor, *, weight: float = 0.0005) -> Tensor:
    """`weight` times the squared error summed over an image (C·H·W·MSE), averaged over the batch.

    Source: Sabour et al. 2017, section 4.1. Both tensors are floating [B, C, H, W]. Raises ValueError for shapes that
    differ.
    """
    if image.ndim != 4 or image.numel() == 0:
        raise ValueError(f"image is {_describe(image)}; expected a non-empty [B, C, H, W] tensor")
    if reconstruction.shape != image.shape:
        raise ValueError(f"reconstruction is {_describe(reconstruction)}; expected image's shape {list(image.shape)}")
    error = _at_least_float32(reconstruction) - _at_least_float32(image)
    return weight * image[0].numel() * error.square().mean()


def regression_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over the samples with a target (eq. 2).

    Args:
        prediction: floating [B], in the target's unit.
        target: floating [B]; NaN marks a sample without a target.

    Returns:
        A scalar. If all targets are missing it is zero, and still part of the graph.

    Raises:
        ValueError: another shape ([B, 1] would broadcast to [B, B]); for CPU tensors also an infinite target.
    """
    if prediction.ndim != 1 or prediction.numel() == 0:
        raise ValueError(f"prediction is {_describe(prediction)}; expected a non-empty [B] tensor")
    if target.shape != prediction.shape or not target.is_floating_point():
        raise ValueError(f"target is {_describe(target)}; expected a floating [B] = [{len(prediction)}] tensor")
    if target.device.type == "cpu" and bool(target.isinf().any()):
        raise ValueError("target is infinite; expected finite, or NaN where missing")
    prediction, target = _at_least_float32(prediction), _at_least_float32(target)
    measured = ~target.isnan()
    error = torch.where(measured, prediction - target, 0.0)
    return error.square().sum() / measured.sum().clamp(min=1)


class _ClassWeighted(nn.Module):
    """Base class with the persistent buffer `class_weight` [J], as `class_weights` returns it; None: two ones."""

    class_weight: Tensor

    def __init__(self, class_weight: Tensor | None = None) -> None:
        super().__init__()
        if class_weight is None:
            class_weight = torch.ones(2)
        if class_weight.ndim != 1 or not bool((class_weight.isfinite() & (class_weight >= 0)).all()):
            raise ValueError(f"class_weight is {class_weight.tolist()}; expected a finite, non-negative [J] tensor")
        self.register_buffer("class_weight", class_weight.detach().clone().float())


class CardioCapsLoss(_ClassWeighted):
    """The loss of CardioCaps: margin · class weight + reconstruction + λ_reg · regression (eq. 2)."""

    parts: ClassVar[tuple[str, ...]] = ("loss", "margin", "reconstruction", "regression")

    def __init__(
        self,
        class_weight: Tensor | None = None,
        *,
        reconstruction_weight: float = 0.0005,
        regression_weight: float = 0.05,
        m_plus: float = 0.9,
        m_minus: float = 0.1,
        lam: float = 0.5,
    ) -> None:
        super().__init__(class_weight)
        self.reconstruction_weight = reconstruction_weight
        self.regression_weight = regression_weight
        self.m_plus, self.m_minus, self.lam = m_plus, m_minus, lam

    def forward(
        self,
        scores: Tensor,
        labels: Tensor,
        reconstruction: Tensor | None = None,
        image: Tensor | None = None,
        prediction: Tensor | None = None,
        target: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Compute the loss.

        Arguments and errors are those of `margin_loss` (`scores` are its `lengths`), `reconstruction_loss` and
        `regression_loss`. The part of a pair that is None is zero.

        Returns:
            Scalars "loss" (the total), "margin", "reconstruction" (with its weight) and "regression" (without λ_reg).
        """
        if (reconstruction is None) != (image is None):
            raise ValueError("reconstruction, image: one is given; expected both or neither")
        if (prediction is None) != (target is None):
            raise ValueError("prediction, target: one is given; expected both or neither")
        margin = margin_loss(
            scores,
            labels,
            m_plus=self.m_plus,
            m_minus=self.m_minus,
            lam=self.lam,
            class_weight=self.class_weight,
        )
        parts = {
            "margin": margin,
            "reconstruction": torch.zeros_like(margin),
            "regression": torch.zeros_like(margin),
        }
        if reconstruction is not None and image is not None:
            parts["reconstruction"] = reconstruction_loss(reconstruction, image, weight=self.reconstruction_weight)
        if prediction is not None and target is not None:
            parts["regression"] = regression_loss(prediction, target)
        total = margin + parts["reconstruction"] + self.regression_weight * parts["regression"]
        return {"loss": total, **parts}


class SpreadLoss(_ClassWeighted):
    """Spread loss of activations (`spread_loss`) with a margin that grows in training (Hinton et al. 2018).

    The margin grows in equal steps from 0.2 in the first epoch to 0.9 after half of the epochs; see `begin_epoch`. In
    evaluation mode it is 0.9, so that the validation losses of all epochs are comparable. Reconstruction and regression
    are ignored.
    """

    parts: ClassVar[tuple[str, ...]] = ("loss",)
    first_margin: ClassVar[float] = 0.2
    last_margin: ClassVar[float] = 0.9

    def __init__(self, class_weight: Tensor | None = None) -> None:
        super().__init__(class_weight)
        self._training_margin = self.first_margin

    @property
    def margin(self) -> float:
        """The current margin."""
        return self._training_margin if self.training else self.last_margin

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Set the margin for training in `epoch`, in 0 … epochs − 1. Raises ValueError for another one."""
        if not 0 <= epoch < epochs:
            raise ValueError(f"epoch is {epoch}; expected 0 … {epochs - 1}")
        grown = min(1.0, 2 * epoch / epochs)
        self._training_margin = self.first_margin + grown * (self.last_margin - self.first_margin)

    def forward(self, scores: Tensor, labels: Tensor, *_: Tensor | None) -> dict[str, Tensor]:
        """The scalar `loss`. Shapes and errors as in `spread_loss`."""
        return {"loss": spread_loss(scores, labels, margin=self.margin, class_weight=self.class_weight)}


class CrossEntropyLoss(_ClassWeighted):
    """Cross-entropy of logits (`cross_entropy_loss`). Reconstruction and regression are ignored."""

    parts: ClassVar[tuple[str, ...]] = ("loss",)

    def forward(self, scores: Tensor, labels: Tensor, *_: Tensor | None) -> dict[str, Tensor]:
        """The scalar `loss`. Shapes and errors as in `cross_entropy_loss`."""
        return {"loss": cross_entropy_loss(scores, labels, class_weight=self.class_weight)}


def _check_scores(name: str, scores: Tensor, labels: Tensor, class_weight: Tensor | None) -> None:
    if scores.ndim != 2 or scores.numel() == 0 or not scores.is_floating_point():
        raise ValueError(f"{name} is {_describe(scores)}; expected a non-empty floating [B, J] tensor")
    batch, classes = scores.shape
    if labels.shape != (batch,) or labels.dtype != torch.int64:
        raise ValueError(f"labels is {_describe(labels)}; expected an int64 [B] = [{batch}] tensor")
    if labels.device.type == "cpu" and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        worst = int(labels.min()) if int(labels.min()) < 0 else int(labels.max())
        raise ValueError(f"labels is {worst}; expected labels in 0 … {classes - 1}")
    if class_weight is not None and class_weight.shape != (classes,):
        raise ValueError(f"class_weight is {_describe(class_weight)}; expected [J] = [{classes}]")


def _weighted_mean(loss: Tensor, labels: Tensor, class_weight: Tensor | None) -> Tensor:
    """Mean of the losses [B] of the samples, weighted by class."""
    if class_weight is not None:
        loss = loss * class_weight.to(loss.dtype)[labels]
    return loss.mean()


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _describe(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
