"""Pictures of pseudo labels: what is kept is solid and has its score, what is dropped is dashed."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ssod.data.draw import class_color, draw_boxes, fit, sheet
from ssod.ops.views import into_view
from ssod.strategies.verdicts import Verdict
from ssod.structures import Instances, View

THUMB = 320  # pixels, long side of an image in `images/`
TILE, PAIR = 240, 360  # long side of an image of a sheet, and of a view
DASHED = 15  # dropped boxes drawn on an image, the surest: they tell what was nearly kept
NAMED = 12  # classes in a legend
QUALITY = 82  # of JPEG


def jpeg(picture: np.ndarray) -> bytes:
    """uint8 [H, W, 3] RGB -> a file's bytes."""
    out = BytesIO()
    Image.fromarray(picture).save(out, "JPEG", quality=QUALITY)
    return out.getvalue()


def thumbnail(image: np.ndarray) -> bytes:
    """A JPEG of the image with a long side of at most THUMB pixels."""
    return jpeg(fit(image, min(THUMB, max(image.shape[:2])))[0])


def film_sheet(
    images: Sequence[np.ndarray], verdicts: Sequence[Verdict], names: Sequence[str], title: str
) -> np.ndarray:
    """All images of the film at one moment. Verdicts, here and below, are on the CPU."""
    tiles = [_tile(image, *_parts(v), TILE) for image, v in zip(images, verdicts, strict=True)]
    page = sheet(tiles, [f"{int(v.kept.sum())} of {len(v.found)} kept" for v in verdicts])
    return _with_legend(page, [v.found for v in verdicts], names, title)


def pair_picture(
    views: tuple[View, View],
    images: tuple[np.ndarray, np.ndarray],
    verdict: Verdict,
    names: Sequence[str],
    title: str,
) -> np.ndarray:
    """The weak view with the verdict's boxes, and the strong view with the same boxes as training carries them there.

    views  weak and strong, of one image each; images: their pixels
    """
    kept, dropped = _parts(verdict)
    carried = [into_view([part], *views)[0] for part in (kept, dropped)]
    tiles = [_tile(images[0], kept, dropped, PAIR), _tile(images[1], carried[0], carried[1], PAIR)]
    titles = [f"weak: {len(kept)} kept, {len(dropped)} dropped", f"strong: {len(carried[0])} to learn from"]
    return _with_legend(sheet(tiles, titles, columns=2), [verdict.found], names, title)


def _parts(verdict: Verdict) -> tuple[Instances, Instances]:
    return verdict.found[verdict.kept], verdict.found[~verdict.kept]


def _tile(image: np.ndarray, kept: Instances, dropped: Instances, side: int) -> np.ndarray:
    """Boxes are in pixels of the image, which becomes as large as `side`."""
    picture, factor = fit(image, side)
    assert kept.scores is not None
    assert dropped.scores is not None
    dropped = dropped[dropped.scores.argsort(descending=True)[:DASHED]]
    picture = _drawn(picture, dropped, factor, [""] * len(dropped), dashed=True)
    return _drawn(picture, kept, factor, [f"{s:.2f}" for s in kept.scores.tolist()])


def _drawn(
    picture: np.ndarray, found: Instances, factor: float, captions: list[str], dashed: bool = False
) -> np.ndarray:
    boxes = found.boxes.nan_to_num().numpy() * factor
    return draw_boxes(picture, boxes, found.labels.tolist(), captions, dashed=dashed)


def _with_legend(page: np.ndarray, found: Sequence[Instances], names: Sequence[str], title: str) -> np.ndarray:
    """The page with a title and, below it, the colours and names of the classes, the most frequent ones."""
    counts = np.bincount(np.concatenate([f.labels.numpy() for f in found]), minlength=len(names))
    shown = [k for k in np.argsort(-counts, kind="stable")[:NAMED].tolist() if counts[k]]
    font = ImageFont.load_default()
    line, width = 18, page.shape[1]
    places, x, y = [], 8, line
    for k in shown:
        length = round(font.getlength(names[k])) + 26
        if x + length > width and x > 8:
            x, y = 8, y + line
        places.append((k, x, y))
        x += length
    strip = Image.new("RGB", (width, y + line + 4 if shown else line), (255, 255, 255))
    pen = ImageDraw.Draw(strip)
    pen.text((8, 2), title, fill=(40, 40, 40), font=font)
    for k, x, y in places:
        pen.rectangle([x, y + 3, x + 9, y + 12], fill=class_color(k))
        pen.text((x + 14, y + 2), names[k], fill=(40, 40, 40), font=font)
    return np.concatenate([page, np.asarray(strip)])
