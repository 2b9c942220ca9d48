"""Where one split lies on disk, and how names from annotation files become paths."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any, NoReturn

from ssod.data.image import IMAGE_SUFFIXES
from ssod.errors import UserError


@dataclass(frozen=True)
class Found:
    """One split. format: "COCO", "VOC", "YOLO", "YOLO list", "YOLO glob", or without labels "images" (a folder),
    "list", "glob".

    images       the folder below which the images are; of a glob, the pattern
    annotations  the COCO JSON, the VOC list of names, the YOLO label folder or the text list; None where there is none
    complete     False where the data YAML lists it as 'partial'
    """

    format: str
    root: Path
    split: str
    images: Path
    annotations: Path | None
    complete: bool = True


def corrupt(path: Path, record: str, reason: str) -> NoReturn:
    """Refuse an annotation file: which, where in it, and why."""
    raise UserError(f"{path}{', ' + record if record else ''}: {reason}.")


def is_image(name: str) -> bool:
    """Whether a file's name looks like that of an image; hidden files do not."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def walk_images(folder: Path) -> Iterator[Path]:
    """Image files below a folder, sorted by their path in it; hidden files and folders are none of the data.

    Sub-folders that are symbolic links are not entered (they may form a circle), links to files are taken.
    At any time only the names of the folders on the way to the current image are in memory.
    """
    with os.scandir(folder) as entries:
        # A folder sorts as if its name ended in "/": then going depth first gives the order of the whole paths.
        names = [
            f"{entry.name}/" if entry.is_dir(follow_symlinks=False) else entry.name
            for entry in entries
            if not entry.name.startswith(".") and not (entry.is_symlink() and entry.is_dir())
        ]
    for name in sorted(names):
        if name.endswith("/"):
            yield from walk_images(folder / name)
        elif is_image(name):
            yield folder / name


def list_images(folder: Path) -> list[Path]:
    """`walk_images` as a list."""
    return list(walk_images(folder))


class SafePaths:
    """Turns names that stand in one annotation file into paths inside of the data folder, or refuses them.

    A name may not be absolute, hold `..`, or lead over a symbolic link to a place outside of both the data root and
    the folder of images. (That folder itself may be a link: the user made it, no annotation did.) `also` lists more
    folders that may be links.
    """

    def __init__(self, found: Found, base: Path, also: Sequence[Path] = ()) -> None:
        assert found.annotations is not None
        self.file = found.annotations
        self.base = base
        self.allowed = tuple(os.path.realpath(top) for top in (found.root, base, *also))
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

    def absolute(self, name: str, record: str) -> Path:
        """The path itself where it lies in the data folder."""
        if os.path.realpath(name) != os.path.normpath(name):
            self._check_inside(name, name, record)
        elif not self._inside(os.path.normpath(name)):
            corrupt(self.file, record, f"the file name {name!r} leads out of the data folder")
        return Path(name)

    def _inside(self, real: str) -> bool:
        return any(real == top or real.startswith(top.rstrip(os.sep) + os.sep) for top in self.allowed)

    def _check_inside(self, path: str, name: str, record: str) -> None:
        if not self._inside(os.path.realpath(path)):
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
