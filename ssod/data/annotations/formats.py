"""What a split of the data YAML may point to, relative to its `path`, and which reader reads it.

COCO    annotations/instances_train.json, or a folder of images whose annotations/instances_NAME.json lies in it
        or in `path`, NAME being the folder's or the split's; the images are found in images/NAME, NAME, ...
VOC     ImageSets/Main/train.txt, or just its name `train`, or the folder that holds ImageSets
YOLO    images/train (or train/images); the labels are found in labels/train (train/labels), or beside the images
list    train.txt, one image path a line, relative to the list or to `path`; labels as for YOLO
glob    images/*/cam1_*.jpg; labels as for YOLO
images  any folder, list or glob, for the split `unlabeled` only
tars    pool-{000000..000127}.tar, a .tar, a glob or folder of such, for the split `unlabeled` only
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ssod.data.annotations import coco, shards, voc, yolo
from ssod.data.annotations.found import Found
from ssod.data.annotations.listing import is_glob
from ssod.data.samples import Inspector, Sample
from ssod.errors import UserError


def way_out(layout: str, root: Path) -> str:
    """What to do about data missing in `root`, for the end of a sentence; `layout` is the data YAML's."""
    put = f"put {layout} into {root}" if layout else "mend the line or 'path'"
    return f"{put}, give data_path=DIR, or try `ssod train cfg=demo.yaml`, which needs no data"


def find_split(root: Path, value: str, split: str, where: str, remedy: str) -> Found:
    """Find out what `value`, relative to `root`, is; `where` names the line of the YAML for the errors.

    `remedy` ends the sentence where there is nothing.

    Raises UserError when it is nothing, or when two formats fit.
    """
    target = root / Path(value).expanduser()
    if target.suffix.lower() == ".json" and target.is_file():
        folder = target.parent
        # `annotations` usually stands beside the images; a data folder may hold several such pairs.
        tops = [root, folder.parent, folder] if folder.name == "annotations" else [folder, root]
        return _coco(target, root, split, tops)
    if target.suffix.lower() == ".txt" and target.is_file():
        return _voc(target, root, split, where) if _in_image_sets(target) else _listed(target, root, split)
    if target.is_dir():
        return _folder(target, root, split, where)
    if shards.is_tar(target.name) and shards.find_tars(target):
        if split != "unlabeled":
            raise UserError(f"{where}: {target} may serve as 'unlabeled' only: labels in tars are not read; unpack it.")
        return Found("tars", root, split, target, None)
    if is_glob(value):
        kind = "glob" if split == "unlabeled" else "YOLO glob"
        return Found(kind, root, split, target, None)
    # Not a path, but perhaps the name of a list: `train: trainval`
    listed = root / "ImageSets" / "Main" / f"{value}.txt"
    if listed.is_file():
        return _voc(listed, root, split, where)
    raise UserError(f"{where}: {target} does not exist; {remedy}.")


def class_names(found: Found) -> list[str]:
    """Class names in the order of the labels, from the annotations themselves."""
    if found.format == "COCO" and found.annotations is not None:
        return coco.read_names(found.annotations)
    if found.format == "VOC":
        return voc.read_names(found.images.parent)
    raise UserError(
        f"YOLO labels of {found.annotations or found.images} hold numbers only; list the classes as 'names' in the "
        "data YAML."
    )


def read_split(found: Found, names: list[str], inspector: Inspector) -> Sequence[Sample]:
    """All usable samples of a split, in an order that is the same on every machine."""
    if found.format == "COCO":
        return coco.read(found, inspector)
    if found.format == "VOC":
        return voc.read(found, names, inspector)
    if found.format == "tars":
        return shards.read(found, inspector)
    if found.format.startswith("YOLO"):
        return yolo.read(found, names, inspector)
    return yolo.read_plain(found, inspector)


def _coco(json_path: Path, root: Path, split: str, tops: list[Path]) -> Found:
    return Found("COCO", root, split, coco.find_images(json_path, tops, split), json_path)


def _listed(file: Path, root: Path, split: str) -> Found:
    return Found("list" if split == "unlabeled" else "YOLO list", root, split, file.parent, file)


def _in_image_sets(listed: Path) -> bool:
    return listed.parent.name == "Main" and listed.parent.parent.name == "ImageSets"


def _voc(listed: Path, root: Path, split: str, where: str) -> Found:
    images = listed.parents[2] / "JPEGImages"
    if not images.is_dir():
        raise UserError(f"{where}: {listed} is a Pascal VOC list, but its folder of images {images} is missing.")
    return Found("VOC", root, split, images, listed)


def _folder(folder: Path, root: Path, split: str, where: str) -> Found:
    fits: list[Found] = []
    listed = folder / "ImageSets" / "Main" / f"{split}.txt"
    if listed.is_file():
        fits.append(_voc(listed, root, split, where))
    file = _json_of(folder, root, split)
    if file is not None:
        fits.append(_coco(file, root, split, [folder]))
    labels = yolo.label_folder(folder, root) if split != "unlabeled" else None
    if labels is not None:
        fits.append(Found("YOLO", root, split, folder, labels))
    if split == "unlabeled" and shards.find_tars(folder):
        fits.append(Found("tars", root, split, folder, None))
    if len(fits) > 1:
        both = " and ".join(f"{f.format} ({f.annotations or f.images})" for f in fits)
        raise UserError(f"{where}: {folder} may be {both}; point it at the file that counts, or remove the other.")
    if fits:
        return fits[0]
    if split == "unlabeled":
        return Found("images", root, split, folder, None)
    raise UserError(
        f"{where}: no annotations found for {folder}; expected is a COCO annotations/instances_{split}.json, "
        f"a VOC ImageSets/Main/{split}.txt or a YOLO folder 'labels' in place of 'images'."
    )


def _json_of(folder: Path, root: Path, split: str) -> Path | None:
    """The COCO file that belongs to a folder, the nearest first."""
    names = [folder / "annotations" / f"instances_{split}.json"]
    if split != "unlabeled":  # what lies beside a plain folder of images describes another split
        names += [root / "annotations" / f"instances_{name}.json" for name in (folder.name, split)]
    return next((file for file in names if file.is_file()), None)
