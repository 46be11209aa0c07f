"""How far the reader of continuous scenes can be trusted: on clean scenes of `--shapes-level 3`, and on noisy, blurred,
shifted and faded ones.

    python -m experiments.reader_limits

prints a table: the share of images whose shape is right, unclear or another one, and the mean errors of hue (degrees), place
and size (pixels of 32 x 32) against the numbers of the scene, which are not rounded.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from scipy import ndimage

from experiments.lab import format_markdown
from transfusion.data.built_in.continuous import render
from transfusion.data.built_in.shapes import Shapes
from transfusion.evaluation.continuous import Errors, mean_errors, measure_errors, read_objects
from transfusion.evaluation.shapes import UNCLEAR

NUM_SCENES = 300
SHIFT = -1.5, 0.6  # pixels, right and down

Change = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def add_noise(strength: float) -> Change:
    return lambda image, rng: image + rng.normal(0, strength, image.shape)


def blur(width: float) -> Change:
    return lambda image, _: ndimage.gaussian_filter(image, (width, width, 0))


def fade(share: float) -> Change:
    return lambda image, _: 50 + share * (image - 50)


def shift(image: np.ndarray, _: np.random.Generator) -> np.ndarray:
    return ndimage.shift(image, (SHIFT[1], SHIFT[0], 0), order=1, mode="nearest")


CHANGES: dict[str, Change] = {
    "clean": lambda image, _: image,
    **{f"noise, standard deviation {strength} of 255": add_noise(strength) for strength in (6, 12, 18, 25)},
    **{f"blur, standard deviation {width} pixels": blur(width) for width in (0.5, 1.0, 1.3, 1.6)},
    **{f"contrast {share:.0%}": fade(share) for share in (0.75, 0.5, 0.4)},
    "shifted by half pixels": shift,
}


def measure(name: str) -> list[str]:
    """The row of the table for a change."""
    shapes, errors = {"right": 0, "unclear": 0, "another": 0, "not one object": 0}, []
    source = Shapes(level=3, split="heldout")
    for n in range(NUM_SCENES):
        scene = source.scene(n)
        pixels = CHANGES[name](render(scene).astype(np.float32), np.random.default_rng(n))
        readings = read_objects(pixels.round().clip(0, 255).astype(np.uint8))
        if len(readings) != 1:
            shapes["not one object"] += 1
            continue
        (found,) = (reading.object for reading in readings)
        kind = {scene.object.shape: "right", UNCLEAR: "unclear"}.get(found.shape, "another")
        shapes[kind] += 1
        offset = SHIFT if name == "shifted by half pixels" else (0, 0)
        centre = tuple(a + b for a, b in zip(scene.object.centre, offset, strict=True))
        errors.append(measure_errors(replace(scene.object, centre=centre), found))
    means = mean_errors(errors or [Errors(np.nan, np.nan, np.nan)])
    figures = [f"{means[error]:.2f}" for error in ("hue_error", "place_error", "size_error")]
    return [name, *(f"{count / NUM_SCENES:.1%}" for count in shapes.values()), *figures]


if __name__ == "__main__":
    head = ["", "shape right", "unclear", "another", "not one object", "hue error", "place error", "size error"]
    print(format_markdown(head, [measure(name) for name in CHANGES]), end="")
