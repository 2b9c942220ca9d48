"""Arrays kept in the user's cache folder, so that what took seconds to find out is read at once the next time.

A file here is never needed: one that is missing, stale or damaged counts as not there, and a folder that cannot be
written costs time and nothing else. Nothing in it can run code.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

_DAYS = 30  # a file that nobody has used for so long is removed
_SECONDS_A_DAY = 86_400


def cache_folder() -> Path:
    """$SSOD_CACHE, else ~/.cache/ssod."""
    return Path(os.environ.get("SSOD_CACHE") or Path.home() / ".cache" / "ssod")


def identity(file: str | os.PathLike[str]) -> str:
    """What changes when a file's content does: its path, size and time of change. Raises OSError."""
    about = os.stat(file)
    return f"{os.path.abspath(file)}|{about.st_size}|{about.st_mtime_ns}"


def place_of(kind: str, file: str | os.PathLike[str]) -> Path:
    """Where arrays of one kind about one file are kept: a new content of the file replaces the old arrays."""
    path = os.fsencode(os.path.abspath(file))
    return cache_folder() / kind / f"{hashlib.sha256(path).hexdigest()[:32]}.npz"


def load_arrays(place: Path, key: str) -> dict[str, np.ndarray] | None:
    """The arrays that `save_arrays` put there under this key, or None. The zip's check sums are verified."""
    try:
        with np.load(place, allow_pickle=False) as stored:
            if str(stored["key"]) != key:
                return None
            arrays = {name: stored[name] for name in stored.files if name != "key"}
        os.utime(place)  # used today
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError):
        return None
    return arrays


def save_arrays(place: Path, key: str, arrays: dict[str, np.ndarray]) -> None:
    """Keep arrays, whole or not at all. Silent where that is impossible (no space, a read-only home)."""
    with suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        sweep(place.parent)
        write_whole(place, lambda file: np.savez(file, **{"key": np.array(key), **arrays}))  # type: ignore[arg-type]


def write_whole(place: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write(file)` fill a temporary file that then takes the place of `place`. Raises OSError."""
    handle, temporary = tempfile.mkstemp(dir=place.parent, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
        os.replace(temporary, place)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def sweep(folder: Path, days: float = _DAYS) -> int:
    """Remove files that nobody has used for `days`, and unfinished ones older than one; returns how many."""
    now, removed = time.time(), 0
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(OSError):
                age = (now - entry.stat(follow_symlinks=False).st_mtime) / _SECONDS_A_DAY
                if entry.is_file(follow_symlinks=False) and age > (1 if entry.name.endswith(".part") else days):
                    os.unlink(entry.path)
                    removed += 1
    return removed
