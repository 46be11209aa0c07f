"""Scenes of `shapes` and their captions: does a drawn scene match its caption, and a caption its scene?"""

from collections.abc import Sequence

import numpy as np

from transfusion.data.built_in.continuous import parse as parse_continuous
from transfusion.data.loader import Source, read_pairs
from transfusion.evaluation import continuous, shapes
from transfusion.evaluation.captions import caption_heldout
from transfusion.inference.engine import Engine, Request

BATCH_SIZE = 64  # images that are drawn together
ATTRIBUTES = ("everything", "count", "colour", "shape", "size", "place")


def draw_scenes(
    engine: Engine, source: Source, count: int, seed: int = 0
) -> tuple[dict, list[tuple[str, np.ndarray, bool]]]:
    """One image for each of the first `count` held-out captions: the shares that are right, and (caption, pixels, right)."""
    captions = [caption for _, caption, _ in read_pairs(source, count)]
    return judge_scenes(captions, draw_captions(engine, captions, seed))


def draw_captions(engine: Engine, captions: Sequence[str], seed: int = 0) -> list[np.ndarray]:
    """One image (Y, X, channels) uint8 for each caption with the run's defaults; caption n has the seed `seed` + n."""
    return draw(engine, [Request(parts=(caption,), num_images=1, seed=seed + n) for n, caption in enumerate(captions)])


def draw(engine: Engine, requests: Sequence[Request]) -> list[np.ndarray]:
    """The single image (Y, X, channels) uint8 of each request, in batches, since each row needs memory in the KV cache."""
    batches = (requests[first : first + BATCH_SIZE] for first in range(0, len(requests), BATCH_SIZE))
    return [answer.parts[-1] for batch in batches for (answer,) in engine.generate(batch)]


def judge_scenes(captions: Sequence[str], images: Sequence[np.ndarray]) -> tuple[dict, list[tuple[str, np.ndarray, bool]]]:
    """The share of images that match their captions, by attribute, and (caption, pixels, right). Of level 3 also the mean
    errors, of the images that have an object."""
    judgements, errors = [], []
    for caption, pixels in zip(captions, images, strict=True):
        if is_continuous(caption):
            judgement, its_errors = continuous.judge(caption, pixels)
            errors.append(its_errors)
        else:
            judgement = shapes.judge(caption, pixels)
        judgements.append(judgement)
    shares = {name: sum(getattr(it, name) for it in judgements) / len(judgements) for name in ATTRIBUTES}
    shown = [(caption, pixels, it.everything) for caption, pixels, it in zip(captions, images, judgements, strict=True)]
    return shares | continuous.mean_errors(errors) | {"count_drawn": len(judgements)}, shown


def caption_scenes(engine: Engine, source: Source, count: int) -> dict:
    """What `caption_heldout` returns. Of level 3 also `within_limits`, the share of captions that are right within the
    limits for drawings, and the mean errors of those that are captions."""
    values = caption_heldout(engine, source, count)
    pairs = [(it["reference"], it["prediction"]) for it in values["answers"] if is_continuous(it["reference"])]
    if not pairs:
        return values
    is_right, errors = zip(*(continuous.judge_caption(*pair) for pair in pairs), strict=True)
    return {"within_limits": sum(is_right) / len(pairs), **continuous.mean_errors(errors), **values}


def is_continuous(caption: str) -> bool:
    """True for captions of level 3 of `shapes`."""
    return parse_continuous(caption) is not None
