"""Half-size images: means of 2 x 2 pixels, at odd sides of what is valid."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssod.ops.half import half_size
from ssod.structures import Instances, View


def view(images: torch.Tensor, sizes: list[list[int]]) -> View:
    batch = len(images)
    matrices = torch.eye(3, dtype=torch.float64).repeat(batch, 1, 1)
    return View(images, torch.tensor(sizes), matrices, [Instances.empty()] * batch, list(range(batch)))


def test_the_mean_of_four_pixels_halves_rounded_up() -> None:
    # (10 + 20 + 30 + 41) / 4 = 25.25; (0 + 1 + 0 + 1) / 4 = 0.5 -> 1
    image = torch.tensor([[10, 20, 0, 1], [30, 41, 0, 1]], dtype=torch.uint8).expand(1, 3, 2, 4)
    small, sizes = half_size(view(image, [[2, 4]]))
    assert small.dtype == torch.uint8
    assert small.tolist() == [[[[25, 1]]] * 3]
    assert sizes.tolist() == [[1, 2]]


def test_an_odd_side_is_covered_by_what_is_valid() -> None:
    # 3 x 3 valid pixels in a frame of 4 x 5, whose padding is 255: the last row's pairs are (7 + 8) / 2 and 9
    image = torch.full((2, 3, 4, 5), 255, dtype=torch.uint8)
    image[:, :, :3, :3] = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]], dtype=torch.uint8)
    kept = image.clone()
    small, sizes = half_size(view(image, [[3, 3], [4, 5]]))
    assert small.shape == (2, 3, 2, 3)
    assert sizes.tolist() == [[2, 2], [2, 3]]
    # (1 + 2 + 4 + 5) / 4 = 3, (3 + 6) / 2 = 4.5 -> 5, (7 + 8) / 2 = 7.5 -> 8, 9
    assert small[0, 0, :, :2].tolist() == [[3, 5], [8, 9]]
    assert small[1, 0, 1].tolist() == [(7 + 8 + 255 + 255 + 2) // 4, (9 + 3 * 255 + 2) // 4, 255]
    assert torch.equal(image, kept)  # the view stays as it is


def test_an_even_frame_is_not_written_to_either() -> None:
    image = torch.full((1, 3, 4, 4), 100, dtype=torch.uint8)
    image[:, :, 3:] = 0
    kept = image.clone()
    small, _ = half_size(view(image, [[3, 4]]))
    assert small.unique().tolist() == [100]
    assert torch.equal(image, kept)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 5), st.integers(0, 5), st.integers(0, 99))
def test_the_valid_part_does_not_depend_on_the_padding(h: int, w: int, down: int, across: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    picture = torch.randint(0, 256, (1, 3, h, w), dtype=torch.uint8, generator=generator)
    padded = torch.randint(0, 256, (1, 3, h + down, w + across), dtype=torch.uint8, generator=generator)
    padded[:, :, :h, :w] = picture
    small, sizes = half_size(view(picture, [[h, w]]))
    large, same = half_size(view(padded, [[h, w]]))
    assert sizes.tolist() == same.tolist() == [[(h + 1) // 2, (w + 1) // 2]]
    assert torch.equal(large[:, :, : (h + 1) // 2, : (w + 1) // 2], small)
    assert small.min() >= picture.min()
    assert small.max() <= picture.max()
