import copy

import torch

from ssod.ops.anchors import AnchorGrid, ratio_cells, square_cells
from ssod.ops.boxes import centers

CPU = torch.device("cpu")


def test_square_cells_sit_on_multiples_of_the_stride():
    anchors, spans = AnchorGrid(square_cells({8: 8, 16: 16}))({8: (2, 2), 16: (1, 1)}, CPU)
    # stride 8: side 8 around (0, 0), (8, 0), (0, 8), (8, 8); stride 16: side 16 around (0, 0)
    assert anchors.tolist() == [[-4, -4, 4, 4], [4, -4, 12, 4], [-4, 4, 4, 12], [4, 4, 12, 12], [-8, -8, 8, 8]]
    assert spans == {8: slice(0, 4), 16: slice(4, 5)}


def test_ratio_cells_are_height_over_width():
    cells = ratio_cells({4: [32]}, (0.5, 1.0, 2.0))[4]
    # ratio 0.5: h = 32 * sqrt(0.5) = 22.63, w = 45.25; halves rounded to 11 and 23
    assert cells.tolist() == [[-23, -11, 23, 11], [-16, -16, 16, 16], [-11, -23, 11, 23]]


def test_a_level_is_found_by_stride_whatever_its_place():
    grid = AnchorGrid(square_cells({8: 8, 16: 16, 32: 32}))
    every, spans = grid({8: (4, 4), 16: (2, 2), 32: (1, 1)}, CPU)
    alone, _ = grid({16: (2, 2)}, CPU)
    assert torch.equal(every[spans[16]], alone)


def test_the_same_shapes_give_the_same_tensor_and_a_copy_starts_empty():
    grid = AnchorGrid(square_cells({8: 8}))
    assert grid({8: (3, 5)}, CPU)[0] is grid({8: (3, 5)}, CPU)[0]
    assert copy.deepcopy(grid)._cache == {}


def test_sizes_of_one_ratio_are_neighbours():
    cells = ratio_cells({8: [32, 40]}, (1.0, 4.0))[8]
    # ratio 4: half as wide, twice as high
    assert cells.tolist() == [[-16, -16, 16, 16], [-20, -20, 20, 20], [-8, -32, 8, 32], [-10, -40, 10, 40]]


def test_places_from_a_frame_are_rounded_as_torchvision_rounds_them():
    grid = AnchorGrid(square_cells({64: 64}))
    by_stride, _ = grid({64: (2, 3)}, CPU)
    by_frame, _ = grid({64: (2, 3)}, CPU, (120, 160))  # rows 120 // 2 = 60 px apart, columns 160 // 3 = 53
    assert centers(by_stride).tolist() == [[0, 0], [64, 0], [128, 0], [0, 64], [64, 64], [128, 64]]
    assert centers(by_frame).tolist() == [[0, 0], [53, 0], [106, 0], [0, 60], [53, 60], [106, 60]]
    exact, _ = grid({64: (2, 3)}, CPU, (128, 192))
    assert torch.equal(exact, by_stride)
