"""Checkpoints: written atomically, verified when read, never able to run code.

A checkpoint is an ordinary `torch.save` file of tensors and primitives whose zip comment carries the SHA-256 of
everything before it, so `torch.load(path, weights_only=True)` reads it too. A packed network (ssod.packed) is read as
a checkpoint of one network. Keys:

    format      int, FORMAT
    spec        what rebuilds the detector: build_detector(**spec)
    names       class names, in label order
    imgsz       long side it was trained at, pixels
    use         "student" or "teacher": the network that scored better, which val, predict and export take
    metrics     AP of each network when it was saved, step, seed, versions
    networks    {"student": state_dict, "teacher": state_dict}
    train       last.pt only: all that resuming needs (strategy, optimizer, scaler, step, config)
"""

from __future__ import annotations

import hashlib
import io
import os
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch

from ssod.errors import UserError, first_line
from ssod.packed import SUFFIX, is_packed, read_packed

FORMAT = 1
_MARK = b"ssod-sha256:"
_COMMENT = len(_MARK) + 64
_TEMPORARY = ".partial"


class CheckpointError(UserError):
    """A checkpoint that is damaged, foreign or unsafe."""


def save_checkpoint(content: dict[str, Any], path: Path, keep: Path | None = None) -> None:
    """Write `content` so that after a crash at any moment `path` is either the old file or the new one.

    keep: where the old file goes; a crash between the two renames leaves it there and no `path`.

    Raises OSError (disk full, no permission) and leaves the old file as it was.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    body = buffer.getbuffer()[:-2]  # an empty zip comment is its length, two zero bytes, at the very end
    digest = hashlib.sha256(body).hexdigest().encode()
    temporary = path.with_name(f".{path.name}.{os.getpid()}{_TEMPORARY}")
    try:
        with open(temporary, "wb") as file:
            file.write(body)
            file.write(struct.pack("<H", _COMMENT) + _MARK + digest)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)  # the rename itself must reach the disk
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def sweep(folder: Path) -> None:
    """Remove what a killed writer left behind."""
    for stray in folder.glob(f".*{_TEMPORARY}"):
        stray.unlink(missing_ok=True)


def is_checkpoint(path: Path) -> bool:
    """Whether an existing file ends as ours do, or is packed; `load_checkpoint` says whether it is sound."""
    if is_packed(path):
        return True
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - _COMMENT))
        return file.read().startswith(_MARK)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read and verify a checkpoint; tensors on the CPU.

    Raises CheckpointError when the file is missing, damaged, not one of ours, or holds anything but tensors
    and primitives (such a file could run code; it is not run).
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}.")
    if path.suffix == SUFFIX:
        try:
            return {"format": FORMAT} | read_packed(path)
        except UserError as error:
            raise CheckpointError(str(error)) from None
    raw = path.read_bytes()
    if raw[-_COMMENT : -_COMMENT + len(_MARK)] != _MARK:
        known = zipfile.is_zipfile(path)
        what = "has no ssod checksum: it is truncated or was not written by ssod" if known else "is not a checkpoint"
        raise CheckpointError(f"{path} {what}.")
    if hashlib.sha256(memoryview(raw)[: -_COMMENT - 2]).hexdigest().encode() != raw[-64:]:
        raise CheckpointError(f"{path} is damaged: its SHA-256 does not match its content.")
    try:
        content = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a file it will not read
        raise CheckpointError(
            f"{path} holds something other than tensors and plain values: {first_line(error)}"
        ) from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else None
        raise CheckpointError(f"{path} has format {found}; this version of ssod reads format {FORMAT}.")
    return content


def check_networks(content: dict[str, Any], path: str | Path) -> None:
    """Raises CheckpointError where what describes the networks is not of the form at the top of this file."""
    names, networks, spec = content.get("names"), content.get("networks"), content.get("spec")
    sound = {
        "spec": isinstance(spec, dict),
        "names": isinstance(names, list) and all(isinstance(n, str) for n in names),
        "num_classes": isinstance(spec, dict) and isinstance(names, list) and spec.get("num_classes") == len(names),
        "imgsz": isinstance(content.get("imgsz"), int | list | tuple),
        "use": isinstance(content.get("use"), str),
        "metrics": isinstance(content.get("metrics"), dict),
        "networks": isinstance(networks, dict)
        and all(isinstance(n, dict) for n in networks.values())
        and all(isinstance(v, torch.Tensor) for n in networks.values() for v in n.values()),
    }
    if wrong := [key for key, fine in sound.items() if not fine]:
        raise CheckpointError(f"{path} was not written by ssod, or is damaged: its '{wrong[0]}' is not one.")


def load_last_good(folder: Path, names: tuple[str, ...] = ("last.pt", "previous.pt")) -> tuple[dict[str, Any], str]:
    """The first of `names` in `folder` that verifies, and a sentence about those that did not ("" if none).

    Raises CheckpointError when none does.
    """
    said: list[str] = []
    for name in names:
        try:
            return load_checkpoint(folder / name), " ".join(said)
        except CheckpointError as error:
            said.append(str(error))
    raise CheckpointError(" ".join(said))
