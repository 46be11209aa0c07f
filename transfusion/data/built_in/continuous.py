"""Level 3 of `shapes`: one shaded object with continuous hue, size and place, and a caption that gives them in numbers: "a
circle of hue 210, size 12, at 20 9".

The colour of a pixel is (1 - c) background + c light colour(hue):
- c: coverage, clip(0.5 - signed distance / edge, 0, 1), with a soft edge of 1 to 2.5 units
- light: brightness, a linear function of the place in the object
- colour(hue): HSV with constant saturation and value
- background: grey, a linear function of the place on the canvas

Grey and light do not change the ratios of the channels' differences, so every pixel of an object has the same HSV hue.
A caption has the hue to 10 degrees, size and centre to one unit: few different numbers, which a small tokenizer keeps whole.
It does not describe edge, light and background. Lengths are in units of a canvas of 32 x 32, x to the right and y down. The
size is the side of the object's box, and the centre that of the box. A box ends at least `MARGIN` before the border.
"""

import colorsys
import math
import re
from dataclasses import dataclass

import numpy as np

from transfusion.data.built_in.outlines import CANVAS, SHAPES, pixel_centres, signed_distance

SIZES = 9.0, 16.0  # of a box, smallest and largest
EDGES = 1.0, 2.5  # widths of a soft edge
MARGIN = 2.0  # more than half of the widest edge: nothing of an object is cut off
HUE_STEP = 10  # degrees, of a caption
SATURATION, VALUE = 0.75, 0.78  # of a colour where the light is 1
MAX_LIGHT = 0.25  # change of the light from the centre of a box to its side
GREY, MAX_GREY_CHANGE = (36.0, 64.0), 20.0  # of the background: at the centre of the canvas, and from there to the border


@dataclass(frozen=True)
class ContinuousObject:
    """An object as a caption gives it."""

    shape: str
    hue: float  # of HSV, degrees from 0 (red) by 120 (green) and 240 (blue) to below 360
    size: float  # side of its box
    centre: tuple[float, float]  # of its box, (x, y)


@dataclass(frozen=True)
class ContinuousScene:
    """An object, and what its caption does not describe. A gradient (x, y) is the change from the centre of the box, or of
    the canvas, to its right and lower side."""

    object: ContinuousObject
    edge: float  # width of the soft edge
    light: tuple[float, float]  # gradient of the brightness, which is 1 at the centre
    grey: float  # of the background at the centre of the canvas, from 0 to 255
    grey_gradient: tuple[float, float]


def sample(seed: int) -> ContinuousScene:
    """A random scene: every number is uniform, gradients have a uniform direction. A pure function of the seed."""
    rng = np.random.default_rng(seed)
    shape, hue = SHAPES[rng.integers(len(SHAPES))], rng.uniform(0, 360)
    size = rng.uniform(*SIZES)
    x, y = rng.uniform(MARGIN + size / 2, CANVAS - MARGIN - size / 2, 2).tolist()
    edge, light = rng.uniform(*EDGES), _sample_gradient(rng, MAX_LIGHT)
    grey, grey_gradient = rng.uniform(*GREY), _sample_gradient(rng, MAX_GREY_CHANGE)
    return ContinuousScene(ContinuousObject(shape, hue, size, (x, y)), edge, light, grey, grey_gradient)


def _sample_gradient(rng: np.random.Generator, largest: float) -> tuple[float, float]:
    length, angle = rng.uniform(0, largest), rng.uniform(0, 2 * math.pi)
    return length * math.cos(angle), length * math.sin(angle)


def caption(item: ContinuousObject) -> str:
    """The caption of an object: hue to the nearest 10 degrees, size and centre to the nearest unit."""
    hue, (x, y) = HUE_STEP * round(item.hue / HUE_STEP) % 360, map(round, item.centre)
    return f"a {item.shape} of hue {hue}, size {round(item.size)}, at {x} {y}"


def parse(text: str) -> ContinuousObject | None:
    """The object that a caption means, with the caption's numbers. None when the string is not a caption. The grammar
    accepts slightly more than is sampled: any whole hue below 360, any size and centre of one or two digits."""
    match = _CAPTION.fullmatch(text)
    if match is None or int(match[2]) >= 360:
        return None
    hue, size, x, y = map(float, match.groups()[1:])
    return ContinuousObject(match[1], hue, size, (x, y))


_NUMBER = "(0|[1-9][0-9]?)"
_CAPTION = re.compile(f"a ({'|'.join(SHAPES)}) of hue (0|[1-9][0-9]{{0,2}}), size {_NUMBER}, at {_NUMBER} {_NUMBER}")


def render(scene: ContinuousScene, size: int = CANVAS) -> np.ndarray:
    """The image of a scene: (size, size, 3) uint8."""
    item, pixels = scene.object, pixel_centres(size)  # (X,)
    x, y = pixels - np.float32(item.centre[0]), (pixels - np.float32(item.centre[1]))[:, None]  # (X,), (Y, 1)
    edge = max(scene.edge, CANVAS / size)  # at least a pixel, as anti-aliasing
    covered = coverage(item.shape, item.size, x, y, edge)[..., None]  # (Y, X, 1)
    light = 1 + (x * scene.light[0] + y * scene.light[1]) / (item.size / 2)  # (Y, X)
    across = pixels / (CANVAS / 2) - 1  # (X,) from -1 to 1
    grey = scene.grey + across * scene.grey_gradient[0] + across[:, None] * scene.grey_gradient[1]  # (Y, X)
    image = (1 - covered) * grey[..., None] + covered * light[..., None] * colour(item.hue)  # (Y, X, 3)
    return np.clip(image + 0.5, 0, 255).astype(np.uint8)


def coverage(shape: str, size: float, x: np.ndarray, y: np.ndarray, edge: float) -> np.ndarray:
    """How much of the object is seen at points x (X,), y (Y, 1) relative to its centre: (Y, X), from 0 outside to 1 inside,
    1/2 at its outline."""
    return np.clip(0.5 - signed_distance(shape, (size, size), x, y) / edge, 0, 1)


def colour(hue: float) -> np.ndarray:
    """The colour of a hue in degrees where the light is 1: (3,) float32, from 0 to 255."""
    return 255 * np.float32(colorsys.hsv_to_rgb(hue / 360, SATURATION, VALUE))
