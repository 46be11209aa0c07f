"""The conditioning gap: nothing for a model that does not listen, and for one that does what it says by hand."""

import pytest
import torch

from tests import tiny
from tests.documents import SHAPES
from transfusion.data.raw import RawDocument, RawImage, RawText
from transfusion.evaluation.conditioning import conditioning_gap
from transfusion.inference.engine import Engine

CAPTIONS = ["a small house", "a drawing", "a small house", "zwei kleine"]


def listening(captions=CAPTIONS) -> tuple[Engine, list[RawDocument]]:
    """An engine whose image head says something, and pairs in either order."""
    engine = tiny.engine()
    engine.model = engine.opened.model  # without notes
    torch.nn.init.normal_(engine.model.patches.proj_out.weight, generator=torch.Generator().manual_seed(1))
    pairs = [(RawText(text), RawImage(tiny.picture(SHAPES[0], n))) for n, text in enumerate(captions)]
    return engine, [RawDocument(pair if n % 2 else pair[::-1], n, pairs=True) for n, pair in enumerate(pairs)]


def test_a_model_that_ignores_captions_has_no_gap():
    engine, source = listening()
    torch.nn.init.zeros_(engine.model.patches.proj_out.weight)
    found = conditioning_gap(engine, source, 4)
    assert found["gap"] == 0
    assert found["image_loss"] == found["image_loss_of_others"] > 0


def test_a_gap_is_how_much_larger_the_loss_is_behind_the_next_other_caption():
    engine, source = listening()
    found = conditioning_gap(engine, source, 4)
    others = ["a drawing", "a small house", "zwei kleine", "a small house"]
    _, swapped = listening(others)
    assert conditioning_gap(engine, swapped, 4)["image_loss"] == pytest.approx(found["image_loss_of_others"], rel=1e-6)
    assert found["gap"] == pytest.approx(found["image_loss_of_others"] / found["image_loss"] - 1)
    assert abs(found["gap"]) > 1e-4
    assert found["count"] == 4


def test_it_is_the_same_every_time_and_of_as_many_as_asked():
    engine, source = listening()
    assert conditioning_gap(engine, source, 3) == conditioning_gap(engine, source, 3)
    assert conditioning_gap(engine, source, 3)["count"] == 3


def test_where_all_captions_are_alike_there_is_nothing_to_say():
    engine, source = listening(["one"] * 3)
    assert conditioning_gap(engine, source, 3) == {"count": 0}
