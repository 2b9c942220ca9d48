"""What is asked of a device seldom: rows of masks, images of rows, numbers of the host."""

from __future__ import annotations

import torch

from ssod.ops.host import on_device, owned_starts, owners, rows_by_owner, true_rows


def test_rows_of_masks_of_any_length() -> None:
    masks = [torch.tensor([True, False, True]), torch.zeros(0, dtype=torch.bool), torch.tensor([False, True])]
    assert [r.tolist() for r in true_rows(masks)] == [[0, 2], [], [1]]
    assert [r.dtype for r in true_rows(masks)] == [torch.int64] * 3


def test_rows_belong_to_images() -> None:
    assert owners([2, 0, 1], torch.device("cpu")).tolist() == [0, 0, 2]
    assert owners([0, 0], torch.device("cpu")).tolist() == []


def test_rows_are_found_image_by_image() -> None:
    image = owners([2, 0, 3], torch.device("cpu"))
    assert owned_starts([2, 0, 3], image).tolist() == [0, 0, 2, 2, 2]
    first, second = torch.tensor([True, False, True, False, True]), torch.zeros(5, dtype=torch.bool)
    (rows, counts), (nothing, none) = rows_by_owner([first, second], image, 3)
    assert (rows.tolist(), counts) == ([0, 2, 4], [1, 0, 2])
    assert (nothing.tolist(), none) == ([], [0, 0, 0])
    mixed = torch.tensor([1, 0, 1, 2, 0])  # rows of several layers: image by image once more and more
    ((rows, counts),) = rows_by_owner([torch.tensor([True, True, True, False, True])], mixed, 3)
    assert (rows.tolist(), counts) == ([1, 4, 0, 2], [2, 2, 0])


def test_numbers_keep_their_kind() -> None:
    assert on_device([1, 2], torch.device("cpu")).dtype == torch.int64
    assert on_device((1.0, 2.0), torch.device("cpu"), torch.float64).tolist() == [1.0, 2.0]
