"""COCO files record by record: what the plain parser would say, from the cache as from the file; large sets."""

from __future__ import annotations

import copy
import json
import os
import runpy
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from small_sets import CocoFolder, picture, refusal
from test_annotations import ODD_VALUES

from ssod.data import samples as kinds
from ssod.data.annotations import coco_parse
from ssod.data.annotations.coco_parse import CocoArrays, _parse_whole, parse
from ssod.data.annotations.sources import load_data
from ssod.data.image import ImageError
from ssod.data.reader import Reader
from ssod.data.samples import Dataset, count_problems
from ssod.errors import UserError

REPOSITORY = Path(__file__).parents[2]
IGNORE_FIXTURE = [HealthCheck.function_scoped_fixture]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SSOD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def outcome(function: Callable[[], Any]) -> Any:
    """What a call gives, or the sentence in which it refuses."""
    try:
        return function()
    except UserError as error:
        return str(error)


def assert_same_arrays(a: Any, b: Any) -> None:
    assert type(a) is type(b), (a, b)
    if not isinstance(a, CocoArrays):
        assert a == b
        return
    for field in fields(CocoArrays):
        one, other = getattr(a, field.name), getattr(b, field.name)
        if isinstance(one, np.ndarray):
            assert one.dtype == other.dtype, field.name
            assert np.array_equal(one, other, equal_nan=one.dtype.kind == "f"), field.name
        else:  # repr: NaN equals itself
            assert repr(one) == repr(other), field.name


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**25), 10**25)
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["images", "[", "}", "\\", '"', "\udc80", "a\0b", "ü"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
BOX = st.lists(st.integers(-5, 50) | st.floats(-5, 50), min_size=4, max_size=4)
IMAGE = st.fixed_dictionaries(
    {"id": st.integers(0, 9), "file_name": st.text(max_size=5) | VALUES},
    optional={"width": st.integers(0, 99), "height": VALUES, "more": VALUES},
)
ANNOTATION = st.fixed_dictionaries(
    {"id": st.integers(0, 9), "image_id": st.integers(0, 9), "category_id": st.integers(0, 3), "bbox": BOX},
    optional={"area": st.floats() | VALUES, "iscrowd": st.integers(0, 1), "segmentation": VALUES},
)
CONTENT = st.dictionaries(st.sampled_from(["info", "licenses", "x"]), VALUES, max_size=2).flatmap(
    lambda more: st.fixed_dictionaries(
        {},
        optional={
            "images": st.lists(IMAGE | VALUES, max_size=5) | VALUES,
            "annotations": st.lists(ANNOTATION | VALUES, max_size=6) | VALUES,
            "categories": st.lists(VALUES, max_size=3),
            **{key: st.just(value) for key, value in more.items()},
        },
    )
)


@settings(max_examples=250, deadline=None, suppress_health_check=IGNORE_FIXTURE)
@given(CONTENT, st.sampled_from([None, 1]), st.booleans(), st.integers(1, 60), st.integers(1, 4))
def test_record_by_record_is_the_plain_parser(
    tmp_path: Path, content: dict[str, Any], indent: int | None, ascii_: bool, chunk: int, batch: int
) -> None:
    """Whatever a JSON holds, and wherever the text is cut while it is read."""
    file = tmp_path / "a.json"
    text = json.dumps(content, indent=indent, ensure_ascii=ascii_)
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coco_parse, "_CHUNK", chunk)
        patch.setattr(coco_parse, "_BATCH", batch)
        if ascii_:  # else the text may hold what is no UTF-8
            patch.setattr(coco_parse, "_parse_whole", fails)
        streamed = outcome(lambda: parse(file))
    assert_same_arrays(streamed, outcome(lambda: _parse_whole(file)))


GOOD = json.dumps(
    {
        "info": {"year": 2017, "pi": 3.25},
        "images": [{"id": 7, "file_name": "ü.png", "width": 40, "height": 30}, {"id": 3, "file_name": "a.png"}],
        "annotations": [{"id": 1, "image_id": 7, "category_id": 9, "bbox": [1, 2, 10.5, 2e1], "iscrowd": 0}] * 3,
        "categories": [{"id": 9, "name": "pike"}],
    },
    ensure_ascii=False,
)


@settings(max_examples=400, deadline=None, suppress_health_check=IGNORE_FIXTURE)
@given(
    st.integers(0, len(GOOD)),
    st.integers(0, 3),
    st.sampled_from(list('{}[],:"x1 \n\0.')) | st.just(""),
    st.integers(1, 99),
)
@example(len(GOOD), 0, ",", 5)
@example(len(GOOD), 0, "{}", 5)
@example(len(GOOD) - 1, 0, ",", 5)
@example(0, 1, "[", 5)
def test_a_spoilt_file_is_refused_as_by_the_plain_parser(
    tmp_path: Path, at: int, lost: int, put: str, chunk: int
) -> None:
    file = tmp_path / "a.json"
    file.write_text(GOOD[:at] + put + GOOD[at + lost :], encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coco_parse, "_CHUNK", chunk)
        streamed = outcome(lambda: parse(file))
    assert_same_arrays(streamed, outcome(lambda: _parse_whole(file)))


def test_a_key_that_stands_twice(tmp_path: Path) -> None:
    """The last one counts, as in every JSON parser; the first leaves nothing behind."""
    file = tmp_path / "a.json"
    file.write_text(GOOD[:-1] + ', "annotations": [], "images": 5}', encoding="utf-8")
    assert_same_arrays(parse(file), _parse_whole(file))
    assert len(parse(file).owners) == 0
    assert parse(file).missing == ["images"]


# ----------------------------------------------------------------- the cache


def described(data: Dataset | str) -> Any:
    if isinstance(data, str):
        return data
    samples = [
        (s.path, s.image_id, s.width, s.height, s.boxes.tolist(), s.labels.tolist(), s.crowd.tolist(), s.labeled)
        + (None if s.areas is None else s.areas.tolist(),)
        for s in data.samples
    ]
    return samples, data.names, [str(p) for p in data.problems]


@pytest.fixture
def cached(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small files, too, are kept in the cache."""
    monkeypatch.setattr(coco_parse, "CACHE_FROM", 0)


def fails(*_: object) -> Any:
    pytest.fail("the file was parsed again")


@pytest.mark.filterwarnings("error")
def test_from_the_cache_as_from_the_file(coco_folder: CocoFolder, own_cache: Path) -> None:
    """Faults and problems of every kind, value by value."""
    good = coco_folder.content
    places = [(k, i, f) for k, records in good.items() for i, r in enumerate(records) for f in r][::2]
    compared = 0
    for n, (key, i, field) in enumerate(places):
        for odd in ODD_VALUES[n % 3 :: 3]:
            coco_folder.content = copy.deepcopy(good)
            coco_folder.content[key][i][field] = odd
            coco_folder.content["annotations"].append(
                {"id": 1, "image_id": 99, "category_id": 5, "bbox": [0, 0, 90, 1]}
            )
            yaml = coco_folder.write()
            plain = described(outcome(lambda: load_data(yaml, "train")))  # noqa: B023
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(coco_parse, "CACHE_FROM", 0)
                described(outcome(lambda: load_data(yaml, "train")))  # noqa: B023
                if any(own_cache.rglob("*.npz")):
                    patch.setattr(coco_parse, "_parse", fails)
                assert described(outcome(lambda: load_data(yaml, "train"))) == plain  # noqa: B023
                compared += 1
            for file in own_cache.rglob("*.npz"):
                file.unlink()
    assert compared > 50


@pytest.mark.usefixtures("cached")
def test_a_changed_file_is_read_anew(coco_folder: CocoFolder) -> None:
    assert len(load_data(coco_folder.write(), "train").samples[0].boxes) == 1
    coco_folder.content["annotations"] *= 2
    assert len(load_data(coco_folder.write(), "train").samples[0].boxes) == 2
    stat = coco_folder.json.stat()
    coco_folder.json.write_text(coco_folder.json.read_text().replace("pike", "bass"))
    os.utime(coco_folder.json, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))  # the same size, a moment later
    assert load_data(coco_folder.yaml, "train").names == ["carp", "bass"]


@pytest.mark.usefixtures("cached")
@settings(max_examples=60, deadline=None, suppress_health_check=IGNORE_FIXTURE)
@given(share=st.floats(0, 1, exclude_max=True), cut=st.booleans())
def test_a_damaged_cache_is_built_anew(tmp_path: Path, own_cache: Path, share: float, cut: bool) -> None:
    coco_parse.CACHE_FROM, before = 0, coco_parse.CACHE_FROM
    try:
        file = tmp_path / "a.json"
        file.write_text(GOOD, encoding="utf-8")
        whole = parse(file)
        [kept] = own_cache.rglob("*.npz")
        content = bytearray(kept.read_bytes())
        at = int(share * len(content))
        if cut:
            del content[at:]
        else:
            content[at] ^= 255
        kept.write_bytes(content)
        assert_same_arrays(parse(file), whole)
    finally:
        coco_parse.CACHE_FROM = before


@pytest.mark.usefixtures("cached")
def test_a_pickle_in_the_cache_is_not_opened(tmp_path: Path, own_cache: Path) -> None:
    file, fired = tmp_path / "a.json", tmp_path / "fired"
    file.write_text(GOOD, encoding="utf-8")

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (fired,)

    parse(file)
    [kept] = own_cache.rglob("*.npz")
    with np.load(kept) as stored:
        arrays = dict(stored)
    np.savez(kept, **(arrays | {"boxes": np.array([Bomb()], dtype=object)}))
    with np.load(kept, allow_pickle=True) as stored:
        stored["boxes"]
    assert fired.exists(), "the fault is not there"
    fired.unlink()
    assert len(parse(file).boxes) == 3
    assert not fired.exists()


@pytest.mark.usefixtures("cached")
def test_the_data_folder_is_never_written_to(coco_folder: CocoFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(coco_folder.root.rglob("*"))
    coco_folder.write()
    monkeypatch.setenv("SSOD_CACHE", str(coco_folder.json / "impossible"))
    assert len(load_data(coco_folder.yaml, "train")) == 2
    assert {*coco_folder.root.rglob("*")} - {*before} == {coco_folder.json.parent, coco_folder.json, coco_folder.yaml}


# ----------------------------------------------------------------- large sets: sizes are taken as told


@pytest.fixture
def trusting(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for more images than `TRUST_ABOVE`."""
    monkeypatch.setattr(kinds, "TRUST_ABOVE", 0)


@pytest.mark.parametrize("split", ["train", "unlabeled"])
def test_a_listed_set_is_the_set_that_was_opened(
    coco_folder: CocoFolder, split: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sub-folders, missing images, links, names out of the ordinary, images without a size, and one listed twice."""
    images = coco_folder.root / "images" / "train"
    picture(images / "deep" / "er" / "c.png", seed=3)
    picture(images / "deep" / "a..b ü.png", seed=4)
    os.symlink(images / "a.png", images / "link.png")
    extra = ["deep/er/c.png", "deep/./er/c.png", "deep/a..b ü.png", "gone.png", "no/folder.png", "link.png", "a.png"]
    coco_folder.content["images"] += [
        {"id": 20 + i, "file_name": name, "width": 40, "height": 30} for i, name in enumerate(extra)
    ]
    coco_folder.content["images"].append({"id": 40, "file_name": "b.png"})
    coco_folder.lines = [f"{split}: annotations/instances_train.json", "names: [carp, pike]"]
    yaml = coco_folder.write()
    opened = load_data(yaml, split)
    monkeypatch.setattr(kinds, "TRUST_ABOVE", 0)
    assert described(load_data(yaml, split)) == described(opened)
    assert count_problems(opened.problems) == {kinds.IMAGE_TWICE: 3, kinds.IMAGE_MISSING: 2}
    assert described(load_data(yaml, split, headers=True)) == described(opened)


@pytest.mark.usefixtures("trusting")
def test_no_header_is_opened_unless_asked(coco_folder: CocoFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    yaml, opened = coco_folder.write(), []
    real = kinds.image_size
    monkeypatch.setattr(kinds, "image_size", lambda path: (opened.append(path), real(path))[1])
    load_data(yaml, "train")
    assert opened == []
    load_data(yaml, "train", strict=True)
    load_data(yaml, "train", headers=True)
    assert len(opened) == 4


@pytest.mark.usefixtures("trusting")
@pytest.mark.parametrize("name", ["link.png", "folder/a.png"])
def test_a_link_out_of_the_data_is_refused(coco_folder: CocoFolder, tmp_path: Path, name: str) -> None:
    picture(tmp_path / "outside" / "a.png")
    os.symlink(tmp_path / "outside" / "a.png", coco_folder.root / "images" / "train" / "link.png")
    os.symlink(tmp_path / "outside", coco_folder.root / "images" / "train" / "folder")
    coco_folder.content["images"].append({"id": 9, "file_name": name, "width": 40, "height": 30})
    assert "symbolic link out of the data folder" in refusal(coco_folder.write())


@pytest.mark.usefixtures("trusting")
def test_another_size_shows_when_the_image_is_decoded(coco_folder: CocoFolder) -> None:
    coco_folder.content["images"][0] |= {"width": 30, "height": 40}
    coco_folder.content["annotations"][0]["bbox"] = [1, 2, 10, 33]
    yaml = coco_folder.write()
    data = load_data(yaml, "train")
    assert data.problems == []
    reader = Reader(data.samples, 20)
    assert reader[0].image.shape[1:] == (15, 20)
    with pytest.raises(ImageError, match="annotated as 30x40, but upright it is 40x30"):
        reader[1]
    unlabeled = Reader(data.samples.without_labels(), 20)
    assert unlabeled[1].image.shape[1:] == (15, 20), "without boxes any size will do"
    assert kinds.SIZE_DIFFERS in count_problems(load_data(yaml, "train", headers=True).problems)


def test_a_set_of_twenty_thousand_images_stays_small(tmp_path: Path) -> None:
    """In proportion, what 118,287 images and 860,001 boxes may take is 250 MB a process."""
    bench = runpy.run_path(str(REPOSITORY / "tests" / "bench" / "bench_index.py"))
    images, boxes = 20_500, 149_045
    yaml = bench["write_set"](tmp_path / "set", images, boxes, points=4)
    first, again = (bench["in_process"]("ours", yaml, tmp_path / "cache") for _ in range(2))
    assert first["boxes"] == again["boxes"] == boxes
    assert first["MB"] < 250 * images / 118_287
    assert again["MB"] < 250 * images / 118_287
    assert again["CPU seconds"] < first["CPU seconds"] / 2
