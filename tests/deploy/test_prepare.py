"""Pixels of an exported model are those of validation: sides, places, padding, and the way back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssod.data.evalset import EvalLoader
from ssod.data.image import read_image
from ssod.data.samples import Sample
from ssod.data.shapes import draw_image
from ssod.data.sizes import Fit
from ssod.deploy.prepare import prepare, to_source

MEAN = (0.485, 0.456, 0.406)
LEVELS = 2  # of 255 between Pillow's kernel and torchvision's; measured on photos, too: 2 at 512 px, else 0 or 1


def picture(seed: int, height: int, width: int, noisy: bool) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if noisy:
        return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(draw_image(rng)[0]).resize((width, height)))


@pytest.mark.parametrize("fit", [Fit(97), Fit(160), Fit([96, 150]), Fit(333, 64), Fit(640, 32, (128, 224))])
@pytest.mark.parametrize("noisy", [False, True])
def test_pixels_are_those_of_validation(fit: Fit, noisy: bool, tmp_path: Path) -> None:
    for seed, (height, width) in enumerate([(120, 160), (211, 97), (300, 301)]):
        file = tmp_path / f"{seed}.png"
        Image.fromarray(picture(seed, height, width, noisy)).save(file)
        (view,) = EvalLoader(
            [Sample.unlabeled(file, 1, width, height)], fit.imgsz, 1, pad_to=fit.multiple, frame=fit.frame
        )
        ours = prepare(read_image(file), fit, MEAN)
        h, w = ours.size
        assert [[h, w]] == view.sizes.tolist()
        difference = np.abs(ours.image[:, :h, :w] * 255 - view.images[0, :, :h, :w].numpy())
        assert difference.max() <= LEVELS + 1e-3
        assert difference.mean() < 0.5
        if fit.frame is None:
            assert ours.image.shape[1:] == view.images.shape[2:]


def test_padding_is_the_mean_and_the_image_lies_in_the_corner() -> None:
    white = np.full((50, 100, 3), 255, np.uint8)
    image, size, shape = prepare(white, Fit(90, 32), MEAN)
    assert (image.shape, image.dtype, size, shape) == ((3, 64, 96), np.float32, (45, 90), (50, 100))
    assert (image[:, :45, :90] == 1).all()
    for padding in (image[:, 45:], image[:, :, 90:]):
        assert (padding == np.float32(MEAN)[:, None, None]).all()


@pytest.mark.parametrize(
    ("shape", "size"), [((50, 100), (64, 128)), ((100, 50), (96, 48)), ((10, 3000), (1, 128)), ((96, 128), (96, 128))]
)
def test_a_fixed_input_takes_the_largest_size_that_fits(shape: tuple[int, int], size: tuple[int, int]) -> None:
    prepared = prepare(np.zeros((*shape, 3), np.uint8), Fit(640, 32, (96, 128)), MEAN)
    assert prepared.size == size
    assert prepared.image.shape == (3, 96, 128)


def test_boxes_go_back_to_the_image_and_end_at_its_edges() -> None:
    prepared = prepare(np.zeros((50, 100, 3), np.uint8), Fit(96), MEAN)
    boxes = to_source(np.array([[0, 0, 96, 48], [24, 12, 48, 24], [-5, 40, 99, 70]], np.float32), prepared)
    np.testing.assert_allclose(boxes, [[0, 0, 100, 50], [25, 12.5, 50, 25], [0, 40 / 0.96, 100, 50]], rtol=1e-6)
    assert to_source(np.zeros((0, 4), np.float32), prepared).shape == (0, 4)
