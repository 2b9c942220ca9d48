"""No GPL and no AGPL in what an install brings, and docs/licences.md names it all."""

from __future__ import annotations

import re
import sys
from importlib.metadata import version

import pytest
from licence_page import ROOT, closure, forbidden, licence, wanted


def test_nothing_is_under_a_licence_that_would_bind_the_user() -> None:
    found = closure(wanted())
    assert len(found) > 30
    assert {name: licence(one) for name, one in found.items() if forbidden(licence(one))} == {}


def _pinned() -> bool:
    """Whether this environment is the one that the page is about: other versions bring other packages."""
    pins = dict(re.findall(r"(?m)^([\w.-]+)==([^\s;]+)", (ROOT / "constraints.txt").read_text(encoding="utf-8")))
    installed = {name: version(name).split("+")[0] for name in ("timm", "openvino", "tensorboard")}
    return sys.version_info >= (3, 11) and all(pins[name] == v for name, v in installed.items())


@pytest.mark.skipif(not _pinned(), reason="the page is about the versions of constraints.txt, on Python 3.11 and later")
def test_the_page_names_them() -> None:
    named = set(re.findall(r"(?m)^\| (\S+) \|", (ROOT / "docs" / "licences.md").read_text(encoding="utf-8")))
    # CUDA's packages come and go with torch's build.
    own = {name for name in closure(wanted()) if not name.startswith(("nvidia-", "cuda-", "triton"))}
    assert own <= named, "python tests/licence_page.py > docs/licences.md"


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("GPL-3.0-only", True),
        ("GNU Affero General Public License v3", True),
        ("GNU General Public License v2 or later (GPLv2+)", True),
        ("LGPL-3.0-or-later", False),
        ("GNU Lesser General Public License v3 (LGPLv3)", False),
        ("MIT OR GPL-2.0-only", False),
        ("Apache-2.0", False),
    ],
)
def test_the_rule(text: str, wrong: bool) -> None:
    assert forbidden(text) == wrong
