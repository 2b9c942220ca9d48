"""The NMS operator of `ssod.ops.fixed` in ONNX: NonMaxSuppression gives a list, a scatter makes the mask of it."""

from __future__ import annotations

from typing import Any

from onnxscript import FLOAT, INT64, opset18

op: Any = opset18  # typed, every constant would need a cast

LOWEST = -3.0e38  # below every score
EXCLUDED = -3.4e38  # of another group: not above LOWEST, so it takes no part


def nms_keep(boxes: FLOAT, scores: FLOAT, groups: INT64, num_groups: int, iou: float) -> Any:
    """boxes [B, T, 4], scores and groups [B, T] -> bool [B, T]. Every group is a class of its own to the operator."""
    numbers = op.Reshape(op.Range(0, op.Cast(num_groups, to=7), 1), op.Constant(value_ints=[1, -1, 1]))
    own = op.Equal(op.Unsqueeze(groups, op.Constant(value_ints=[1])), numbers)  # [B, G, T]
    by_group = op.Where(own, op.Unsqueeze(scores, op.Constant(value_ints=[1])), op.Constant(value_float=EXCLUDED))
    chosen = op.NonMaxSuppression(
        boxes,
        by_group,
        op.Constant(value_ints=[2**31 - 1]),
        op.Constant(value_floats=[iou]),
        op.Constant(value_floats=[LOWEST]),
    )  # [n, 3]: image, group, candidate
    where = op.Gather(chosen, op.Constant(value_ints=[0, 2]), axis=1)  # [n, 2]
    count = op.Shape(where, start=0, end=1)
    none = op.Expand(op.Constant(value_float=0.0), op.Shape(scores))
    return op.Cast(op.ScatterND(none, where, op.Expand(op.Constant(value_float=1.0), count)), to=9)
