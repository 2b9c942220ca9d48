"""`torchvision://NAME`: a real server, a real missing network, and no leftovers."""

import hashlib
import http.server
import threading

import pytest
import torch

from ssod.detectors.convert import BackboneWeights, read_weights
from ssod.detectors.fetch import expected_hash, fetch, published_url
from ssod.detectors.names_torchvision import NETWORKS
from ssod.errors import UserError


@pytest.fixture
def cache(tmp_path):
    """torch.hub's folder, for this test."""
    before = torch.hub.get_dir()
    torch.hub.set_dir(str(tmp_path / "hub"))
    yield tmp_path / "hub" / "checkpoints"
    torch.hub.set_dir(before)


class Server:
    """Serves `files` and counts requests; "cut" files end before their announced length."""

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.cut: set[str] = set()
        self.requests = 0
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                server.requests += 1
                name = self.path.lstrip("/")
                if name not in server.files:
                    self.send_error(404)
                    return
                body = server.files[name]
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: len(body) // 2] if name in server.cut else body)

            def log_message(self, *_):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def add(self, body: bytes, digest: str | None = None) -> str:
        """The address of a file whose name carries its hash (or a wrong one)."""
        name = f"net-{digest or hashlib.sha256(body).hexdigest()[:8]}.pth"
        self.files[name] = body
        return f"http://127.0.0.1:{self.http.server_address[1]}/{name}"


@pytest.fixture
def server():
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def test_a_file_is_downloaded_once_and_read(cache, server, tmp_path):
    torch.save({"conv1.weight": torch.ones(2)}, tmp_path / "x.pth")
    url = server.add((tmp_path / "x.pth").read_bytes())
    asked = []

    def url_of(network, weights):
        asked.append((network, weights))
        return url

    found = read_weights("torchvision://resnet50/IMAGENET1K_V1", url_of)
    assert isinstance(found, BackboneWeights)
    assert torch.equal(found.tensors["conv1.weight"], torch.ones(2))
    assert [p.name for p in cache.iterdir()] == [url.rsplit("/", 1)[1]]
    assert fetch("torchvision://resnet50", url_of) == cache / url.rsplit("/", 1)[1]
    assert server.requests == 1
    assert asked == [("resnet50", "IMAGENET1K_V1"), ("resnet50", None)]


def one_sentence(address, url):
    with pytest.raises(UserError) as error:
        fetch(address, lambda *_: url)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.fault(30)
def test_a_wrong_hash_is_refused_and_nothing_stays(cache, server):
    url = server.add(b"something else", digest="0123abcd")
    said = one_sentence("torchvision://resnet50", url)
    assert "has the SHA-256" in said
    assert "not 0123abcd" in said
    assert f"as {cache / 'net-0123abcd.pth'}, or give weights=FILE" in said
    assert list(cache.iterdir()) == []


@pytest.mark.fault(30)
def test_a_cut_download_is_refused_and_nothing_stays(cache, server):
    url = server.add(b"x" * 5_000_000)
    server.cut.add(url.rsplit("/", 1)[1])
    assert "give weights=FILE" in one_sentence("torchvision://resnet50", url)
    assert list(cache.iterdir()) == []


def test_a_missing_file_says_why(cache, server):
    url = server.add(b"x").replace("net-", "gone-")
    assert "could not be downloaded (Not Found)" in one_sentence("torchvision://resnet50", url)
    assert not cache.exists()


def test_without_a_network_one_sentence_says_the_way_out(cache, server):
    url = server.add(b"x")
    server.http.shutdown()
    server.http.server_close()  # nobody listens there any more
    said = one_sentence("torchvision://resnet50", url)
    assert f"torchvision://resnet50: {url} could not be downloaded (" in said
    assert f"Put the file there by other means, as {cache / url.rsplit('/', 1)[1]}, or give weights=FILE." in said
    assert not cache.exists()


def test_a_host_without_an_address_is_the_same(cache):
    said = one_sentence("torchvision://resnet50", "https://no-such-host.invalid/net-0123abcd.pth")
    assert "could not be downloaded" in said
    assert not cache.exists()


def test_a_damaged_file_in_the_cache_is_not_used(cache, server):
    url = server.add(b"good")
    path = fetch("torchvision://resnet50", lambda *_: url)
    path.write_bytes(b"bad")
    assert f"{path} is damaged" in one_sentence("torchvision://resnet50", url)
    assert server.requests == 1


def test_a_file_put_there_by_hand_needs_no_network(cache):
    cache.mkdir(parents=True)
    name = f"net-{hashlib.sha256(b'mine').hexdigest()[:8]}.pth"
    (cache / name).write_bytes(b"mine")
    assert fetch("torchvision://resnet50", lambda *_: f"https://no-such-host.invalid/{name}") == cache / name


@pytest.mark.parametrize("name", [*NETWORKS, "resnet50", "resnet101", "resnext50_32x4d"])
def test_published_addresses_are_secure_and_carry_a_hash(name):
    url = published_url(name, None)
    assert url.startswith("https://")
    assert expected_hash(url.rsplit("/", 1)[1])


def test_weights_can_be_named():
    assert published_url("resnet50", "IMAGENET1K_V1") != published_url("resnet50", "IMAGENET1K_V2")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("torchvision://resnet49", r"resnet49 is none of torchvision's detectors fcos.*Did you mean 'resnet"),
        ("torchvision://fcos_resnet50", r"Did you mean 'fcos_resnet50_fpn'"),
        ("torchvision://ssd300_vgg16", r"none of torchvision's detectors"),
        ("torchvision://fasterrcnn_resnet50_fpn_v2", r"Did you mean 'fasterrcnn_resnet50_fpn'"),
        (
            "torchvision://resnet50/COCO_V1",
            r"resnet50/COCO_V1: torchvision has IMAGENET1K_V1, IMAGENET1K_V2, DEFAULT",
        ),
    ],
)
def test_unknown_names_are_refused_before_any_download(cache, address, message):
    with pytest.raises(UserError, match=message):
        read_weights(address)
    assert not cache.exists()
