"""An image from the web: asked for by its URL, bounded in size and time, in memory only. Needs no torch.

Only https; http only from this machine itself (localhost), where nobody is in between. A redirect may not leave for
another kind of address, nor for this machine. This protects a user who types a URL, not a server that takes URLs from
strangers: inside a private network those can reach more than they should.
"""

from __future__ import annotations

import re
import threading
import urllib.error
import urllib.request
from io import BytesIO
from pathlib import PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import numpy as np

from ssod.data.image import ImageError, read_image
from ssod.errors import UserError

MAX_BYTES = 64 << 20
SECONDS = 30.0  # for everything: name look-up, redirects, body
_REDIRECTS = 5
_HERE = ("localhost", "127.0.0.1", "::1")


class _Answer(NamedTuple):
    body: bytes
    kind: str  # content type, as the server says


def is_url(text: str) -> bool:
    """Whether a source is written as a URL of any scheme."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text) is not None


def name_of(url: str) -> str:
    """What a file of that URL would be called: "https://x.org/a/bus.jpg?size=3" -> "bus.jpg"."""
    return PurePosixPath(unquote(urlsplit(url).path)).name or "image.jpg"


def check_url(url: str) -> None:
    """Raises UserError for a URL that is not asked for: another scheme than https, or no host."""
    try:
        parts = urlsplit(url)
        host = parts.hostname
    except ValueError as error:
        raise UserError(f"source {url} is not a URL: {error}.") from None
    if not host:
        raise UserError(f"source {url} names no host. A URL looks like https://example.org/photo.jpg.")
    if parts.scheme == "http" and host not in _HERE:
        raise UserError(f"source {url}: http is open to everybody on the way. Use https{url[4:]}.")
    if parts.scheme not in ("http", "https"):
        raise UserError(f"source {url}: only https URLs are fetched. Download it and give the file.")


def fetch_image(url: str, max_bytes: int = MAX_BYTES, seconds: float = SECONDS) -> np.ndarray:
    """Pixels uint8 [H, W, 3] RGB, upright, of the image at a URL; nothing is kept on disk.

    Raises ImageError where it cannot be had in time, is larger than `max_bytes`, or is no image; UserError for a URL
    that `check_url` refuses.
    """
    check_url(url)
    answer = _in_time(url, max_bytes, seconds)
    try:
        return read_image(url, stream=BytesIO(answer.body))
    except ImageError as error:
        raise ImageError(url, f"{error.reason} (the server calls it {answer.kind})") from None


def _in_time(url: str, max_bytes: int, seconds: float) -> _Answer:
    """A socket's own limit is for each of its pieces, and for a name look-up there is none: a thread can be left."""
    given: list[_Answer | BaseException] = []

    def work() -> None:
        try:
            given.append(_fetch(url, max_bytes, seconds))
        except BaseException as error:
            given.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if not given:
        raise ImageError(url, f"it took longer than {seconds:g} seconds")
    if isinstance(given[0], BaseException):
        raise given[0]
    return given[0]


def _fetch(url: str, max_bytes: int, seconds: float) -> _Answer:
    request = urllib.request.Request(url, headers={"User-Agent": "ssod", "Accept": "image/*"})
    opener = urllib.request.build_opener(_Redirects(urlsplit(url).hostname in _HERE))
    try:
        with opener.open(request, timeout=seconds) as response:
            body = response.read(max_bytes + 1)
            kind = response.headers.get_content_type()
    except UserError:
        raise
    except urllib.error.HTTPError as error:
        error.close()
        raise ImageError(url, f"the server says {error.code} {error.reason}") from None
    except urllib.error.URLError as error:
        raise ImageError(url, f"it cannot be had: {error.reason}") from None
    except Exception as error:  # what http.client raises of a broken answer has no common base
        raise ImageError(url, f"the answer broke off ({type(error).__name__}: {error})") from None
    if len(body) > max_bytes:
        raise ImageError(url, f"larger than {max_bytes >> 20} MiB")
    return _Answer(body, kind)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows a few redirects to addresses that could have been typed; to this machine only from itself."""

    max_redirections = _REDIRECTS

    def __init__(self, from_here: bool) -> None:
        self.from_here = from_here

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        try:
            check_url(newurl)
            allowed = self.from_here or urlsplit(newurl).hostname not in _HERE
        except UserError:
            allowed = False
        if not allowed:
            fp.close()
            raise ImageError(req.full_url, f"it leads on to {newurl}, which is not followed")
        return super().redirect_request(req, fp, code, msg, headers, newurl)
