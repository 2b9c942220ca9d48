"""Kept images are the decoded ones: found again by later runs, told apart by content, never trusted when damaged."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_sets import picture

import ssod.data.reader as reader_module
from ssod.data.cache import DiskCache, open_cache, shrunk
from ssod.data.image import ImageError, image_size
from ssod.data.reader import Reader
from ssod.data.samples import Sample, SampleTable
from ssod.data.store import sweep
from ssod.data.views.geometry import fitted
from ssod.data.views.operations import Frame
from ssod.errors import UserError

SIDES = [(40, 30), (30, 80), (64, 64), (20, 11)]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder."""
    monkeypatch.setenv("SSOD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    paths = [picture(tmp_path / "images" / f"bild {i}.png", w, h, seed=i) for i, (w, h) in enumerate(SIDES)]
    return [Sample.unlabeled(path, i, *image_size(path)) for i, path in enumerate(paths)]


def frames(samples: list[Sample], limit: int, kind: bool | str) -> list[Frame]:
    """Every image twice, the second time from the cache where there is one."""
    table = SampleTable.of(samples)
    reader = Reader(table, limit, open_cache(kind, table, limit))
    return [reader[i] for _ in range(2) for i in range(len(reader))]


def assert_same(a: list[Frame], b: list[Frame]) -> None:
    for one, other in zip(a, b, strict=True):
        assert torch.equal(one.image, other.image)
        assert np.allclose(one.matrix, other.matrix, rtol=1e-15)


def no_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(path: Path, stream: object) -> np.ndarray:
        raise ImageError(path, "read again")

    monkeypatch.setattr(reader_module, "read_image", read)


@pytest.mark.parametrize("limit", [16, 50, 1000])
@pytest.mark.parametrize("kind", ["ram", "disk", True])
def test_a_kept_image_is_the_decoded_one(samples: list[Sample], kind: bool | str, limit: int) -> None:
    assert_same(frames(samples, limit, kind), frames(samples, limit, False))


@given(st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 5000)), min_size=1), st.integers(16, 2000))
def test_shapes_are_those_of_the_resize(sizes: list[tuple[int, int]], limit: int) -> None:
    for (w, h), shape in zip(sizes, shrunk(np.array(sizes, np.int32), limit).tolist(), strict=True):
        assert tuple(shape) == ((h, w) if max(h, w) <= limit else fitted(h, w, limit))


def test_an_image_of_another_size_is_not_kept_in_memory(samples: list[Sample]) -> None:
    wrong = [replace(samples[0], width=31), replace(samples[1], width=0, height=0)]
    assert_same(frames(wrong, 50, "ram"), frames(wrong, 50, False))
    assert_same(frames(wrong, 50, "disk"), frames(wrong, 50, False))


def test_a_later_run_decodes_nothing(samples: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    first = frames(samples, 50, "disk")
    no_reading(monkeypatch)
    assert_same(frames(samples, 50, "disk"), first)
    assert_same(frames(samples[1:3], 50, "disk")[:2], first[1:3])  # another choice of the same images
    with pytest.raises(ImageError, match="read again"):
        frames(samples, 40, "disk")  # other settings


def test_a_changed_image_is_decoded_anew(samples: list[Sample]) -> None:
    frames(samples, 50, "disk")
    path = picture(samples[0].path, *SIDES[0], seed=77)
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert_same(frames(samples, 50, "disk"), frames(samples, 50, False))


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1, exclude_max=True), cut=st.booleans())
def test_a_damaged_file_is_not_used(samples: list[Sample], folder: Path, share: float, cut: bool) -> None:
    wanted = frames(samples[:1], 50, False)
    assert_same(frames(samples[:1], 50, "disk"), wanted)
    [kept] = [file for file in folder.rglob("*") if file.is_file()]
    content = bytearray(kept.read_bytes())
    at = int(share * len(content))
    if cut:
        del content[at:]
    else:
        content[at] ^= 255
    kept.write_bytes(content)
    assert_same(frames(samples[:1], 50, "disk"), wanted)
    assert kept.stat().st_size == 28 + 3 * 40 * 30


def test_a_disk_too_small_is_refused_before_anything_is_written(
    samples: list[Sample], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=15_000))
    with pytest.raises(UserError, match=r"cache=disk would write .* GiB to .*cache.*SSOD_CACHE"):
        frames(samples, 50, "disk")
    assert not [file for file in folder.rglob("*") if file.is_file()]
    monkeypatch.undo()
    monkeypatch.setenv("SSOD_CACHE", str(folder))
    frames(samples, 50, "disk")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    frames(samples, 50, "disk")  # all there already: needs no more space


def test_a_folder_that_cannot_be_written(samples: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSOD_CACHE", str(samples[0].path))
    with pytest.raises(UserError, match="cache=disk cannot write to"):
        frames(samples, 50, "disk")


def test_a_disk_that_becomes_full_costs_no_image(samples: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    table = SampleTable.of(samples)
    cache = DiskCache(table, 50)
    monkeypatch.setattr(os, "replace", full)
    reader = Reader(table, 50, cache)
    assert_same([reader[i] for i in range(4)], frames(samples, 50, False)[:4])
    assert not [file for file in cache.folder.rglob("*") if file.is_file()], "no unfinished file is left"


def test_labelled_images_of_another_size_are_left_out_of_the_cache_too(samples: list[Sample]) -> None:
    frames(samples, 50, "disk")  # an unlabelled run has kept it
    wrong = replace(samples[0], width=99, labeled=True)
    with pytest.raises(ImageError, match="annotated as 99x30, but upright it is 40x30"):
        frames([wrong], 50, "disk")
    right = [replace(sample, labeled=True) for sample in samples]
    assert_same(frames(right, 16, "disk"), frames(right, 16, False))


def test_files_unused_for_a_month_are_removed(samples: list[Sample], folder: Path) -> None:
    frames(samples, 50, "disk")
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    old = time.time() - 31 * 86_400
    for file in files[:2]:
        os.utime(file, (old, old))
    week = time.time() - 7 * 86_400
    os.utime(files[2], (week, week))
    unfinished = files[3].with_name("x.part")
    unfinished.touch()
    os.utime(unfinished, (week, week))
    DiskCache(SampleTable.of(samples), 50)
    assert sorted(file for file in folder.rglob("*") if file.is_file()) == files[2:]
    frames(samples, 50, "disk")
    assert files[2].stat().st_mtime > time.time() - 60, "used again, kept again"
    assert sweep(folder / "nowhere") == 0
