"""The conditioning gap: 0 for a model that ignores captions; for another one the value computed by hand."""

import pytest
import torch

from tests import tiny
from tests.documents import SHAPES
from transfusion.data.raw import RawDocument, RawImage, RawText
from transfusion.evaluation.conditioning import conditioning_gap
from transfusion.inference.engine import Engine

CAPTIONS = ["a small house", "a drawing", "a small house", "zwei kleine"]


def conditioned(captions=CAPTIONS) -> tuple[Engine, list[RawDocument]]:
    """An engine whose image head is not 0, and pairs in both orders."""
    engine = tiny.build_engine()
    engine.model = engine.opened.model  # without RecordingModel
    torch.nn.init.normal_(engine.model.patches.proj_out.weight, generator=torch.Generator().manual_seed(1))
    pairs = [(RawText(text), RawImage(tiny.picture(SHAPES[0], n))) for n, text in enumerate(captions)]
    return engine, [RawDocument(pair if n % 2 else pair[::-1], n, pairs=True) for n, pair in enumerate(pairs)]


def test_model_that_ignores_captions_has_gap_0():
    engine, source = conditioned()
    torch.nn.init.zeros_(engine.model.patches.proj_out.weight)
    result = conditioning_gap(engine, source, 4)
    assert result["gap"] == 0
    assert result["image_loss"] == result["image_loss_of_others"] > 0


def test_gap_is_relative_to_the_loss_with_the_next_different_caption():
    engine, source = conditioned()
    result = conditioning_gap(engine, source, 4)
    others = ["a drawing", "a small house", "zwei kleine", "a small house"]
    _, swapped = conditioned(others)
    assert conditioning_gap(engine, swapped, 4)["image_loss"] == pytest.approx(result["image_loss_of_others"], rel=1e-6)
    assert result["gap"] == pytest.approx(result["image_loss_of_others"] / result["image_loss"] - 1)
    assert abs(result["gap"]) > 1e-4
    assert result["count"] == 4


def test_gap_is_deterministic_and_uses_count_pairs():
    engine, source = conditioned()
    assert conditioning_gap(engine, source, 3) == conditioning_gap(engine, source, 3)
    assert conditioning_gap(engine, source, 3)["count"] == 3


def test_equal_captions_give_no_gap():
    engine, source = conditioned(["one"] * 3)
    assert conditioning_gap(engine, source, 3) == {"count": 0}
