"""Views: matrices agree with pixels, kernels agree with torchvision, draws follow from their seed alone."""

from __future__ import annotations

import itertools
import pickle
from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.v2 import functional as tvf

from ssod.data.streams import generator
from ssod.data.views import geometry, pixels
from ssod.data.views.geometric import Affine, Crop, Flip, OneAffine, Resize
from ssod.data.views.geometry import fitted, from_hwc, to_hwc
from ssod.data.views.operations import Frame
from ssod.data.views.photometric import Color, Cutout, Erase
from ssod.data.views.presets import VIEWS
from ssod.data.views.transforms import MIXINGS, OPERATIONS, Chain, pipeline
from ssod.errors import UserError
from ssod.ops.views import map_boxes

STRONG = sorted(set(VIEWS) - {"mosaic_view"})  # what may stand in a strong view

kernels = pytest.mark.parametrize("fast", [False, pytest.param(True, id="fast")])


def use(monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:
    """With or without OpenCV."""
    if fast:
        pytest.importorskip("cv2")
    else:
        monkeypatch.setattr(geometry, "cv2", None)
        monkeypatch.setattr(pixels, "cv2", None)


def photo(h: int = 120, w: int = 160, seed: int = 0) -> torch.Tensor:
    """Smooth colours and some texture, the statistics of a photograph more or less."""
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.uniform(20, 235, (1, 3, 6, 8)))
    smooth = torch.nn.functional.interpolate(coarse, (h, w), mode="bicubic")[0]
    noise = torch.from_numpy(rng.normal(0, 4, (3, h, w)))
    image = (smooth + noise).clamp(0, 255).to(torch.uint8)
    return from_hwc(np.ascontiguousarray(to_hwc(image)))


def start(image: torch.Tensor) -> Frame:
    return Frame(image, np.eye(3))


# ---------------------------------------------------------------- pixels land where the matrix says


def edges(image: torch.Tensor) -> torch.Tensor:
    """xyxy of what is bright, from the half-height crossings of its row and column profiles."""
    bright = image[0].float() / 255
    ys, xs = (bright.amax(d) > 0.5 for d in (1, 0))
    y, x = ys.nonzero()[:, 0], xs.nonzero()[:, 0]
    return torch.stack((x.min(), y.min(), x.max() + 1, y.max() + 1)).float()


@kernels
@pytest.mark.parametrize(
    "operation",
    [
        Resize(imgsz=320),
        Resize(imgsz=1000),
        Resize((0.4, 1.7), 500),
        Flip(1.0),
        Crop((0.85, 0.95)),
        Affine(translate=0.1),
        Affine(rotate=30),
        Affine(shear=20),
        Affine(scale=(0.7, 1.2)),
        Affine(15, 10, 0.05, (0.8, 1.1)),
        OneAffine(),
    ],
    ids=str,
)
def test_a_white_rectangle_lands_where_the_matrix_says(
    operation: object, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, fast)
    monkeypatch.setattr(geometry, "GREY", 0)
    array = np.zeros((360, 500, 3), np.uint8)
    box = torch.tensor([[190.0, 120, 310, 240]])
    array[120:240, 190:310] = 255
    for seed in range(6):
        frame = operation(start(from_hwc(array)), generator(seed))  # type: ignore[operator]
        expected = map_boxes(box, torch.from_numpy(frame.matrix))[0]
        # The corners of a turned square are thin: half a pixel of them is below half brightness.
        torch.testing.assert_close(edges(frame.image), expected, rtol=0, atol=1.5)


@pytest.mark.parametrize("name", STRONG)
def test_a_rectangle_lands_right_through_whole_presets(name: str) -> None:
    array = np.full((360, 500, 3), 40, np.uint8)
    array[100:240, 190:310] = (250, 250, 250)
    box = torch.tensor([[190.0, 100, 310, 240]])
    weak = pipeline("weak", 480)
    (chain,) = pipeline(name, 480).chains
    geometric = tuple(o for o in chain.operations if isinstance(o, Resize | Flip | Crop | Affine | OneAffine))
    for seed in range(6):
        begin = start(from_hwc(array))
        if chain.from_weak:
            begin = weak.preset(begin, generator(seed, 0))
        frame = Chain(geometric)(begin, generator(seed, 1))
        bright = frame.image.float() - 40 > 105
        y, x = (bright[0].any(d).nonzero()[:, 0] for d in (1, 0))
        found = torch.stack((x.min(), y.min(), x.max() + 1, y.max() + 1)).float()
        torch.testing.assert_close(found, map_boxes(box, torch.from_numpy(frame.matrix))[0], rtol=0, atol=1.5)


@kernels
def test_no_half_pixel_is_lost(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The centre of mass of a blob moves as a continuous point does."""
    use(monkeypatch, fast)
    monkeypatch.setattr(geometry, "GREY", 0)
    y, x = torch.meshgrid(torch.arange(100) + 0.5, torch.arange(100) + 0.5, indexing="ij")
    blob = 250 * torch.exp(-((x - 40) ** 2 + (y - 60) ** 2) / 50)
    image = from_hwc(np.repeat(blob.to(torch.uint8).numpy()[..., None], 3, 2))
    for operation in (Resize(imgsz=237), Resize(imgsz=50), Flip(1.0), Affine(rotate=20, scale=(1.1, 1.1))):
        frame = operation(start(image), generator(3))
        mass = frame.image[0].float()
        h, w = mass.shape
        cx = float((mass.sum(0) * (torch.arange(w) + 0.5)).sum() / mass.sum())
        cy = float((mass.sum(1) * (torch.arange(h) + 0.5)).sum() / mass.sum())
        np.testing.assert_allclose([cx, cy], (frame.matrix @ [40, 60, 1])[:2], atol=0.1)


def test_warps_with_and_without_opencv_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cv2")
    image = photo()
    matrix = geometry.affine_matrix(120, 160, 12, (5, -4), (6, -3), 0.9)
    difference = (geometry.warp(image, matrix).int() - geometry._warp_torch(image, matrix).int()).abs().float()
    assert difference.mean() < 0.5  # OpenCV places on a grid of 1/32 pixel
    assert difference.quantile(0.99) <= 4


# ---------------------------------------------------------------- photometry


@kernels
def test_one_colour_matrix_against_torchvision(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Brightness, contrast, saturation and gray agree to rounding; hue is an approximation, bounded here."""
    use(monkeypatch, fast)
    image = (photo().float() * 0.5 + 60).to(torch.uint8)  # no clipping in between, where the two would differ

    def worst(matrix: np.ndarray, reference: torch.Tensor) -> float:
        return float((pixels.recolour(image, matrix).float() - reference.float()).abs().max())

    assert worst(pixels.brightness(1.2), tvf.adjust_brightness(image, 1.2)) <= 1
    assert worst(pixels.contrast(0.7), tvf.adjust_contrast(image, 0.7)) <= 2
    assert worst(pixels.saturation(1.3), tvf.adjust_saturation(image, 1.3)) <= 2
    assert worst(pixels.saturation(0), tvf.rgb_to_grayscale(image, 3)) <= 1
    for turn in (-0.1, 0.05, 0.1):
        approximate = pixels.recolour(image, pixels.hue(turn)).float()
        exact = tvf.adjust_hue(image, turn).float()
        unchanged = (image.float() - exact).abs().mean()
        assert (approximate - exact).abs().mean() < 0.9 * unchanged  # nearer to HSV hue than doing nothing
        assert (approximate - exact).abs().mean() < 8  # levels, on saturated random colours


def test_hue_keeps_the_mean_and_turns_the_right_way() -> None:
    red = torch.tensor([180, 110, 110], dtype=torch.uint8).reshape(3, 1, 1).expand(3, 8, 8)
    turned = pixels.recolour(from_hwc(np.ascontiguousarray(to_hwc(red))), pixels.hue(0.1))[:, 0, 0]
    assert turned[1] > turned[2]  # towards yellow, not magenta
    assert abs(float(turned.float().mean()) - 400 / 3) < 1
    np.testing.assert_allclose(pixels.hue(1 / 3)[:, :3], np.eye(3)[[2, 0, 1]], atol=1e-12)  # red becomes green
    back = pixels.then(pixels.hue(0.1), pixels.hue(-0.1))
    np.testing.assert_allclose(back, pixels.UNCHANGED, atol=1e-5)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_a_chain_in_any_order_is_torchvisions_chain(order: tuple[int, ...]) -> None:
    """All but hue, fused: within 3 levels of three separate roundings."""
    image = (photo().float() * 0.5 + 60).to(torch.uint8)
    matrix, reference = pixels.UNCHANGED, image
    for step in order:
        change = (pixels.brightness(1.15), pixels.contrast(0.7), pixels.saturation(1.3))[step]
        matrix = pixels.then(matrix, change)
        adjust = (tvf.adjust_brightness, tvf.adjust_contrast, tvf.adjust_saturation)[step]
        reference = adjust(reference, (1.15, 0.7, 1.3)[step])
    assert (pixels.recolour(image, matrix).int() - reference.int()).abs().max() <= 3


def test_matrices_compose_in_order() -> None:
    image = photo().double().reshape(3, -1).numpy()

    def changed(image: np.ndarray, matrix: np.ndarray) -> np.ndarray:
        return matrix[:, :3] @ image + matrix[:, 3:] @ image.mean(1, keepdims=True)

    first, second, third = pixels.contrast(0.6), pixels.saturation(1.4), pixels.contrast(1.3)
    one = changed(changed(changed(image, first), second), third)
    np.testing.assert_allclose(changed(image, pixels.then(pixels.then(first, second), third)), one)


def test_mean_colour_is_close_to_the_mean() -> None:
    image = photo(480, 640)
    np.testing.assert_allclose(pixels.mean_colour(image), image.double().mean((1, 2)).numpy(), atol=1.5)


@kernels
@pytest.mark.parametrize("sigma", [0.4, 1.0, 2.0, 5.0])
def test_blur_against_torchvision(sigma: float, fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, fast)
    image, size = photo(), 2 * round(3 * sigma) + 1
    reference = tvf.gaussian_blur(image, [size, size], [sigma, sigma])
    assert (pixels.blur(image, sigma).int() - reference.int()).abs().max() <= 1


def test_blur_of_a_tiny_image_and_of_a_tiny_sigma() -> None:
    assert pixels.blur(photo(2, 2), 3.0).shape == (3, 2, 2)
    image = photo(1, 5)
    assert torch.equal(pixels.blur(image, 3.0), image)
    assert pixels.blur(image, 0.1) is image


def test_erasing_covers_the_stated_area_and_nothing_else() -> None:
    image = torch.full((3, 200, 300), 7, dtype=torch.uint8)
    for seed in range(20):
        frame = Erase(1.0, (0.05, 0.2), (0.3, 3.3))(start(image), generator(seed))
        changed = (frame.image != 7).any(0)
        y, x = changed.any(1).nonzero()[:, 0], changed.any(0).nonzero()[:, 0]
        h, w = int(y.max() - y.min()) + 1, int(x.max() - x.min()) + 1
        assert 0.045 < h * w / 60000 < 0.21
        assert 0.28 < h / w < 3.5
    assert (image == 7).all()  # the frame before is whole
    patched = Cutout((2, 4), 0.2)(start(image), generator(1)).image
    assert 0 < (patched != 7).any(0).float().mean() < 4 * 0.04


@pytest.mark.parametrize("name", OPERATIONS)
def test_no_operation_writes_into_its_input(name: str) -> None:
    image = photo()
    before = image.clone()
    for seed in range(12):
        OPERATIONS[name]()(start(image), generator(seed))
    assert torch.equal(image, before)


# ---------------------------------------------------------------- chains, presets, recipes


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(STRONG), st.integers(20, 90), st.integers(20, 90))
def test_the_same_seed_is_the_same_view_and_stays_in_bounds(seed: int, name: str, h: int, w: int) -> None:
    (chain,) = pipeline(name, 64).chains
    one, two = (chain(start(photo(h, w)), generator(seed)) for _ in range(2))
    assert torch.equal(one.image, two.image)
    assert np.array_equal(one.matrix, two.matrix)
    assert one.image.dtype == torch.uint8
    if chain.longest:
        assert max(one.image.shape) <= chain.longest


def test_global_random_numbers_are_not_touched() -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    state, numpy_state = torch.random.get_rng_state(), str(np.random.get_state())  # noqa: NPY002
    for name in STRONG:
        for seed in range(5):
            pipeline(name, 64).chains[0](start(photo()), generator(seed))
    assert torch.equal(state, torch.random.get_rng_state())
    assert numpy_state == str(np.random.get_state())  # noqa: NPY002


def test_a_recipe_reads_as_written() -> None:
    views = pipeline([{"resize": {"scale": [0.8, 1.2]}}, {"flip": 0.3}, "blur", {"color": {"hue": 0.2}}], 320)
    (chain,) = views.chains
    assert chain.operations[0] == Resize((0.8, 1.2), 320)
    assert chain.operations[1] == Flip(0.3)
    assert chain.operations[3] == Color(hue=0.2)
    assert chain.longest == 384
    assert not chain.from_weak
    assert pipeline([{"resize": [0.5, 1]}], 100).chains[0].operations == (Resize((0.5, 1), 100),)
    assert len(pipeline(["weak", "strong"], 320).chains) == 2
    assert pipeline(["weak", {"blur": None}], 320).chains[0].from_weak
    assert pipeline("weak", 64).as_weak() == Chain((Resize(imgsz=64), Flip(0.5)))


def test_views_travel_to_spawned_workers() -> None:
    for name in STRONG:
        views = pipeline(name, 320)
        assert pickle.loads(pickle.dumps(views)) == views


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("stong", "Did you mean 'strong'"),
        (["weak", {"colour": {}}], "Did you mean 'color'"),
        (["weak", {"color": {"brightnes": 0.4}}], "Did you mean 'brightness'"),
        (["weak", {"color": {"hue": 0.9}}], "color.hue must lie in 0 .. 0.5"),
        (["weak", {"blur": {"sigma": 2}}], r"blur.sigma must be a range \[low, high\]"),
        (["weak", {"blur": {"sigma": [2, 1]}}], "blur.sigma must lie in"),
        (["weak", {"flip": "often"}], "flip.p must be a number"),
        (["weak", {"flip": [0.1, 0.5]}], "flip.p must be one number"),
        ([{"flip": 0.5}], "'resize'"),
        ([], "must be a name"),
        (7, "must be a name"),
        (["weak", {"flip": 0.5, "blur": {}}], "An operation is written"),
        (["weak", 3], "An operation is written"),
        (["strong", {"flip": 0.5}], "may only begin with 'weak'"),
        (["weak", {"flip": {1: 0.5}}], "'flip' has no parameter '1'"),
    ],
)
def test_mistakes_are_said_in_one_sentence(spec: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        pipeline(spec, 320)  # type: ignore[arg-type]


def test_every_operation_has_a_name_and_limits() -> None:
    for name, cls in (OPERATIONS | MIXINGS).items():
        operation = cls()
        assert operation.name == name
        assert type(operation).limits().keys() == {f.name for f in fields(operation)}


def test_an_image_size_of_two_sides_limits_both():
    # 640 x 480 to a short side of 800 is 1067 x 800; a panorama of 1000 x 200 is stopped by its long side, 1333.
    assert fitted(480, 640, 1333, 800) == (800, 1067)
    assert fitted(200, 1000, 1333, 800) == (267, 1333)
    assert fitted(480, 640, 640) == (480, 640)
    frame, rng = Frame(torch.zeros(3, 48, 64, dtype=torch.uint8), np.eye(3)), np.random.default_rng(0)
    assert pipeline("weak", [80, 133]).as_weak()(frame, rng).image.shape == (3, 80, 107)
    assert pipeline([{"resize": {"imgsz": 32}}], [80, 133]).chains[0](frame, rng).image.shape == (3, 24, 32)
