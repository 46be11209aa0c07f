"""GenEval (Ghosh et al. 2023, 2310.11513): are the things asked for there, as many, in their colours and places?

Four pictures of each prompt; a detector says what is in them, and the published rules say whether that is what was asked.
Published figures come from one detector (Mask2Former with a Swin-S backbone, colours by CLIP ViT-L/14): with another one
they are not to be compared. `geneval_prompts.py` has the 553 prompts, `geneval_shapes.py` the same questions about `shapes`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from transfusion.inference.engine import Engine, Request

CATEGORIES = ("single_object", "two_object", "counting", "colors", "position", "color_attr")  # as the benchmark calls them
PER_PROMPT = 4  # pictures
AT_ONCE = 16  # prompts that are drawn together

CONFIDENCE = 0.3  # of a detection that counts
COUNTED_CONFIDENCE = 0.9  # where the question is how many
MOST = 16  # detections of one name
CLEARANCE = 0.1  # of both boxes' sides: nearer than this, a thing is not beside another
DIRECTION = 0.5  # of the way between two middles: so much of it must lead to a side


@dataclass(frozen=True)
class Requirement:
    """So many things of a name, of this colour, in this relation to those that the prompt wants at place `other`."""

    name: str
    count: int
    colour: str | None = None
    relation: str | None = None  # "left of", "right of", "above" or "below"
    other: int | None = None


@dataclass(frozen=True)
class Prompt:
    """What is asked, and what makes a picture right: all of `wanted`, and of none of `unwanted` as many as it says."""

    category: str
    text: str
    wanted: tuple[Requirement, ...]
    unwanted: tuple[Requirement, ...] = ()


@dataclass(frozen=True)
class Detection:
    """A thing in a picture: its name, its box (left, top, right, bottom) in any unit, how sure that is, its colour."""

    name: str
    box: tuple[float, float, float, float]
    score: float
    colour: str | None = None  # None: of no colour that can be asked for


class Detector(Protocol):
    """A picture, (Y, X, 3) uint8, to all that is in it, however unsure."""

    def __call__(self, pixels: np.ndarray) -> Sequence[Detection]: ...


def draw_geneval(
    engine: Engine, prompts: Sequence[Prompt], detect: Detector, seed: int = 0
) -> tuple[dict, list[tuple[str, np.ndarray, bool]]]:
    """Shares of right pictures, by category and `overall` (the mean of the categories, whatever their sizes), each prompt
    drawn four times by the run's own defaults; and (prompt, pixels, right) of each prompt's first picture.

    Only categories that are asked for are counted. ValueError when nothing is.
    """
    if not prompts:
        raise ValueError("GenEval needs at least one prompt")
    right, shown = {}, []
    for first in range(0, len(prompts), AT_ONCE):
        some = prompts[first : first + AT_ONCE]
        requests = [
            Request(parts=(prompt.text,), num_images=PER_PROMPT, seed=seed + first + n) for n, prompt in enumerate(some)
        ]
        for prompt, draws in zip(some, engine.generate(requests), strict=True):
            pictures = [draw.parts[0] for draw in draws]
            judged = [is_right(prompt, detect(pixels)) for pixels in pictures]
            right.setdefault(prompt.category, []).extend(judged)
            shown.append((prompt.text, pictures[0], judged[0]))
    shares = {name: sum(judged) / len(judged) for name, judged in right.items()}
    overall = sum(shares.values()) / len(shares)
    return shares | {"overall": overall, "count_drawn": PER_PROMPT * len(prompts)}, shown


def is_right(prompt: Prompt, found: Sequence[Detection]) -> bool:
    """By the published rules: colours and relations are asked only of the surest detections, as many as are wanted."""
    least = COUNTED_CONFIDENCE if prompt.category == "counting" else CONFIDENCE
    seen: dict[str, list[Detection]] = {}
    for it in sorted(found, key=lambda it: -it.score):
        if it.score > least:
            seen.setdefault(it.name, []).append(it)
    met: list[list[Detection]] = []
    for wanted in prompt.wanted:
        surest = seen.get(wanted.name, [])[: min(wanted.count, MOST)]
        if len(surest) < wanted.count:
            return False
        if wanted.colour is not None and any(it.colour != wanted.colour for it in surest):
            return False
        others = [] if wanted.other is None else met[wanted.other]
        if any(wanted.relation not in relations(one, other) for one in surest for other in others):
            return False
        met.append(surest)
    return all(len(seen.get(unwanted.name, [])[:MOST]) < unwanted.count for unwanted in prompt.unwanted)


def relations(one: Detection, other: Detection) -> set[str]:
    """Where the first is, seen from the second: up to two of "left of", "right of", "above", "below"."""
    a, b = (np.array(it.box, float).reshape(2, 2) for it in (one, other))  # corners: (2, 2), x and y
    way = a.mean(0) - b.mean(0)  # (2,) from the second's middle to the first's
    clear = np.maximum(np.abs(way) - CLEARANCE * (np.ptp(a, 0) + np.ptp(b, 0)), 0)  # (2,)
    if (clear < 1e-3).all():
        return set()
    x, y = np.sign(way) * clear / np.hypot(*way)
    sides = {"left of": -x, "right of": x, "above": -y, "below": y}
    return {name for name, share in sides.items() if share > DIRECTION}
