"""The training loss: weighted margin loss, reconstruction loss and the regression auxiliary loss (CardioCaps,
eq. 1 and 2).

Inputs are converted to float32 before anything is computed: the squares of small margins vanish in half
precision. Autocast does not lower any of the operations used here. No function asks the device for a value,
so that a training step on a GPU is never held up; what can only be seen in the values (a label out of range,
an infinite target) is checked on CPU tensors.
"""

from typing import Literal, get_args

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
    """Margin loss: the sum over classes of eq. 1, weighted by the sample's own class (eq. 2), averaged over
    the batch.

    `lengths` [B, J] floating, the lengths of the class capsules; `labels` [B] int64 in 0 … J-1;
    `class_weight` [J] or None. The weights multiply the samples' losses and do not divide the mean. Returns a
    scalar of float32 (float64 for float64). Raises ValueError for a wrong shape or type, and for a label out
    of range (CPU tensors; on a GPU such a label trips the device's own assertion). Source: Sabour et al.
    2017, eq. 4; CardioCaps, eq. 1 and 2.
    """
    if lengths.ndim != 2 or lengths.numel() == 0 or not lengths.is_floating_point():
        raise ValueError(f"lengths: must be a non-empty floating [B, J] tensor, is {_describe(lengths)}")
    batch, classes = lengths.shape
    if labels.shape != (batch,) or labels.dtype != torch.int64:
        raise ValueError(f"labels: must be an int64 [B] = [{batch}] tensor, is {_describe(labels)}")
    if labels.device.type == "cpu" and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        worst = int(labels.min()) if int(labels.min()) < 0 else int(labels.max())
        raise ValueError(f"labels: must lie in 0 … {classes - 1}, one is {worst}")
    if class_weight is not None and class_weight.shape != (classes,):
        raise ValueError(f"class_weight: must be [J] = [{classes}], is {_describe(class_weight)}")
    lengths = _at_least_float32(lengths)
    present = torch.zeros_like(lengths).scatter(1, labels[:, None], 1.0)
    too_short = (m_plus - lengths).clamp(min=0).square()
    too_long = (lengths - m_minus).clamp(min=0).square()
    loss = (present * too_short + lam * (1 - present) * too_long).sum(dim=1)
    if class_weight is not None:
        loss = loss * class_weight.to(loss.dtype)[labels]
    return loss.mean()


def class_weights(counts: Tensor, mode: ClassWeight = "balanced") -> Tensor:
    """Weight of each class, float32 [J], from its number of training samples `counts` [J].

    `balanced`: n / (J n_c), so that every class has the same total weight; `proportion`: n_c / n, the letter
    of eq. 2, which weights the majority up; `none`: ones. Raises ValueError for counts that are not finite
    and non-negative with a positive sum, and for a class without a sample under `balanced`.
    """
    if mode not in get_args(ClassWeight):
        raise ValueError(f"mode: must be one of {', '.join(get_args(ClassWeight))}, is {mode!r}")
    if counts.ndim != 1 or counts.numel() == 0:
        raise ValueError(f"counts: must be a non-empty [J] tensor, is {_describe(counts)}")
    count = counts.double()
    if not bool((count.isfinite() & (count >= 0)).all()) or float(count.sum()) == 0:
        raise ValueError(f"counts: must be finite, not negative and not all zero, is {counts.tolist()}")
    if mode == "none":
        weight = torch.ones_like(count)
    elif mode == "proportion":
        weight = count / count.sum()
    elif bool((count == 0).any()):
        raise ValueError(f"counts: balanced weights need a sample of every class, is {counts.tolist()}")
    else:
        weight = count.sum() / (count.numel() * count)
    return weight.float()


def reconstruction_loss(reconstruction: Tensor, image: Tensor, *, weight: float = 0.0005) -> Tensor:
    """`weight` times the squared error summed over an image (that is, C·H·W·MSE), averaged over the batch.

    Both tensors [B, C, H, W] floating, here [B, 3, S, S] with values in [0, 1]. Returns a scalar. Raises
    ValueError for shapes that differ. Source: Sabour et al. 2017, section 4.1.
    """
    if image.ndim != 4 or image.numel() == 0:
        raise ValueError(f"image: must be a non-empty [B, C, H, W] tensor, is {_describe(image)}")
    if reconstruction.shape != image.shape:
        raise ValueError(f"reconstruction: must have image's shape {list(image.shape)}, is {_describe(reconstruction)}")
    error = _at_least_float32(reconstruction) - _at_least_float32(image)
    return weight * image[0].numel() * error.square().mean()


def regression_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over the samples with a target (eq. 2); NaN marks a sample without one.

    Both tensors [B] floating, in the target's unit (cm or percent). Returns a scalar, exactly zero but still
    part of the graph where every target is missing. Raises ValueError for another shape ([B, 1] would
    broadcast to [B, B]), and for an infinite target (CPU tensors).
    """
    if prediction.ndim != 1 or prediction.numel() == 0:
        raise ValueError(f"prediction: must be a non-empty [B] tensor, is {_describe(prediction)}")
    if target.shape != prediction.shape or not target.is_floating_point():
        raise ValueError(f"target: must be a floating [B] = [{len(prediction)}] tensor, is {_describe(target)}")
    if target.device.type == "cpu" and bool(target.isinf().any()):
        raise ValueError("target: must be finite, or NaN where missing; one is infinite")
    prediction, target = _at_least_float32(prediction), _at_least_float32(target)
    measured = ~target.isnan()
    error = torch.where(measured, prediction - target, 0.0)
    return error.square().sum() / measured.sum().clamp(min=1)


class CardioCapsLoss(nn.Module):
    """The whole loss: margin · class weight + reconstruction + λ_reg · regression (eq. 2).

    `class_weight` [J] as `class_weights` returns it; None stands for two classes of weight one. It is a
    persistent buffer.
    """

    class_weight: Tensor

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
        super().__init__()
        if class_weight is None:
            class_weight = torch.ones(2)
        if class_weight.ndim != 1 or not bool((class_weight.isfinite() & (class_weight >= 0)).all()):
            raise ValueError(f"class_weight: must be a finite, non-negative [J] tensor, is {class_weight.tolist()}")
        self.register_buffer("class_weight", class_weight.detach().clone().float())
        self.reconstruction_weight = reconstruction_weight
        self.regression_weight = regression_weight
        self.m_plus, self.m_minus, self.lam = m_plus, m_minus, lam

    def forward(
        self,
        lengths: Tensor,
        labels: Tensor,
        reconstruction: Tensor | None = None,
        image: Tensor | None = None,
        prediction: Tensor | None = None,
        target: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Scalars `loss` (the total), `margin`, `reconstruction` (with its weight) and `regression` (before
        λ_reg, so in the target's unit squared). A model without decoder or regression head gives None for the
        pair: its part is zero. Shapes and errors as in `margin_loss`, `reconstruction_loss` and
        `regression_loss`.
        """
        if (reconstruction is None) != (image is None):
            raise ValueError("reconstruction, image: give both or neither")
        if (prediction is None) != (target is None):
            raise ValueError("prediction, target: give both or neither")
        margin = margin_loss(
            lengths,
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


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _describe(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
