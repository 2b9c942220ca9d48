"""Images by URL: what is fetched, and what is refused, from a real server on this machine."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssod.data.image import ImageError
from ssod.deploy.sources import pictures
from ssod.deploy.url import _Redirects, check_url, fetch_image, is_url, name_of
from ssod.errors import UserError

PIXELS = np.random.default_rng(0).integers(0, 255, (30, 20, 3), dtype=np.uint8)


def png() -> bytes:
    file = BytesIO()
    Image.fromarray(PIXELS).save(file, "PNG")
    return file.getvalue()


class Site(BaseHTTPRequestHandler):
    """/a.png an image; /page no image; /cut half of one; /slow a byte now and then; /to?URL leads there; else 404."""

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        if path == "/to":
            self.send_response(302)
            self.send_header("Location", query)
            self.end_headers()
            return
        bodies = {"/a.png": png(), "/page": b"<html>no image</html>", "/cut": png()[:400], "/slow": b"."}
        if path not in bodies:
            self.send_error(404, "Not Found")
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/html" if path == "/page" else "image/png")
        self.end_headers()
        self.wfile.write(bodies[path])
        while path == "/slow" and not self.server.over.wait(0.05):  # type: ignore[attr-defined]
            try:
                self.wfile.write(b".")
            except OSError:
                return

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    server.over = threading.Event()  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.over.set()  # type: ignore[attr-defined]
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")


def test_an_image_by_its_url_leaves_nothing_on_the_disk(
    site: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    (picture,) = pictures(f"{site}/a.png?size=3")
    assert (picture.path, picture.name, picture.in_file) == (Path("a.png"), f"{site}/a.png?size=3", False)
    np.testing.assert_array_equal(picture.read(), PIXELS)
    np.testing.assert_array_equal(fetch_image(f"{site}/to?{site}/a.png"), PIXELS)
    assert not list(tmp_path.iterdir())


def test_the_fetch_waits_until_the_pixels_are_wanted() -> None:
    (picture,) = pictures("https://nobody.invalid/a.png")
    assert picture.pixels is None


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/none.png", "the server says 404 Not Found"),
        ("/page", r"not an image, or of an unsupported kind \(the server calls it text/html\)"),
        ("/cut", r"\(the server calls it image/png\)"),
        ("/to?file:///etc/hostname", "file:///etc/hostname' is not allowed"),
        ("/to?ftp://127.0.0.1/a.png", "leads on to ftp://127.0.0.1/a.png, which is not followed"),
        ("/to?http://example.org/a.png", "leads on to http://example.org/a.png, which is not followed"),
    ],
)
def test_what_is_no_image_and_where_no_redirect_leads(site: str, path: str, reason: str) -> None:
    with pytest.raises(ImageError, match=reason) as error:
        fetch_image(site + path)
    assert "\n" not in str(error.value)


def test_a_circle_of_redirects_ends(site: str) -> None:
    with pytest.raises(ImageError, match="the server says 302"):
        fetch_image(f"{site}/to?/to?{site}/to")


def test_a_server_elsewhere_cannot_lead_to_this_machine() -> None:
    class Request:
        full_url = "https://example.org/a.png"

    with pytest.raises(ImageError, match="leads on to https://localhost/secret"):
        _Redirects(False).redirect_request(Request(), BytesIO(), 302, "", {}, "https://localhost/secret")


def test_size_and_time_are_limited(site: str) -> None:
    with pytest.raises(ImageError, match="larger than 0 MiB"):
        fetch_image(f"{site}/a.png", max_bytes=100)
    start = time.monotonic()
    with pytest.raises(ImageError, match=r"took longer than 0\.3 seconds"):
        fetch_image(f"{site}/slow", seconds=0.3)  # each of its pieces comes in time
    assert time.monotonic() - start < 2


def test_a_server_that_is_not_there() -> None:
    with pytest.raises(ImageError, match="it cannot be had"):
        fetch_image("http://127.0.0.1:9/a.png")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://example.org/a.png", r"http is open to everybody on the way\. Use https://example.org/a.png"),
        ("ftp://example.org/a.png", "only https URLs"),
        ("file:///etc/passwd", "names no host"),
        ("file://localhost/etc/passwd", "only https URLs"),
        ("https:///a.png", "names no host"),
        ("https://[::1/a.png", "is not a URL"),
    ],
)
def test_urls_that_are_refused(url: str, words: str) -> None:
    assert is_url(url)
    with pytest.raises(UserError, match=words):
        list(pictures(url))


def test_names() -> None:
    assert [name_of(f"https://x.org{p}") for p in ("/a/b%20c.jpg?d=1", "/a/", "")] == ["b c.jpg", "a", "image.jpg"]
    assert not is_url("C:\\photos")
    assert not is_url("photos/a.jpg")
    check_url("http://localhost:8000/a.png")
    check_url("https://example.org/a.png")
