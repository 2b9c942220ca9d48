"""The strong view painted on the device: the same images as the workers' where the draws are the same, the same
distribution everywhere, the same bits for the same step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from ssod.data.streams import generator
from ssod.data.views import geometry, pixels
from ssod.data.views.device import PAINT, Painter, divide
from ssod.data.views.geometric import Flip, Resize
from ssod.data.views.geometry import GREY
from ssod.data.views.operations import Frame, Operation
from ssod.data.views.photometric import Blur, Color, Cutout, Erase, OneColor, Painting
from ssod.data.views.presets import VIEWS
from ssod.data.views.transforms import pipeline
from ssod.structures import View

SIZES = [(60, 96), (64, 50), (33, 96), (64, 96)]


@pytest.fixture(autouse=True)
def _torch_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geometry, "cv2", None)
    monkeypatch.setattr(pixels, "cv2", None)


def view(sizes: list[tuple[int, int]] = SIZES, seed: int = 0) -> View:
    """A batch of smooth images of these (h, w), padded to 64 x 96."""
    rng = np.random.default_rng(seed)
    images = torch.full((len(sizes), 3, 64, 96), GREY, dtype=torch.uint8)
    for image, (h, w) in zip(images, sizes, strict=True):
        coarse = torch.from_numpy(rng.uniform(10, 245, (1, 3, 5, 6)))
        smooth = torch.nn.functional.interpolate(coarse, (h, w), mode="bicubic")[0]
        image[:, :h, :w] = (smooth + torch.from_numpy(rng.normal(0, 6, (3, h, w)))).clamp(0, 255).to(torch.uint8)
    count = len(sizes)
    return View(images, torch.tensor(sizes), torch.eye(3, dtype=torch.float64).repeat(count, 1, 1), [], [0] * count)


def by_worker(batch: View, operations: tuple[Painting, ...], seed: int, step: int) -> torch.Tensor:
    """What the workers' operations make of every image when they draw from the painter's own numbers."""
    images = batch.images.clone()
    for i, (h, w) in enumerate(batch.sizes.tolist()):
        rng = generator(seed, PAINT, step * len(batch) + i, 0, 0)
        frame = Frame(images[i, :, :h, :w].clone(), np.eye(3))
        for operation in operations:
            frame = operation(frame, rng)
        images[i, :, :h, :w] = frame.image
    return images


COLOURS: list[tuple[Painting, ...]] = [
    (Color(),),
    (Color(0.8, 0.8, 0.8, 0.2, p=1.0),),
    (Color(p=0.0, gray=1.0),),
    (Blur(),),
    (Blur((2.0, 6.0), 1.0),),
    (Cutout((0, 4), 0.4),),
    (Color(0.4, 0.4, 0.4, 0.1, 0.8, 0.2), Blur(), Cutout()),
]


@pytest.mark.parametrize("operations", COLOURS, ids=str)
def test_the_same_draws_give_the_same_image(operations: tuple[Painting, ...]) -> None:
    touched = 0
    for step in range(8):
        batch = view(seed=step)
        painted = Painter(operations, seed=3)(batch, batch.sizes, step).images
        difference = (painted.int() - by_worker(batch, operations, 3, step).int()).abs()
        assert difference.max() <= len(operations)  # a sum in another order rounds to the next level, at most
        assert (difference > 0).float().mean() < 0.02
        touched += not torch.equal(painted, batch.images)
    assert touched >= 6


def test_erasing_covers_the_drawn_rectangle_with_uniform_noise() -> None:
    erase = Erase(1.0, (0.2, 0.4), (0.5, 2.0))
    values = []
    for step in range(60):
        batch = replace(view(), images=torch.full((4, 3, 64, 96), 7, dtype=torch.uint8))
        images = Painter([erase], seed=1)(batch, batch.sizes, step).images
        for i, (h, w) in enumerate(batch.sizes.tolist()):
            ((top, left, tall, wide),) = erase.draw(generator(1, PAINT, 4 * step + i, 0, 0), h, w)
            patch = images[i, :, top : top + tall, left : left + wide]
            values.append(patch.flatten().clone())
            patch.fill_(7)
            assert (images[i, :, :h, :w] == 7).all()  # nothing else has changed
    histogram = torch.bincount(torch.cat(values).long(), minlength=256).double()
    expected = histogram.sum() / 256
    assert ((histogram - expected) ** 2 / expected).sum() < 255 + 5 * (2 * 255) ** 0.5  # chi-square, five sigma


def statistics(images: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """Per image: mean and spread of each channel, luma contrast, roughness, share of changed pixels. [B, 9]"""
    x = images.float()
    rough = (x[..., 1:] - x[..., :-1]).abs().mean((1, 2, 3))
    changed = (images != before).any(1).float().mean((1, 2))
    luma = x.mean(1).std((1, 2))
    return torch.cat((x.mean((2, 3)), x.std((2, 3)), torch.stack((rough, changed, luma), 1)), 1)


PARTS: dict[str, Any] = {
    "color": {"color": {"p": 0.8, "gray": 0.2}},
    "strong colour": {"color": {"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2}},
    "blur": {"blur": {}},
    "erase": {"erase": {"p": 0.7, "area": [0.05, 0.2]}},
    "cutout": "cutout",
}


@pytest.mark.parametrize("name", [*PARTS, "strong", "rpl"])
def far_apart(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two samples [n] differ by more than chance does once in 10,000 times (Kolmogorov-Smirnov).

    Rounding moves equal values a little apart, so they are compared on a grid of 1/200 of a level.
    """
    a, b = ((x * 200).round() for x in (a, b))
    grid = torch.cat((a, b)).unique()
    below = [torch.searchsorted(x.sort().values, grid, right=True) / len(x) for x in (a, b)]
    return bool((below[0] - below[1]).abs().max() > 2.23 * (2 / len(a)) ** 0.5)


DRAWS = 640


@pytest.mark.parametrize("name", [*PARTS, "strong", "rpl"])
def test_both_places_draw_from_one_distribution(name: str) -> None:
    """Many draws on one image: means and variances of every statistic agree within four standard errors, and so
    do the distributions."""
    views = pipeline(["weak", PARTS[name]] if name in PARTS else name, 64)
    (chain,), (_, operations) = views.chains, divide(views)
    assert operations == chain.operations
    one = view([(64, 96)], seed=5)
    batch = View(one.images.expand(64, -1, -1, -1), one.sizes.expand(64, -1), one.matrices, [], [0] * 64)
    painter = Painter(operations, seed=9)
    device = torch.cat([painter(batch, batch.sizes, step).images for step in range(DRAWS // 64)])
    source = Frame(one.images[0], np.eye(3))
    worker = torch.stack([chain(source, generator(77, i)).image for i in range(DRAWS)])
    a, b = (statistics(images, one.images).double() for images in (device, worker))
    spread = torch.maximum(a.std(0), b.std(0))
    assert ((a.mean(0) - b.mean(0)).abs() < 4 * spread * (2 / DRAWS) ** 0.5 + 1e-3).all()
    fourth = torch.maximum(*(((x - x.mean(0)) ** 4).mean(0) for x in (a, b)))
    assert ((a.var(0) - b.var(0)).abs() < 4 * (2 * fourth / DRAWS) ** 0.5 + 1e-3).all()
    assert not any(far_apart(x, y) for x, y in zip(a.T, b.T, strict=True))


def test_the_yardstick_tells_a_wrong_strength() -> None:
    one = view([(64, 96)], seed=5)
    source = Frame(one.images[0], np.eye(3))

    def roughness(blur: Blur, seed: int) -> torch.Tensor:
        images = torch.stack([blur(source, generator(seed, i)).image for i in range(DRAWS)])
        return statistics(images, one.images)[:, 6].double()

    assert not far_apart(roughness(Blur((0.1, 2.0), 1.0), 1), roughness(Blur((0.1, 2.0), 1.0), 2))
    assert far_apart(roughness(Blur((0.1, 2.0), 1.0), 1), roughness(Blur((0.1, 1.5), 1.0), 2))


def test_padding_stays_grey_and_the_batch_whole() -> None:
    batch = view()
    before = batch.images.clone()
    operations = divide(pipeline("strong", 96))[1]
    for step in range(6):
        painted = Painter(operations, seed=0)(batch, batch.sizes, step)
        assert torch.equal(batch.images, before)
        assert painted.images.dtype == torch.uint8
        for image, (h, w) in zip(painted.images, SIZES, strict=True):
            assert (image[:, h:] == GREY).all()
            assert (image[:, :, w:] == GREY).all()


def test_a_step_is_the_same_whenever_it_is_painted() -> None:
    operations = divide(pipeline("strong", 96))[1]
    batch = view()
    run = Painter(operations, seed=4)
    steps = [run(batch, batch.sizes, step).images for step in range(5)]
    assert torch.equal(Painter(operations, seed=4)(batch, batch.sizes, 3).images, steps[3])
    assert len({images.numpy().tobytes() for images in steps}) == 5
    assert not torch.equal(Painter(operations, seed=5)(batch, batch.sizes, 3).images, steps[3])


def test_two_ranks_draw_what_one_draws() -> None:
    operations = divide(pipeline(["weak", "color", "blur", "cutout"], 96))[1]
    batch = view()
    alone = Painter(operations, seed=4)(batch, batch.sizes, 2).images
    halves = [
        replace(batch, images=batch.images[part], sizes=batch.sizes[part], indices=[0, 0])
        for part in (slice(0, 2), slice(2, 4))
    ]
    shared = [Painter(operations, 4, rank, 2)(half, half.sizes, 2).images for rank, half in enumerate(halves)]
    assert torch.equal(torch.cat(shared), alone)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_paints_what_the_host_paints() -> None:
    operations = (*COLOURS[-1], Erase(1.0))
    batch = view()
    covered = 0
    for step in range(6):
        there = Painter(operations, seed=2)(batch.to("cuda"), batch.sizes, step).images.cpu()
        here = Painter(operations, seed=2)(batch, batch.sizes, step).images
        same = (there.int() - here.int()).abs().amax(1) <= len(operations)
        covered += int((~same).sum())
        for i, (h, w) in enumerate(batch.sizes.tolist()):  # only the noise under one rectangle may differ
            y, x = (~same[i]).nonzero().unbind(1)
            if len(y):
                assert (y.max() - y.min() + 1) * (x.max() - x.min() + 1) <= 0.21 * h * w
    assert covered > 0


def test_what_the_device_takes_over() -> None:
    rest, painted = divide(pipeline("unbiased_teacher", 64))
    assert rest.chains[0].operations == ()
    assert rest.chains[0].from_weak
    assert [type(o) for o in painted] == [Color, Blur, Erase, Erase, Erase]
    rest, painted = divide(pipeline("soft_teacher", 64))
    assert [type(o) for o in painted] == [Cutout]
    assert OneColor in [type(o) for o in rest.chains[0].operations]
    mixed: list[object] = [{"resize": [1, 1]}, "blur", {"flip": 0.5}, "color"]
    rest, painted = divide(pipeline(mixed, 64))
    kinds: list[type[Operation]] = [type(o) for o in rest.chains[0].operations]
    assert kinds == [Resize, Blur, Flip]
    assert [type(o) for o in painted] == [Color]
    for name in set(VIEWS) - {"mosaic_view"}:
        views = pipeline(name, 64)
        rest, painted = divide(views)
        assert rest.chains[0].operations + painted == views.chains[0].operations
