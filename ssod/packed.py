"""A network in one small file: fp16 safetensors whose metadata say what it is, so that the file alone rebuilds it.

Metadata, all text: `ssod`, a card as JSON, and `sha256`, over the card and every tensor. Keys of the card:

    spec, names, imgsz, use, metrics   as in a checkpoint, see ssod.checkpoint
    about                              facts for people: data, strategy, AP, licences, the command that made it

Numbers with a fraction are stored as fp16 and read as float32; whole numbers (counters, tables) are kept.
"""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssod.errors import UserError
from ssod.files import replacing

SUFFIX = ".safetensors"
_HEADER = 100_000_000  # bytes, the largest that safetensors itself reads
_NEEDED = ("spec", "names", "imgsz", "use", "metrics")


def is_packed(path: Path) -> bool:
    """Whether an existing file is one of these and no other safetensors; `read_packed` says whether it is sound."""
    if path.suffix != SUFFIX:
        return False
    with open(path, "rb") as file:  # the header alone: other people's files are large
        first = file.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
        header = file.read(min(length, _HEADER))
    try:
        return "ssod" in json.loads(header).get("__metadata__", {})
    except (ValueError, AttributeError):
        return False


def write_packed(content: dict[str, Any], path: Path, about: dict[str, Any]) -> None:
    """Write the network `content["use"]` of a checkpoint's content; the file appears whole or not at all.

    Raises UserError for weights that fp16 cannot hold (beyond 65504), OSError where the file cannot be written.
    """
    from safetensors.torch import save

    state: dict[str, Tensor] = content["networks"][content["use"]]
    half = {k: (v.half() if v.is_floating_point() else v).contiguous().cpu() for k, v in state.items()}
    lost = [k for k, v in half.items() if v.is_floating_point() and not torch.isfinite(v).all()]
    if lost:
        raise UserError(f"'{lost[0]}' holds numbers beyond 65504, the largest of fp16, so {path.name} is not written.")
    card = json.dumps({k: content[k] for k in _NEEDED} | {"about": about})
    header, body = _parts(save(half))
    with replacing(path) as file:
        file.write(save(half, {"ssod": card, "sha256": _digest(card, header, body)}))


def read_packed(path: Path) -> dict[str, Any]:
    """The content of a checkpoint (ssod.checkpoint) with one network, float32, and the card's `about` beside it.

    Raises UserError for a file that is damaged or not one of these.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    raw = path.read_bytes()
    try:
        header, body = _parts(raw)
        told = header.get("__metadata__", {})
        if "ssod" not in told:
            raise UserError(f"{path} is a safetensors file, but was not written by ssod.")
        if _digest(told["ssod"], header, body) != told.get("sha256"):
            raise UserError(f"{path} is damaged: its SHA-256 does not match its content.")
        card = json.loads(told["ssod"])
        state = load(raw)
    except (ValueError, SafetensorError) as error:
        raise UserError(f"{path} is damaged or no safetensors file: {error}.") from None
    missing = [k for k in _NEEDED if not isinstance(card, dict) or k not in card]
    if missing:
        raise UserError(f"{path} does not say its {missing[0]}; it was written by another version of ssod.")
    if not isinstance(card["use"], str):
        raise UserError(f"{path} is damaged: its 'use' is not the name of a network.")
    state = {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
    return {k: card[k] for k in _NEEDED} | {"networks": {card["use"]: state}, "about": card.get("about", {})}


def _parts(raw: bytes) -> tuple[dict[str, Any], bytes]:
    """(header, tensors) of safetensors: eight bytes that count the header's, the header as JSON, the rest."""
    if len(raw) < 8:
        raise ValueError("it is shorter than its header")
    (length,) = struct.unpack("<Q", raw[:8])
    if length > len(raw) - 8:
        raise ValueError("it is shorter than its header")
    header = json.loads(raw[8 : 8 + length])
    if not isinstance(header, dict):
        raise ValueError("its header is no table")
    return header, raw[8 + length :]


def _digest(card: str, header: dict[str, Any], body: bytes) -> str:
    places = {k: v for k, v in header.items() if k != "__metadata__"}
    digest = hashlib.sha256(card.encode())
    digest.update(json.dumps(places, sort_keys=True).encode())
    digest.update(body)
    return digest.hexdigest()
