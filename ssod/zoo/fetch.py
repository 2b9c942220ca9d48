"""From a zoo name to a file on this machine whose SHA-256 is right: of the package, the cache, or fetched now."""

from __future__ import annotations

import http.client
import os
import re
import sys
from pathlib import Path
from urllib.parse import urlsplit

from ssod import zoo
from ssod.errors import UserError, did_you_mean
from ssod.zoo import Entry

_HERE = ("localhost", "127.0.0.1", "::1")  # nobody is on the way to these


def resolve(model: str | Path) -> Path:
    """The file that a model's name or path means: of a zoo name its verified file, else the path as it is.

    Raises UserError for a name near to one of the zoo's, for one that is a file's here, too, and as `locate` does.
    """
    word = str(model)
    if not re.fullmatch(r"\w+", word):
        return Path(model)
    known = zoo.entries()
    here = Path(word).exists()
    if word in known:
        if here:
            raise UserError(f"'{word}' is in the zoo, and also a file or folder here: give ./{word} for the latter.")
        return locate(known[word])
    if not here and (near := did_you_mean(word, known)):
        raise UserError(f"the zoo has no '{word}'.{near} `ssod zoo` lists them.")
    return Path(model)


def locate(entry: Entry) -> Path:
    """The verified file of an entry, fetched and kept in the cache where the package does not hold it.

    Raises UserError for a damaged file, a URL that is not https, and where the file cannot be fetched.
    """
    from ssod.detectors.fetch import sha256  # brings torch, which the weights need in any case

    path = zoo.HOME / "weights" / entry.file if entry.file else cache_folder() / f"{entry.name}-{entry.sha256[:8]}"
    if entry.url:
        path = path.with_suffix(".safetensors")
    if not path.is_file():
        if entry.file:
            raise UserError(f"the zoo's {entry.name} is not there: {path} is missing; install ssod anew.")
        _download(entry, path)
    if sha256(path) != entry.sha256:
        way_out = "install ssod anew" if entry.file else "remove it, and it is fetched anew"
        raise UserError(f"{path} is damaged: its SHA-256 is not that of the zoo's {entry.name}; {way_out}.")
    return path


def cache_folder() -> Path:
    """SSOD_CACHE, else `ssod` in XDG_CACHE_HOME or ~/.cache; the zoo's files lie in its folder zoo."""
    own = os.environ.get("SSOD_CACHE")
    general = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return (Path(own) if own else Path(general) / "ssod") / "zoo"


def in_zoo(path: Path) -> bool:
    """Whether a file is one of the zoo's, so that nothing is to be written beside it."""
    return path.parent in (zoo.HOME / "weights", cache_folder())


def _download(entry: Entry, path: Path) -> None:
    from ssod.detectors.fetch import download

    assert entry.url is not None
    parts = urlsplit(entry.url)
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in _HERE):
        raise UserError(f"the zoo's {entry.name} lies at {entry.url}, which is not https; it is not fetched.")
    way_out = f"Put the file there by other means, as {path}."
    print(f"ssod: fetching {entry.name}, {entry.size / 1e6:.1f} MB, from {entry.url} to {path}", file=sys.stderr)
    try:
        found = download(entry.url, path, entry.sha256, entry.size)
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise UserError(f"the zoo's {entry.name}: {entry.url} could not be fetched ({reason}). {way_out}") from error
    if found != entry.sha256:
        raise UserError(f"the zoo's {entry.name}: what {entry.url} gave has the SHA-256 {found[:8]}..., not its own.")
