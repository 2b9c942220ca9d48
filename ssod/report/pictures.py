"""Pictures in a page: JPEGs as data URLs, boxes over them as SVG."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from markupsafe import Markup, escape
from PIL import Image

from ssod.data.image import ImageError, read_image
from ssod.report.charts import hue
from ssod.report.findings import Findings, Mistake, by_image

CROP = 224  # pixels, the longest side of a crop in the page
QUALITY = 80
AROUND = 1.2  # of a crop: margin beside the box, as a share of its longer side
LEAST = 48  # pixels of the source image: margin for tiny boxes


@dataclass(frozen=True)
class Picture:
    """url: the JPEG as a data URL; width, height: what the boxes in `overlay` (SVG) refer to."""

    url: str
    width: int
    height: int
    alt: str
    title: str = ""
    note: str = ""
    overlay: Markup | None = None


def embed(image: Image.Image | np.ndarray, longest: int) -> str:
    """The image as a JPEG within `longest` pixels, in a data URL."""
    own = Image.fromarray(image) if isinstance(image, np.ndarray) else image.convert("RGB")
    own.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    buffer = BytesIO()
    own.save(buffer, "JPEG", quality=QUALITY, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def embed_file(path: Path, longest: int) -> tuple[str, int, int] | None:
    """(data URL, width, height) of an image file; None where it cannot be read."""
    try:
        pixels = read_image(path)
    except ImageError:
        return None
    return embed(pixels, longest), pixels.shape[1], pixels.shape[0]


def rectangle(box: Sequence[float] | np.ndarray, label: int, kind: str, title: str) -> str:
    """A box (xyxy) over a picture. kind: CSS class, such as "solid" or "dashed"."""
    x1, y1, x2, y2 = box
    return (
        f'<rect class="{kind}" style="--h:{hue(label)}" x="{x1:.1f}" y="{y1:.1f}" width="{x2 - x1:.1f}" '
        f'height="{y2 - y1:.1f}"><title>{escape(title)}</title></rect>'
    )


def crops(findings: Findings, paths: Sequence[Path], mistakes: Sequence[Mistake], conf: float) -> list[Picture]:
    """A picture of each mistake: annotations dashed, detections from `conf` on solid, the mistake itself thick.

    Images that cannot be read are left out.
    """
    count = len(findings.images)
    truth, found = by_image(findings.truth, count), by_image(findings.found, count)
    out = []
    for m in mistakes:
        try:
            pixels = read_image(paths[m.image])
        except ImageError:
            continue
        height, width = pixels.shape[:2]
        x1, y1, x2, y2 = _around(m.box, width, height)
        boxes = [
            rectangle(t[1:5] - (x1, y1, x1, y1), int(t[5]), "dashed", f"annotated: {findings.names[int(t[5])]}")
            for t in findings.truth[truth[m.image]]
        ] + [
            rectangle(d[1:5] - (x1, y1, x1, y1), int(d[5]), "solid", f"{findings.names[int(d[5])]} {d[6]:.2f}")
            for d in findings.found[found[m.image]]
            if d[6] >= conf
        ]
        own = np.asarray(m.box) - (x1, y1, x1, y1)
        name = findings.names[m.label]
        boxes.append(rectangle(own, m.label, "dashed thick" if m.score is None else "solid thick", name))
        title = name if m.score is None else f"{name} {m.score:.2f}"
        file = findings.images[m.image]["file_name"]
        out.append(
            Picture(
                embed(np.ascontiguousarray(pixels[y1:y2, x1:x2]), CROP),
                x2 - x1,
                y2 - y1,
                f"{title} in {file}: {m.why}",
                title,
                f"{m.why}\n{file}",
                Markup("".join(boxes)),  # built of numbers and escaped titles
            )
        )
    return out


def _around(box: Sequence[float], width: int, height: int) -> tuple[int, int, int, int]:
    """A square window about a box, moved into the image where it can be: xyxy, whole pixels."""
    x1, y1, x2, y2 = box
    longer = max(x2 - x1, y2 - y1)
    side = int(np.ceil(longer + 2 * max(LEAST, AROUND * longer / 2)))
    left, top = int((x1 + x2 - side) / 2), int((y1 + y2 - side) / 2)
    left, top = max(0, min(left, width - side)), max(0, min(top, height - side))
    return left, top, min(width, left + side), min(height, top + side)
