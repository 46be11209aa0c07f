"""The checker of the data set `shapes`: it reads a scene from its pixels and compares it with a caption.

It is made for generated images. It tolerates noise, specks, faded colours, soft edges and edges of a wrong tint: artefacts
of lossy codecs and small diffusion models. Extra objects, missing ones, and ones without a valid shape or size are wrong.

The limits of the shapes were chosen on 100 drawings of models that were labelled by eye. docs/evaluation.md has the
agreement with readers on other drawings.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from transfusion.data.built_in.shapes import (
    BACKGROUND,
    BOXES,
    CANVAS,
    COLOURS,
    SHAPES,
    SIZES,
    Description,
    SceneObject,
    coverage,
    parse,
)

UNCLEAR = "unclear"  # the shape of a blob that fits none; the size of one that is far too small or too large
# A shape is clear at one of two limits of its error with the margin of that limit. The margin is to the second-best of the
# three shapes (in likeness) and to the nearest rival (in error): with a small error a rival may be a little nearer.
MAX_ERROR = {"circle": (0.022, 0.04), "square": (0.028, 0.05), "triangle": (0.035, 0.04)}
MIN_MARGIN = (-0.005, 0.001)
MAX_SIZE_RATIO = 1.7  # between an object's area and the nearest valid one; above it the size is unclear
AREA_PENALTY = 0.04  # of the likeness, times |log(area / valid area)|
BLUR_SIGMA = 0.7  # of the Gaussian blur before shapes are compared, in canvas units
MIN_AREA = 12.0  # smaller blobs are ignored; the smallest object has 43 (in canvas units squared)
MIN_COLOUR_SHARE = 0.25  # of a blob: a colour with less is a tint, not an object
# Shapes that are none of the three, but that models draw: flat below and round above. The width at each depth (0: top, 1:
# base), as a share of the base, which is as wide as the shape is high.
RIVALS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "arch": lambda depth: np.sqrt(1 - np.maximum(1 - 2 * depth, 0) ** 2),  # a half disc on a rectangle
    "mound": np.cbrt,
}


@dataclass(frozen=True)
class DetectedShape:
    """An object in an image, with its box in units of a 32 x 32 canvas. `likeness` is 1 for the ideal shape."""

    object: SceneObject
    centre: tuple[float, float]  # of its box, (x, y)
    box: tuple[float, float]  # (width, height), scaled to the object's area
    likeness: float


@dataclass(frozen=True)
class Judgement:
    """The attributes of a caption that an image matches. An attribute is right only if it is right for every object."""

    count: bool  # the number of objects
    colour: bool
    shape: bool
    size: bool
    place: bool  # every relation holds; True for a caption without relations

    @property
    def everything(self) -> bool:
        return self.count and self.colour and self.shape and self.size and self.place


def judge(caption: str | Description, pixels: np.ndarray) -> Judgement:
    """Compare an image (Y, Y, 3) uint8 with its caption. ValueError if it is not a caption of this data set. Detected
    objects are assigned to named objects so that the fewest attributes are wrong, then so that the relations hold. A missing
    object makes every attribute and its relation wrong; an extra object only the count."""
    description = parse(caption) if isinstance(caption, str) else caption
    if description is None:
        raise ValueError(f"not a caption of the data set shapes: {caption!r}")
    named, detected = description.objects, read_scene(pixels)
    best = max(_assignments(named, detected), key=lambda assignment: _rank(description, assignment))
    pairs = [(wanted, it.object if it else _MISSING) for wanted, it in zip(named, best, strict=True)]
    return Judgement(
        count=len(detected) == len(named),
        colour=all(wanted.colour == actual.colour for wanted, actual in pairs),
        shape=all(wanted.shape == actual.shape for wanted, actual in pairs),
        size=all(wanted.size == actual.size for wanted, actual in pairs),
        place=_holds_relations(description, best),
    )


_MISSING = SceneObject("", "", "")


def read_scene(pixels: np.ndarray) -> list[DetectedShape]:
    """The objects in an image (Y, Y, 3) uint8, the largest first."""
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape != (len(pixels), len(pixels), 3):
        raise ValueError(f"a scene must be (Y, Y, 3) uint8, not {pixels.shape} {pixels.dtype}")
    offset = pixels.astype(np.float32) - np.float32(BACKGROUND)  # (Y, X, 3) from the background colour
    blobs = list(_find_blobs(offset))
    occupied = sum((mask for mask, _ in blobs), np.zeros(offset.shape[:2], bool))  # (Y, X)
    blobs.sort(key=lambda blob: -blob[0].sum())
    return [_classify(offset, mask, colour, occupied) for mask, colour in blobs]


def rival_coverage(widths: Callable[[np.ndarray], np.ndarray], area: float, x: float, y: float, size: int) -> np.ndarray:
    """Share of each pixel that a rival of this area and centre of mass covers, (size, size), by four lines a pixel."""
    depth = (np.arange(64) + 0.5) / 64
    side = np.sqrt(area / widths(depth).mean())
    top = y - side * np.average(depth, weights=widths(depth))
    pixel = CANVAS / size
    depth = ((np.arange(4 * size) + 0.5) * pixel / 4 - top) / side  # (4 Y,)
    half_width = widths(np.clip(depth, 0, 1)) * side / 2 * ((depth > 0) & (depth < 1))  # (4 Y,)
    columns = (np.arange(size) + 0.5) * pixel  # (X,)
    covered = (half_width[:, None] - np.abs(columns - x)) / pixel + 0.5  # (4 Y, X)
    return np.clip(covered, 0, np.minimum(2 * half_width[:, None] / pixel, 1)).reshape(size, 4, size).mean(1)  # (Y, X)


def _find_blobs(offset: np.ndarray) -> Iterator[tuple[np.ndarray, str]]:
    """Connected regions of one colour, each as a mask (Y, X) and the colour's name."""
    names, colours = tuple(COLOURS), _colour_offsets()  # (6, 3)
    offset = np.stack([_blur(channel) for channel in np.moveaxis(offset, -1, 0)], -1)  # (Y, X, 3)
    amount = offset @ (colours / (colours**2).sum(1, keepdims=True)).T  # (Y, X, 6) projection onto each colour
    amount = np.clip(amount, 0, 1)  # (Y, X, 6)
    error = ((offset[..., None, :] - amount[..., None] * colours) ** 2).sum(-1)  # (Y, X, 6)
    nearest = error.argmin(-1)  # (Y, X)
    solid = np.take_along_axis(amount, nearest[..., None], -1)[..., 0] >= 0.5  # (Y, X)
    min_pixels = MIN_AREA * (len(offset) / CANVAS) ** 2
    for blob in _components(solid, min_pixels):
        share = np.bincount(nearest[blob], minlength=len(names)) / blob.sum()  # (6,)
        colour_ids = np.flatnonzero(share >= MIN_COLOUR_SHARE)
        if len(colour_ids) <= 1:
            yield blob, names[share.argmax()]
            continue
        for n in colour_ids:
            yield from ((part, names[n]) for part in _components(blob & (nearest == n), min_pixels))


def _components(mask: np.ndarray, min_pixels: float) -> Iterator[np.ndarray]:
    """The connected components of at least `min_pixels` pixels, as masks (Y, X)."""
    labels, count = ndimage.label(mask)
    for k in range(1, count + 1):
        component = labels == k  # (Y, X)
        if component.sum() >= min_pixels:
            yield component


class _Fit(NamedTuple):
    """How well a blob fits one shape of its area and centre of mass."""

    likeness: float  # 1 - error - AREA_PENALTY |log(area / valid area)|
    error: float  # |blob - ideal|^2 / |ideal|^2, both blurred, so that a soft edge does not count more than a missing corner
    shape: str
    size: str
    centre: tuple[float, float]  # of the box
    box: tuple[float, float]


def _classify(offset: np.ndarray, mask: np.ndarray, colour: str, occupied: np.ndarray) -> DetectedShape:
    """The object that a blob fits best. `occupied`: the pixels of all blobs. A pixel's coverage follows from its brightness,
    because a codec keeps an edge's brightness better than its tint. It is relative to the blob's own brightness inside, so
    faded objects are measured correctly."""
    size = len(offset)
    edge = max(1, round(2 * size / CANVAS))  # pixels around the mask that may hold a soft edge
    near = ndimage.binary_dilation(mask, iterations=edge) & (mask | ~occupied)  # (Y, X)
    covered = offset.sum(-1) / _colour_offsets()[tuple(COLOURS).index(colour)].sum()  # (Y, X)
    covered /= np.clip(np.quantile(covered[mask], 0.75), 0.5, 1)
    covered = np.clip(covered, 0, 1) * near  # (Y, X)
    rows, columns = np.nonzero(near)
    weights = covered[rows, columns]
    area = float(weights.sum()) * (CANVAS / size) ** 2
    x, y = ((np.average(at, weights=weights) + 0.5) * CANVAS / size for at in (columns, rows))
    blurred = _blur(covered)  # (Y, X)
    second, best = sorted(_fit_shape(blurred, area, x, y, shape) for shape in SHAPES)[-2:]
    rival_error = min(_error(blurred, rival_coverage(widths, area, x, y, size)) for widths in RIVALS.values())
    margin = min(best.likeness - second.likeness, rival_error - best.error)
    limits = zip(MAX_ERROR[best.shape], MIN_MARGIN, strict=True)
    is_clear = any(best.error <= max_error and margin >= min_margin for max_error, min_margin in limits)
    item = SceneObject(best.size, colour, best.shape if is_clear else UNCLEAR)
    return DetectedShape(item, best.centre, best.box, best.likeness)


def _fit_shape(blurred: np.ndarray, area: float, x: float, y: float, shape: str) -> _Fit:
    """`blurred`: the blurred coverage of a blob, (Y, X); x and y: its centre of mass."""
    areas = [_area(shape, BOXES[size, shape]) for size in SIZES]
    is_large = int(area >= np.sqrt(areas[0] * areas[1]))
    scale = np.sqrt(area / areas[is_large])
    width, height = (float(scale * side) for side in BOXES[SIZES[is_large], shape])
    centroid_offset = height / 6 if shape == "triangle" else 0  # a triangle's centroid is below the centre of its box
    centre = (float(x), float(y - centroid_offset))
    error = _error(blurred, coverage(shape, (width, height), centre, len(blurred)))
    log_ratio = abs(float(np.log(area / areas[is_large])))
    kind = SIZES[is_large] if log_ratio < np.log(MAX_SIZE_RATIO) else UNCLEAR
    return _Fit(1 - error - AREA_PENALTY * log_ratio, error, shape, kind, centre, (width, height))


def _error(blurred: np.ndarray, ideal: np.ndarray) -> float:
    ideal = _blur(ideal)  # (Y, X)
    return float(((blurred - ideal) ** 2).sum() / (ideal**2).sum())


def _blur(image: np.ndarray) -> np.ndarray:
    return ndimage.gaussian_filter(image, BLUR_SIGMA * len(image) / CANVAS)  # (Y, X)


def _area(shape: str, box: tuple[float, float]) -> float:
    return box[0] * box[1] * {"circle": np.pi / 4, "square": 1.0, "triangle": 0.5}[shape]


@lru_cache(maxsize=1)
def _colour_offsets() -> np.ndarray:
    return np.array(list(COLOURS.values()), np.float32) - np.float32(BACKGROUND)  # (6, 3)


Assignment = Sequence[DetectedShape | None]  # for each named object the detected object, None if missing


def _assignments(named: Sequence[SceneObject], detected: Sequence[DetectedShape]) -> Iterator[Assignment]:
    """All assignments; of many objects only the largest len(named) + 2 are tried."""
    candidates = list(detected[: len(named) + 2])
    return permutations(candidates + [None] * (len(named) - len(candidates)), len(named))


def _rank(description: Description, assignment: Assignment) -> tuple[int, bool]:
    """Sort key of an assignment: the number of right attributes, then whether the relations hold."""
    pairs = [(wanted, it.object) for wanted, it in zip(description.objects, assignment, strict=True) if it]
    right = [(a.size == b.size) + (a.colour == b.colour) + (a.shape == b.shape) for a, b in pairs]
    return sum(right), _holds_relations(description, assignment)


def _holds_relations(description: Description, assignment: Assignment) -> bool:
    """For every relation: is every centre on its side, and is the offset larger along the relation's axis than across?"""
    groups = description.groups
    for relation, before, after in zip(description.relations, groups, groups[1:], strict=False):
        if None in assignment[before] or None in assignment[after]:
            return False
        along, across = (1, 0) if relation == "above" else (0, 1)
        first = np.array([it.centre for it in assignment[before]])  # (objects, 2)
        second = np.array([it.centre for it in assignment[after]])  # (objects, 2)
        offset = second.mean(0) - first.mean(0)  # (2,)
        if first[:, along].max() >= second[:, along].min() or offset[along] <= abs(offset[across]):
            return False
    return True
