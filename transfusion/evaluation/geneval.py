"""GenEval (Ghosh et al. 2023, 2310.11513): does an image hold the objects, counts, colours and positions of its prompt?

Each prompt is drawn four times. A detector finds the objects, and the published rules decide whether they match. Published
figures use one detector (Mask2Former with a Swin-S backbone, colours by CLIP ViT-L/14); figures of another one are not
comparable. The 553 prompts are in `geneval_prompts.py`, the same categories for `shapes` in `geneval_shapes.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from transfusion.inference.engine import Engine, Request

CATEGORIES = ("single_object", "two_object", "counting", "colors", "position", "color_attr")  # the benchmark's names
IMAGES_PER_PROMPT = 4
BATCH_SIZE = 16  # prompts that are drawn together

CONFIDENCE = 0.3  # detections with a higher score count
COUNTING_CONFIDENCE = 0.9  # the same, in the category counting
MAX_DETECTIONS = 16  # of one name
POSITION_MARGIN = 0.1  # offsets up to this share of both boxes' sides give no relation
MIN_DIRECTION = 0.5  # share of the offset that must point to a side


@dataclass(frozen=True)
class Requirement:
    """`count` objects of a name, of this colour, in this relation to the objects of entry `relative_to` of the prompt."""

    name: str
    count: int
    colour: str | None = None
    relation: str | None = None  # "left of", "right of", "above" or "below"
    relative_to: int | None = None


@dataclass(frozen=True)
class Prompt:
    """A prompt and its rules: an image is right if it meets all of `include` and none of `exclude`."""

    category: str
    text: str
    include: tuple[Requirement, ...]
    exclude: tuple[Requirement, ...] = ()


@dataclass(frozen=True)
class Detection:
    """An object in an image: name, box (left, top, right, bottom) in any unit, confidence, colour."""

    name: str
    box: tuple[float, float, float, float]
    score: float
    colour: str | None = None  # None: none of GenEval's colours


class Detector(Protocol):
    """An image (Y, X, 3) uint8 -> all its objects, with any confidence."""

    def __call__(self, pixels: np.ndarray) -> Sequence[Detection]: ...


def draw_geneval(
    engine: Engine, prompts: Sequence[Prompt], detect: Detector, seed: int = 0
) -> tuple[dict, list[tuple[str, np.ndarray, bool]]]:
    """Draw each prompt four times with the run's defaults. The shares of right images by category, their mean `overall`
    (each category has the same weight), and (prompt, pixels, right) of each prompt's first image. Categories without a
    prompt do not count. ValueError without a prompt."""
    if not prompts:
        raise ValueError("GenEval needs at least one prompt")
    results, shown = {}, []
    for first in range(0, len(prompts), BATCH_SIZE):
        batch = prompts[first : first + BATCH_SIZE]
        requests = [
            Request(parts=(prompt.text,), num_images=IMAGES_PER_PROMPT, seed=seed + first + n)
            for n, prompt in enumerate(batch)
        ]
        for prompt, draws in zip(batch, engine.generate(requests), strict=True):
            images = [draw.parts[0] for draw in draws]
            right = [is_right(prompt, detect(pixels)) for pixels in images]
            results.setdefault(prompt.category, []).extend(right)
            shown.append((prompt.text, images[0], right[0]))
    shares = {name: sum(right) / len(right) for name, right in results.items()}
    overall = sum(shares.values()) / len(shares)
    return shares | {"overall": overall, "count_drawn": IMAGES_PER_PROMPT * len(prompts)}, shown


def is_right(prompt: Prompt, detections: Sequence[Detection]) -> bool:
    """The published rules. Colours and relations are checked for the `count` detections with the highest scores."""
    threshold = COUNTING_CONFIDENCE if prompt.category == "counting" else CONFIDENCE
    by_name: dict[str, list[Detection]] = {}
    for detection in sorted(detections, key=lambda it: -it.score):
        if detection.score > threshold:
            by_name.setdefault(detection.name, []).append(detection)
    matched: list[list[Detection]] = []
    for required in prompt.include:
        best = by_name.get(required.name, [])[: min(required.count, MAX_DETECTIONS)]
        if len(best) < required.count:
            return False
        if required.colour is not None and any(it.colour != required.colour for it in best):
            return False
        others = [] if required.relative_to is None else matched[required.relative_to]
        if any(required.relation not in relative_positions(it, other) for it in best for other in others):
            return False
        matched.append(best)
    return all(len(by_name.get(it.name, [])[:MAX_DETECTIONS]) < it.count for it in prompt.exclude)


def relative_positions(a: Detection, b: Detection) -> set[str]:
    """The position of `a` relative to `b`: up to two of "left of", "right of", "above", "below"."""
    a_box, b_box = (np.array(it.box, float).reshape(2, 2) for it in (a, b))  # corners: (2, 2), x and y
    offset = a_box.mean(0) - b_box.mean(0)  # (2,) between the centres
    beyond = np.maximum(np.abs(offset) - POSITION_MARGIN * (np.ptp(a_box, 0) + np.ptp(b_box, 0)), 0)  # (2,)
    if (beyond < 1e-3).all():
        return set()
    x, y = np.sign(offset) * beyond / np.hypot(*offset)
    directions = {"left of": -x, "right of": x, "above": -y, "below": y}
    return {name for name, share in directions.items() if share > MIN_DIRECTION}
