import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cardiocaps.models.losses import (
    CardioCapsLoss,
    CrossEntropyLoss,
    SpreadLoss,
    class_weights,
    cross_entropy_loss,
    margin_loss,
    reconstruction_loss,
    regression_loss,
    spread_loss,
)

NAN = math.nan


def test_margin_loss_by_hand() -> None:
    lengths = torch.tensor([[0.8, 0.3], [0.95, 0.05], [0.2, 0.6]])
    labels = torch.tensor([0, 1, 1])
    # eq. 1:  (0.9-0.8)^2 + 0.5 (0.3-0.1)^2 = 0.03
    #         (0.9-0.05)^2 + 0.5 (0.95-0.1)^2 = 1.08375
    #         (0.9-0.6)^2 + 0.5 (0.2-0.1)^2 = 0.095
    assert margin_loss(lengths, labels).item() == pytest.approx((0.03 + 1.08375 + 0.095) / 3, rel=1e-6)


def test_margin_loss_is_zero_exactly_beyond_the_margins() -> None:
    lengths = torch.tensor([[0.95, 0.05], [0.1, 0.9]], requires_grad=True)
    loss = margin_loss(lengths, torch.tensor([0, 1]))
    loss.backward()
    assert loss.item() == 0
    assert lengths.grad is not None and not lengths.grad.any()


def test_margin_loss_weights_a_sample_by_its_own_class() -> None:
    lengths = torch.tensor([[0.8, 0.3], [0.2, 0.6]])
    weighted = margin_loss(lengths, torch.tensor([0, 1]), class_weight=torch.tensor([0.5, 3.0]))
    assert weighted.item() == pytest.approx((0.5 * 0.03 + 3 * 0.095) / 2, rel=1e-6)


def test_margin_loss_weighs_a_capsule_by_its_class_as_eq_2_is_printed() -> None:
    lengths = torch.tensor([[0.8, 0.3], [0.2, 0.6]])
    # L_0 and L_1 of both samples: (0.9-0.8)^2, 0.5 (0.3-0.1)^2; 0.5 (0.2-0.1)^2, (0.9-0.6)^2
    by_hand = (0.8 * 0.01 + 0.2 * 0.02 + 0.8 * 0.005 + 0.2 * 0.09) / 2
    proportion = torch.tensor([0.8, 0.2])
    weighed = margin_loss(lengths, torch.tensor([0, 1]), proportion, weigh="capsule")
    assert weighed.item() == pytest.approx(by_hand, rel=1e-6)
    loss = CardioCapsLoss(proportion, weigh="capsule")(lengths, torch.tensor([0, 1]))
    assert loss["margin"].item() == pytest.approx(by_hand, rel=1e-6)
    assert margin_loss(lengths, torch.tensor([0, 1]), proportion).item() != pytest.approx(by_hand, rel=1e-2)


def test_margin_loss_as_published_is_half_of_the_sum_over_two_classes() -> None:
    generator = torch.Generator().manual_seed(4)
    lengths, labels = torch.rand(7, 2, generator=generator), torch.randint(2, (7,), generator=generator)
    mean = CardioCapsLoss(mean_over_classes=True)(lengths, labels)["margin"]
    torch.testing.assert_close(2 * mean, margin_loss(lengths, labels))


def test_spread_loss_by_hand() -> None:
    activations = torch.tensor([[0.8, 0.3, 0.7], [0.95, 0.05, 0.9]])
    # Hinton et al. 2018, eq. 3, margin 0.4:  (0.4 - 0.5)+^2 + (0.4 - 0.1)^2 = 0.09
    #                                         (0.4 + 0.05)^2 + (0.4 - 0.85)+^2 = 0.2025
    expected = {None: (0.09 + 0.2025) / 2, (2.0, 1.0, 10.0): (2 * 0.09 + 10 * 0.2025) / 2}
    for weight, value in expected.items():
        loss = spread_loss(
            activations,
            torch.tensor([0, 2]),
            margin=0.4,
            class_weight=None if weight is None else torch.tensor(weight),
        )
        assert loss.item() == pytest.approx(value, rel=1e-5)


def test_the_margin_of_the_spread_loss_grows_until_half_of_the_epochs() -> None:
    loss, scores, label = SpreadLoss(), torch.tensor([[0.5, 0.5]]), torch.tensor([0])
    assert loss.margin == 0.2
    margins = []
    for epoch in range(8):
        loss.begin_epoch(epoch, 8)
        margins.append(loss.margin)
        assert loss(scores, label)["loss"].item() == pytest.approx(loss.margin**2)
        loss.eval()
        assert loss(scores, label)["loss"].item() == pytest.approx(0.9**2)
        loss.train()
    assert margins == pytest.approx([0.2, 0.375, 0.55, 0.725, 0.9, 0.9, 0.9, 0.9])
    loss.begin_epoch(1, 8)
    assert loss.margin == margins[1], "after a resume as in a run that was not cut off"


def test_cross_entropy_multiplies_by_the_class_weight_and_divides_by_the_batch() -> None:
    logits = torch.tensor([[0.0, 0.0], [0.0, math.log(3.0)]])
    labels, weight = torch.tensor([1, 1]), torch.tensor([0.5, 3.0])
    by_hand = 3 * (math.log(2) + math.log(4 / 3)) / 2
    assert cross_entropy_loss(logits, labels, class_weight=weight).item() == pytest.approx(by_hand, rel=1e-6)
    assert CrossEntropyLoss(weight)(logits, labels)["loss"].item() == pytest.approx(by_hand, rel=1e-6)
    divided = cross_entropy_loss(logits, torch.tensor([0, 1]), class_weight=weight, divided=True).item()
    # 0.5 · log 2 and 3 · log(4/3), divided by 3.5
    assert divided == pytest.approx((0.5 * math.log(2) + 3 * math.log(4 / 3)) / 3.5, rel=1e-6)
    unweighted = torch.nn.functional.cross_entropy(logits, labels)
    torch.testing.assert_close(CrossEntropyLoss()(logits, labels)["loss"], unweighted)


@pytest.mark.parametrize("kind", [CardioCapsLoss, SpreadLoss, CrossEntropyLoss])
def test_every_loss_is_called_alike(kind: type[CardioCapsLoss | SpreadLoss | CrossEntropyLoss]) -> None:
    loss = kind(torch.tensor([0.6, 3.0]))
    parts = loss(*_batch().values())
    assert tuple(parts) == kind.parts and parts["loss"].shape == ()
    assert list(loss.state_dict()) == ["class_weight"]


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**31), st.sampled_from([spread_loss, cross_entropy_loss]))
@settings(max_examples=30, deadline=None)
def test_a_loss_is_the_mean_over_the_batch(batch: int, classes: int, seed: int, loss: Callable[..., Tensor]) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(batch, classes, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (batch,), generator=generator)
    weight = torch.rand(classes, generator=generator, dtype=torch.float64)
    singles = [loss(scores[i : i + 1], labels[i : i + 1], class_weight=weight) for i in range(batch)]
    torch.testing.assert_close(loss(scores, labels, class_weight=weight), torch.stack(singles).mean())


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_margin_loss_is_the_mean_over_the_batch(batch: int, classes: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.rand(batch, classes, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (batch,), generator=generator)
    weight = torch.rand(classes, generator=generator, dtype=torch.float64)
    singles = [margin_loss(lengths[i : i + 1], labels[i : i + 1], class_weight=weight) for i in range(batch)]
    torch.testing.assert_close(margin_loss(lengths, labels, class_weight=weight), torch.stack(singles).mean())


def test_gradients() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64, requires_grad=True)

    labels = torch.tensor([0, 1, 1, 0])
    weight = torch.tensor([0.6, 3.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: margin_loss(x, labels, class_weight=weight), draw(4, 2))
    assert torch.autograd.gradcheck(lambda x: spread_loss(x, labels, class_weight=weight), draw(4, 2))
    assert torch.autograd.gradcheck(lambda x: cross_entropy_loss(x, labels, class_weight=weight), draw(4, 2))
    assert torch.autograd.gradcheck(reconstruction_loss, (draw(2, 3, 4, 4), draw(2, 3, 4, 4)))
    target = torch.tensor([4.0, NAN, 5.0, NAN], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: regression_loss(x, target), draw(4))


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("balanced", [100 / 160, 100 / 40]), ("proportion", [0.8, 0.2]), ("none", [1.0, 1.0])],
)
def test_class_weights(mode: str, expected: list[float]) -> None:
    torch.testing.assert_close(class_weights(torch.tensor([80, 20]), mode), torch.tensor(expected))  # type: ignore[arg-type]


def test_balanced_weights_give_each_class_the_same_total() -> None:
    counts = torch.tensor([7, 1, 92])
    total = counts * class_weights(counts)
    torch.testing.assert_close(total, torch.full((3,), 100 / 3))


def test_reconstruction_loss_is_the_scaled_error_of_an_image() -> None:
    image = torch.zeros(2, 3, 4, 4)
    reconstruction = image.clone()
    reconstruction[0, 0, 0, 0] = 2.0  # squared error 4 in one image of two
    assert reconstruction_loss(reconstruction, image).item() == pytest.approx(0.0005 * 4 / 2)
    assert reconstruction_loss(reconstruction, image, weight=1.0).item() == pytest.approx(2.0)


def test_regression_loss_leaves_missing_targets_out() -> None:
    prediction = torch.tensor([1.0, NAN, 5.0], requires_grad=True)
    loss = regression_loss(prediction, torch.tensor([2.0, NAN, 2.0]))
    loss.backward()
    assert loss.item() == (1 + 9) / 2
    assert prediction.grad is not None and prediction.grad.tolist() == [-1.0, 0.0, 3.0]


def test_regression_loss_without_any_target_is_a_zero_with_a_graph() -> None:
    prediction = torch.tensor([1.0, 2.0], requires_grad=True)
    loss = regression_loss(prediction, torch.tensor([NAN, NAN]))
    loss.backward()
    assert loss.item() == 0
    assert prediction.grad is not None and prediction.grad.tolist() == [0.0, 0.0]


def test_a_diverged_prediction_is_not_hidden() -> None:
    assert regression_loss(torch.tensor([NAN]), torch.tensor([1.0])).isnan()
    assert margin_loss(torch.tensor([[NAN, 0.5]]), torch.tensor([1])).isnan()


def _batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "scores": torch.rand(4, 2, generator=generator),
        "labels": torch.tensor([0, 1, 1, 0]),
        "reconstruction": torch.rand(4, 3, 8, 8, generator=generator),
        "image": torch.rand(4, 3, 8, 8, generator=generator),
        "prediction": torch.rand(4, generator=generator),
        "target": torch.tensor([4.0, NAN, 5.0, 3.5]),
    }


def test_the_total_is_the_sum_of_its_parts() -> None:
    batch, weight = _batch(), torch.tensor([0.6, 3.0])
    parts = CardioCapsLoss(weight, reconstruction_weight=0.001, regression_weight=0.25)(**batch)
    margin = margin_loss(batch["scores"], batch["labels"], class_weight=weight)
    reconstruction = reconstruction_loss(batch["reconstruction"], batch["image"], weight=0.001)
    regression = regression_loss(batch["prediction"], batch["target"])
    expected = {
        "loss": margin + reconstruction + 0.25 * regression,
        "margin": margin,
        "reconstruction": reconstruction,
        "regression": regression,
    }
    assert parts.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(parts[name], value)


def test_a_model_without_decoder_or_regression_has_the_margin_loss_alone() -> None:
    batch = _batch()
    parts = CardioCapsLoss()(batch["scores"], batch["labels"])
    torch.testing.assert_close(parts["loss"], margin_loss(batch["scores"], batch["labels"]))
    assert parts["reconstruction"].item() == parts["regression"].item() == 0


def test_class_weight_is_a_buffer_that_a_checkpoint_restores() -> None:
    saved = CardioCapsLoss(torch.tensor([0.6, 3.0])).state_dict()
    loss = CardioCapsLoss()
    loss.load_state_dict(saved)
    assert loss.class_weight.tolist() == pytest.approx([0.6, 3.0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    batch = _batch()
    half = {name: x.to(dtype) if x.is_floating_point() else x for name, x in batch.items()}
    exact = {name: x.double() if x.is_floating_point() else x for name, x in half.items()}
    loss = CardioCapsLoss(torch.tensor([0.6, 3.0]))
    with torch.autocast("cpu", torch.bfloat16):
        low = loss(**half)
    for name, value in loss(**exact).items():
        assert low[name].dtype == torch.float32
        torch.testing.assert_close(low[name].double(), value.double(), rtol=1e-6, atol=1e-7)


def test_a_step_never_waits_for_the_device() -> None:
    # A meta tensor has no values: whatever would read one, and so wait for a GPU, raises here.
    batch = {name: x.to("meta") for name, x in _batch().items()}
    loss = CardioCapsLoss().to("meta")(**batch)["loss"]
    assert loss.shape == ()
    with pytest.raises(RuntimeError):
        loss.item()


def test_a_column_of_predictions_is_named() -> None:
    with pytest.raises(ValueError, match=r"prediction is \[3, 1\]; expected target's shape \[3\]"):
        regression_loss(torch.rand(3, 1), torch.rand(3))
