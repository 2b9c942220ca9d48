"""Boxes between views: every view knows its 3x3 matrix, so a box travels from any view to any other.

Pixels are unit squares: pixel i covers [i, i + 1), its centre is i + 0.5, an image spans [0, W] x [0, H].
Matrices act on homogeneous column vectors (x, y, 1) and are affine (last row 0 0 1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssod.ops.host import owned_starts, owners, rows_by_owner
from ssod.structures import Instances, View

MIN_AREA, MIN_VISIBLE = 1.0, 0.1  # what must remain of a box: pixels^2, and its share


def between(matrix_a: Tensor, matrix_b: Tensor) -> Tensor:
    """Pixels of view A -> pixels of view B, of the same source: `M_B @ inv(M_A)`, [..., 3, 3] each.

    The inverse is written out (adjugate over determinant): a solver would make a GPU wait for the host.
    """
    r0, r1, r2 = matrix_a.unbind(-2)
    c0, c1, c2 = torch.linalg.cross(r1, r2), torch.linalg.cross(r2, r0), torch.linalg.cross(r0, r1)
    determinant = (r0 * c0).sum(-1)[..., None, None]
    return matrix_b @ (torch.stack((c0, c1, c2), -1) / determinant)


def map_points(points: Tensor, matrix: Tensor) -> Tensor:
    """Move points [..., P, 2] by affine matrices [..., 3, 3], computed in the dtype of `points`."""
    m = matrix.to(points.device, points.dtype)
    return points @ m[..., :2, :2].mT + m[..., None, :2, 2]


def map_boxes(boxes: Tensor, matrix: Tensor) -> Tensor:
    """Move xyxy boxes [..., 4] by affine matrices [..., 3, 3], one or one a box: the enclosing box of the four moved
    corners.

    Exact for resizing, flips, translations and crops; under rotation and shear the box grows, so there
    and back encloses the first box. Not clipped.
    """
    exact = boxes if boxes.device.type == "mps" else boxes.double()  # mps has no float64
    x1, y1, x2, y2 = exact.unbind(-1)
    corners = torch.stack((x1, y1, x2, y1, x2, y2, x1, y2), -1).unflatten(-1, (4, 2))  # [..., 4 corners, xy]
    moved = map_points(corners, matrix)
    return torch.cat((moved.amin(-2), moved.amax(-2)), -1).to(boxes.dtype)


def of_images(matrices: Tensor, image: Tensor) -> Tensor:
    """The matrix of each row's image: [B, 3, 3] and int64 [M] -> [M, 3, 3]. On mps, which has no float64, matrices stay
    on the host."""
    return matrices[image.to(matrices.device)]


def map_instances(
    instances: Instances,
    matrix: Tensor,
    size: Tensor | tuple[int, int],
    min_area: float = MIN_AREA,
    min_visible: float = MIN_VISIBLE,
) -> tuple[Instances, Tensor]:
    """Move objects into a view of valid `size` (h, w), clip them, and drop those clipped away.

    matrix       [3, 3] from the pixels of `instances` to those of the view, see `between`
    min_area     pixels^2 of the view that must remain of a box
    min_visible  0 .. 1, share of the moved box that must remain inside
    Returns the kept objects, and their int64 indices [kept] in `instances`.
    """
    moved, shown = _moved(instances, matrix, size, min_area, min_visible)
    keep = shown.nonzero()[:, 0]
    return moved[keep], keep


def into_view(found: list[Instances], of: View, into: View) -> list[Instances]:
    """Objects of each image in one view's pixels -> in those of another of the same images; what is clipped away there
    is dropped."""
    return chosen_into_view(found, [everything(found)], of, into)[0]


def everything(found: list[Instances]) -> list[Tensor]:
    """The choice of all objects of each image."""
    return [torch.ones_like(f.labels, dtype=torch.bool) for f in found]


def chosen_into_view(
    found: list[Instances], choices: list[list[Tensor]], of: View, into: View
) -> list[list[Instances]]:
    """As `into_view`, several times: of each choice, a bool [N] an image, the chosen objects. A GPU is waited for once
    for all, and all images are moved at once."""
    return [moved for moved, _ in into_views(found, choices, between(of.matrices, into.matrices), into.sizes)]


def into_views(
    found: list[Instances], choices: list[list[Tensor]], matrices: Tensor, sizes: Tensor
) -> list[tuple[list[Instances], list[Tensor]]]:
    """`map_instances` of B images for each choice, a bool [N] an image: the objects that are left, and their int64
    indices in `found`. matrices [B, 3, 3], sizes [B, 2]; all images have the same fields."""
    counts = [len(f) for f in found]
    every, image = Instances.cat(found), owners(counts, found[0].boxes.device)  # M objects of the batch
    moved, shown = _moved(every, of_images(matrices, image), sizes[image], MIN_AREA, MIN_VISIBLE)
    first = owned_starts(counts, image)
    out = []
    for rows, kept in rows_by_owner([shown & torch.cat(choice) for choice in choices], image, len(found)):
        out.append((moved[rows].split(kept), list((rows - first[rows]).split(kept))))
    return out


def _moved(
    instances: Instances, matrix: Tensor, size: Tensor | tuple[int, int], min_area: float, min_visible: float
) -> tuple[Instances, Tensor]:
    """All objects, moved and clipped, and whether enough of each is left: bool [N]. One matrix and size for all, or one
    each."""
    boxes = map_boxes(instances.boxes, matrix)
    # Kept as a tensor: reading h and w into Python would make a GPU wait once more per image.
    h, w = torch.as_tensor(size, device=boxes.device, dtype=boxes.dtype).unbind(-1)
    clipped = torch.minimum(boxes.clamp(min=0), torch.stack((w, h, w, h), dim=-1))
    area, visible = _area(boxes), _area(clipped)
    return instances.with_boxes(clipped), (visible >= min_area) & (visible >= min_visible * area) & (visible > 0)


def _area(boxes: Tensor) -> Tensor:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
