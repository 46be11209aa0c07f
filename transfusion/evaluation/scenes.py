"""Drawn scenes of `shapes`: are they what their captions say, as read back from the pixels?"""

import numpy as np

from transfusion.data.loader import Source
from transfusion.evaluation.shapes import judge
from transfusion.inference.engine import Engine, Request

ATTRIBUTES = ("everything", "count", "colour", "shape", "size", "place")


def draw_scenes(
    engine: Engine, source: Source, count: int, seed: int = 0
) -> tuple[dict, list[tuple[str, np.ndarray, bool]]]:
    """One drawing for each of the first `count` held-out captions: shares that are right, and (caption, pixels, right)."""
    count = min(count, len(source))
    captions = [source[n].pair[0] for n in range(count)]
    answers = engine.generate(
        [Request(parts=(caption,), num_images=1, seed=seed + n) for n, caption in enumerate(captions)]
    )
    pictures = [draws[0].parts[0] for draws in answers]
    judged = [judge(caption, pixels) for caption, pixels in zip(captions, pictures, strict=True)]
    values = {name: sum(getattr(j, name) for j in judged) / count for name in ATTRIBUTES}
    shown = [(c, p, j.everything) for c, p, j in zip(captions, pictures, judged, strict=True)]
    return values | {"count_drawn": count}, shown
