"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that appears under its name only when it is complete and safe on the disk; until then, and where writing
    fails, `path` is what it was before."""
    own = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(own, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(own, path)
    except BaseException:
        own.unlink(missing_ok=True)
        raise
