"""The loader: the same bits for any number of workers, from any step, over any number of ranks."""

from __future__ import annotations

import gc
import os
import pickle
import signal
import time
from collections import Counter
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import ssod.data.cache as cache_module
import ssod.data.loader as loader_module
import ssod.data.reader as reader_module
from ssod.data import batching
from ssod.data.evalset import EvalLoader
from ssod.data.loader import LoaderError, StepLoader, build_loader
from ssod.data.samples import Sample
from ssod.data.streams import Stream
from ssod.data.views import geometry, pixels
from ssod.data.views.geometry import GREY
from ssod.data.views.transforms import pipeline
from ssod.errors import UserError
from ssod.ops.views import map_boxes
from ssod.structures import SemiBatch, View

SIZES = [(60, 80), (80, 60), (64, 64), (50, 100), (90, 70), (40, 44), (61, 83)]


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    made = []
    for i, (h, w) in enumerate(SIZES):
        path = folder / f"bild {i} ü.png"
        Image.fromarray(rng.integers(0, 256, (h // 4, w // 4, 3), np.uint8)).resize((w, h)).save(path)
        boxes = np.array([[4, 5, 30, 28], [10, 10, w, h]], np.float32)
        crowd = np.array([False, i == 0])
        made.append(Sample(path, i + 1, w, h, boxes, np.array([i % 3, 2]), crowd, labeled=True))
    return made


def make(labeled: list[Sample], unlabeled: list[Sample], **options: Any) -> StepLoader:
    views: dict[str, Any] = {
        "labeled_view": options.pop("labeled_view", "weak"),
        "weak": options.pop("weak", "weak"),
        "strong": options.pop("strong", "strong"),
    }
    given: dict[str, Any] = {
        "batch": 2,
        "batch_unlabeled": 3,
        "imgsz": 64,
        "seed": 5,
        "start_step": 0,
        "steps": 5,
        "workers": 0,
        **options,
    }
    read = {name: pipeline(spec, given["imgsz"]) for name, spec in views.items()}
    return build_loader(labeled, unlabeled, **(given | read))


def assert_same_view(a: View | None, b: View | None) -> None:
    assert (a is None) == (b is None)
    if a is None or b is None:
        return
    assert torch.equal(a.images, b.images)
    assert torch.equal(a.sizes, b.sizes)
    assert torch.equal(a.matrices, b.matrices)
    assert a.indices == b.indices
    for s, t in zip(a.targets, b.targets, strict=True):
        assert torch.equal(s.boxes, t.boxes)
        assert torch.equal(s.labels, t.labels)


def assert_same(a: SemiBatch, b: SemiBatch) -> None:
    assert_same_view(a.labeled, b.labeled)
    assert_same_view(a.weak, b.weak)
    assert_same_view(a.strong, b.strong)
    assert a.bad == b.bad


def join(views: list[View | None]) -> list[tuple[int, bytes, bytes]]:
    """Index, pixels and matrix of each image, padding left out."""
    return [
        (index, image[:, :h, :w].numpy().tobytes(), matrix.numpy().tobytes())
        for view in views
        if view is not None
        for index, image, (h, w), matrix in zip(view.indices, view.images, view.sizes, view.matrices, strict=True)
    ]


# ---------------------------------------------------------------- the stream


@given(st.integers(1, 30), st.integers(1, 8), st.integers(1, 4), st.integers(0, 99))
def test_every_epoch_holds_every_sample_once(n: int, batch: int, world: int, seed: int) -> None:
    ranks = [Stream(n, seed, batch, rank, world) for rank in range(world)]
    steps = -(-3 * n // (batch * world))
    drawn = [place for step in range(steps) for stream in ranks for place in stream.step(step)][: 3 * n]
    assert [epoch for epoch, _ in drawn] == sorted(epoch for epoch, _ in drawn)
    for epoch in range(3):
        assert sorted(i for e, i in drawn if e == epoch) == list(range(n))


@given(st.integers(1, 30), st.integers(1, 4), st.integers(1, 4), st.integers(0, 50))
def test_ranks_share_what_one_rank_sees(n: int, batch: int, world: int, step: int) -> None:
    alone = list(Stream(n, 0, batch * world).step(step))
    shared = [place for rank in range(world) for place in Stream(n, 0, batch, rank, world).step(step)]
    assert alone == shared


def test_a_stream_can_be_entered_anywhere_and_epochs_differ() -> None:
    stream, fresh = Stream(50, 1, 10), Stream(50, 1, 10)
    ahead = [list(stream.step(t)) for t in range(30)]
    assert list(fresh.step(29)) == ahead[29]
    assert list(stream.step(0)) == ahead[0]  # and backwards
    orders = [tuple(index for _, index in chain(*ahead[5 * e : 5 * e + 5])) for e in range(6)]
    assert len(set(orders)) == 6


# ---------------------------------------------------------------- bit-equality


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("strong", ["strong", "strong_geo"])
def test_workers_change_nothing(
    samples: list[Sample], strong: str, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for room in (geometry, pixels, batching):
        if not fast:
            monkeypatch.setattr(room, "cv2", None)
    alone = list(make(samples[:3], samples, strong=strong, labeled_view=["weak", "strong"]))
    parallel = list(make(samples[:3], samples, strong=strong, labeled_view=["weak", "strong"], workers=2))
    assert len(alone) == len(parallel) == 5
    for a, b in zip(alone, parallel, strict=True):
        assert isinstance(b.labeled, View)
        assert_same(a, b)


def test_the_dataset_travels_to_spawned_workers(samples: list[Sample]) -> None:
    dataset = make(samples[:3], samples, cache=True).dataset
    assert_same(pickle.loads(pickle.dumps(dataset))[3], dataset[3])  # type: ignore[arg-type]


def test_resuming_is_starting_later(samples: list[Sample]) -> None:
    whole = list(make(samples[:3], samples))
    tail = list(make(samples[:3], samples, start_step=3))
    assert len(tail) == 2
    for a, b in zip(whole[3:], tail, strict=True):
        assert_same(a, b)


def test_two_ranks_see_what_one_sees(samples: list[Sample]) -> None:
    one = list(make(samples[:3], samples, batch=4, batch_unlabeled=6))
    two = [list(make(samples[:3], samples, rank=rank, world=2)) for rank in range(2)]
    for alone, first, second in zip(one, *two, strict=True):
        assert join([alone.labeled]) == join([first.labeled, second.labeled])
        assert join([alone.weak]) == join([first.weak, second.weak])
        assert join([alone.strong]) == join([first.strong, second.strong])


def test_every_epoch_draws_anew(samples: list[Sample]) -> None:
    view = next(iter(make(samples[:1], [], batch=16, batch_unlabeled=0, labeled_view="strong"))).labeled
    assert len({pixels for _, pixels, _ in join([view])}) > 12  # one image, sixteen epochs in a batch


def test_another_seed_is_another_run(samples: list[Sample]) -> None:
    a, b = (next(iter(make(samples, samples, seed=seed))) for seed in (1, 2))
    assert join([a.strong]) != join([b.strong])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_a_cache_changes_no_pixel(
    samples: list[Sample], kind: str, workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSOD_CACHE", str(tmp_path))
    options: dict[str, Any] = {"imgsz": 48, "strong": "strong_geo", "steps": 10, "workers": workers}
    plain, cached = (list(make(samples[:3], samples, cache=cache, **options)) for cache in (False, kind))
    for a, b in zip(plain, cached, strict=True):
        assert_same(a, b)


def test_a_cache_reads_each_file_once(samples: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    reads: Counter[Path] = Counter()
    real = reader_module.read_image
    monkeypatch.setattr(reader_module, "read_image", lambda path, stream: (reads.update([path]), real(path))[1])
    list(make(samples, [], batch_unlabeled=0, batch=7, steps=4, cache=True))
    assert set(reads.values()) == {1}


def test_a_cache_too_large_is_refused(samples: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "_free_shared_memory", lambda: 10_000)
    with pytest.raises(UserError, match="cache=False or a smaller imgsz"):
        make(samples, samples, cache=True)


# ---------------------------------------------------------------- what is in a batch


def test_shapes_padding_and_shared_geometry(samples: list[Sample]) -> None:
    for batch in make(samples[:2], samples, batch=3, steps=3):
        assert batch.weak is not None
        assert batch.strong is not None
        assert len(batch.labeled) == 3  # more than there are labelled images
        assert batch.weak.indices == batch.strong.indices
        assert torch.equal(batch.weak.matrices, batch.strong.matrices)
        assert not torch.equal(batch.weak.images, batch.strong.images)
        for view in (batch.labeled, batch.weak, batch.strong):
            b, _, height, width = view.images.shape
            assert view.images.dtype == torch.uint8
            assert height % 32 == width % 32 == 0
            assert view.sizes.shape == (b, 2)
            assert view.matrices.shape == (b, 3, 3)
            assert view.matrices.dtype == torch.float64
            for image, (h, w) in zip(view.images, view.sizes, strict=True):
                assert max(h, w) == 64
                assert (image[:, h:] == GREY).all()
                assert (image[:, :, w:] == GREY).all()
                assert (image[:, h - 1] != GREY).any()


def test_a_fixed_square(samples: list[Sample]) -> None:
    for batch in make(samples, samples, rect=False, pad_to=64, strong="strong_geo"):
        assert batch.strong is not None
        assert batch.labeled.images.shape[2:] == batch.strong.images.shape[2:] == (128, 128)  # 1.5 * 64, rounded up


def test_other_geometry_where_the_view_says_so(samples: list[Sample]) -> None:
    batch = next(iter(make(samples, samples, strong="strong_geo")))
    assert batch.weak is not None
    assert batch.strong is not None
    assert not torch.equal(batch.weak.matrices, batch.strong.matrices)


def test_labelled_targets_follow_their_image(samples: list[Sample]) -> None:
    view = next(iter(make(samples, [], batch=7, batch_unlabeled=0, labeled_view=["weak", "strong"]))).labeled
    assert view.indices[:7] == view.indices[7:]
    assert torch.equal(view.matrices[:7], view.matrices[7:])
    for index, matrix, targets in zip(view.indices, view.matrices, view.targets, strict=True):
        sample = samples[index]
        boxes = torch.from_numpy(sample.boxes[~sample.crowd])
        torch.testing.assert_close(targets.boxes, map_boxes(boxes, matrix), rtol=0, atol=1e-3)
        assert targets.labels.tolist() == sample.labels[~sample.crowd].tolist()


def test_without_unlabelled_images(samples: list[Sample]) -> None:
    batch = next(iter(make(samples, [], batch_unlabeled=0)))
    assert batch.weak is None
    assert batch.strong is None


def test_labels_of_unlabelled_images_are_never_read(samples: list[Sample]) -> None:
    """Ruin them: nothing changes, and nothing of them is in a batch."""
    ruined = [replace(s, boxes=s.boxes * np.float32("nan"), labels=s.labels + 999) for s in samples]
    for a, b in zip(make(samples[:2], samples), make(samples[:2], ruined), strict=True):
        assert_same(a, b)
        assert b.weak is not None
        assert b.strong is not None
        assert all(len(t) == 0 for t in (*b.weak.targets, *b.strong.targets))


def test_the_users_weak_view_is_the_one_strong_goes_on_from(samples: list[Sample]) -> None:
    jitter = [{"resize": [0.5, 1.5]}, {"flip": 0.5}]
    batch = next(iter(make(samples, samples, weak=jitter, batch_unlabeled=7)))
    assert batch.weak is not None
    assert batch.strong is not None
    assert torch.equal(batch.weak.matrices, batch.strong.matrices)
    assert len({max(size) for size in batch.weak.sizes.tolist()}) > 1


def test_what_cannot_be_loaded_is_said_at_once(samples: list[Sample]) -> None:
    with pytest.raises(UserError, match="no labelled images"):
        make([], samples)
    with pytest.raises(UserError, match="batch_unlabeled=0"):
        make(samples, [])
    with pytest.raises(UserError, match="`strong` must be one view"):
        make(samples, samples, strong=["weak", "strong"])


# ---------------------------------------------------------------- faults


def broken(samples: list[Sample], folder: Path, which: set[int]) -> list[Sample]:
    made = list(samples)
    for i in which:
        path = folder / f"broken{i}.png"
        path.write_bytes(samples[i].path.read_bytes()[:120])
        made[i] = replace(samples[i], path=path)
    return made


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_replaced_and_reported(samples: list[Sample], tmp_path: Path, workers: int) -> None:
    ruined = broken(samples, tmp_path, {2, 4})
    before = {s.path: s.path.read_bytes() for s in ruined}
    runs = [list(make(samples[:3], ruined, batch_unlabeled=7, steps=2, workers=workers)) for _ in range(2)]
    for a, b in zip(*runs, strict=True):
        assert_same(a, b)
        assert a.weak is not None
        assert len(a.weak) == 7
        assert not {2, 4} & set(a.weak.indices)
        # Two broken images may follow each other in the order: then the second is met twice.
        assert {Path(path).name for path, _ in a.bad} == {"broken2.png", "broken4.png"}
        assert all(reason for _, reason in a.bad)
    assert {s.path: s.path.read_bytes() for s in ruined} == before


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_readable_is_an_error_for_the_user(samples: list[Sample], tmp_path: Path, workers: int) -> None:
    with pytest.raises(UserError, match="7 images in a row cannot be read") as caught:
        list(make(broken(samples, tmp_path, set(range(7))), samples, workers=workers))
    assert "Traceback" not in str(caught.value)


@pytest.mark.fault(14)
def test_a_hung_worker_is_named(samples: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "read_image", lambda path, stream: time.sleep(60))
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.5)  # patience before it is ended
    began = time.monotonic()
    with pytest.raises(LoaderError, match="within 1 s"):
        list(make(samples, samples, workers=1, timeout=1))
    assert time.monotonic() - began < 30


@pytest.mark.fault(14)
def test_a_killed_worker_is_named(samples: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "read_image", lambda path, stream: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(LoaderError, match="worker died"):
        list(make(samples, samples, workers=1))


def test_workers_outlive_ctrl_c(samples: list[Sample]) -> None:
    batches = iter(make(samples, samples, workers=1, steps=30))
    next(batches)
    for child in torch.multiprocessing.active_children():
        os.kill(child.pid, signal.SIGINT)  # type: ignore[arg-type]
    assert len(list(batches)) == 29


def test_workers_have_one_thread() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        previous = signal.getsignal(signal.SIGINT)
        loader_module._start_worker(0)
        signal.signal(signal.SIGINT, previous)
        assert torch.get_num_threads() == 1
    finally:
        gc.unfreeze()
        torch.set_num_threads(before)


class Sessions:
    """What must end in the process that began it, in a cycle that only the collector finds."""

    def __init__(self, ended: Path) -> None:
        self.ended, self.itself = ended, self

    def __del__(self) -> None:
        with open(self.ended, "a") as file:
            file.write(f"{os.getpid()}\n")


def test_a_worker_does_not_end_what_the_parent_began(
    samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = reader_module.read_image

    def collect_and_read(*args: Any, **more: Any) -> np.ndarray:
        gc.collect()
        return read(*args, **more)

    monkeypatch.setattr(reader_module, "read_image", collect_and_read)
    ended = tmp_path / "ended.txt"
    gc.disable()
    try:
        Sessions(ended)
        list(make(samples, samples, workers=1, steps=2))
        assert not ended.exists()
    finally:
        gc.enable()
    gc.collect()
    assert ended.read_text() == f"{os.getpid()}\n"


# ---------------------------------------------------------------- evaluation


def test_evaluation_shows_every_image_once_as_if_alone(samples: list[Sample]) -> None:
    many = samples * 3
    batched = list(EvalLoader(many, 64, batch=4))
    alone = {view.indices[0]: view for view in EvalLoader(many, 64, batch=1)}
    assert sorted(i for view in batched for i in view.indices) == list(range(21))
    assert len(batched) == len(EvalLoader(many, 64, batch=4)) < 21
    for view in batched:
        for k, index in enumerate(view.indices):
            assert torch.equal(view.images[k], alone[index].images[0])  # the padding too
            assert torch.equal(view.matrices[k], alone[index].matrices[0])
            assert int(view.sizes[k].max()) == 64
            assert torch.equal(view.targets[k].boxes, alone[index].targets[0].boxes)
    for a, b in zip(batched, EvalLoader(many, 64, batch=4, workers=2), strict=True):
        assert_same_view(a, b)


def test_evaluation_resizes_as_training_does(samples: list[Sample]) -> None:
    view = next(iter(make(samples[:1], [], batch=1, batch_unlabeled=0, weak=["resize"], labeled_view=["weak"]))).labeled
    assert_same_view(view, next(iter(EvalLoader(samples[:1], 64, 1))))


def test_evaluation_reports_what_it_cannot_read(samples: list[Sample], tmp_path: Path) -> None:
    loader = EvalLoader(broken(samples, tmp_path, {1}), 64, batch=2, workers=1)
    for _ in range(2):
        assert sorted(i for view in loader for i in view.indices) == [0, 2, 3, 4, 5, 6]
        assert [Path(path).name for path, _ in loader.bad] == ["broken1.png"]


def test_an_image_that_differs_from_its_record_is_still_alone(samples: list[Sample]) -> None:
    liar = replace(samples[1], path=samples[0].path)  # says 60 x 80, is 80 x 60
    views = list(EvalLoader([samples[1], liar], 128, batch=2))
    assert {view.indices[0]: tuple(view.images.shape[2:]) for view in views} == {0: (128, 96), 1: (96, 128)}
