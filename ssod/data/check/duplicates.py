"""The same image twice: by its content, or by its looks.

Content is a hash of the decoded pixels (or of the file's bytes). Looks are a perceptual hash of 256 bits: the signs of
the 16 x 16 lowest frequencies of the grey image shrunk to 64 x 64, as the library imagehash computes them. Another
size, compression, brightness or a little noise changes few of these bits; photographs of different scenes differ in 70
and more as a rule. Images that were turned, mirrored or cropped by 3 % look different to it (docs/doctor.md).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

_TRAINED_ON = ("train", "unlabeled")
NEAR = 32  # bits of 256. Measured: re-compressed or shrunk <= 4, noise <= 8, 1.3 times as bright <= 22 (95 %)
_BITS, _BANDS = 256, 21
_WINDOW = 1024  # neighbours that an image is compared with in a band; more share one only in films of a still scene


@dataclass(frozen=True)
class Fingerprint:
    """content: 16 bytes, equal for equal content; looks: uint64 [4], or None where only bytes were read."""

    content: bytes
    looks: np.ndarray | None


@dataclass
class Overlap:
    """Images of split `a` found in split `b` (or twice in one): pairs (path in `a`, path in `b`).

    near: by their looks, the distance in bits of 256 stands in `distances`; otherwise by their content.
    """

    a: str
    b: str
    pairs: list[tuple[Path, Path]]
    near: bool = False
    distances: list[int] | None = None

    @property
    def spoils(self) -> bool:
        """Whether scores are worthless for it: the model has seen what it is tested on."""
        return (self.a in _TRAINED_ON) != (self.b in _TRAINED_ON)


def fingerprint(pixels: np.ndarray, looks: bool) -> Fingerprint:
    """Of decoded pixels uint8 [H, W, 3], or of a file's bytes uint8 [n] (then without looks)."""
    content = hashlib.blake2b(repr(pixels.shape).encode() + pixels.tobytes(), digest_size=16).digest()
    if not looks:
        return Fingerprint(content, None)
    from imagehash import phash  # brings scipy with it, which nothing else here needs

    bits = phash(Image.fromarray(pixels), hash_size=16).hash.reshape(-1)  # bool [256]
    return Fingerprint(content, np.packbits(bits).view(np.uint64))


def find_overlaps(splits: dict[str, list[tuple[Path, Fingerprint]]]) -> list[Overlap]:
    """What splits share with each other and repeat in themselves; `splits` in the order in which they are told.

    An image that has its equal by content in a split is not told again as near to it. Of images that look alike,
    each is paired with the nearest in the other split.
    """
    names = list(splits)
    # Of every content, once: the first path of it in each split, or None. E contents, S splits.
    first: dict[bytes, list[Path | None]] = {}
    looks: list[np.ndarray] = []
    exact: dict[tuple[int, int], list[tuple[Path, Path]]] = {}
    for s, entries in enumerate(splits.values()):
        for path, print_ in entries:
            if print_.content not in first:
                first[print_.content] = [None] * len(names)
                if print_.looks is not None:
                    looks.append(print_.looks)
            known = first[print_.content]
            for t in range(s + 1):
                earlier = known[t]
                if earlier is not None:
                    exact.setdefault((t, s), []).append((earlier, path))
            known[s] = known[s] or path
    overlaps = [Overlap(names[s], names[t], pairs) for (s, t), pairs in exact.items()]
    if looks:
        overlaps += _near_overlaps(names, list(first.values()), np.stack(looks))
    return overlaps


def _near_overlaps(names: list[str], paths: list[list[Path | None]], looks: np.ndarray) -> list[Overlap]:
    """paths [E][S]; looks uint64 [E, 4]."""
    member = np.array([[path is not None for path in row] for row in paths])  # [E, S]
    distance, other = nearest(looks, member)
    out = []
    for s, a in enumerate(names):
        for t, b in enumerate(names[s:], s):
            pairs: dict[tuple[Path, Path], int] = {}
            here = member[:, t] & (distance[:, s] <= NEAR) & ((s == t) | ~member[:, s])
            for e in np.flatnonzero(here).tolist():
                f = int(other[e, s])
                x, y = (paths[f][s], paths[e][t]) if s != t else (paths[min(e, f)][s], paths[max(e, f)][s])
                assert x is not None
                assert y is not None
                pairs[x, y] = int(distance[e, s])
            if pairs:
                ranked = sorted(pairs, key=lambda pair: pairs[pair])  # the most alike first
                out.append(Overlap(a, b, ranked, near=True, distances=[pairs[p] for p in ranked]))
    return out


def nearest(looks: np.ndarray, member: np.ndarray, limit: int = NEAR) -> tuple[np.ndarray, np.ndarray]:
    """For each of E images the nearest other one in each of S sets: (distance int64 [E, S], which int64 [E, S]).

    looks uint64 [E, 4], member bool [E, S]. Distances above `limit` read as 257, their `which` as -1. Of equally near
    ones the first. Only images that agree in one of 21 bands of 12 bits are compared, not all with all: a pair 24 bits
    apart is missed once in 2000 times, one 32 bits apart once in 100, one 12 bits apart never (pigeonhole: < 21).
    """
    count = len(looks)
    best = np.full(member.shape, 2**62)  # distance and index in one number, so that a minimum keeps both
    for band in _bands(looks):
        order = np.argsort(band, kind="stable")
        keys = band[order]
        for step in range(1, min(count, _WINDOW)):
            same = np.flatnonzero(keys[step:] == keys[:-step])
            if len(same) == 0:
                break
            i, j = order[same], order[same + step]
            apart = np.bitwise_count(looks[i] ^ looks[j]).sum(axis=1, dtype=np.int64)
            close = apart <= limit
            i, j, apart = i[close], j[close], apart[close]
            for x, y in ((i, j), (j, i)):
                for s in range(member.shape[1]):
                    inside = member[y, s]
                    np.minimum.at(best[:, s], x[inside], apart[inside] * 2**40 + y[inside])
    found = best < 2**62
    return np.where(found, best >> 40, _BITS + 1), np.where(found, best & (2**40 - 1), -1)


def _bands(looks: np.ndarray) -> list[np.ndarray]:
    """21 keys of 12 bits for every image, int64 [E] each; a key mixes low and high frequencies."""
    bits = np.unpackbits(looks.view(np.uint8), axis=1)  # [E, 256]
    width = _BITS // _BANDS
    weights = 1 << np.arange(width)
    return [bits[:, band::_BANDS][:, :width].astype(np.int64) @ weights for band in range(_BANDS)]
