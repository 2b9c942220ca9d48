"""Tars of images: found, indexed once, read at any place; damage is said and costs no more than it must."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small_sets import YoloFolder, picture, refusal

from ssod.config import load_config
from ssod.data.annotations import shards
from ssod.data.annotations.shards import find_tars, read_tars
from ssod.data.annotations.sources import load_data
from ssod.data.check.doctor import check_data
from ssod.data.image import ImageError, read_image
from ssod.data.loader import build_loader
from ssod.data.reader import Reader
from ssod.data.samples import IMAGE_TWICE, IMAGE_UNREADABLE, SHARD_DAMAGED, Inspector, count_problems
from ssod.data.views.transforms import pipeline
from ssod.engine.setup import build_data
from ssod.errors import UserError


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSOD_CACHE", str(tmp_path / "cache"))


def encoded(seed: int, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (30, 40 + seed, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def write_tar(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def pool(folder: Path, tars: int = 3, each: int = 4) -> list[Path]:
    """WebDataset's way: what belongs together shares a name, and labels lie beside the images."""
    kinds = [("png", "PNG"), ("jpg", "JPEG"), ("webp", "WEBP")]
    out = []
    for t in range(tars):
        files: dict[str, bytes] = {}
        for i in range(each):
            suffix, kind = kinds[i % 3]
            files[f"{t:02d}{i:03d}.{suffix}"] = encoded(t * each + i, kind)
            files[f"{t:02d}{i:03d}.json"] = b'{"label": 1}'
        out.append(write_tar(folder / f"pool-{t:06d}.tar", files))
    return out


def test_images_of_a_tar_are_those_of_the_files(tmp_path: Path) -> None:
    tars = pool(tmp_path / "pool")
    table = read_tars(tars, Inspector())
    assert [s.image_id for s in table] == list(range(1, 13))
    assert not any(s.labeled for s in table)
    for tar in tars:
        with tarfile.open(tar) as opened:
            opened.extractall(tmp_path / tar.stem, filter="data")
    for sample, frame in zip(table, Reader(table, 4096), strict=False):
        tar, name = sample.path.parent, sample.path.name
        file = tmp_path / tar.stem / name
        assert np.array_equal(frame.image.numpy().transpose(1, 2, 0), read_image(file)), "the same pixels"
        assert (sample.width, sample.height) == (frame.image.shape[2], frame.image.shape[1])


def test_what_a_source_means(tmp_path: Path) -> None:
    a, b, c = pool(tmp_path / "pool")
    folder = tmp_path / "pool"
    assert find_tars(folder) == [a, b, c]
    assert find_tars(folder / "*.tar") == [a, b, c]
    assert find_tars(b) == [b]
    assert find_tars(folder / "pool-{000001..000002}.tar") == [b, c]
    assert find_tars(tmp_path) == find_tars(folder / "nothing.tar") == find_tars(folder / "*.jpg") == []
    with pytest.raises(UserError, match=r"2 of these 5 tars are missing, the first is .*pool-000003\.tar"):
        find_tars(folder / "pool-{000000..000004}.tar")


def test_two_ranges_count_like_two_loops(tmp_path: Path) -> None:
    wanted = [write_tar(tmp_path / f"{a}" / f"{b:02d}.tar", {}) for a in (1, 2) for b in (9, 10)]
    assert find_tars(tmp_path / "{1..2}" / "{09..10}.tar") == wanted


@pytest.mark.parametrize(
    "value", ["pool", "pool/*.tar", "pool/pool-{000000..000002}.tar", "[pool/pool-000000.tar, more]"]
)
def test_tars_in_a_data_yaml(yolo_folder: YoloFolder, value: str) -> None:
    pool(yolo_folder.root / "pool")
    picture(yolo_folder.root / "more" / "x.png")
    with open(yolo_folder.yaml, "a") as yaml:
        yaml.write(f"unlabeled: {value}\nval: images/train\n")
    data = load_data(yolo_folder.yaml, "unlabeled", strict=True)
    assert len(data) == (5 if "more" in value else 12)
    assert len({s.image_id for s in data.samples}) == len(data)
    assert data.format == ("tars + images" if "more" in value else "tars")
    report = check_data(yolo_folder.yaml)
    assert report.errors == {}
    assert report.splits["unlabeled"].decoded == len(data)
    assert len(check_data(yolo_folder.yaml, decode=False).splits["unlabeled"].problems) == 0


def test_tars_on_the_command_line(yolo_folder: YoloFolder) -> None:
    tars = pool(yolo_folder.root / "pool")
    tars[1].write_bytes(tars[1].read_bytes()[:1600])
    with open(yolo_folder.yaml, "a") as yaml:
        yaml.write("val: images/train\n")
    for value in (yolo_folder.root / "pool", yolo_folder.root / "pool" / "pool-{000000..000002}.tar"):
        data = build_data(load_config("train", {"data": str(yolo_folder.yaml), "unlabeled": str(value)}))
        assert 8 <= len(data.unlabeled) < 12
        assert any("ends too early" in note for note in data.notes)


def test_tars_hold_no_labelled_images(yolo_folder: YoloFolder) -> None:
    pool(yolo_folder.root / "pool")
    yolo_folder.yaml.write_text("train: pool/*.tar\nnames: [carp, pike]\n")
    assert "'unlabeled' only" in refusal(yolo_folder.yaml)
    picture(yolo_folder.root / "pool" / "x.png")
    yolo_folder.yaml.write_text("unlabeled: pool\nnames: [carp, pike]\n")
    assert "holds tars and images" in refusal(yolo_folder.yaml, "unlabeled")


def test_tars_without_an_image_are_refused_with_the_reason(yolo_folder: YoloFolder) -> None:
    tar = yolo_folder.root / "pool" / "a.tar"
    write_tar(tar, {"a.txt": b"0"})
    tar.write_bytes(tar.read_bytes()[:600])
    with open(yolo_folder.yaml, "a") as yaml:
        yaml.write("val: images/train\n")
    with pytest.raises(UserError, match=r"no usable image in 1 tars\..*unexpected end"):
        build_data(load_config("train", {"data": str(yolo_folder.yaml), "unlabeled": str(tar), "labeled": 2}))
    yolo_folder.yaml.write_text("unlabeled: pool\nnames: [carp, pike]\n")
    assert "unexpected end" in refusal(yolo_folder.yaml, "unlabeled")


# ----------------------------------------------------------------- the index


def test_a_tar_is_gone_through_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tars = pool(tmp_path / "pool")
    first = read_tars(tars, Inspector())
    monkeypatch.setattr(shards, "_gone_through", lambda tar: pytest.fail("read again"))
    again = read_tars(tars, Inspector())
    assert [(s.path, s.place, s.width) for s in first] == [(s.path, s.place, s.width) for s in again]
    monkeypatch.undo()
    monkeypatch.setenv("SSOD_CACHE", str(tmp_path / "cache"))
    for file in (tmp_path / "cache" / "tars").iterdir():  # damaged: built anew
        file.write_bytes(file.read_bytes()[:-30])
    assert [s.place for s in read_tars(tars, Inspector())] == [s.place for s in first]
    write_tar(tars[0], {"z.png": encoded(9)})  # changed: built anew
    assert read_tars(tars, Inspector())[0].path.name == "z.png"


def test_nothing_is_written_beside_the_tars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tars = pool(tmp_path / "pool")
    before = sorted(p.name for p in (tmp_path / "pool").iterdir())
    unwritable = tmp_path / "file"
    unwritable.write_text("")
    monkeypatch.setenv("SSOD_CACHE", str(unwritable))  # a cache that cannot be written costs nothing but time
    assert len(read_tars(tars, Inspector())) == 12
    assert sorted(p.name for p in (tmp_path / "pool").iterdir()) == before


@pytest.mark.parametrize("format_", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_kinds_of_tars(tmp_path: Path, format_: int) -> None:
    long = "/".join(["folder" * 5] * 4) + "/bild.png"
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=format_) as tar:
        for name in (long, "./b.png", "/c.png", ".hidden.png", "d.txt"):
            member = tarfile.TarInfo(name)
            member.size = len(encoded(1))
            tar.addfile(member, io.BytesIO(encoded(1)))
        link = tarfile.TarInfo("e.png")
        link.type, link.linkname = tarfile.SYMTYPE, "b.png"
        tar.addfile(link)
    table = read_tars([path], Inspector(strict=True))
    assert [s.path.name for s in table] == ["bild.png", "b.png", "c.png"]
    assert all(frame.image.shape[1:] == (30, 41) for frame in map(Reader(table, 4096).__getitem__, range(3)))


# ----------------------------------------------------------------- faults


def test_images_that_cannot_be_read_and_names_that_repeat(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", {"a.png": b"no image", "b.png": b"", "c.png": encoded(0)})
    with tarfile.open(tar, "a") as opened:
        member = tarfile.TarInfo("c.png")
        member.size = len(encoded(1))
        opened.addfile(member, io.BytesIO(encoded(1)))
    inspector = Inspector()
    table = read_tars([tar], inspector)
    assert count_problems(inspector.problems) == {IMAGE_UNREADABLE: 2, IMAGE_TWICE: 1}
    assert [s.width for s in table] == [40, 41]
    with pytest.raises(UserError, match=r"a\.tar, a\.png"):
        read_tars([tar], Inspector(strict=True))


def test_a_compressed_tar_is_refused(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", {"a.png": encoded(0)}, "w:gz")
    inspector = Inspector()
    assert len(read_tars([tar], inspector)) == 0
    assert "uncompressed" in inspector.problems[0].reason


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_damaged_tar_is_never_taken_for_a_whole_one(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Cut anywhere, or a header spoilt: what comes out are whole images of the tar, and the damage is said."""
    folder = tmp_path_factory.mktemp("damage")
    [tar] = pool(folder, tars=1)
    whole = read_tars([tar], Inspector())
    content = tar.read_bytes()
    with tarfile.open(tar) as opened:
        heads = [m.offset for m in opened]
        end = opened.offset  # type: ignore[attr-defined]
    if data.draw(st.booleans(), label="cut"):
        content = content[: data.draw(st.integers(0, end + 511), label="at")]
    else:
        at = data.draw(st.sampled_from(heads), label="head") + data.draw(st.integers(0, 99), label="byte")
        content = content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :]
    tar.write_bytes(content)
    inspector = Inspector()
    table = read_tars([tar], inspector)
    assert count_problems(inspector.problems) == {SHARD_DAMAGED: 1}
    assert [s.place for s in table] == [s.place for s in whole][: len(table)]
    reader = Reader(table, 4096)
    assert all(reader[i].image.shape[2] == whole[i].width for i in range(len(table)))


def test_a_tar_that_goes_away_is_an_image_error(tmp_path: Path) -> None:
    [tar] = pool(tmp_path, tars=1)
    reader = Reader(read_tars([tar], Inspector()), 4096)
    content = tar.read_bytes()
    tar.write_bytes(content[: len(content) // 2])
    with pytest.raises(ImageError, match="ends within it"):
        reader[3]
    os.unlink(tar)
    with pytest.raises(ImageError, match="No such file"):
        reader[0]


# ----------------------------------------------------------------- in training


def test_batches_from_tars_follow_from_their_step(tmp_path: Path) -> None:
    table = read_tars(pool(tmp_path / "pool"), Inspector())
    picture(tmp_path / "a.png")
    yolo = YoloFolder(tmp_path / "yolo")
    labeled = load_data(yolo.yaml, "train").samples

    def batches(start: int, workers: int) -> list[bytes]:
        views = {name: pipeline(name, 64) for name in ("weak", "strong")}
        loader = build_loader(
            labeled,
            table,
            batch=1,
            batch_unlabeled=5,
            imgsz=64,
            labeled_view=views["weak"],
            seed=3,
            start_step=start,
            steps=5,
            workers=workers,
            **views,
        )
        return [b.strong.images.numpy().tobytes() for b in loader if b.strong is not None]

    whole = batches(0, 0)
    assert batches(0, 2) == whole
    assert batches(3, 0) == whole[3:]


def test_an_index_travels(tmp_path: Path) -> None:
    table = read_tars(pool(tmp_path / "pool"), Inspector())
    copy = pickle.loads(pickle.dumps(table))
    assert [s.place for s in copy] == [s.place for s in table]
