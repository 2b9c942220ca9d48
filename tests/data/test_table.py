"""Samples as arrays: the same as a list of samples, in whatever parts, and not copied for workers."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st

from ssod.data.samples import Sample, SampleTable, class_counts


@st.composite
def made(draw: st.DrawFn, labeled: bool | None = None) -> Sample:
    if labeled is None:
        labeled = draw(st.booleans())
    n = draw(st.integers(0, 4)) if labeled else 0
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    areas = rng.random(n).astype(np.float32) if labeled and draw(st.booleans()) else None
    name = draw(st.text("aß/ \udcff", min_size=1, max_size=9))
    place = (Path(f"tar {name.strip('/') or 'x'}.tar"), 512, 7) if not labeled and draw(st.booleans()) else None
    return Sample(
        place[0] / "in" / "b.png" if place else Path("top", name),
        draw(st.integers(-(2**62), 2**62)),
        draw(st.integers(0, 10**6)),
        draw(st.integers(0, 10**6)),
        rng.random((n, 4)).astype(np.float32),
        rng.integers(0, 5, n),
        rng.random(n) < 0.3,
        labeled,
        areas,
        place,
        draw(st.booleans()),
    )


def assert_same(a: Sample, b: Sample) -> None:
    for field in ("path", "image_id", "width", "height", "labeled", "place", "complete"):
        assert getattr(a, field) == getattr(b, field)
    for field in ("boxes", "labels", "crowd", "areas"):
        one, other = getattr(a, field), getattr(b, field)
        assert (one is None) == (other is None)
        if one is not None:
            assert one.dtype == other.dtype
            assert np.array_equal(one, other)


@settings(max_examples=150, deadline=None)
@given(st.lists(made(), max_size=7), st.lists(made(), max_size=4), st.data())
def test_a_table_is_the_list_it_was_made_of(first: list[Sample], second: list[Sample], data: st.DataObject) -> None:
    table, samples = SampleTable.of(first), first
    if data.draw(st.booleans(), label="join"):
        table, samples = SampleTable.join([first, SampleTable.of(second)]), first + second
    for _ in range(data.draw(st.integers(0, 3), label="parts")):
        if samples and data.draw(st.booleans(), label="select"):
            chosen = data.draw(st.lists(st.integers(0, len(samples) - 1), max_size=9))
            table, samples = table.select(chosen), [samples[i] for i in chosen]
        else:
            part = data.draw(st.slices(len(samples)))
            table, samples = table[part], samples[part]
    if data.draw(st.booleans(), label="again"):
        table = SampleTable.join([table, table[:0]])
    if data.draw(st.booleans(), label="pickle"):
        table = pickle.loads(pickle.dumps(table))
    assert len(table) == len(samples)
    for a, b in zip(table, samples, strict=True):
        assert_same(a, b)
    assert table.names() == [s.path.name for s in samples]
    assert table.ids.tolist() == [s.image_id for s in samples]
    assert table.sizes.tolist() == [[s.width, s.height] for s in samples]
    assert table.labeled.tolist() == [s.labeled for s in samples]
    assert table.complete.tolist() == [s.complete for s in samples]
    owner, labels, crowd = table.objects()
    assert owner.tolist() == [i for i, s in enumerate(samples) for _ in s.labels]
    assert labels.tolist() == [label for s in samples for label in s.labels]
    assert crowd.tolist() == [c for s in samples for c in s.crowd]
    plain = [label for s in samples for label in s.labels[~s.crowd]]
    assert class_counts(table, 5).tolist() == [plain.count(k) for k in range(5)]
    assert [s.image_id for s in table.renumbered()] == list(range(1, len(samples) + 1))


@given(st.lists(made(), min_size=1, max_size=5))
def test_without_labels_no_box_is_left(samples: list[Sample]) -> None:
    table = SampleTable.of(samples).without_labels()
    for a, b in zip(table, samples, strict=True):
        assert_same(a, replace(Sample.unlabeled(b.path, b.image_id, b.width, b.height, b.place), complete=b.complete))
    assert len(table.columns.boxes) == len(table.columns.labels) == 0


def test_indices_as_of_a_list() -> None:
    samples = [Sample.unlabeled(Path(f"{i}.png"), i, 1, 1) for i in range(3)]
    table = SampleTable.of(samples)
    assert table[-1].path == Path("2.png")
    with pytest.raises(IndexError):
        table[3]
    assert not table[:0]
    assert SampleTable.of(table) is table


def test_parts_share_the_arrays() -> None:
    table = large(1000)
    for part in (table[10:500], table.select(range(0, 1000, 3))):
        assert np.shares_memory(part.columns.boxes, table.columns.boxes)
        assert np.shares_memory(part[0].boxes, table.columns.boxes)


# ----------------------------------------------------------------- memory


def large(images: int, boxes_each: int = 8) -> SampleTable:
    rng = np.random.default_rng(0)
    return SampleTable.of(
        [
            Sample(
                Path(f"/data/coco/train2017/{i:012d}.jpg"),
                i,
                640,
                480,
                rng.random((boxes_each, 4)).astype(np.float32),
                rng.integers(0, 80, boxes_each),
                np.zeros(boxes_each, np.bool_),
                True,
                rng.random(boxes_each).astype(np.float32),
            )
            for i in range(images)
        ]
    )


def test_a_table_needs_few_bytes() -> None:
    """At this rate the images and boxes of COCO train2017 take 45 MB."""
    columns = large(2000).columns
    size = sum(array.nbytes for array in vars(columns).values() if isinstance(array, np.ndarray))
    assert size / 2000 < 45e6 / 118_287


def _private_kb() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    table = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return table["Private_Clean"] + table["Private_Dirty"]


def _worker(table: SampleTable, pipe: mp.connection.Connection) -> None:  # type: ignore[name-defined]
    shared = {name: bool(tensor.is_shared()) for name, tensor in table.columns.__getstate__().items()}
    before = _private_kb()
    total = sum(float(sample.boxes.sum()) + len(sample.path.name) for sample in table)
    table.columns.boxes[:1] = 7  # the parent sees it: one memory
    pipe.send((shared, _private_kb() - before, total))


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's account of private memory")
def test_a_spawned_worker_shares_the_arrays() -> None:
    table = large(40_000)
    size_kb = sum(a.nbytes for a in vars(table.columns).values() if isinstance(a, np.ndarray)) / 1024
    total = sum(float(sample.boxes.sum()) + len(sample.path.name) for sample in table)
    before = table[5]
    context = mp.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_worker, args=(table, there))
    process.start()
    shared, grown_kb, seen = here.recv()
    process.join()
    assert all(shared.values())
    assert seen == pytest.approx(total)
    assert grown_kb < size_kb / 2, "looking at all samples copies no array"
    assert table[0].boxes[0].tolist() == [7, 7, 7, 7]
    assert_same(table[5], before)
