"""Which images a user means: an image, a folder, a text list, a glob, or several of these.

Everything comes one path at a time, so that millions of images cost no more memory than the names of the largest
single folder among them.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from ssod.data import samples as kinds
from ssod.data.annotations.found import Found, SafePaths, corrupt, is_image, walk_images
from ssod.data.samples import Inspector
from ssod.errors import UserError

_LOOK_AT = 100  # entries of a list that decide which folder its names are relative to


def is_glob(text: str) -> bool:
    return glob.has_magic(text)


def glob_images(pattern: Path) -> list[Path]:
    """Image files that a pattern matches (`**` goes through sub-folders), sorted."""
    return sorted(p for p in map(Path, glob.glob(str(pattern), recursive=True)) if is_image(p.name) and p.is_file())


def find_images(source: str | Path | Sequence[str | Path]) -> list[Path]:
    """`iter_images` as a list."""
    return list(iter_images(source))


def iter_images(source: str | Path | Sequence[str | Path]) -> Iterator[Path]:
    """Image files of an image, a folder, a text list (.txt, one path a line), a glob, or of a sequence of these.

    Folders and globs are sorted by path, lists keep their order. Paths in a list may be absolute, or relative to the
    list or to the current folder. A list's images need not exist; whoever opens them says so.
    Raises UserError where one of the sources holds no image.
    """
    if not isinstance(source, str | Path):
        for part in source:
            yield from iter_images(part)
        return
    path = Path(source).expanduser()
    if path.is_file():
        found = _of_list(path) if path.suffix.lower() == ".txt" else iter([path])
    elif path.is_dir():
        found = walk_images(path)
    else:
        found = iter(glob_images(path))
    first = next(found, None)
    if first is None:
        raise UserError(
            f"{source}: no image there. Give an image, a folder, a list of paths (.txt) or a glob such as "
            "'photos/*.jpg'."
        )
    yield first
    yield from found


def _of_list(file: Path) -> Iterator[Path]:
    base = _base_of(file, [file.parent, Path()])
    return (base / entry for _, entry in _entries(file))  # joining an absolute path gives that path


def listed_images(found: Found, inspector: Inspector) -> list[Path]:
    """Paths that the text list of a data YAML names, in its order, each once.

    Unlike a list on the command line it may come with somebody else's data, so its names may not lead out of the
    data folder. (`images` in that folder may be a link, as `ssod label` makes it.)
    """
    assert found.annotations is not None
    base = _base_of(found.annotations, [found.annotations.parent, found.root])
    to_path = SafePaths(found, base, also=[top / "images" for top in (base, found.root)])
    seen: dict[Path, str] = {}
    for record, entry in _entries(found.annotations):
        path = to_path.absolute(entry, record) if os.path.isabs(entry) else to_path(entry, record)
        if path in seen:
            inspector.report(kinds.IMAGE_TWICE, found.annotations, record, f"{entry} stands in {seen[path]}, too")
        seen.setdefault(path, record)
    return list(seen)


def _entries(file: Path) -> Iterator[tuple[str, str]]:
    """(which line, path as written) of a text list, blank lines left out."""
    try:
        with open(file, encoding="utf-8-sig", errors="surrogateescape") as stream:
            for number, line in enumerate(stream, 1):
                entry = line.strip()
                if "\0" in entry:
                    corrupt(file, f"line {number}", "a list of image paths is expected, this is a binary file")
                if entry:
                    yield f"line {number}", entry
    except OSError as error:
        corrupt(file, "", f"cannot be read as a list of image paths ({error.strerror})")


def _base_of(file: Path, folders: list[Path]) -> Path:
    """The folder that a list's relative names are relative to: of those given, that which has most of the first."""
    names = [entry for _, entry in islice(_entries(file), _LOOK_AT)]
    for number, name in enumerate(names, 1):
        if os.path.splitext(name)[1] == "":
            reason = "the path of an image is expected (a Pascal VOC list must lie in ImageSets/Main)"
            corrupt(file, f"entry {number}", f"{reason}, not {name!r}")
    return max(folders, key=lambda folder: sum(os.path.isfile(folder / name) for name in names))  # the first of equals
