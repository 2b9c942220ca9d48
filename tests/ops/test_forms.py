"""Graphs take other operations than eager code, and give the same numbers."""

import torch

from ssod.ops.forms import extent, graph_for, in_graph
from ssod.ops.roi import roi_features


def regions(count):
    g = torch.Generator().manual_seed(0)
    corner = torch.rand(count, 2, generator=g) * 200 - 10
    return torch.cat([corner, corner + torch.rand(count, 2, generator=g) * 300], dim=1), torch.arange(count) % 2


def test_regions_are_cut_out_alike_in_all_forms():
    maps = {s: torch.randn(2, 8, 256 // s, 320 // s) for s in (4, 8, 16, 32)}
    boxes, image = regions(40)
    eager = roi_features(maps, boxes, image, 7)
    for target in ("onnx", "tensorrt"):
        with graph_for(target):
            assert in_graph()
            torch.testing.assert_close(roi_features(maps, boxes, image, 7), eager, rtol=1e-4, atol=1e-5)


def test_extent_is_a_tensor_of_both():
    assert extent(3, 5, torch.device("cpu")).tolist() == [3, 5]
    with graph_for("onnx"):
        assert extent(3, 5, torch.device("cpu")).tolist() == [3, 5]
