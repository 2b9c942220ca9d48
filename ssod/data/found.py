"""Where one split lies on disk, and how names from annotation files become paths."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any, NoReturn

from ssod.data.image import IMAGE_SUFFIXES
from ssod.errors import UserError


@dataclass(frozen=True)
class Found:
    """One split. format: "COCO", "VOC", "YOLO" or "images" (a plain folder).

    images       the folder below which the images are
    annotations  the COCO JSON, the VOC list of names or the YOLO label folder; None for a plain folder
    """

    format: str
    root: Path
    split: str
    images: Path
    annotations: Path | None


def corrupt(path: Path, record: str, reason: str) -> NoReturn:
    """Refuse an annotation file: which, where in it, and why."""
    raise UserError(f"{path}{', ' + record if record else ''}: {reason}.")


def list_images(folder: Path) -> list[Path]:
    """Image files below a folder, sorted by their path in it; hidden files and folders are none of the data.

    Sub-folders that are symbolic links are not entered (they may form a circle), links to files are taken.
    """
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [f for f in folders if not f.startswith(".")]
        for name in files:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES:
                found.append(Path(parent, name))
    return sorted(found, key=lambda p: p.relative_to(folder).as_posix())


class SafePaths:
    """Turns names that stand in one annotation file into paths inside of the data folder, or refuses them.

    A name may not be absolute, hold `..`, or lead over a symbolic link to a place outside of both the data root and
    the folder of images. (That folder itself may be a link: the user made it, no annotation did.)
    """

    def __init__(self, found: Found, base: Path) -> None:
        assert found.annotations is not None
        self.file = found.annotations
        self.base = base
        self.allowed = (os.path.realpath(found.root), os.path.realpath(base))
        self.checked_parents: set[str] = set()

    def __call__(self, name: Any, record: str) -> Path:
        check_name(name, self.file, record)
        path = os.path.join(self.base, name)
        # Almost all names share a parent, so a look at the last part of the path is enough for most.
        parent = os.path.dirname(path)
        if parent not in self.checked_parents:
            self._check_inside(parent, name, record)
            self.checked_parents.add(parent)
        if os.path.islink(path):
            self._check_inside(path, name, record)
        return Path(path)

    def _check_inside(self, path: str, name: str, record: str) -> None:
        real = os.path.realpath(path)
        if not any(real == top or real.startswith(top.rstrip(os.sep) + os.sep) for top in self.allowed):
            corrupt(self.file, record, f"the file name {name!r} leads over a symbolic link out of the data folder")


def check_name(name: Any, file: Path, record: str) -> str:
    """Return a file name; refuse a file name that is not a plain relative path downwards, on this or another system."""
    if not isinstance(name, str) or not name or "\0" in name or not _encodable(name):
        corrupt(file, record, f"a file name is expected, not {name!r}")
    windows = PureWindowsPath(name)  # knows both kinds of slashes
    if windows.drive or windows.root or ".." in windows.parts:
        corrupt(file, record, f"the file name {name!r} leads out of the data folder")
    return name


def _encodable(name: str) -> bool:
    """Whether the system can look for such a file: JSON may hold halves of characters."""
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return True
