"""GenEval's six questions about the made world `shapes`, where the detector is its checker and never errs.

A caption of that world says more than a question needs (a size, say): only what the category asks for counts.
"""

from collections.abc import Iterable

import numpy as np

from transfusion.data.built_in.shapes import Description, caption, parse
from transfusion.evaluation.geneval import CATEGORIES, Detection, Prompt, Requirement
from transfusion.evaluation.shapes import read_scene


def shapes_prompts(captions: Iterable[str], each: int) -> list[Prompt]:
    """The first `each` prompts of every category among these captions, no caption twice in one.

    Categories of which there are none are left out: only level 2 counts, and level 0 has single things alone.
    """
    prompts: dict[str, dict[str, Prompt]] = {category: {} for category in CATEGORIES}
    for text in captions:
        described = parse(text)
        if described is None:
            raise ValueError(f"not a caption of the world shapes: {text!r}")
        for prompt in _questions(described):
            asked = prompts[prompt.category]
            if len(asked) < each:
                asked.setdefault(text, prompt)
        if all(len(asked) == each for asked in prompts.values()):
            break
    return [prompt for asked in prompts.values() for prompt in asked.values()]


def find_things(pixels: np.ndarray) -> list[Detection]:
    """All that the checker sees in a picture, (Y, Y, 3) uint8, boxes in units of a canvas of 32 x 32."""
    return [
        Detection(it.thing.shape, (x - width / 2, y - height / 2, x + width / 2, y + height / 2), 1.0, it.thing.colour)
        for it in read_scene(pixels)
        for (x, y), (width, height) in [(it.centre, it.box)]
    ]


def _questions(described: Description) -> list[Prompt]:
    """What can be asked of a caption: of one thing or one group, or of two things of different shapes."""
    text, kinds = caption(described), described.kinds
    match described.counts:
        case (1,):
            (it,) = kinds
            return [
                Prompt("single_object", text, (Requirement(it.shape, 1),)),
                Prompt("colors", text, (Requirement(it.shape, 1, it.colour),)),
            ]
        case (count,):
            return [
                Prompt(
                    "counting", text, (Requirement(kinds[0].shape, count),), (Requirement(kinds[0].shape, count + 1),)
                )
            ]
        case (1, 1) if kinds[0].shape != kinds[1].shape:
            one, other = kinds
            (relation,) = described.relations
            asked = [
                Prompt("two_object", text, (Requirement(one.shape, 1), Requirement(other.shape, 1))),
                Prompt(
                    "position",
                    text,
                    (Requirement(other.shape, 1), Requirement(one.shape, 1, relation=relation, other=0)),
                ),
            ]
            if one.colour != other.colour:
                both = Requirement(one.shape, 1, one.colour), Requirement(other.shape, 1, other.colour)
                asked.append(Prompt("color_attr", text, both))
            return asked
        case _:
            return []
