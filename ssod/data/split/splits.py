"""Which images of a training set count as labelled; the others lose their labels.

The choice depends on the seed and the names of the image files only: no random generator is involved, so that it is
the same on every machine and with every version of every library, whatever folder the data lie in. For one seed the
choices are nested: what 5 % chooses is among what 10 % chooses.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from ssod.data.samples import Sample, SampleTable
from ssod.errors import UserError

_SPECS = "a share such as 10%, a number of images, 'all', a .txt or .json file that lists images, or a fold's folder"


def choose_labeled(
    samples: Sequence[Sample], spec: str | int, seed: int, num_classes: int
) -> tuple[list[int], list[int]]:
    """Divide samples into (labelled, unlabelled): two ascending lists of positions, disjoint, together all.

    spec is one of
        "10%"        the share of images, rounded up; more only if the classes need it, see below
        200, "200"   the number of images, likewise
        "all"        every image; nothing is left unlabelled
        a file       .txt, one image a line, or .json, a list: names (with or without suffix or folders) or image ids;
                     or a COCO .json, whose images are meant; the annotations are those of the samples
        a folder     of `ssod split`, which holds such a labeled.json

    For a share and a number, every class that the samples hold is among the labelled ones, in at least one box that
    is not crowd. Classes are served from the rarest on, an image chosen for each that has none so far; the rest is
    filled up from all images alike. A list is taken as it is.

    Raises UserError for a spec that is none of these, a share or number out of range, an image that is unknown or not
    unique, and a choice without any box.
    """
    assert samples
    assert SampleTable.of(samples).labeled.all()
    spec = str(spec).strip()
    if (Path(spec) / "labeled.json").is_file():
        spec = str(Path(spec) / "labeled.json")
    if spec.lower().endswith((".txt", ".json")):
        chosen = _from_list(samples, Path(spec))
    elif spec == "all":
        chosen = set(range(len(samples)))
    else:
        chosen = _at_random(samples, _count(spec, len(samples)), seed, num_classes)
    if not any((~samples[i].crowd).any() for i in chosen):
        raise UserError(f"labeled={spec}: there is not one box in the {len(chosen)} labelled images; choose others.")
    return sorted(chosen), [i for i in range(len(samples)) if i not in chosen]


def _count(spec: str, n: int) -> int:
    """How many of n images a share or a number asks for."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(%?)", spec)
    if match is None:
        raise UserError(f"labeled={spec!r} is not understood; it is {_SPECS}.")
    number, percent = Fraction(match[1]), bool(match[2])  # exact: 7 % of 100 is 7, not 7.000000000000001
    if percent:
        if not 0 < number <= 100:
            raise UserError(f"labeled={spec}: a share lies above 0% and is at most 100%.")
        return -(-number * n // 100)
    if number.denominator != 1:
        share = f"{float(number * 100):g}%"
        raise UserError(f"labeled={spec}: a number of images is whole; did you mean labeled={share}?")
    if not 0 < number <= n:
        raise UserError(f"labeled={spec}: there are {n} training images; choose 1 to {n}, or a share such as 10%.")
    return int(number)


def _at_random(samples: Sequence[Sample], count: int, seed: int, num_classes: int) -> set[int]:
    table = SampleTable.of(samples)
    lots = [_lot(seed, name) for name in table.names()]
    order = sorted(range(len(samples)), key=lambda i: (lots[i], i))
    owner, labels, crowd = table.objects()
    present = np.zeros((len(samples), num_classes), np.bool_)
    present[owner[~crowd], labels[~crowd]] = True
    images_with = present.sum(axis=0)
    chosen: set[int] = set()
    covered = np.zeros(num_classes, np.bool_)
    for c in np.argsort(images_with, kind="stable"):  # the rarest first; of equals the first in the class list
        if images_with[c] and not covered[c]:
            first = next(i for i in order if present[i, c])
            chosen.add(first)
            covered |= present[first]
    for i in order:
        if len(chosen) >= count:
            break
        chosen.add(i)
    return chosen


def _lot(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}:{name}".encode("utf-8", "surrogateescape")).digest()


def _from_list(samples: Sequence[Sample], file: Path) -> set[int]:
    entries = _read_entries(file)
    by_name: dict[str, list[int]] = {}
    by_id = {s.image_id: i for i, s in enumerate(samples)}
    for i, sample in enumerate(samples):
        for name in {sample.path.name, sample.path.stem}:
            by_name.setdefault(name, []).append(i)
    # Numbers are ids only where none of them is a name: "000139" may well be the image 000139.jpg.
    are_ids = all(_is_integer(e) for e in entries) and not any(e in by_name for e in entries)
    chosen: set[int] = set()
    unknown = []
    for entry in entries:
        if are_ids:
            fits = [by_id[int(entry)]] if int(entry) in by_id else []
        else:
            # An entry may begin with folders; these are looked at only to tell images of one name apart.
            fits = by_name.get(Path(entry).name, [])
            if len(fits) > 1:
                fits = [i for i in fits if f"/{samples[i].path.as_posix()}".endswith(f"/{entry}")] or fits
        if len(fits) > 1:
            both = " and ".join(str(samples[i].path) for i in fits[:2])
            raise UserError(f"{file}: {entry!r} may be {both}; write enough of its folder to tell them apart.")
        chosen.update(fits)
        if not fits:
            unknown.append(entry)
    if unknown:
        few = ", ".join(unknown[:3]) + (", ..." if len(unknown) > 3 else "")
        raise UserError(f"{file}: {len(unknown)} of its {len(entries)} images are not in the training set ({few}).")
    return chosen


def _read_entries(file: Path) -> list[str]:
    try:
        text = file.read_text(encoding="utf-8-sig")
        content = json.loads(text) if file.suffix.lower() == ".json" else text.splitlines()
    except FileNotFoundError:
        raise UserError(f"labeled={file}: there is no such file (current folder: {Path.cwd()}).") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"labeled={file}: cannot be read as a list of images ({error}).") from error
    if isinstance(content, dict):
        content = _coco_names(content, file)
    if not isinstance(content, list) or not all(type(e) in (str, int) for e in content):
        raise UserError(f"labeled={file}: a list of image names or ids, or a COCO file, is expected.")
    entries = [str(e).strip() for e in content]
    entries = [e for e in entries if e]
    if not entries:
        raise UserError(f"labeled={file}: the list is empty; name at least one image.")
    return entries


def _coco_names(content: dict[str, Any], file: Path) -> list[Any] | None:
    """The file names of a COCO JSON, or None where it is not one."""
    info, images = content.get("info"), content.get("images")
    if isinstance(info, dict) and info.get("kind") == "sparse":
        raise UserError(
            f"labeled={file}: boxes were erased in this file, and labeled= would take them from the full annotations; "
            f"train with data={file.with_name('data.yaml')} instead."
        )
    if not isinstance(images, list) or not all(isinstance(i, dict) for i in images):
        return None
    return [image.get("file_name") for image in images]


def _is_integer(text: str) -> bool:
    return re.fullmatch(r"-?\d+", text) is not None
