"""Edits, measured: a drawing that is what was asked for, one that is what it began from, and what is no edit."""

from types import SimpleNamespace

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio

from transfusion.data.raw import RawDocument, RawImage, RawText
from transfusion.evaluation.edits import edit_heldout, is_edit, psnr

CHANCE = np.random.default_rng(0)


def picture() -> np.ndarray:
    return CHANCE.integers(0, 256, (8, 8, 3), np.uint8)


def edit() -> RawDocument:
    before = RawImage(picture(), loss=False, max_t=0)
    return RawDocument((before, RawText("make it red", loss=False), RawImage(picture())))


class Draws:
    """An engine that answers with what it is told."""

    def __init__(self, drawn: list[np.ndarray]):
        self.drawn, self.asked = iter(drawn), []

    def generate(self, requests):
        self.asked += requests
        return [[SimpleNamespace(parts=[next(self.drawn)])] for _ in requests]


def test_what_is_asked_for_is_nearer_than_what_it_began_from():
    edits = [edit() for _ in range(70)]  # more than are drawn together
    right, left = ([one.segments[place].pixels for one in edits] for place in (2, 0))
    engine = Draws(right)
    found = edit_heldout(engine, edits, 70, seed=5)
    assert (found["psnr"], found["nearer"], found["count"]) == (100.0, 1.0, 70)
    assert found["psnr_of_source"] == pytest.approx(np.mean([psnr(a, b) for a, b in zip(left, right, strict=True)]))
    assert [request.seed for request in engine.asked] == list(range(5, 75))
    assert engine.asked[0].parts[1] == "make it red" and engine.asked[0].parts[0] is left[0]
    unchanged = edit_heldout(Draws(left), edits, 70)
    assert unchanged["nearer"] == 0 and unchanged["psnr"] == unchanged["psnr_of_source"]


def test_psnr_is_that_of_skimage():
    one, other = picture(), picture()
    assert psnr(one, other) == pytest.approx(peak_signal_noise_ratio(other, one))
    assert psnr(one, one) == 100 and psnr(one, one[:4]) == 0


def test_captioned_pictures_are_no_edits():
    assert is_edit(edit())
    before, words, after = edit().segments
    assert not is_edit(RawDocument((words, after), pairs=True))
    assert not is_edit(RawDocument((after, words, after)))
