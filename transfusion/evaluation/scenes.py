"""Drawn scenes of `shapes`: are they what their captions say, as read back from the pixels?"""

from collections.abc import Sequence

import numpy as np

from transfusion.data.loader import Source
from transfusion.evaluation.shapes import judge
from transfusion.inference.engine import Engine, Request

AT_ONCE = 64  # drawings that are made together
ATTRIBUTES = ("everything", "count", "colour", "shape", "size", "place")


def draw_scenes(
    engine: Engine, source: Source, count: int, seed: int = 0
) -> tuple[dict, list[tuple[str, np.ndarray, bool]]]:
    """One drawing for each of the first `count` held-out captions: shares that are right, and (caption, pixels, right)."""
    captions = [source[n].pair[0] for n in range(min(count, len(source)))]
    return judge_scenes(captions, draw_captions(engine, captions, seed))


def draw_captions(engine: Engine, captions: Sequence[str], seed: int = 0) -> list[np.ndarray]:
    """One drawing (Y, X, colours) uint8 for each caption, by the run's own defaults; the n-th from seed + n."""
    return draw(engine, [Request(parts=(caption,), num_images=1, seed=seed + n) for n, caption in enumerate(captions)])


def draw(engine: Engine, requests: Sequence[Request]) -> list[np.ndarray]:
    """The one image that each of these asks for, (Y, X, colours) uint8; some at a time, for each row takes cache."""
    some = (requests[first : first + AT_ONCE] for first in range(0, len(requests), AT_ONCE))
    return [answer.parts[-1] for asked in some for (answer,) in engine.generate(asked)]


def judge_scenes(
    captions: Sequence[str], pictures: Sequence[np.ndarray]
) -> tuple[dict, list[tuple[str, np.ndarray, bool]]]:
    """Shares of the pictures that are what their captions say, and (caption, pixels, right)."""
    judged = [judge(caption, pixels) for caption, pixels in zip(captions, pictures, strict=True)]
    values = {name: sum(getattr(j, name) for j in judged) / len(judged) for name in ATTRIBUTES}
    shown = [(c, p, j.everything) for c, p, j in zip(captions, pictures, judged, strict=True)]
    return values | {"count_drawn": len(judged)}, shown
