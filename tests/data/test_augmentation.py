"""Recipes hold the papers' numbers; boxes follow geometry; mosaic and mixup are sources like any other."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small_sets import CocoFolder

from ssod.cli import main
from ssod.config import load_config, parse_words
from ssod.data.batching import targets_in
from ssod.data.check.sheet import draw_views, read_views
from ssod.data.loader import SAME, Bad, ViewMaker, build_loader, stream_views
from ssod.data.reader import Reader
from ssod.data.samples import Dataset, Sample
from ssod.data.streams import Stream, generator
from ssod.data.views import geometry
from ssod.data.views.geometric import Affine, Crop, Flip, OneAffine, Resize, Window
from ssod.data.views.mixing import Mixing, MixUp, Mosaic, Source
from ssod.data.views.operations import Frame, Operation
from ssod.data.views.photometric import Blur, Color, Cutout, Erase, OneColor
from ssod.data.views.presets import RECIPES, VIEWS
from ssod.data.views.transforms import MIXINGS, OPERATIONS, Chain, pipeline
from ssod.errors import UserError
from ssod.ops.views import between, map_boxes, map_instances, map_points
from ssod.structures import Instances, SemiBatch

# ---------------------------------------------------------------- the papers' numbers


def chains(name: str, role: Any) -> list[tuple[bool, tuple[Operation, ...]]]:
    return [(c.from_weak, c.operations) for c in pipeline(name, 800, role).chains]


# Typed from the table of methods; what a number stands on is in docs/augmentation.md.
FLIP = Flip(p=0.5)
PLAIN = (True, ())  # the run's weak view: resize and flip
UT_ERASE = (
    Erase(p=0.7, area=(0.05, 0.2), ratio=(0.3, 3.3)),
    Erase(p=0.5, area=(0.02, 0.2), ratio=(0.1, 6)),
    Erase(p=0.3, area=(0.02, 0.2), ratio=(0.05, 8)),
)
UT_BLUR = Blur(sigma=(0.1, 2.0), p=0.5)
UT_STRONG = (True, (Color(0.4, 0.4, 0.4, 0.1, p=0.8, gray=0.2), UT_BLUR, *UT_ERASE))
ST_RESIZE = Resize(scale=(400 / 800, 1200 / 800), imgsz=800)
ST_STRONG = (
    False,
    (ST_RESIZE, FLIP, OneColor(p=1.0), OneAffine(translate=0.10, rotate=30, shear=30), Cutout((1, 4), 0.20)),
)
RPL_STRONG = (True, (Color(0.4, 0.4, 0.4, 0.1, p=0.8, gray=0.0), UT_BLUR, *UT_ERASE))
CO_AUGMENTED = (True, (Color(0.8, 0.8, 0.8, 0.2, p=0.8, gray=0.0),))
CO_BLUR = (True, (UT_BLUR,))
PAPERS: dict[str, dict[str, list[tuple[bool, tuple[Operation, ...]]]]] = {
    "unbiased_teacher": {"labeled": [PLAIN, UT_STRONG], "weak": [PLAIN], "strong": [UT_STRONG]},
    "soft_teacher": {
        "labeled": [(False, (ST_RESIZE, FLIP, OneColor(p=1.0)))],
        "weak": [(False, (ST_RESIZE, FLIP))],
        "strong": [ST_STRONG],
    },
    "rpl": {"labeled": [PLAIN], "weak": [PLAIN], "strong": [RPL_STRONG]},
    "comining": {"labeled": [PLAIN, CO_AUGMENTED], "weak": [PLAIN], "strong": [CO_AUGMENTED]},
    "comining_blur": {"labeled": [PLAIN, CO_BLUR], "weak": [PLAIN], "strong": [CO_BLUR]},
}


@pytest.mark.parametrize("name", PAPERS)
@pytest.mark.parametrize("role", ["labeled", "weak", "strong"])
def test_a_recipe_holds_the_numbers_of_its_paper(name: str, role: str) -> None:
    assert chains(name, role) == PAPERS[name][role]
    assert pipeline(name, 800, "weak").as_weak().operations in ((Resize(imgsz=800), FLIP), (ST_RESIZE, FLIP))


def test_every_recipe_is_in_the_table_and_the_old_names_stay() -> None:
    assert RECIPES.keys() == PAPERS.keys()
    assert pipeline("strong", 640) == pipeline("unbiased_teacher", 640)
    assert pipeline("strong_geo", 640) == pipeline("soft_teacher", 640)
    assert pipeline("weak", 640).as_weak() == Chain((Resize(imgsz=640), FLIP))
    assert chains("lsj", "labeled") == [(False, (Resize((0.1, 2.0), 800), Window(800), FLIP))]


def test_the_list_of_soft_teachers_geometry_is_drawn_evenly() -> None:
    """A quarter each; 400 draws of a quarter lie within 100 +- 4 * 8.7."""
    frame = Frame(torch.zeros(3, 40, 60, dtype=torch.uint8), np.eye(3))
    counts = dict.fromkeys(("x", "y", "rotate", "shear"), 0)
    for seed in range(400):
        m = OneAffine()(frame, generator(seed)).matrix
        if np.allclose(m[:2, :2], np.eye(2)):
            kind = "x" if m[0, 2] else "y"
            assert abs(m[0, 2]) <= 6
            assert abs(m[1, 2]) <= 4
        else:
            turned = np.isclose(m[0, 1], -m[1, 0]) and np.isclose(np.linalg.det(m), 1)
            kind = "rotate" if turned else "shear"
            limit = np.sin(np.pi / 6) if turned else np.tan(np.pi / 6)
            assert max(abs(m[0, 1]), abs(m[1, 0])) <= limit + 1e-9
        counts[kind] += 1
    assert all(65 < n < 135 for n in counts.values()), counts


@pytest.mark.parametrize("name", ["unbiased_teacher", "soft_teacher", "rpl", "comining"])
def test_a_recipe_by_name_and_as_a_list_are_the_same(name: str) -> None:
    config = load_config("train", parse_words([f"augment={name}", "data=shapes"]))
    by_name = pipeline(config.augment.strong, 320, "strong")
    assert by_name == pipeline(VIEWS[name], 320)
    listed = load_config("train", {"augment": {"strong": VIEWS[name]}, "data": "shapes"})
    assert pipeline(listed.augment.strong, 320, "strong") == by_name


def test_the_page_names_every_recipe_view_and_operation() -> None:
    page = (Path(__file__).parents[2] / "docs" / "augmentation.md").read_text(encoding="utf-8")
    for name in [*RECIPES, *VIEWS, *OPERATIONS, *MIXINGS]:
        assert f"`{name}`" in page, name
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", page.partition("## Operations")[2], re.M))
    for name, cls in (OPERATIONS | MIXINGS).items():
        parameters = [f.name for f in fields(cls) if f.name != "imgsz" or name in ("resize", "window")]
        assert re.findall(r"`(\w+)`", rows[name]) == parameters


# ---------------------------------------------------------------- boxes follow geometry

boxes = st.lists(
    st.tuples(*[st.floats(0, 1, width=32)] * 4).map(
        lambda b: (min(b[0], b[2]), min(b[1], b[3]), max(b[0], b[2]), max(b[1], b[3]))
    ),
    min_size=1,
    max_size=5,
)
matrices = st.tuples(
    st.floats(-180, 180), st.floats(-30, 30), st.floats(-30, 30), st.floats(-50, 50), st.floats(0.1, 3)
).map(lambda v: geometry.affine_matrix(90, 120, v[0], (v[1], v[2]), (v[3], -v[3]), v[4]))
GEOMETRY = [Resize((0.1, 2.0), 100), Flip(1.0), Crop(), Window(50), Affine(20, 10, 0.1, (0.5, 1.5)), OneAffine()]


@settings(max_examples=60, deadline=None)
@given(boxes, matrices, st.integers(0, 10**6))
def test_a_moved_box_is_the_smallest_around_every_moved_point(rows: Any, matrix: np.ndarray, seed: int) -> None:
    size = torch.tensor([120.0, 90, 120, 90])
    box = torch.tensor(rows) * size
    moved = map_boxes(box, torch.from_numpy(matrix))
    shares = torch.rand(len(box), 50, 2, generator=torch.Generator().manual_seed(seed))
    shares[:, :4] = torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]])  # the corners
    points = box[:, None, :2] + shares * (box[:, None, 2:] - box[:, None, :2])
    there = map_points(points.double(), torch.from_numpy(matrix))
    tight = torch.cat((there.amin(1), there.amax(1)), 1)
    torch.testing.assert_close(moved.double(), tight, rtol=1e-5, atol=1e-3)


@settings(max_examples=60, deadline=None)
@given(boxes, st.lists(st.sampled_from(GEOMETRY), min_size=1, max_size=4), st.integers(0, 10**6))
def test_objects_through_random_operations_stay_inside_and_where_the_matrix_says(
    rows: Any, operations: list[Operation], seed: int
) -> None:
    frame = Frame(torch.zeros(3, 90, 120, dtype=torch.uint8), np.eye(3))
    moved = Chain(tuple(operations))(frame, generator(seed))
    h, w = moved.image.shape[1:]
    objects = Instances(torch.tensor(rows) * torch.tensor([120.0, 90, 120, 90]), torch.arange(len(rows)))
    there = targets_in(objects, moved)
    assert (there.boxes >= 0).all()
    assert (there.boxes[:, 2:] <= torch.tensor([w, h])).all()
    assert (there.boxes[:, 2:] > there.boxes[:, :2]).all()
    whole = map_boxes(objects.boxes[there.labels], torch.from_numpy(moved.matrix))
    limits = torch.tensor([w, h, w, h])
    torch.testing.assert_close(there.boxes, torch.minimum(whole.clamp(min=0), limits), rtol=0, atol=1e-3)


@settings(max_examples=60, deadline=None)
@given(boxes, st.integers(0, 10**6), st.sampled_from([[Resize((0.1, 2.0), 100), FLIP, Window(50)], [Flip(1.0)]]))
def test_there_and_back_between_two_views_is_the_same_box(rows: Any, seed: int, operations: list[Operation]) -> None:
    """Resizing, flips and windows keep boxes boxes, so weak -> strong -> weak changes nothing."""
    frame = Frame(torch.zeros(3, 90, 120, dtype=torch.uint8), np.eye(3))
    weak, strong = (torch.from_numpy(Chain(tuple(operations))(frame, generator(seed, i)).matrix) for i in (0, 1))
    box = torch.tensor(rows) * torch.tensor([120.0, 90, 120, 90])
    in_weak = map_boxes(box, weak)
    back = map_boxes(map_boxes(in_weak, between(weak, strong)), between(strong, weak))
    torch.testing.assert_close(back, in_weak, rtol=0, atol=2e-2)


def test_large_scale_jitter_fills_at_most_the_window() -> None:
    frame = Frame(torch.zeros(3, 90, 120, dtype=torch.uint8), np.eye(3))
    (chain,) = pipeline("lsj", 100, "labeled").chains
    zooms = []
    for seed in range(300):
        moved = chain(frame, generator(seed))
        assert max(moved.image.shape[1:]) <= 100
        zooms.append(abs(moved.matrix[0, 0]) * 120 / 100)
    assert min(zooms) < 0.15
    assert max(zooms) > 1.9
    assert 0.95 < np.mean(zooms) < 1.15  # uniform on 0.1 .. 2.0


# ---------------------------------------------------------------- mosaic and mixup

COLOURS = [(250, 30, 30), (30, 250, 30), (30, 30, 250), (240, 240, 30), (240, 30, 240), (30, 240, 240)]


@pytest.fixture(scope="module")
def painted(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """Six images, each with one bright rectangle in a colour of its own on black, and a box around it."""
    folder = tmp_path_factory.mktemp("painted")
    out = []
    for i, colour in enumerate(COLOURS):
        h, w = ((60, 90), (90, 60), (80, 80))[i % 3]
        array = np.zeros((h, w, 3), np.uint8)
        x1, y1, x2, y2 = 12 + i, 10 + 2 * i, w - 20, h - 14
        array[y1:y2, x1:x2] = colour
        path = folder / f"{i}.png"
        Image.fromarray(array).save(path)
        box = np.array([[x1, y1, x2, y2]], np.float32)
        out.append(Sample(path, i + 1, w, h, box, np.array([i]), np.array([False]), labeled=True))
    return out


def maker(samples: list[Sample], mixing: list[Mixing], seed: int = 0) -> ViewMaker:
    return ViewMaker(Reader(samples, 4096), Stream(len(samples), seed, 2), 0, Chain((Resize(imgsz=64),)), mixing)


def found(image: torch.Tensor, label: int) -> torch.Tensor | None:
    """xyxy of the pixels of a class's colour, or None."""
    near = ((image.int() - torch.tensor(COLOURS[label])[:, None, None]).abs() < 40).all(0)
    if near.sum() < 30:
        return None
    y, x = near.any(1).nonzero()[:, 0], near.any(0).nonzero()[:, 0]
    return torch.stack((x.min(), y.min(), x.max() + 1, y.max() + 1)).float()


def test_boxes_of_a_mosaic_lie_around_their_objects(painted: list[Sample]) -> None:
    seen = 0
    for position in range(40):
        source, (frame,) = maker(painted, [Mosaic(imgsz=64)]).draw(position, (Chain((Resize(imgsz=120),)),), [])
        assert len({part.index for part in source.parts}) >= 1
        targets = targets_in(source.objects(painted), frame)
        labels = targets.labels.tolist()
        for box, label in zip(targets.boxes, labels, strict=True):
            pixels = found(frame.image, label)
            if labels.count(label) == 1 and pixels is not None:
                torch.testing.assert_close(pixels, box, rtol=0, atol=2.5)
                seen += 1
        missed = [i for i in range(6) if found(frame.image, i) is not None and i not in labels]
        assert len(missed) <= 1  # a sliver of less than a tenth of an object is none
    assert seen > 60


def test_mixup_shows_both_images_and_keeps_both_boxes(painted: list[Sample]) -> None:
    for position in range(12):
        source, (frame,) = maker(painted, [MixUp(p=1.0)]).draw(position, (Chain((Resize(imgsz=120),)),), [])
        first, second = (part.index for part in source.parts)
        targets = targets_in(source.objects(painted), frame)
        assert targets.labels.tolist() == [first, second]
        for part, box in zip(source.parts, targets.boxes, strict=True):
            x, y = ((box[:2] + box[2:]) / 2).long().tolist()
            main = torch.tensor(COLOURS[part.index]) > 200
            assert (frame.image[:, y, x][main] > 80).all()  # its share is about a half


def test_a_mixed_source_gives_views_one_matrix_apart(painted: list[Sample]) -> None:
    """Weak and strong views of a mosaic: boxes carried by the two matrices alone lie around their objects."""
    strong = Chain((Resize((0.7, 1.3), 120), Flip(1.0), Affine(translate=0.1)))
    seen = 0
    for position in range(30):
        source, (weak, other) = maker(painted, [Mosaic(imgsz=64), MixUp(0.2)]).draw(position, (SAME, strong), [])
        in_weak = targets_in(source.objects(painted), weak)
        matrix = between(torch.from_numpy(weak.matrix), torch.from_numpy(other.matrix))
        carried, _ = map_instances(in_weak, matrix, tuple(other.image.shape[1:]))
        labels = carried.labels.tolist()
        for box, label in zip(carried.boxes, labels, strict=True):
            pixels = found(other.image, label)
            if labels.count(label) == 1 and pixels is not None and len(source.parts) == 4:
                torch.testing.assert_close(pixels, box, rtol=0, atol=3.5)
                seen += 1
    assert seen > 30


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 30), st.integers(2, 30), st.floats(0, 1), st.floats(0, 1))
def test_windows_of_a_mosaic_lie_inside_and_do_not_overlap(seed: int, h: int, w: int, a: float, b: float) -> None:
    frame = Frame(torch.full((3, h, w), 200, dtype=torch.uint8), np.eye(3))
    mosaic = Mosaic(centre=(min(a, b), max(a, b)), imgsz=16)
    source = mosaic(Source(0, frame), lambda: Source(1, frame), generator(seed))
    height, width = source.frame.image.shape[1:]
    covered = np.zeros((height, width), int)
    assert source.parts
    for part in source.parts:
        x1, y1, x2, y2 = (round(v) for v in part.window)
        assert 0 <= x1 < x2 <= width
        assert 0 <= y1 < y2 <= height
        covered[y1:y2, x1:x2] += 1
    assert covered.max() == 1
    assert ((source.frame.image[0].numpy() == 200) == (covered == 1)).all()


def batches(samples: list[Sample], start: int = 0, **options: Any) -> list[SemiBatch]:
    mixed: list[object] = [{"mosaic": 0.7}, {"mixup": 0.5}, {"resize": [0.8, 1.2]}, {"flip": 0.5}]
    views = {"labeled_view": "weak", "weak": mixed, "strong": "strong"} | {
        k: options.pop(k) for k in ("labeled_view", "weak", "strong") if k in options
    }
    roles = {"labeled_view": "labeled", "weak": "weak", "strong": "strong"}
    read: Any = {k: pipeline(v, 64, roles[k]) for k, v in views.items()}  # type: ignore[arg-type]
    given: Any = {"batch": 2, "batch_unlabeled": 2, "imgsz": 64, "seed": 3, "steps": 5, "workers": 0, **options}
    return list(build_loader(samples, samples, start_step=start, **read, **given))


def test_mixed_batches_follow_from_their_step_alone(painted: list[Sample]) -> None:
    whole, tail, parallel = batches(painted), batches(painted, 3), batches(painted, workers=2)
    for a, b in [*zip(whole, parallel, strict=True), *zip(whole[3:], tail, strict=True)]:
        for x, y in ((a.labeled, b.labeled), (a.weak, b.weak), (a.strong, b.strong)):
            assert x is not None
            assert y is not None
            assert torch.equal(x.images, y.images)
            assert torch.equal(x.matrices, y.matrices)
            assert all(torch.equal(s.boxes, t.boxes) for s, t in zip(x.targets, y.targets, strict=True))


def test_labelled_images_are_mixed_as_their_list_or_the_weak_view_says(painted: list[Sample]) -> None:
    def most(**options: Any) -> int:
        return max(len(t) for b in batches(painted, **options) for t in b.labeled.targets)

    assert most(labeled_view="weak") > 1
    assert most(labeled_view=["weak", "comining"]) > 1
    assert most(labeled_view=[{"resize": [1, 1]}]) == 1
    assert most(labeled_view=[{"mosaic": 1.0}, {"resize": [1, 1]}], weak="weak") > 1
    assert most(labeled_view="weak", weak="weak") == 1
    both = batches(painted, labeled_view=["weak", "comining"])[0].labeled
    assert torch.equal(both.matrices[:2], both.matrices[2:])  # one source, one geometry, two views


def test_no_box_of_an_unlabelled_image_is_read_for_a_mosaic(painted: list[Sample]) -> None:
    bare = [Sample.unlabeled(s.path, s.image_id, s.width, s.height) for s in painted]
    views = stream_views(pipeline("weak", 64), pipeline("mosaic_view", 64, "weak"), pipeline("strong", 64))
    for samples in (bare, painted):
        (loader,) = (maker(samples, list(views.weak.mixing)),)
        source, _ = loader.draw(0, (SAME,), [])
        assert len(source.parts) > 1
    assert all(len(t) == 0 for b in batches(painted) for t in b.weak.targets)  # type: ignore[union-attr]


def test_partners_that_cannot_be_read_are_replaced_and_said(painted: list[Sample], tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    samples = [*painted, Sample.unlabeled(broken, 7, 60, 60)]
    bad: Bad = []
    for position in range(7):
        source, _ = maker(samples, [Mosaic(imgsz=64)]).draw(position, (SAME,), bad)
        assert all(part.index < 6 for part in source.parts)
    assert bad
    assert {path for path, _ in bad} == {str(broken)}


@pytest.mark.parametrize(
    ("spec", "role", "message"),
    [
        (["mosaic", "weak"], "strong", "cannot stand in a strong view"),
        ("mosaic_view", "strong", "Write them at the head of augment.weak"),
        (["weak", "mosaic"], "weak", "it begins the list"),
        (["mosaic", "resize", "mixup"], "labeled", "it begins the list"),
        ([{"mosaic": 1.0}], "labeled", "hold a 'resize'"),
        ([{"mosaic": {"center": [0, 1]}}, "weak"], "labeled", "Did you mean 'centre'"),
        ([{"mixup": 2}, "weak"], "labeled", "mixup.p must lie in 0 .. 1"),
        ("soft_teecher", "weak", "Did you mean 'soft_teacher'"),
        ("strong", "weak", "'strong' is a strong view"),
        (["mosiac", "resize"], "labeled", "Did you mean 'mosaic'"),
    ],
)
def test_mistakes_are_said_in_one_sentence(spec: Any, role: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        pipeline(spec, 64, role)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_strong_view_that_adds_nothing_travels_once(painted: list[Sample], workers: int) -> None:
    plain = batches(painted, weak="weak", strong="strong")
    for a, b in zip(plain, batches(painted, weak="weak", strong="weak", workers=workers), strict=True):
        assert b.strong is b.weak
        assert a.weak is not None
        assert b.weak is not None
        assert torch.equal(a.weak.images, b.weak.images)


# ---------------------------------------------------------------- the sheet


@pytest.mark.parametrize(
    ("augment", "columns", "rows"),
    [
        (["augment=rpl"], 4, 3),  # two pairs a row
        (["augment=unbiased_teacher"], 4, 6),  # weak, strong and two labelled views
        (["augment.weak=mosaic_view"], 4, 3),
        (["augment=[weak, {blur: {p: 1}}]"], 4, 3),
    ],
)
def test_the_sheet_shows_every_view(
    painted: list[Sample], tmp_path: Path, augment: list[str], columns: int, rows: int
) -> None:
    config = load_config("check", parse_words([*augment, "data=shapes"]))
    data = Dataset(painted, [f"class {i}" for i in range(6)], [], "coco", tmp_path, "train")
    out = draw_views(data, read_views(config.augment, 64), 6, tmp_path / "a" / "views.png", seed=2)
    page = Image.open(out)
    assert page.width == columns * 408 + 8
    assert rows * 260 < page.height < rows * 430
    again = draw_views(data, read_views(config.augment, 64), 6, tmp_path / "views.png", seed=2)
    assert again.read_bytes() == out.read_bytes()


def test_check_writes_the_sheet_and_refuses_bad_views_first(
    coco_folder: CocoFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["check", f"data={coco_folder.write()}", f"project={tmp_path / 'runs'}", "imgsz=64", "samples=2"]
    main([*words, "augment=soft_teacher"])
    assert "views.png" in capsys.readouterr().out
    page = Image.open(tmp_path / "runs" / "check" / "exp" / "views.png")
    assert page.width == 3 * 408 + 8  # weak, strong, labelled
    assert main([*words, "augment=soft_teecher"]) == 2
    said = capsys.readouterr()
    assert "Did you mean 'soft_teacher'" in said.err
    assert said.out == ""
