"""EM-CapsNet: coordinate addition against materialised votes, the matrices that positions share, its start."""

from __future__ import annotations

import pytest
import torch

import capsops
from cardiocaps.config import PRESETS
from cardiocaps.models.em_capsnet import ClassCapsules, EMCapsNet


def test_coordinate_addition_is_that_of_hinton_et_al() -> None:
    """Against materialised votes: a matrix for each type, and the scaled place of the capsule added to the first two
    elements of the right-hand column of its vote."""
    torch.manual_seed(0)
    layer = ClassCapsules(3, 2).double()
    pose = torch.randn(2, 3, 4, 5, 4, 4, dtype=torch.float64)
    activation = torch.rand(2, 3, 4, 5, dtype=torch.float64)
    out = layer(pose, activation)

    votes = torch.einsum("bthwpk,tkjd->bthwjpd", pose, layer.weight)
    for row in range(4):
        for column in range(5):
            votes[:, :, row, column, :, 0, 3] += (row + 0.5) / 4
            votes[:, :, row, column, :, 1, 3] += (column + 0.5) / 5
    # Routed as input capsules of dimension 2 · 16, of which the matrix of class j picks the jth vote.
    picking = torch.eye(32, dtype=torch.float64).reshape(32, 2, 16)
    expected = capsops.em_routing(
        votes.reshape(2, 60, 32),
        activation.flatten(1),
        picking,
        layer.beta_u,
        layer.beta_a,
        layer.iterations,
        inverse_temperature=layer.inverse_temperature,
    )
    torch.testing.assert_close(out[0].flatten(2), expected[0])
    torch.testing.assert_close(out[1], expected[1])


def test_the_published_code_adds_coordinates_to_the_first_two_elements() -> None:
    """And renormalises, so that the size of an activation above 0 has no effect."""
    torch.manual_seed(0)
    layer = ClassCapsules(3, 2, renormalise=True, published=True).double()
    pose = torch.randn(2, 3, 4, 5, 4, 4, dtype=torch.float64)
    activation = 0.1 + 0.9 * torch.rand(2, 3, 4, 5, dtype=torch.float64)
    votes = torch.einsum("bthwpk,tkjd->bthwjpd", pose, layer.weight)
    votes[..., 0, 0] += ((torch.arange(4) + 0.5) / 4)[:, None, None]
    votes[..., 0, 1] += ((torch.arange(5) + 0.5) / 5)[:, None]
    expected = capsops.em_routing(
        votes.reshape(2, 60, 2, 4, 4),
        torch.ones(2, 60, dtype=torch.float64),
        None,
        layer.beta_u,
        layer.beta_a,
        layer.iterations,
        inverse_temperature=layer.inverse_temperature,
    )
    out = layer(pose, activation)
    torch.testing.assert_close(out[0], expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out[1], expected[1], rtol=1e-4, atol=1e-5)


def test_only_the_place_of_a_capsule_tells_positions_apart() -> None:
    """The same capsules elsewhere give the same classes but for the two coordinates of the pose."""
    torch.manual_seed(0)
    layer = ClassCapsules(3, 2)
    there = torch.zeros(1, 3, 6, 6, dtype=torch.bool)
    there[:, :, :3, :3] = True
    pose, activation = torch.randn(1, 3, 6, 6, 4, 4), there * torch.rand(1, 3, 6, 6)
    moved = [x.roll((3, 2), (2, 3)) for x in (pose, activation)]
    (pose_before, before), (pose_after, after) = layer(pose, activation), layer(*moved)
    torch.testing.assert_close(after, before)
    shift = torch.zeros(4, 4)
    shift[0, 3], shift[1, 3] = 3 / 6, 2 / 6
    torch.testing.assert_close(pose_after, pose_before + shift, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("preset", ["tiny", "small"])
def test_activations_start_between_their_bounds(preset: str) -> None:
    """Where the gradient of the logistic function is not lost; dark images or bright."""
    torch.manual_seed(0)
    net = EMCapsNet(PRESETS[preset])
    gradient = torch.rand(4, 9, net.size, net.size) * torch.linspace(0, 1, net.size)
    for brightness in (0.1, 1.0):
        scores = net(brightness * gradient).scores
        assert scores.min() > 0.05 and scores.max() < 0.998


def test_activations_weigh_the_votes() -> None:
    torch.manual_seed(0)
    layer = ClassCapsules(2, 2)
    pose, activation = torch.randn(1, 2, 3, 3, 4, 4), torch.rand(1, 2, 3, 3)
    assert not torch.allclose(layer(pose, activation)[0], layer(pose, activation.square())[0])


def test_images_that_are_too_small() -> None:
    from dataclasses import replace

    with pytest.raises(ValueError, match="images of 22 pixels leave no capsule; they need at least 23"):
        EMCapsNet(replace(PRESETS["tiny"], size=22))
