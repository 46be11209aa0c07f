"""The checker of the data set `shapes`: it reads a scene from its pixels and compares it with a caption.

It is made for generated images. It tolerates noise, specks, faded colours, soft edges and edges of a wrong tint: artefacts
of lossy codecs and small diffusion models. Extra objects, missing ones, and ones without a valid shape or size are wrong.

An object has the shape with the largest of three scores, or none if no score is positive. A score is linear in features
(`measure`). The weights (`SCORES`) were fitted to drawings of models that two readers labelled, and to made objects.
docs/evaluation.md has the agreement with readers.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations

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
    parse,
)

UNCLEAR = "unclear"  # the shape of a blob that fits none; the size of one that is far too small or too large
MAX_SIZE_RATIO = 1.7  # between an object's area and the nearest valid one; above it the size is unclear
BLUR_SIGMA = 0.7  # of the Gaussian blur before shapes are compared, in canvas units
MIN_AREA = 12.0  # smaller blobs are ignored; the smallest object has 43 (in canvas units squared)
MIN_COLOUR_SHARE = 0.25  # of a blob: a colour with less is a tint, not an object
MAX_OVERLAP = 0.98  # of an object and a form; more does not count, because it depends on noise
Widths = Callable[[np.ndarray], np.ndarray]
# Of symmetric forms: the width at each depth (0: top, 1: base), as a share of the width of the box.
IDEALS: dict[str, Widths] = {
    "circle": lambda depth: 2 * np.sqrt(depth * (1 - depth)),
    "square": np.ones_like,
    "triangle": lambda depth: depth,
}
RIVALS: dict[str, Widths] = {  # that models draw, flat below and round above: none of the three
    "arch": lambda depth: np.sqrt(1 - np.maximum(1 - 2 * depth, 0) ** 2),  # a half disc on a rectangle
    "mound": np.cbrt,
}
FORMS = IDEALS | RIVALS
FEATURES = *FORMS, "margin to the second", "margin to a nearer rival", "aspect", "stretch", "area", "constant"
# The weight of each feature (rows) for a circle, a square and a triangle. Made by `python -m experiments.shape_scores`.
SCORES = np.array([
    [  9.70,   1.70,   5.48],  # circle
    [ -3.96,   7.57,  -3.79],  # square
    [ -3.67,  -4.49,   7.53],  # triangle
    [ -0.33,  -6.31,  -7.50],  # arch
    [  0.01,   7.80,   9.16],  # mound
    [ -5.70,  -4.46,  -3.39],  # margin to the second
    [  6.32,   8.90,  11.80],  # margin to a nearer rival
    [ -0.92,  -0.69, -10.64],  # aspect
    [ -9.46, -13.31, -17.69],  # stretch
    [ -1.37,   1.21,   0.38],  # area
    [  1.18, -15.69, -17.69],  # constant
])  # fmt: skip


@dataclass(frozen=True)
class DetectedShape:
    """An object in an image, with its box in units of a 32 x 32 canvas."""

    object: SceneObject
    centre: tuple[float, float]  # of its box, (x, y)
    box: tuple[float, float]  # (width, height), scaled to the object's area


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
    return [_classify(covered, colour) for covered, colour in find_objects(pixels)]


def find_objects(pixels: np.ndarray) -> list[tuple[np.ndarray, str]]:
    """The coverage (Y, X) and the colour of each object in an image (Y, Y, 3) uint8, the largest first."""
    offset = pixels.astype(np.float32) - np.float32(BACKGROUND)  # (Y, X, 3) from the background colour
    blobs = sorted(_find_blobs(offset), key=lambda blob: -blob[0].sum())
    occupied = sum((mask for mask, _ in blobs), np.zeros(offset.shape[:2], bool))  # (Y, X)
    return [(_cover(offset, mask, colour, occupied), colour) for mask, colour in blobs]


def measure(covered: np.ndarray) -> np.ndarray:
    """The features (11,) of an object with coverage (Y, X), as in `FEATURES`.

    Of each form, with the object's centre of mass and standard deviations in x and y: -log(1 - overlap), where overlap is
    intersection over union after a slight blur. Then how much the best ideal is above the second, and the best rival above
    the best ideal (negative, or 0); log and |log| of the ratio of the deviations; log of the area (canvas units squared); 1.
    """
    # Faint edges and uneven insides are left out, as by the eye: coverage below a quarter is 0, above three quarters 1.
    solid, pixel = np.clip(2 * covered - 0.5, 0, 1), CANVAS / len(covered)
    centre = _centre(solid)
    at, mass = _positions(len(solid)), max(solid.sum(), 1e-6)
    spread = [float(np.sqrt(solid.sum(axis) @ (at - centre[axis]) ** 2 / mass + pixel**2 / 12)) for axis in (0, 1)]
    units = [_moments(widths)[1:] for widths in FORMS.values()]
    forms = [profile_coverage(widths, (spread[0] / x, spread[1] / y), centre, len(solid))
             for widths, (x, y) in zip(FORMS.values(), units, strict=True)]  # fmt: skip
    blurred, *forms = _blur(np.stack([solid, *forms]), 1)
    overlaps = np.minimum(blurred, forms).sum((1, 2)) / np.maximum(blurred, forms).sum((1, 2))  # (5,)
    nearness = -np.log(1 - np.minimum(overlaps, MAX_OVERLAP))  # (5,)
    second, best = np.sort(nearness[: len(IDEALS)])[-2:]
    rival, aspect = nearness[len(IDEALS) :].max(), np.log(spread[0] / spread[1])
    return np.array([*nearness, best - second, min(best - rival, 0), aspect, abs(aspect), np.log(mass * pixel**2), 1])


def profile_coverage(widths: Widths, box: tuple[float, float], centre: tuple[float, float], size: int) -> np.ndarray:
    """Share of each pixel that a form covers, (size, size), by four lines a pixel. `box`: its width and height; `centre`:
    its centre of mass (x, y)."""
    (width, height), (x, y), pixel = box, centre, CANVAS / size
    depth = (_positions(4 * size) - y) / height + _moments(widths)[0]  # (4 Y,)
    half_width = widths(np.clip(depth, 0, 1)) * width / 2 * ((depth > 0) & (depth < 1)) / pixel  # (4 Y,) in pixels
    covered = half_width[:, None] - abs(_positions(size) - x) / pixel + 0.5  # (4 Y, X)
    return np.clip(covered, 0, np.minimum(2 * half_width[:, None], 1)).reshape(size, 4, size).mean(1)  # (Y, X)


@lru_cache
def _moments(widths: Widths) -> tuple[float, float, float]:
    """Of a form in a box of 1 by 1: the depth of its centre of mass, and its standard deviations in x and y."""
    depth = (np.arange(256) + 0.5) / 256
    width = widths(depth)
    mean = np.average(depth, weights=width)
    variances = (width**3).sum() / width.sum() / 12, np.average((depth - mean) ** 2, weights=width)
    return float(mean), *(float(np.sqrt(variance)) for variance in variances)


def _find_blobs(offset: np.ndarray) -> Iterator[tuple[np.ndarray, str]]:
    """Connected regions of one colour, each as a mask (Y, X) and the colour's name."""
    names, colours = tuple(COLOURS), _colour_offsets()  # (6, 3)
    offset = _blur(offset, 0)  # (Y, X, 3)
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


def _cover(offset: np.ndarray, mask: np.ndarray, colour: str, occupied: np.ndarray) -> np.ndarray:
    """A blob's share of each pixel, (Y, X). `occupied`: the pixels of all blobs. It follows from a pixel's brightness,
    because a codec keeps an edge's brightness better than its tint. It is relative to the blob's own brightness inside, so
    faded objects are measured correctly."""
    edge = max(1, round(2 * len(offset) / CANVAS))  # pixels around the mask that may hold a soft edge
    near = ndimage.binary_dilation(mask, iterations=edge) & (mask | ~occupied)  # (Y, X)
    covered = offset.sum(-1) / _colour_offsets()[tuple(COLOURS).index(colour)].sum()  # (Y, X)
    covered /= np.clip(np.sort(covered[mask])[3 * mask.sum() // 4], 0.5, 1)
    parts, _ = ndimage.label(near & ((covered > 0.5) | mask))
    specks = (parts > 0) & ~np.isin(parts, parts[mask])  # near the blob, but not part of it
    return np.clip(covered, 0, 1) * (near & ~specks)


def _classify(covered: np.ndarray, colour: str) -> DetectedShape:
    """The object with this coverage. Its box is the ideal one of the same area and centre of mass."""
    scores = measure(covered) @ SCORES  # (3,)
    shape, (x, y) = SHAPES[scores.argmax()], _centre(covered)
    area = float(covered.sum()) * (CANVAS / len(covered)) ** 2
    areas = [_area(shape, BOXES[size, shape]) for size in SIZES]
    is_large = int(area >= np.sqrt(areas[0] * areas[1]))
    scale = np.sqrt(area / areas[is_large])
    width, height = (float(scale * side) for side in BOXES[SIZES[is_large], shape])
    centre = (x, y - (height / 6 if shape == "triangle" else 0))  # a triangle's centroid is below the centre of its box
    size = SIZES[is_large] if abs(2 * np.log(scale)) < np.log(MAX_SIZE_RATIO) else UNCLEAR
    is_clear = scores.max() > 0 and area > min(areas) / MAX_SIZE_RATIO  # a spot of a few pixels could be any shape
    return DetectedShape(SceneObject(size, colour, shape if is_clear else UNCLEAR), centre, (width, height))


def _centre(covered: np.ndarray) -> tuple[float, float]:
    """The centre of mass (x, y) of a coverage (Y, X)."""
    at, mass = _positions(len(covered)), max(covered.sum(), 1e-6)
    return float(covered.sum(0) @ at / mass), float(covered.sum(1) @ at / mass)


def _positions(size: int) -> np.ndarray:
    """The centres of `size` pixels across the canvas, (size,)."""
    return (np.arange(size) + 0.5) * CANVAS / size


def _blur(images: np.ndarray, axis: int) -> np.ndarray:
    """Images with Y and X at `axis` and after it."""
    sigmas = [0.0] * images.ndim
    sigmas[axis : axis + 2] = [BLUR_SIGMA * images.shape[axis] / CANVAS] * 2
    return ndimage.gaussian_filter(images, sigmas)


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
