"""The checker of the world `shapes`: reads a scene back from its pixels alone, and says what of a caption is true of it.

It is made for generated pictures: it forgives noise, specks, soft edges and edges of a false tint, as a lossy codec or a
small diffusion model leave them. It does not forgive a thing too many, a missing one, or one that is no shape.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations

import numpy as np
from scipy import ndimage

from transfusion.data.shapes import BACKGROUND, BOXES, CANVAS, COLOURS, SHAPES, SIZES, Description, Thing
from transfusion.data.shapes import coverage, parse

UNCLEAR = "unclear"  # the shape of what is no shape
LIKENESS = 0.85  # less like its ideal shape than this, a shape is unclear
ODD_AREA = 0.04  # what a blob of e times the area that its shape has in the world loses in likeness
SOFTNESS = 0.7  # deviation of the blur under which shapes are compared, in canvas units
SPECK = 12.0  # less area than this is dirt; the smallest thing has 36 (all in canvas units, 32 x 32)
PART = 0.25  # a colour with this share of a blob is a thing of its own, less is a tint


@dataclass(frozen=True)
class Seen:
    """A thing found in a picture: what it is, and the centre (x, y) of its box in units of a 32 x 32 canvas.

    `likeness` in [0, 1] is how well the ideal shape covers it; below `LIKENESS` the shape is "unclear".
    """

    thing: Thing
    centre: tuple[float, float]
    likeness: float


@dataclass(frozen=True)
class Judgement:
    """What of a caption is true of a picture. An attribute is right only if it is right for every thing named."""

    count: bool  # as many things as named, no more, no fewer
    colour: bool
    shape: bool
    size: bool
    place: bool  # every relation holds; true when the caption names none

    @property
    def everything(self) -> bool:
        return self.count and self.colour and self.shape and self.size and self.place


def judge(caption: str | Description, pixels: np.ndarray) -> Judgement:
    """What of the caption is true of the picture, (Y, X, 3) uint8. ValueError when the world has no such caption.

    Things seen are matched with things named so that the fewest attributes are wrong, and among such matches so that
    the relations hold. A thing named and not seen has every attribute wrong, a thing seen and not named only the count.
    """
    described = parse(caption) if isinstance(caption, str) else caption
    if described is None:
        raise ValueError(f"not a caption of the world shapes: {caption!r}")
    named, seen = described.things, read_scene(pixels)
    best = max(_matches(named, seen), key=lambda match: _rank(described, match))
    right = {part: all(it is not None and getattr(it.thing, part) == getattr(thing, part)
                       for thing, it in zip(named, best, strict=True)) for part in ("colour", "shape", "size")}  # fmt: skip
    return Judgement(count=len(seen) == len(named), place=_is_placed(described, best), **right)


def read_scene(pixels: np.ndarray) -> list[Seen]:
    """The things in a square picture, (Y, X, 3) uint8, the largest first."""
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.shape[0] != pixels.shape[1]:
        raise ValueError(f"a scene is read from (Y, X, 3) uint8 with Y = X, not {pixels.shape} {pixels.dtype}")
    step = pixels.astype(np.float32) - np.float32(BACKGROUND)  # (Y, X, 3) how far from the ground
    blobs = list(_find_blobs(step))
    taken = np.any([mask for mask, _ in blobs], axis=0) if blobs else None  # (Y, X)
    seen = [_read_thing(step, mask, colour, taken) for mask, colour in blobs]
    return [it for _, it in sorted(seen, key=lambda pair: -pair[0])]


def _find_blobs(step: np.ndarray) -> Iterator[tuple[np.ndarray, str]]:
    """Connected pixels of one colour, each as a mask (Y, X) and its colour's name."""
    names, steps = tuple(COLOURS), _colour_steps()  # (6, 3)
    step = np.stack([_soften(channel) for channel in np.moveaxis(step, -1, 0)], -1)  # (Y, X, 3)
    amount = np.clip(step @ (steps / (steps**2).sum(1, keepdims=True)).T, 0, 1)  # (Y, X, 6) how far towards each colour
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


def _read_thing(step: np.ndarray, mask: np.ndarray, colour: str, taken: np.ndarray) -> tuple[float, Seen]:
    """A blob as its area and the thing it is most like.

    How full a pixel is follows from its brightness, since a codec loses the tint of an edge before its brightness; a
    dull thing is measured by its own brightness inside.
    """
    size = len(step)
    near = ndimage.binary_dilation(mask, iterations=2 * max(1, size // CANVAS)) & (mask | ~taken)  # (Y, X)
    full = step.sum(-1) / _colour_steps()[tuple(COLOURS).index(colour)].sum()  # (Y, X)
    full /= np.clip(np.quantile(full[mask], 0.75), 0.5, 1)
    full = np.clip(full, 0, 1) * near  # (Y, X)
    rows, columns = np.nonzero(near)
    weight = full[rows, columns]
    area = float(weight.sum()) * (CANVAS / size) ** 2
    x, y = ((np.average(at, weights=weight) + 0.5) * CANVAS / size for at in (columns, rows))
    soft = _soften(full)  # (Y, X)
    likeness, shape, kind, centre = max(_liken(soft, area, x, y, shape) for shape in SHAPES)
    return area, Seen(Thing(kind, colour, shape if likeness >= LIKENESS else UNCLEAR), centre, likeness)


def _liken(soft: np.ndarray, area: float, x: float, y: float, shape: str) -> tuple:
    """How like a shape a blob of this area and middle is: likeness, shape, size, centre of its box.

    The ideal shape takes the blob's area and middle, and both are compared softened, since a smeared edge must not
    count for more than a missing corner. An area that this shape does not have in either size costs a little.
    """
    areas = [_area(shape, BOXES[size, shape]) for size in SIZES]
    large = int(area >= np.sqrt(areas[0] * areas[1]))
    scale = np.sqrt(area / areas[large])
    width, height = (scale * side for side in BOXES[SIZES[large], shape])
    centre = (float(x), float(y - (height / 6 if shape == "triangle" else 0)))  # a triangle's middle is low in its box
    ideal = _soften(coverage(shape, (width, height), centre, len(soft)))  # (Y, X)
    miss = float(((soft - ideal) ** 2).sum() / (ideal**2).sum())
    return 1 - miss - ODD_AREA * abs(float(np.log(area / areas[large]))), shape, SIZES[large], centre


def _soften(picture: np.ndarray) -> np.ndarray:
    return ndimage.gaussian_filter(picture, SOFTNESS * len(picture) / CANVAS)  # (Y, X)


def _area(shape: str, box: tuple[float, float]) -> float:
    return box[0] * box[1] * {"circle": np.pi / 4, "square": 1.0, "triangle": 0.5}[shape]


@lru_cache(maxsize=1)
def _colour_steps() -> np.ndarray:
    return np.array(list(COLOURS.values()), np.float32) - np.float32(BACKGROUND)  # (6, 3)


Match = Sequence[Seen | None]  # for each thing named, the thing seen that stands for it


def _matches(named: Sequence[Thing], seen: Sequence[Seen]) -> Iterator[Match]:
    """Every way to match; of very many things only the largest few can be meant."""
    seen = list(seen[: len(named) + 2])
    return permutations(seen + [None] * (len(named) - len(seen)), len(named))


def _rank(described: Description, match: Match) -> tuple[int, bool]:
    """Better matches rank higher: by attributes that are right, then by place."""
    right = sum((it.thing.size == thing.size) + (it.thing.colour == thing.colour) + (it.thing.shape == thing.shape)
                for thing, it in zip(described.things, match, strict=True) if it is not None)  # fmt: skip
    return right, _is_placed(described, match)


def _is_placed(described: Description, match: Match) -> bool:
    """Does every relation hold? Each thing before it lies wholly on its side, and its way leads more along than across."""
    for relation, before, after in zip(described.relations, described.groups, described.groups[1:], strict=False):
        if None in match[before] or None in match[after]:
            return False
        along, across = (1, 0) if relation == "above" else (0, 1)
        one = np.array([it.centre for it in match[before]])  # (things, 2)
        other = np.array([it.centre for it in match[after]])  # (things, 2)
        way = other.mean(0) - one.mean(0)  # (2,)
        if one[:, along].max() >= other[:, along].min() or way[along] <= abs(way[across]):
            return False
    return True
