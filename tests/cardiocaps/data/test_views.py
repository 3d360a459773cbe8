import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from cardiocaps.data.video import resize
from cardiocaps.data.views import MAX_ANGLE, MAX_SHIFT, base_side, draw_jitter, fixed_views, three_views

from .sample_videos import picture

SIZE, BASE = 64, 182


def frames(count: int = 2, side: int = BASE) -> Tensor:
    """uint8 [B, 3, S, S]: a smooth picture with a bright corner, so that no turn maps it to itself."""
    images = resize(picture(count, 150, 200), side)
    images[:, 0, : side // 4, : side // 8] = 255
    return torch.from_numpy(images)


def still(count: int) -> Tensor:
    return torch.zeros(count, 3, 4)


def crop(base: Tensor, top: int, left: int, size: int = SIZE) -> Tensor:
    return base[:, :, top : top + size, left : left + size].float() / 255


def test_base_sides() -> None:
    assert (base_side(256), base_side(64)) == (728, 182)


def test_without_jitter_the_views_are_a_resize_and_the_middle() -> None:
    base = frames()
    image = three_views(base, SIZE, still(2))
    assert image.shape == (2, 9, SIZE, SIZE) and image.dtype == torch.float32
    full = interpolate(base.float() / 255, (SIZE, SIZE), mode="bilinear", antialias=True)
    torch.testing.assert_close(image[:, :3], full, atol=1e-5, rtol=0)
    for view in (image[:, 3:6], image[:, 6:]):
        torch.testing.assert_close(view, crop(base, 59, 59), atol=1e-5, rtol=0)


def test_a_shift_moves_the_window_right_and_down() -> None:
    base, jitter = frames(), still(2)
    jitter[:, 1, 1:3] = torch.tensor([20 / BASE, -11 / BASE])
    jitter[1, 2, 1:3] = torch.tensor([-27 / BASE, 5 / BASE])
    image = three_views(base, SIZE, jitter)
    torch.testing.assert_close(image[:, 3:6], crop(base, 48, 79), atol=1e-4, rtol=0)
    torch.testing.assert_close(image[1:, 6:], crop(base, 64, 32)[1:], atol=1e-4, rtol=0)
    torch.testing.assert_close(image[:1, 6:], crop(base, 59, 59)[:1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("angle, quarter_turns", [(90, 1), (180, 2), (-90, 3)])
def test_an_angle_turns_the_picture_counter_clockwise(angle: float, quarter_turns: int) -> None:
    base, jitter = frames(), still(2)
    jitter[:, :2, 0] = angle
    image, plain = three_views(base, SIZE, jitter), three_views(base, SIZE, still(2))
    turned = torch.rot90(plain, quarter_turns, (2, 3))  # rot90 is counter-clockwise where rows go down
    torch.testing.assert_close(image[:, :6], turned[:, :6], atol=1e-4, rtol=0)
    torch.testing.assert_close(image[:, 6:], plain[:, 6:], atol=1e-4, rtol=0)


def test_a_scale_magnifies() -> None:
    base, jitter = frames(), still(2)
    jitter[:, :, 3] = math.log(2)
    image = three_views(base, SIZE, jitter)
    inner = interpolate(crop(base, 75, 75, 32), (SIZE, SIZE), mode="bilinear")
    torch.testing.assert_close(image[:, 3:6, 1:-1, 1:-1], inner[:, :, 1:-1, 1:-1], atol=1e-4, rtol=0)


def test_outside_the_frame_is_black() -> None:
    jitter = still(1)
    jitter[:, :, 1] = 2.0
    assert (three_views(torch.full((1, 3, BASE, BASE), 255, dtype=torch.uint8), SIZE, jitter) == 0).all()


def test_gain_and_gamma() -> None:
    base = frames()
    plain = three_views(base, SIZE, still(2))
    torch.testing.assert_close(three_views(base, SIZE, still(2), torch.ones(2, 2)), plain, atol=1e-6, rtol=0)
    image = three_views(base, SIZE, still(2), torch.tensor([[1.2, 1.0], [1.0, 0.5]]))
    torch.testing.assert_close(image[0], (1.2 * plain[0]).clamp(max=1), atol=1e-6, rtol=0)
    torch.testing.assert_close(image[1], plain[1].sqrt(), atol=1e-5, rtol=0)
    assert (three_views(torch.zeros_like(base), SIZE, still(2), torch.full((2, 2), 0.9)) == 0).all()


def test_training_draws_within_its_range_and_evaluation_not_at_all() -> None:
    drawn = [draw_jitter(np.random.default_rng([1, i]), True) for i in range(400)]
    jitter, tone = (np.stack(values) for values in zip(*drawn, strict=True))
    assert jitter.dtype == tone.dtype == np.float32 and jitter.shape == (400, 3, 4) and tone.shape == (400, 2)
    zoomed = np.abs(jitter[:, 1:])
    for column, most in ((0, MAX_ANGLE), (1, MAX_SHIFT), (2, MAX_SHIFT)):
        assert 0.95 * most < zoomed[:, :, column].max() <= most * (1 + 1e-6)
        assert np.abs(jitter[:, 1:, column].mean()) < 0.1 * most
    assert (zoomed[:, :, 3] == 0).all()
    assert (np.abs(jitter[:, 0, :3]).max(0) > 0).all() and (np.abs(jitter[:, 0, 3]) <= 0.1 + 1e-6).all()
    assert 0.8 < tone.min() < tone.max() < 1.25
    fixed, neutral = draw_jitter(np.random.default_rng(0), False)
    again, _ = draw_jitter(np.random.default_rng(5), False)
    np.testing.assert_array_equal(fixed, again)
    assert (fixed[0] == 0).all() and (neutral == 1).all()
    assert fixed[1, 2] == -fixed[2, 2] < 0 and (np.abs(fixed[1:, 1:3]) <= MAX_SHIFT).all()


def test_every_window_that_may_be_drawn_lies_in_the_frame() -> None:
    corners = [(a, x, y) for a in (-1, 0, 1) for x in (-1, 1) for y in (-1, 1)]
    jitter = still(len(corners))
    for row, (a, x, y) in zip(jitter, corners, strict=True):
        row[1:, :3] = torch.tensor([a * MAX_ANGLE, x * MAX_SHIFT, y * MAX_SHIFT])
    white = torch.full((len(corners), 3, BASE, BASE), 255, dtype=torch.uint8)
    assert three_views(white, SIZE, jitter)[:, 3:].min() > 0.999


def test_a_view_depends_on_its_own_frame_alone_and_stays_in_range() -> None:
    base = torch.randint(0, 256, (5, 3, BASE, BASE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    drawn = [draw_jitter(np.random.default_rng(i), True) for i in range(5)]
    jitter = torch.from_numpy(np.stack([j for j, _ in drawn]))
    tone = torch.from_numpy(np.stack([t for _, t in drawn]))
    image = three_views(base, SIZE, jitter, tone)
    assert image.min() >= 0 and image.max() <= 1
    for i in range(5):
        alone = three_views(base[i : i + 1], SIZE, jitter[i : i + 1], tone[i : i + 1])
        torch.testing.assert_close(image[i : i + 1], alone, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("frames", "size"), [(1, 64), (7, 24), (8, 64), (21, 40)])
def test_the_fixed_views_are_those_of_an_evaluation(frames: int, size: int) -> None:
    """Bit for bit: a prediction has the numbers of the evaluation."""
    base = torch.randint(0, 256, (frames, 3, base_side(size), base_side(size)), dtype=torch.uint8)
    jitter, tone = (torch.from_numpy(x) for x in draw_jitter(np.random.default_rng(5), train=False))
    wanted = three_views(base, size, jitter.expand(frames, 3, 4), tone.expand(frames, 2))
    found = fixed_views(base, size)
    assert wanted.std() > 0.1 and (found.dtype, found.shape) == (torch.float32, (frames, 9, size, size))
    assert torch.equal(found, wanted)
