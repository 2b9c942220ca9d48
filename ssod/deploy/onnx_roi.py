"""The operator of `ssod.ops.roi_samples` in ONNX: region by region a Resize that reads its samples off the canvas."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from onnxscript import FLOAT, graph, opset18, script

op: Any = opset18  # typed, it knows neither subgraphs nor tensors of any shape
if TYPE_CHECKING:
    Floats = Any
else:
    Floats = FLOAT[...]


@script()
def pooled_samples(canvas: Floats, spans: Floats, rows: Floats, columns: Floats) -> Floats:
    """canvas [B, H, W, C], spans [B, R, 8], rows and columns [B, R, n, s] -> [B, R, n, n, C]."""
    samples = op.Shape(rows, start=3, end=4)
    channels = op.Shape(canvas, start=3, end=4)
    square = op.Concat(op.Constant(value_ints=[1]), samples, samples, channels, axis=0)
    lines = op.Concat(samples, op.Constant(value_ints=[-1]), axis=0)
    cells = op.Concat(op.Constant(value_ints=[-1]), samples, channels, axis=0)

    @graph()
    def of_image(image: Floats, image_spans: Floats, image_rows: Floats, image_columns: Floats) -> Floats:
        whole = op.Unsqueeze(image, op.Constant(value_ints=[0]))  # [1, H, W, C]

        @graph()
        def of_region(span: Floats, row: Floats, column: Floats) -> Floats:
            read = op.Resize(
                whole, span, None, square, mode="linear", coordinate_transformation_mode="tf_crop_and_resize"
            )  # [1, s, s, C]
            low = op.MatMul(row, op.Reshape(read, lines))  # [n, s * C]
            return op.MatMul(column, op.Reshape(low, cells))  # [n, n, C]

        return op.Scan(image_spans, image_rows, image_columns, body=of_region, num_scan_inputs=3)

    return op.Scan(canvas, spans, rows, columns, body=of_image, num_scan_inputs=4)
