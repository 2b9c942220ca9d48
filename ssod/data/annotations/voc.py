"""Pascal VOC: one XML an image; boxes are given by their first and last pixel, counted from 1.

A box of the pixels xmin..xmax therefore covers xmin - 1 .. xmax on the continuous axis that all boxes of this package
use (0 at the left edge of the image, W at the right one). Files that count from 0 exist, too; for them the shift is
half a pixel off at most at either side, and their border boxes are clipped by that one pixel without a report.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np

from ssod.data import samples as kinds
from ssod.data.annotations.found import Found, SafePaths, corrupt, list_images
from ssod.data.samples import Inspector, Sample, no_objects
from ssod.errors import UserError, did_you_mean


def read_names(root: Path) -> list[str]:
    """Class names, sorted, of all objects in all annotations below `root`."""
    names = set()
    for file in sorted((root / "Annotations").glob("*.xml")):
        names |= {_text(obj, "name", file, f"object {i}") for i, obj in enumerate(_parse(file).findall("object"), 1)}
    return sorted(names)


def read(found: Found, names: list[str], inspector: Inspector) -> list[Sample]:
    """Samples that a VOC list names, sorted by name; for the split "unlabeled" no XML is opened."""
    assert found.annotations is not None
    file_of = _files_by_name(found.images)
    to_path = SafePaths(found, found.images)
    out: list[Sample] = []
    for image_id, (name, record) in enumerate(_listed(found.annotations, inspector), 1):
        to_path(name, record)  # refuses what leads out of the folder, before anything is looked for
        files = file_of.get(name, [])
        if not files:
            inspector.report(kinds.IMAGE_MISSING, found.annotations, record, f"no image {name}.* in {found.images}")
            continue
        if len(files) > 1:
            both = " and ".join(f.name for f in files)
            raise UserError(f"{found.annotations}, {record}: {name!r} may be {both} of {found.images}; keep one.")
        path = to_path(files[0].relative_to(found.images).as_posix(), record)
        size = inspector.size(path)
        if size is None:
            continue
        if found.split == "unlabeled":
            out.append(Sample.unlabeled(path, image_id, *size))
            continue
        xml = found.images.parent / "Annotations" / f"{name}.xml"
        if xml.is_file():
            out.append(_sample(xml, path, image_id, size, names, inspector))
        else:
            # Unlike a missing YOLO label, this is no way to say "background": VOC writes an XML without objects.
            inspector.report(kinds.ANNOTATION_MISSING, xml, "", f"there is no such file for the image {path.name}")
    return out


def _files_by_name(folder: Path) -> dict[str, list[Path]]:
    """{path below the folder without its suffix: image files}."""
    out: dict[str, list[Path]] = {}
    for path in list_images(folder):
        out.setdefault(path.relative_to(folder).with_suffix("").as_posix(), []).append(path)
    return out


def _listed(file: Path, inspector: Inspector) -> list[tuple[str, str]]:
    """(name, which line) of a VOC list, sorted by name, without repetitions."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        corrupt(file, "", f"cannot be read as a list of names ({error})")
    out: dict[str, str] = {}
    for i, line in enumerate(lines, 1):
        name = line.strip()
        if name in out:
            inspector.report(kinds.IMAGE_TWICE, file, f"line {i}", f"{name} stands in {out[name]}, too")
        elif name:
            out[name] = f"line {i}"
    return sorted(out.items())


class _Builder(ET.TreeBuilder):
    """Refuses a document type declaration: it is what entity expansion and outside references need."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise ValueError("a document type declaration (<!DOCTYPE ...>) is refused")


def _parse(file: Path) -> ET.Element:
    try:
        return ET.parse(file, ET.XMLParser(target=_Builder())).getroot()
    except ET.ParseError as error:
        line, column = error.position
        corrupt(file, f"line {line}, column {column + 1}", f"not valid XML ({str(error).split(':')[0]})")
    except (OSError, ValueError, LookupError) as error:  # LookupError: an unknown encoding
        corrupt(file, "", f"cannot be read as XML ({error})")


def _text(element: ET.Element, tag: str, file: Path, record: str) -> str:
    text = (element.findtext(tag) or "").strip()
    if not text:
        corrupt(file, record, f"<{tag}> is missing or empty")
    return text


def _number(element: ET.Element, tag: str, file: Path, record: str) -> float:
    text = _text(element, tag, file, record)
    try:
        return float(text)
    except ValueError:
        corrupt(file, record, f"<{tag}> must be a number, not {text!r}")


def _sample(
    xml: Path, path: Path, image_id: int, size: tuple[int, int], names: list[str], inspector: Inspector
) -> Sample:
    tree = _parse(xml)
    if tree.tag != "annotation":
        corrupt(xml, "", f"a VOC file starts with <annotation>, not <{tree.tag}>")
    declared = tree.find("size")
    if declared is not None:
        width, height = (_number(declared, tag, xml, "<size>") for tag in ("width", "height"))
        if not (width.is_integer() and height.is_integer()):
            corrupt(xml, "<size>", f"width and height must be integers, not {width:g} and {height:g}")
        if (width, height) != (0, 0):  # what some programs write when they do not know
            inspector.compare_size(path, size, (int(width), int(height)), "<size>")
    boxes, labels, crowd, records = [], [], [], []
    for i, obj in enumerate(tree.findall("object"), 1):
        record = f"object {i}"
        name = _text(obj, "name", xml, record)
        if name not in names:
            corrupt(
                xml, record, f"unknown class {name!r}, the classes are {', '.join(names)}" + did_you_mean(name, names)
            )
        corners = obj.find("bndbox")
        if corners is None:
            corrupt(xml, record, "<bndbox> is missing")
        x1, y1, x2, y2 = (_number(corners, tag, xml, record) for tag in ("xmin", "ymin", "xmax", "ymax"))
        # First pixel = last pixel is a stray click rather than an object; unshifted it has no area and is dropped.
        shift = 1 if x2 > x1 and y2 > y1 else 0
        boxes.append((x1 - shift, y1 - shift, x2, y2))
        labels.append(names.index(name))
        crowd.append((obj.findtext("difficult") or "0").strip() == "1")
        records.append(record)
    if not boxes:
        return Sample(path, image_id, *size, *no_objects(), labeled=True)
    clean, keep = inspector.clean(boxes, size, xml, records)
    return Sample(
        path, image_id, *size, clean, np.array(labels, np.int64)[keep], np.array(crowd, np.bool_)[keep], labeled=True
    )
