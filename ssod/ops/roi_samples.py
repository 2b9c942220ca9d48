"""RoIAlign for onnxruntime on a CPU, whose own takes four times as long: the samples of a region are one Resize.

All maps of an image lie below one another on a canvas, each with a border of its own pixels once more. A region's
14 x 14 samples are a regular grid on it, which Resize reads out of it (`tf_crop_and_resize`), channels last and so over
whole vectors; two small products of matrices make 7 x 7 cells of them. What ONNX makes of the operator stands in
ssod.deploy.onnx_roi.

Letters: B images, R regions of each, C channels, n cells per side of a region, s = SAMPLING * n samples per side.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssod.ops.forms import extent

SAMPLING = 2  # bilinear samples per side of a cell
# To the right of every map, beside its border: so no side of the canvas has as many pixels as a region has samples,
# which Resize would take for an axis to be left alone. Maps have 4 or 8 pixels for each 32 of an image.
SPARE = 1


def by_samples(maps: dict[int, Tensor], boxes: Tensor, stride_of: Tensor, size: int) -> Tensor:
    """As `ssod.ops.roi.roi_features`, of as many regions in each image.

    maps {stride: [B, C, h, w]}, ascending strides; boxes [B, R, 4]; stride_of int64 [B, R] -> [B * R, C, size, size]
    """
    shapes = torch.stack([extent(m.shape[-2], m.shape[-1], boxes.device) for m in maps.values()])  # [L, 2]
    level = (stride_of.unsqueeze(-1) > torch.tensor(list(maps))).sum(dim=-1)  # [B, R]
    top = (shapes[:, 0] + 2).cumsum(0) - (shapes[:, 0] + 1)  # [L] where each map begins on the canvas
    height, width = (shapes[:, 0] + 2).sum(), shapes[0, 1] + 2 + SPARE
    x1, y1, x2, y2 = (boxes / stride_of.unsqueeze(-1)).unbind(-1)
    own_height, own_width = shapes[level].unbind(-1)
    up, down, rows = _samples(y1, y2, own_height, size)
    left, right, columns = _samples(x1, x2, own_width, size)
    up, down = ((at + top[level]) / (height - 1) for at in (up, down))
    left, right = ((at + 1) / (width - 1) for at in (left, right))
    zero, one = torch.zeros_like(up), torch.ones_like(up)
    spans = torch.stack([zero, up, left, zero, one, down, right, one], dim=-1)  # [B, R, 8]
    cells = torch.ops.ssod.pooled_samples(_canvas(maps), spans, rows, columns)
    return cells.flatten(0, 1).permute(0, 3, 1, 2)


def _samples(low: Tensor, high: Tensor, length: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Along one axis: places of the first and the last sample [B, R] in pixels of the map, and what share each has in
    the cells [B, R, n, s]; samples more than a pixel outside the map have none."""
    side = (high - low).clamp(min=1)
    count = size * SAMPLING
    steps = (torch.arange(count, device=low.device) + 0.5) / count
    at = low.unsqueeze(-1) + side.unsqueeze(-1) * steps  # [B, R, s]
    inside = (at >= -1) & (at <= length.unsqueeze(-1))
    mean = torch.eye(size, device=low.device).repeat_interleave(SAMPLING, dim=1) / SAMPLING  # [n, s]
    return at[..., 0], at[..., -1], mean * inside.unsqueeze(-2)


def _canvas(maps: dict[int, Tensor]) -> Tensor:
    """[B, H, W, C] float32."""
    bordered = []
    widest = next(iter(maps.values())).shape[-1] + 2 + SPARE
    for m in maps.values():
        x = m.float().permute(0, 2, 3, 1)
        x = torch.cat([x[:, :1], x, x[:, -1:]], dim=1)
        rest = x.new_zeros(1, 1, 1, 1).expand(x.shape[0], x.shape[1], widest - 2 - m.shape[-1], x.shape[3])
        bordered.append(torch.cat([x[:, :, :1], x, x[:, :, -1:], rest], dim=2))
    return torch.cat(bordered, dim=1)


@torch.library.custom_op("ssod::pooled_samples", mutates_args=())
def pooled_samples(canvas: Tensor, spans: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """canvas [B, H, W, C]; spans [B, R, 8]: of each region (0, y, x, 0) of its first sample and (1, y, x, 1) of its
    last, in shares of the canvas; rows, columns [B, R, n, s] the share of each sample in the cells -> [B, R, n, n, C].
    """
    batch, regions, _, samples = rows.shape
    steps = torch.linspace(0, 1, samples, device=canvas.device)
    first, last = spans[..., 1:3], spans[..., 5:7]
    at = first.unsqueeze(2) + (last - first).unsqueeze(2) * steps[:, None]  # [B, R, s, 2] y, x
    y, x = at[..., 0].unsqueeze(3), at[..., 1].unsqueeze(2)
    grid = torch.stack(torch.broadcast_tensors(x, y), dim=-1) * 2 - 1  # [B, R, s, s, 2]
    seen = F.grid_sample(canvas.permute(0, 3, 1, 2), grid.flatten(1, 2), align_corners=True)  # [B, C, R * s, s]
    seen = seen.view(batch, -1, regions, samples, samples)
    return torch.einsum("bcrst,brns,brmt->brnmc", seen, rows, columns)


@pooled_samples.register_fake
def _(canvas: Tensor, spans: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return canvas.new_empty(*rows.shape[:3], rows.shape[2], canvas.shape[3])
