"""GenEval's six categories on the synthetic data set `shapes`, with its checker as an exact detector.

A caption of `shapes` may name more than a category needs, for example a size: only the category's requirements count.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from transfusion.data.built_in import continuous
from transfusion.data.built_in.shapes import parse
from transfusion.evaluation.continuous import read_objects
from transfusion.evaluation.geneval import CATEGORIES, Detection, Detector, Prompt, Requirement
from transfusion.evaluation.shapes import read_scene


def shapes_prompts(captions: Iterable[str], count: int) -> list[Prompt]:
    """The first `count` prompts of each category from these captions, without duplicates. Categories without a prompt are
    omitted: only level 2 has counting, level 0 has single objects only, and level 3 no names of colours either."""
    prompts: dict[str, dict[str, Prompt]] = {category: {} for category in CATEGORIES}
    for text in captions:
        for prompt in _to_prompts(text):
            of_category = prompts[prompt.category]
            if len(of_category) < count:
                of_category.setdefault(text, prompt)
        if all(len(of_category) == count for of_category in prompts.values()):
            break
    return [prompt for of_category in prompts.values() for prompt in of_category.values()]


def choose_detector(prompts: Sequence[Prompt]) -> Detector:
    """The reader of the prompts' level."""
    is_level_3 = any(continuous.parse(prompt.text) for prompt in prompts)
    return detect_continuous_objects if is_level_3 else detect_objects


def detect_continuous_objects(pixels: np.ndarray) -> list[Detection]:
    """All objects that the reader of level 3 finds in an image (Y, Y, 3) uint8, without names of their colours."""
    return [
        Detection(it.shape, (x - it.size / 2, y - it.size / 2, x + it.size / 2, y + it.size / 2), 1.0)
        for it in (reading.object for reading in read_objects(pixels))
        for (x, y) in [it.centre]
    ]


def detect_objects(pixels: np.ndarray) -> list[Detection]:
    """All objects that the checker reads from an image (Y, Y, 3) uint8, boxes in units of a canvas of 32 x 32."""
    return [
        Detection(it.object.shape, (x - width / 2, y - height / 2, x + width / 2, y + height / 2), 1.0, it.object.colour)
        for it in read_scene(pixels)
        for (x, y), (width, height) in [(it.centre, it.box)]
    ]


def _to_prompts(text: str) -> list[Prompt]:
    """The prompts of a caption of one object, one group, or two objects of different shapes."""
    if (item := continuous.parse(text)) is not None:
        return [Prompt("single_object", text, (Requirement(item.shape, 1),))]
    description = parse(text)
    if description is None:
        raise ValueError(f"not a caption of the data set shapes: {text!r}")
    kinds = description.kinds
    match description.counts:
        case (1,):
            (kind,) = kinds
            return [
                Prompt("single_object", text, (Requirement(kind.shape, 1),)),
                Prompt("colors", text, (Requirement(kind.shape, 1, kind.colour),)),
            ]
        case (count,):
            shape = kinds[0].shape
            return [Prompt("counting", text, (Requirement(shape, count),), (Requirement(shape, count + 1),))]
        case (1, 1) if kinds[0].shape != kinds[1].shape:
            first, second = kinds
            (relation,) = description.relations
            related = Requirement(first.shape, 1, relation=relation, relative_to=0)
            prompts = [
                Prompt("two_object", text, (Requirement(first.shape, 1), Requirement(second.shape, 1))),
                Prompt("position", text, (Requirement(second.shape, 1), related)),
            ]
            if first.colour != second.colour:
                both = Requirement(first.shape, 1, first.colour), Requirement(second.shape, 1, second.colour)
                prompts.append(Prompt("color_attr", text, both))
            return prompts
        case _:
            return []
