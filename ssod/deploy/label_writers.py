"""Pseudo labels as COCO, YOLO or Pascal VOC. Written as a stream: never more than one image in memory.

COCO  annotations/instances_train.json; `score` and `quality` in every annotation
YOLO  labels/NAME.txt (with `scores`, the score behind each box), train.txt, classes.txt, images -> the source
VOC   Annotations/NAME.xml, <score> and <quality> in every object, ImageSets/Main/train.txt, JPEGImages -> the source

Each comes with a data.yaml whose `train` reads it. `images` and `JPEGImages` are links, no image is copied.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import yaml

from ssod.deploy.label_plan import Plan
from ssod.errors import UserError
from ssod.files import replacing

Row = dict[str, Any]


@dataclass
class Counts:
    """images: readable ones; empty: of these, without a box; left_out images count as unreadable."""

    images: int = 0
    unreadable: int = 0
    empty: int = 0
    boxes: int = 0
    boxes_of_class: dict[str, int] = field(default_factory=dict)

    def add(self, row: Row, names: list[str]) -> None:
        if "error" in row:
            self.unreadable += 1
            return
        self.images += 1
        self.empty += not row["objects"]
        self.boxes += len(row["objects"])
        for label, *_ in row["objects"]:
            self.boxes_of_class[names[label]] += 1


def write_coco(plan: Plan, out: Path, names: list[str]) -> None:
    """Image and annotation ids count from 1, category ids are label + 1; images without boxes are in it."""
    file = out / "annotations" / "instances_train.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    info = {"description": "pseudo labels", **plan.settings}
    categories = [{"id": i, "name": name} for i, name in enumerate(names, 1)]
    with replacing(file) as stream:
        stream.write(f'{{"info": {json.dumps(info)},\n"categories": {json.dumps(categories)},\n"images": ['.encode())
        stream.writelines(_separated(_coco_images(plan)))
        stream.write(b'\n],\n"annotations": [')
        stream.writelines(_separated(_coco_annotations(plan)))
        stream.write(b"\n]}\n")
    _data_yaml(out, plan.base, _relative(file, plan.base), names)


def _separated(records: Iterator[Row]) -> Iterator[bytes]:
    for number, record in enumerate(records):
        yield (b",\n" if number else b"\n") + json.dumps(record).encode()


def _readable(plan: Plan) -> Iterator[Row]:
    return (row for row in plan.rows() if "error" not in row)


def _coco_images(plan: Plan) -> Iterator[Row]:
    for id_, row in enumerate(_readable(plan), 1):
        yield {"id": id_, "file_name": row["file"], "width": row["width"], "height": row["height"]}


def _coco_annotations(plan: Plan) -> Iterator[Row]:
    id_ = 0
    for image_id, row in enumerate(_readable(plan), 1):
        for label, x1, y1, x2, y2, score, quality in row["objects"]:
            id_ += 1
            w, h = round(x2 - x1, 2), round(y2 - y1, 2)
            record = {"id": id_, "image_id": image_id, "category_id": label + 1, "bbox": [x1, y1, w, h]}
            record |= {"area": round(w * h, 4), "iscrowd": 0, "score": score}
            yield record if quality is None else record | {"quality": quality}


def write_yolo(plan: Plan, out: Path, names: list[str]) -> None:
    """Lines `class x_center y_center width height`, shares of the image; an image without boxes has an empty file."""
    _link(out / "images", plan.base)
    with replacing(out / "train.txt") as listed:
        for row in _readable(plan):
            listed.write(f"./images/{row['file']}\n".encode("utf-8", "surrogateescape"))
            _write_file((out / "labels" / row["file"]).with_suffix(".txt"), _yolo_lines(row, plan.settings["scores"]))
    _write_file(out / "classes.txt", "".join(f"{name}\n" for name in names))
    _data_yaml(out, out.absolute(), "train.txt", names)


def _yolo_lines(row: Row, scores: bool) -> str:
    lines = []
    for label, x1, y1, x2, y2, score, _ in row["objects"]:
        w, h = row["width"], row["height"]
        shares = ((x1 + x2) / 2 / w, (y1 + y2) / 2 / h, (x2 - x1) / w, (y2 - y1) / h)
        lines.append(f"{label} {' '.join(f'{v:.6f}' for v in shares)}{f' {score:.5f}' if scores else ''}\n")
    return "".join(lines)


def write_voc(plan: Plan, out: Path, names: list[str]) -> None:
    """Corners are the first and the last pixel, counted from 1, with fractions; no box is narrower than a pixel."""
    _link(out / "JPEGImages", plan.base)
    listed = out / "ImageSets" / "Main" / "train.txt"
    listed.parent.mkdir(parents=True, exist_ok=True)
    with replacing(listed) as stream:
        for row in _readable(plan):
            stream.write(f"{Path(row['file']).with_suffix('').as_posix()}\n".encode("utf-8", "surrogateescape"))
            _write_file((out / "Annotations" / row["file"]).with_suffix(".xml"), _voc_xml(row, names))
    _data_yaml(out, out.absolute(), "ImageSets/Main/train.txt", names)


def _voc_xml(row: Row, names: list[str]) -> str:
    size = f"<size><width>{row['width']}</width><height>{row['height']}</height><depth>3</depth></size>"
    lines = ["<annotation>", f"  <filename>{escape(Path(row['file']).name)}</filename>", f"  {size}"]
    for label, x1, y1, x2, y2, score, quality in row["objects"]:
        corners = (min(x1 + 1, x2 - 0.01), min(y1 + 1, y2 - 0.01), x2, y2)
        tags = zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
        box = "".join(f"<{tag}>{value:.2f}</{tag}>" for tag, value in tags)
        lines += ["  <object>", f"    <name>{escape(names[label])}</name>", "    <difficult>0</difficult>"]
        lines += [f"    <bndbox>{box}</bndbox>", f"    <score>{score}</score>"]
        lines += [f"    <quality>{quality}</quality>"] if quality is not None else []
        lines.append("  </object>")
    return "\n".join([*lines, "</annotation>\n"])


def _write_file(file: Path, text: str) -> None:
    try:
        file.write_bytes(text.encode("utf-8", "backslashreplace"))
    except FileNotFoundError:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text.encode("utf-8", "backslashreplace"))


def _link(link: Path, target: Path) -> None:
    """Make a folder that is the folder of the images, without copying them."""
    if link.is_symlink() and link.resolve() == target.resolve():
        return
    try:
        os.symlink(_relative(target, link.parent), link, target_is_directory=True)
    except FileExistsError:
        raise UserError(f"{link} is in the way of a link to the images; give another out=, or move it.") from None
    except OSError as error:
        raise UserError(
            f"{link} cannot be made a link to {target} ({error.strerror}); use format=coco, which needs none."
        ) from None


def _data_yaml(out: Path, root: Path, train: str, names: list[str]) -> None:
    content = {"path": _relative(root, out), "train": Path(train).as_posix(), "names": names}
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    _write_file(out / "data.yaml", f"# pseudo labels, written by `ssod label`\n{text}")


def _relative(path: Path, folder: Path) -> str:
    """The path as seen from a folder, so that both can be moved together; absolute on another Windows drive."""
    try:
        return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()
    except ValueError:
        return str(path)


WRITERS: dict[str, Callable[[Plan, Path, list[str]], None]] = {
    "coco": write_coco,
    "yolo": write_yolo,
    "voc": write_voc,
}
