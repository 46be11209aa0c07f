"""The checker of the world `shapes`: reads a scene from pixels alone, and says what of a caption is true.

It is made for generated pictures: it forgives noise, specks, dull colours, soft edges and edges of a false
tint, as a lossy codec or a small diffusion model leave them. It does not forgive a thing too many, a missing
one, or one that has no shape or no size of the world.
"""

from collections.abc import Iterator, Sequence
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
    coverage,
    parse,
)

UNCLEAR = "unclear"  # the shape of what is no shape, the size of what is far too small or too big
LIKENESS = 0.85  # less like its ideal shape than this, a shape is unclear
OFF_SIZE = 1.7  # a thing has no size of the world when its area is off by more than this factor from either
ODD_AREA = 0.04  # what a blob loses in likeness when its area is e times that of the shape
SOFTNESS = 0.7  # deviation of the blur under which shapes are compared, in canvas units
SPECK = 12.0  # less area than this is dirt; the smallest thing has 43 (in canvas units)
PART = 0.25  # a colour with this share of a blob is a thing of its own, less is a tint


@dataclass(frozen=True)
class DetectedShape:
    """A thing found in a picture: what it is, and its box in units of a 32 x 32 canvas.

    `likeness` is 1 for the ideal shape; below `LIKENESS` the shape is "unclear", and so is a size by
    `OFF_SIZE`.
    """

    thing: SceneObject
    centre: tuple[float, float]  # of its box, (x, y)
    box: tuple[float, float]  # (width, height), as large as it was drawn
    likeness: float


@dataclass(frozen=True)
class Judgement:
    """What of a caption is true of a picture. An attribute is right only if it is for every thing named."""

    count: bool  # as many things as named, no more, no fewer
    colour: bool
    shape: bool
    size: bool
    place: bool  # every relation holds; true when the caption names none

    @property
    def everything(self) -> bool:
        return self.count and self.colour and self.shape and self.size and self.place


def judge(caption: str | Description, pixels: np.ndarray) -> Judgement:
    """What of a caption is true of a picture, (Y, Y, 3) uint8. ValueError when the world has no such caption.

    Things seen are matched with things named so that the fewest attributes are wrong, and among such matches
    so that the relations hold. A thing named and not seen makes every attribute wrong and the relation it
    stands in; a thing seen and not named only the count.
    """
    described = parse(caption) if isinstance(caption, str) else caption
    if described is None:
        raise ValueError(f"not a caption of the world shapes: {caption!r}")
    named, seen = described.objects, read_scene(pixels)
    best = max(_matches(named, seen), key=lambda match: _rank(described, match))
    pairs = [(thing, it.thing if it else _NOTHING) for thing, it in zip(named, best, strict=True)]
    return Judgement(
        count=len(seen) == len(named),
        colour=all(thing.colour == found.colour for thing, found in pairs),
        shape=all(thing.shape == found.shape for thing, found in pairs),
        size=all(thing.size == found.size for thing, found in pairs),
        place=_is_placed(described, best),
    )


_NOTHING = SceneObject("", "", "")


def read_scene(pixels: np.ndarray) -> list[DetectedShape]:
    """The things in a picture, (Y, Y, 3) uint8, the largest first."""
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape != (len(pixels), len(pixels), 3):
        raise ValueError(f"a scene is read from (Y, Y, 3) uint8, not from {pixels.shape} {pixels.dtype}")
    step = pixels.astype(np.float32) - np.float32(BACKGROUND)  # (Y, X, 3) how far from the ground
    blobs = list(_find_blobs(step))
    taken = sum((mask for mask, _ in blobs), np.zeros(step.shape[:2], bool))  # (Y, X)
    blobs.sort(key=lambda blob: -blob[0].sum())
    return [_read_thing(step, mask, colour, taken) for mask, colour in blobs]


def _find_blobs(step: np.ndarray) -> Iterator[tuple[np.ndarray, str]]:
    """Connected pixels of one colour, each as a mask (Y, X) and its colour's name."""
    names, steps = tuple(COLOURS), _colour_steps()  # (6, 3)
    step = np.stack([_soften(channel) for channel in np.moveaxis(step, -1, 0)], -1)  # (Y, X, 3)
    amount = step @ (steps / (steps**2).sum(1, keepdims=True)).T  # (Y, X, 6) how far towards each colour
    amount = np.clip(amount, 0, 1)  # (Y, X, 6)
    missed = ((step[..., None, :] - amount[..., None] * steps) ** 2).sum(-1)  # (Y, X, 6)
    nearest = missed.argmin(-1)  # (Y, X)
    solid = np.take_along_axis(amount, nearest[..., None], -1)[..., 0] >= 0.5  # (Y, X)
    least = SPECK * (len(step) / CANVAS) ** 2
    for blob in _components(solid, least):
        share = np.bincount(nearest[blob], minlength=len(names)) / blob.sum()  # (6,)
        parts = np.flatnonzero(share >= PART)
        if len(parts) <= 1:
            yield blob, names[share.argmax()]
            continue
        for part in parts:
            yield from ((piece, names[part]) for piece in _components(blob & (nearest == part), least))


def _components(mask: np.ndarray, least: float) -> Iterator[np.ndarray]:
    """Its connected parts of at least so many pixels, as masks (Y, X)."""
    labels, count = ndimage.label(mask)
    for k in range(1, count + 1):
        part = labels == k  # (Y, X)
        if part.sum() >= least:
            yield part


def _read_thing(step: np.ndarray, mask: np.ndarray, colour: str, taken: np.ndarray) -> DetectedShape:
    """A blob as the thing it is most like. `taken` is where blobs are, this one and the others.

    How full a pixel is follows from its brightness, since a codec loses the tint of an edge before its
    brightness; a dull thing is measured by its own brightness inside.
    """
    size = len(step)
    reach = max(1, round(2 * size / CANVAS))  # pixels around the mask, where a soft edge may run out
    near = ndimage.binary_dilation(mask, iterations=reach) & (mask | ~taken)  # (Y, X)
    full = step.sum(-1) / _colour_steps()[tuple(COLOURS).index(colour)].sum()  # (Y, X)
    full /= np.clip(np.quantile(full[mask], 0.75), 0.5, 1)
    full = np.clip(full, 0, 1) * near  # (Y, X)
    rows, columns = np.nonzero(near)
    weight = full[rows, columns]
    area = float(weight.sum()) * (CANVAS / size) ** 2
    x, y = ((np.average(at, weights=weight) + 0.5) * CANVAS / size for at in (columns, rows))
    soft = _soften(full)  # (Y, X)
    likeness, shape, kind, centre, box = max(_liken(soft, area, x, y, shape) for shape in SHAPES)
    return DetectedShape(SceneObject(kind, colour, shape if likeness >= LIKENESS else UNCLEAR), centre, box, likeness)


def _liken(
    soft: np.ndarray, area: float, x: float, y: float, shape: str
) -> tuple[float, str, str, tuple[float, float], tuple[float, float]]:
    """How like a shape a blob of this area and middle is: likeness, shape, size, centre of its box, and the box.

    The ideal shape takes the blob's area and middle, and both are compared softened, since a smeared edge
    must not count for more than a missing corner. An area that this shape does not have in either size costs
    a little.
    """
    areas = [_area(shape, BOXES[size, shape]) for size in SIZES]
    large = int(area >= np.sqrt(areas[0] * areas[1]))
    scale = np.sqrt(area / areas[large])
    width, height = (float(scale * side) for side in BOXES[SIZES[large], shape])
    low = height / 6 if shape == "triangle" else 0  # the middle of a triangle is that low in its box
    centre = (float(x), float(y - low))
    ideal = _soften(coverage(shape, (width, height), centre, len(soft)))  # (Y, X)
    miss = float(((soft - ideal) ** 2).sum() / (ideal**2).sum())
    odd = abs(float(np.log(area / areas[large])))
    kind = SIZES[large] if odd < np.log(OFF_SIZE) else UNCLEAR
    return 1 - miss - ODD_AREA * odd, shape, kind, centre, (width, height)


def _soften(picture: np.ndarray) -> np.ndarray:
    return ndimage.gaussian_filter(picture, SOFTNESS * len(picture) / CANVAS)  # (Y, X)


def _area(shape: str, box: tuple[float, float]) -> float:
    return box[0] * box[1] * {"circle": np.pi / 4, "square": 1.0, "triangle": 0.5}[shape]


@lru_cache(maxsize=1)
def _colour_steps() -> np.ndarray:
    return np.array(list(COLOURS.values()), np.float32) - np.float32(BACKGROUND)  # (6, 3)


Match = Sequence[DetectedShape | None]  # for each thing named, the thing seen that stands for it


def _matches(named: Sequence[SceneObject], seen: Sequence[DetectedShape]) -> Iterator[Match]:
    """Every way to match; of very many things only the largest few can be meant."""
    seen = list(seen[: len(named) + 2])
    return permutations(seen + [None] * (len(named) - len(seen)), len(named))


def _rank(described: Description, match: Match) -> tuple[int, bool]:
    """Better matches rank higher: by attributes that are right, then by place."""
    found = [(thing, it.thing) for thing, it in zip(described.objects, match, strict=True) if it]
    right = [(a.size == b.size) + (a.colour == b.colour) + (a.shape == b.shape) for a, b in found]
    return sum(right), _is_placed(described, match)


def _is_placed(described: Description, match: Match) -> bool:
    """Does every relation hold: is every centre on its side, and the way more along than across?"""
    groups = described.groups
    for relation, before, after in zip(described.relations, groups, groups[1:], strict=False):
        if None in match[before] or None in match[after]:
            return False
        along, across = (1, 0) if relation == "above" else (0, 1)
        one = np.array([it.centre for it in match[before]])  # (things, 2)
        other = np.array([it.centre for it in match[after]])  # (things, 2)
        way = other.mean(0) - one.mean(0)  # (2,)
        if one[:, along].max() >= other[:, along].min() or way[along] <= abs(way[across]):
            return False
    return True
