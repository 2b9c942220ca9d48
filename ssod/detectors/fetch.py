"""`torchvision://NAME`: torchvision's own weights, downloaded because they were asked for."""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ssod.detectors.names_torchvision import NETWORKS
from ssod.errors import UserError, did_you_mean

SCHEME = "torchvision://"
TIMEOUT = 30  # seconds without a byte
CHUNK = 1 << 20

UrlOf = Callable[[str, str | None], str]  # network, weights or None for torchvision's default -> address


def published_url(network: str, weights: str | None) -> str:
    """torchvision's address of a network's weights; the file name ends in the start of its SHA-256.

    Raises UserError for a network that torchvision does not have or that cannot be loaded, and for unknown weights.
    """
    import torchvision

    classifiers = torchvision.models.list_models(module=torchvision.models)
    if network not in [*NETWORKS, *classifiers]:
        raise UserError(
            f"weights={SCHEME}{network} is none of torchvision's detectors {', '.join(NETWORKS)} and none of its "
            f"classification networks.{did_you_mean(network, [*NETWORKS, *classifiers])}"
        )
    known = torchvision.models.get_model_weights(network)
    if weights is None:
        return str(known.DEFAULT.url)
    if weights not in known.__members__:
        raise UserError(f"weights={SCHEME}{network}/{weights}: torchvision has {', '.join(known.__members__)} of it.")
    return str(known[weights].url)


def expected_hash(name: str) -> str | None:
    """The start of the SHA-256 that a published file's name carries, such as 0676ba61 in resnet50-0676ba61.pth."""
    found = re.search(r"-([0-9a-f]{8,64})\.[a-z]+$", name)
    return found[1] if found else None


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def fetch(address: str, url_of: UrlOf = published_url) -> Path:
    """The local file of `torchvision://NAME` or `torchvision://NAME/WEIGHTS`, downloaded where it is not there yet.

    It lies in torch.hub's folder (`torch.hub.get_dir()`/checkpoints), where torchvision would look for it, too. It gets
    its name only when it is complete and its SHA-256 is right; a failed download leaves nothing behind.
    Raises UserError for an unknown name, without a network, and for a file with another hash.
    """
    network, _, weights = address.removeprefix(SCHEME).partition("/")
    url = url_of(network, weights or None)
    name = url.rsplit("/", 1)[-1]
    wanted = expected_hash(name)
    if wanted is None:
        raise UserError(
            f"weights={address}: the file {name} carries no hash, so it cannot be checked; give weights=FILE."
        )
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    way_out = f"Put the file there by other means, as {path}, or give weights=FILE."
    if path.is_file():
        if not sha256(path).startswith(wanted):
            raise UserError(f"weights={address}: {path} is damaged, its SHA-256 is not {wanted}...; remove it.")
        return path
    try:
        found = download(url, path, wanted)
    except (OSError, http.client.HTTPException) as error:  # no network, no such host, a broken connection, a full disk
        reason = getattr(error, "reason", error)
        raise UserError(f"weights={address}: {url} could not be downloaded ({reason}). {way_out}") from error
    if not found.startswith(wanted):
        raise UserError(f"weights={address}: what {url} gave has the SHA-256 {found[:8]}..., not {wanted}. {way_out}")
    return path


class _StaysHttps(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if req.full_url.startswith("https:") and not newurl.startswith("https:"):
            fp.close()
            raise urllib.error.URLError(f"it leads on to {newurl}, which is not https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def download(url: str, path: Path, wanted: str, limit: int | None = None) -> str:
    """Write `url` to `path` if its SHA-256 begins with `wanted`; return the SHA-256.

    limit  bytes of the file at most. Raises OSError where it is larger or cannot be had, and leaves nothing behind.
    """
    digest, size = hashlib.sha256(), 0
    opener = urllib.request.build_opener(_StaysHttps)
    with opener.open(url, timeout=TIMEOUT) as source:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
        try:
            with open(temporary, "xb") as file:
                while chunk := source.read(CHUNK):
                    size += len(chunk)
                    if limit is not None and size > limit:
                        raise OSError(f"it is larger than the {limit} bytes that it should be")
                    digest.update(chunk)
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
            if digest.hexdigest().startswith(wanted):
                os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    return digest.hexdigest()
