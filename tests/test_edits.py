"""Edit metrics: a drawing equal to the target, one equal to the source image, and documents that are not edits."""

from types import SimpleNamespace

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio

from transfusion.data.raw import RawDocument, RawImage, RawText
from transfusion.evaluation.edits import edit_heldout, is_edit, psnr

RNG = np.random.default_rng(0)


def random_image() -> np.ndarray:
    return RNG.integers(0, 256, (8, 8, 3), np.uint8)


def edit() -> RawDocument:
    before = RawImage(random_image(), loss=False, max_t=0)
    return RawDocument((before, RawText("make it red", loss=False), RawImage(random_image())))


class FakeEngine:
    """An engine that returns these images."""

    def __init__(self, images: list[np.ndarray]):
        self.images, self.requests = iter(images), []

    def generate(self, requests):
        self.requests += requests
        return [[SimpleNamespace(parts=[next(self.images)])] for _ in requests]


def test_psnr_of_the_target_and_of_the_source_image():
    edits = [edit() for _ in range(70)]  # more than are drawn together
    targets, sources = ([document.segments[n].pixels for document in edits] for n in (2, 0))
    engine = FakeEngine(targets)
    result = edit_heldout(engine, edits, 70, seed=5)
    assert (result["psnr"], result["nearer"], result["count"]) == (100.0, 1.0, 70)
    assert result["psnr_of_source"] == pytest.approx(np.mean([psnr(a, b) for a, b in zip(sources, targets, strict=True)]))
    assert [request.seed for request in engine.requests] == list(range(5, 75))
    assert engine.requests[0].parts[1] == "make it red" and engine.requests[0].parts[0] is sources[0]
    unchanged = edit_heldout(FakeEngine(sources), edits, 70)
    assert unchanged["nearer"] == 0 and unchanged["psnr"] == unchanged["psnr_of_source"]


def test_psnr_equals_skimage():
    a, b = random_image(), random_image()
    assert psnr(a, b) == pytest.approx(peak_signal_noise_ratio(b, a))
    assert psnr(a, a) == 100 and psnr(a, a[:4]) == 0


def test_captioned_images_are_not_edits():
    assert is_edit(edit())
    before, instruction, after = edit().segments
    assert not is_edit(RawDocument((instruction, after), pairs=True))
    assert not is_edit(RawDocument((after, instruction, after)))
