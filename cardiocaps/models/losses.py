"""The training losses, all with the same class weights.

CardioCaps has a weighted margin loss, a reconstruction loss and an auxiliary regression loss (eq. 1 and 2 of the
paper). The networks that it is compared with have spread loss or cross-entropy.

A loss is a module that is called with (scores, labels, reconstruction, image, prediction, target); the last four are
optional. It returns a dict of scalars, in which "loss" is minimised; its attribute `parts` names all of them. The loss
of a sample is multiplied by the weight of its class; the weights do not divide the mean. One mode differs: with class
weights "proportion" the margin loss weighs the term of each capsule, as the formula of eq. 2 has it.

Where a batch is computed in parts, `Shares` make the mean of the parts' losses that of the whole batch.

Inputs are converted to float32, because the squares of small margins underflow in half precision. Autocast does not
lower any operation used here. No function reads a value from a tensor, which on a GPU would stall the training step.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

ClassWeight = Literal["balanced", "proportion", "none"]
Weigh = Literal["sample", "capsule"]


@dataclass(frozen=True)
class Shares:
    """What the means over a part of a batch count, in a batch of p parts: p times the share that the part has of it.

    Attributes:
        samples: of the samples; scalar.
        measured: of the samples with a regression target; scalar.
    """

    samples: Tensor | float = 1.0
    measured: Tensor | float = 1.0


WHOLE = Shares()
"""The shares of a batch that is not divided."""


def margin_loss(
    lengths: Tensor,
    labels: Tensor,
    class_weight: Tensor | None = None,
    *,
    weigh: Weigh = "sample",
    mean_over_classes: bool = False,
) -> Tensor:
    """Margin loss: the sum over classes of eq. 1, weighted (eq. 2) and averaged over the batch.

    A capsule of the true class has no loss from length 0.9 on, another one up to length 0.1; the others weigh half.

    Source: Sabour et al. 2017, eq. 4; CardioCaps, eq. 1 and 2.

    Args:
        lengths: floating [B, J], lengths of the class capsules.
        labels: int64 [B] in 0 … J-1.
        class_weight: [J], or None for ones.
        weigh: "sample": the whole loss of a sample has the weight of its label; "capsule": the term of class k has
            weight k whatever the label, Σ_k p_k L_k, as eq. 2 is printed.
        mean_over_classes: average over the classes instead of the sum, as the published code does without weights.
            (The reconstruction then weighs J times as much in comparison.)

    Returns:
        A scalar of float32 (float64 for float64).
    """
    lengths = _at_least_float32(lengths)
    present = torch.zeros_like(lengths).scatter(1, labels[:, None], 1.0)
    too_short = (0.9 - lengths).clamp(min=0).square()
    too_long = (lengths - 0.1).clamp(min=0).square()
    terms = present * too_short + 0.5 * (1 - present) * too_long
    if weigh == "capsule" and class_weight is not None:
        terms = terms * class_weight.to(terms.dtype)
    loss = terms.mean(dim=1) if mean_over_classes else terms.sum(dim=1)
    return _weighted_mean(loss, labels, class_weight if weigh == "sample" else None)


def spread_loss(
    activations: Tensor, labels: Tensor, class_weight: Tensor | None = None, *, margin: float = 0.9
) -> Tensor:
    """Spread loss: Σ_{i≠t} max(0, margin − (a_t − a_i))² with t the class of the sample, averaged over the batch.

    Source: Hinton et al. 2018, eq. 3. `activations` is floating [B, J]; all else as in `margin_loss`.
    """
    activations = _at_least_float32(activations)
    too_close = (margin - (activations.gather(1, labels[:, None]) - activations)).clamp(min=0).square()
    others = torch.ones_like(activations).scatter(1, labels[:, None], 0.0)
    return _weighted_mean((too_close * others).sum(dim=1), labels, class_weight)


def cross_entropy_loss(
    logits: Tensor, labels: Tensor, class_weight: Tensor | None = None, *, divided: bool = False
) -> Tensor:
    """Cross-entropy averaged over the batch.

    `logits` is floating [B, J]; all else as in `margin_loss`.

    Args:
        divided: divide by the sum of the weights of the batch instead of its size, as the published code does. A batch
            of only one class then weighs as much as one of the other class.
    """
    logits = _at_least_float32(logits)
    if divided and class_weight is not None:
        return nn.functional.cross_entropy(logits, labels, class_weight.to(logits.dtype))
    return _weighted_mean(nn.functional.cross_entropy(logits, labels, reduction="none"), labels, class_weight)


def class_weights(counts: Tensor, mode: ClassWeight = "balanced") -> Tensor:
    """Weight of each class, float32 [J], from its number of training samples `counts` [J], none of them 0.

    Args:
        counts: [J].
        mode: "balanced": n / (J n_c), so that every class has the same total weight; "proportion": p_c = n_c / n of
            eq. 2, where it is the weight of a capsule (`weigh` of `margin_loss`) and favours the larger class; "none":
            ones.
    """
    count = counts.double()
    if mode == "none":
        weight = torch.ones_like(count)
    elif mode == "proportion":
        weight = count / count.sum()
    else:
        weight = count.sum() / (count.numel() * count)
    return weight.float()


def reconstruction_loss(reconstruction: Tensor, image: Tensor, *, weight: float = 0.0005) -> Tensor:
    """`weight` times the squared error summed over an image (C·H·W·MSE), averaged over the batch.

    Source: Sabour et al. 2017, section 4.1. Both tensors are floating [B, C, H, W].
    """
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
        ValueError: the shapes differ ([B, 1] and [B] would broadcast to [B, B]).
    """
    if prediction.shape != target.shape:
        raise ValueError(f"prediction is {list(prediction.shape)}; expected target's shape {list(target.shape)}")
    prediction, target = _at_least_float32(prediction), _at_least_float32(target)
    measured = ~target.isnan()
    error = torch.where(measured, prediction - target, 0.0)
    return error.square().sum() / measured.sum().clamp(min=1)


class _ClassWeighted(nn.Module):
    """Base class with the persistent buffer `class_weight` [J], as `class_weights` returns it; None: two ones."""

    parts: ClassVar[tuple[str, ...]] = ("loss",)
    class_weight: Tensor

    def __init__(self, class_weight: Tensor | None = None) -> None:
        super().__init__()
        weight = torch.ones(2) if class_weight is None else class_weight
        self.register_buffer("class_weight", weight.detach().clone().float())


class CardioCapsLoss(_ClassWeighted):
    """The loss of CardioCaps: margin · class weight + reconstruction + λ_reg · regression (eq. 2).

    `weigh` and `mean_over_classes` are those of `margin_loss`.
    """

    parts: ClassVar[tuple[str, ...]] = ("loss", "margin", "reconstruction", "regression")

    def __init__(
        self,
        class_weight: Tensor | None = None,
        *,
        reconstruction_weight: float = 0.0005,
        regression_weight: float = 0.05,
        weigh: Weigh = "sample",
        mean_over_classes: bool = False,
    ) -> None:
        super().__init__(class_weight)
        self.reconstruction_weight, self.regression_weight = reconstruction_weight, regression_weight
        self.weigh: Weigh = weigh
        self.mean_over_classes = mean_over_classes

    def forward(
        self,
        scores: Tensor,
        labels: Tensor,
        reconstruction: Tensor | None = None,
        image: Tensor | None = None,
        prediction: Tensor | None = None,
        target: Tensor | None = None,
        *,
        shares: Shares = WHOLE,
    ) -> dict[str, Tensor]:
        """Compute the loss.

        Arguments and errors are those of `margin_loss` (`scores` are its `lengths`), `reconstruction_loss` and
        `regression_loss`. The part of a pair that is None is zero. Every part is multiplied by its one of `shares`.

        Returns:
            Scalars "loss" (the total), "margin", "reconstruction" (with its weight) and "regression" (without λ_reg).
        """
        margin = shares.samples * margin_loss(
            scores, labels, self.class_weight, weigh=self.weigh, mean_over_classes=self.mean_over_classes
        )
        reconstructed = regressed = torch.zeros_like(margin)
        if reconstruction is not None and image is not None:
            reconstructed = shares.samples * reconstruction_loss(
                reconstruction, image, weight=self.reconstruction_weight
            )
        if prediction is not None and target is not None:
            regressed = shares.measured * regression_loss(prediction, target)
        total = margin + reconstructed + self.regression_weight * regressed
        return {"loss": total, "margin": margin, "reconstruction": reconstructed, "regression": regressed}


class TargetLoss(nn.Module):
    """The loss of a regression alone: that of CardioCaps (eq. 2) without its first part, and without labels."""

    parts: ClassVar[tuple[str, ...]] = ("loss", "reconstruction", "regression")

    def __init__(self, *, reconstruction_weight: float = 0.0005, regression_weight: float = 0.05) -> None:
        super().__init__()
        self.reconstruction_weight, self.regression_weight = reconstruction_weight, regression_weight

    def forward(
        self,
        scores: Tensor,
        labels: Tensor,
        reconstruction: Tensor,
        image: Tensor,
        prediction: Tensor,
        target: Tensor,
        *,
        shares: Shares = WHOLE,
    ) -> dict[str, Tensor]:
        """As `CardioCapsLoss`; scores and labels are ignored."""
        reconstructed = shares.samples * reconstruction_loss(reconstruction, image, weight=self.reconstruction_weight)
        regressed = shares.measured * regression_loss(prediction, target)
        total = reconstructed + self.regression_weight * regressed
        return {"loss": total, "reconstruction": reconstructed, "regression": regressed}


class SpreadLoss(_ClassWeighted):
    """Spread loss of activations (`spread_loss`) with a margin that grows in training (Hinton et al. 2018).

    The margin grows in equal steps from 0.2 in the first epoch to 0.9 after half of the epochs; see `begin_epoch`. In
    evaluation mode it is 0.9, so that the validation losses of all epochs are comparable. Reconstruction and regression
    are ignored.
    """

    _training_margin = 0.2

    @property
    def margin(self) -> float:
        """The current margin."""
        return self._training_margin if self.training else 0.9

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Set the margin for training in `epoch`, in 0 … epochs − 1."""
        self._training_margin = 0.2 + min(1.0, 2 * epoch / epochs) * (0.9 - 0.2)

    def forward(self, scores: Tensor, labels: Tensor, *_: Tensor | None, shares: Shares = WHOLE) -> dict[str, Tensor]:
        return {"loss": shares.samples * spread_loss(scores, labels, self.class_weight, margin=self.margin)}


class CrossEntropyLoss(_ClassWeighted):
    """Cross-entropy of logits (`cross_entropy_loss`, with its `divided`). Reconstruction and regression are ignored."""

    def __init__(self, class_weight: Tensor | None = None, *, divided: bool = False) -> None:
        super().__init__(class_weight)
        self.divided = divided

    def forward(self, scores: Tensor, labels: Tensor, *_: Tensor | None, shares: Shares = WHOLE) -> dict[str, Tensor]:
        return {"loss": shares.samples * cross_entropy_loss(scores, labels, self.class_weight, divided=self.divided)}


def _weighted_mean(loss: Tensor, labels: Tensor, class_weight: Tensor | None) -> Tensor:
    """Mean of the losses [B] of the samples, weighted by class."""
    if class_weight is not None:
        loss = loss * class_weight.to(loss.dtype)[labels]
    return loss.mean()


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
