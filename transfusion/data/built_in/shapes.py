"""`shapes`: a synthetic data set of captioned scenes of coloured objects, whose images can be checked automatically.

A level 0 caption names one object: "a large red circle". Level 1 also names two with a relation: "a small green
triangle left of a large cyan circle". Level 2 adds counts and more objects: "three small red circles", "a large red
circle above two small blue squares", "a small red circle above a large cyan square left of a small blue circle"
(each relation joins its two neighbours). The first object named is the upper or the left one. A single group may be
anywhere. Level 3 is one shaded object with continuous hue, size and place: see `continuous.py`.

Lengths are in units of a canvas of 32 x 32, x to the right and y down. Rules of every scene of levels 0 to 2:
- The boxes of any two objects are at least `GAP` apart in x or in y, and at least `MARGIN` from the border.
- In "A above B" every box of A ends at least `GAP` before every box of B begins. The vector from the centre of A to
  the centre of B is at least twice as long in y as in x. "left of" is the same with x and y swapped.
- The groups of a scene differ in size, colour or shape.
So exactly one of all possible captions is true of an image.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, combinations

import numpy as np

from transfusion.data.built_in import continuous
from transfusion.data.built_in.continuous import ContinuousScene
from transfusion.data.built_in.outlines import CANVAS, SHAPES, pixel_centres, signed_distance
from transfusion.data.raw import RawDocument, RawImage, RawText

SIZES = ("small", "large")
RELATIONS = ("above", "left of")
COUNTS = ("a", "two", "three", "four")
LEVELS = (0, 1, 2, 3)
CONTINUOUS = 3  # the level of `continuous.py`
MAX_OBJECTS = 4  # in a scene

COLOURS = {"red": (235, 60, 60), "green": (45, 190, 75), "blue": (50, 85, 245),
           "yellow": (250, 220, 60), "purple": (185, 70, 225), "cyan": (70, 225, 235)}  # fmt: skip
BACKGROUND = (24, 26, 34)
BOXES = {
    ("small", "circle"): (8.0, 8.0), ("small", "square"): (8.0, 8.0), ("small", "triangle"): (9.5, 9.0),
    ("large", "circle"): (13.0, 13.0), ("large", "square"): (13.0, 13.0), ("large", "triangle"): (13.5, 13.0),
}  # (width, height); areas are 43 to 64 and 88 to 169: small and large differ clearly  # fmt: skip
GAP = 3.0
MARGIN = 0.5
GRID_STEP = 0.25  # centres are on this grid; odd seeds shift it by half a step, so they never give an image of an even seed

Centres = tuple[tuple[float, float], ...]  # (x, y) of each object
Boxes = tuple[tuple[float, float], ...]  # (width, height) of each object


@dataclass(frozen=True)
class SceneObject:
    """One object as a caption names it."""

    size: str
    colour: str
    shape: str


@dataclass(frozen=True)
class Description:
    """The meaning of a caption: `counts[g]` objects `kinds[g]`; `relations[g]` is between groups g and g + 1."""

    kinds: tuple[SceneObject, ...]
    counts: tuple[int, ...]
    relations: tuple[str, ...] = ()

    @property
    def objects(self) -> tuple[SceneObject, ...]:
        return tuple(kind for kind, count in zip(self.kinds, self.counts, strict=True) for _ in range(count))

    @property
    def groups(self) -> tuple[slice, ...]:
        """The slice of `objects` that each group takes."""
        ends = accumulate(self.counts)
        return tuple(slice(end - count, end) for end, count in zip(ends, self.counts, strict=True))


@dataclass(frozen=True)
class Scene:
    """A description, and the centre (x, y) of each object's box in units of a 32 x 32 canvas."""

    description: Description
    centres: Centres

    @property
    def objects(self) -> tuple[SceneObject, ...]:
        return self.description.objects


class Shapes:
    """A random-access source of scenes with their captions. No held-out image is a training image for any seeds (see
    `GRID_STEP`; images of level 3 have continuous parameters). Captions do recur: level 1 has only 2,556. So only the image
    is held out, not its content, and a very similar training image may exist."""

    name = "shapes"

    def __init__(self, level: int = 1, size: int = CANVAS, split: str = "train", seed: int = 0):
        lengths = {"train": 1_000_000, "heldout": 2_000}
        if level not in LEVELS or split not in lengths or seed < 0 or size < 1:
            raise ValueError(f"shapes does not support level {level}, split {split!r}, size {size}, seed {seed}: use level "
                             f"{LEVELS}, split {[*lengths]}, a size of at least 1, a seed of at least 0")  # fmt: skip
        self.level, self.size, self.split, self.seed = level, size, split, seed
        self.length = lengths[split]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> RawDocument:
        scene = self.scene(i)
        if isinstance(scene, ContinuousScene):
            text, pixels = continuous.caption(scene.object), continuous.render(scene, self.size)
        else:
            text, pixels = caption(scene), render(scene, self.size)
        return RawDocument((RawText(text), RawImage(pixels)), id=i, pairs=True)

    def scene(self, i: int) -> Scene | ContinuousScene:
        """The scene of document i. IndexError when there is no document i."""
        if not 0 <= i < self.length:
            raise IndexError(f"shapes ({self.split}) has documents 0 to {self.length - 1}, not {i}")
        seed = 2 * (self.seed * 2**32 + i) + (self.split == "heldout")
        return continuous.sample(seed) if self.level == CONTINUOUS else sample_scene(self.level, seed)


def sample_scene(level: int, seed: int) -> Scene:
    """A random scene of level 0, 1 or 2, a pure function of the seed (at least 0). At 32 pixels or more, no image of an even
    seed equals one of an odd seed, at any of these levels."""
    if level not in LEVELS[:CONTINUOUS]:
        raise ValueError(f"there are no scenes of level {level} here; use one of {LEVELS[:CONTINUOUS]}")
    rng = np.random.default_rng(seed)
    while True:  # sample the description again when no placement is found
        description = _sample_description(level, rng)
        centres = _sample_centres(description, rng, shift=GRID_STEP / 2 * (seed % 2))
        if centres is not None:
            return Scene(description, centres)


def caption(scene: Scene | Description) -> str:
    """The caption of a scene."""
    description = scene.description if isinstance(scene, Scene) else scene
    words = [f"{COUNTS[count - 1]} {kind.size} {kind.colour} {kind.shape}{'s' if count > 1 else ''}"
             for kind, count in zip(description.kinds, description.counts, strict=True)]  # fmt: skip
    joined = zip(description.relations, words[1:], strict=True)
    return words[0] + "".join(f" {relation} {word}" for relation, word in joined)


def parse(caption: str) -> Description | None:
    """The description that a caption means: the inverse of `caption`. None when the string is not a valid caption. The
    grammar accepts slightly more than is sampled, with at most `MAX_OBJECTS` objects: "four large red circles" (rarely fits)
    and "a small red circle above a small red circle" (the same kind twice)."""
    parts = _RELATION.split(caption)
    groups = [_GROUP.fullmatch(part) for part in parts[::2]]
    if not all(groups):
        return None
    counts = tuple(COUNTS.index(group[1]) + 1 for group in groups)
    if sum(counts) > MAX_OBJECTS or any((n > 1) != bool(group[5]) for n, group in zip(counts, groups, strict=True)):
        return None
    return Description(tuple(SceneObject(*group.group(2, 3, 4)) for group in groups), counts, tuple(parts[1::2]))


_GROUP = re.compile(" ".join(f"({'|'.join(words)})" for words in (COUNTS, SIZES, COLOURS, SHAPES)) + "(s?)")
_RELATION = re.compile(rf" ({'|'.join(RELATIONS)}) ")


def render(scene: Scene, size: int = CANVAS) -> np.ndarray:
    """The image of a scene: (size, size, 3) uint8, anti-aliased, on a plain dark background. Only pixels near an object are
    computed."""
    image, pixels = _background(size).copy(), pixel_centres(size)  # (Y, X * 3), (X,)
    for item, centre in zip(scene.objects, scene.centres, strict=True):
        box = BOXES[item.size, item.shape]
        columns, rows = (_pixels_near(c, side, size) for c, side in zip(centre, box, strict=True))
        mask = _cover(item.shape, box, centre, pixels[columns], pixels[rows], CANVAS / size).repeat(3, 1)
        image[rows, 3 * columns.start : 3 * columns.stop] += mask * _colour_offsets(item.colour, size)[: mask.shape[1]]
    image += 0.5
    return image.astype(np.uint8).reshape(size, size, 3)


def coverage(shape: str, box: tuple[float, float], centre: tuple[float, float], size: int = CANVAS) -> np.ndarray:
    """Share of each pixel that a shape covers, (size, size) float32 in [0, 1]. Box and centre in canvas units. coverage =
    clip(0.5 - d, 0, 1), d: signed distance in pixels from the pixel's centre to the outline. Exact for edges along the grid,
    close for the others, and many times faster than supersampling."""
    return _cover(shape, box, centre, pixel_centres(size), pixel_centres(size), CANVAS / size)


def _cover(
    shape: str, box: tuple[float, float], centre: tuple[float, float], columns: np.ndarray, rows: np.ndarray, pixel: float
) -> np.ndarray:
    """`coverage` of pixels of this side whose centres have these x (X,) and y (Y,)."""
    x = columns - np.float32(centre[0])  # (X,)
    y = (rows - np.float32(centre[1]))[:, None]  # (Y, 1)
    outside = signed_distance(shape, box, x, y)  # (Y, X)
    return np.minimum(np.maximum(0.5 - outside / np.float32(pixel), 0), 1)  # (Y, X)


def _pixels_near(centre: float, side: float, size: int) -> slice:
    """The pixels along one axis that an object can cover: its box and, for the tip of a triangle, two more."""
    first, last = (centre - side / 2) * size / CANVAS, (centre + side / 2) * size / CANVAS
    return slice(max(0, int(first) - 2), int(last) + 3)


@lru_cache(maxsize=8)
def _background(size: int) -> np.ndarray:
    return np.tile(np.float32(BACKGROUND), (size, size))  # (Y, X * 3)


@lru_cache(maxsize=8 * len(COLOURS))
def _colour_offsets(colour: str, size: int) -> np.ndarray:
    """The difference of a colour from the background, for each pixel of a row."""
    return np.tile(np.float32(np.subtract(COLOURS[colour], BACKGROUND)), size)  # (X * 3,)


def _sample_description(level: int, rng: np.random.Generator) -> Description:
    """Level 0: single objects. Level 1: a quarter single, the rest pairs. Level 2: a quarter each of level 1, a counted
    group, two groups with counts, and three objects around a corner. Descriptions without a placement are rejected."""
    form = rng.integers(4)
    if level == 0:
        return _sample_groups([1], rng)
    if level == 1:
        return _sample_groups([1] if form == 0 else [1, 1], rng)
    match form:
        case 0:
            return _sample_description(1, rng)
        case 1:
            return _sample_groups([int(rng.integers(2, 5))], rng)
        case 2:
            return _sample_groups([(1, 2), (2, 1), (2, 2)][rng.integers(3)], rng)
        case _:
            return _sample_groups([1, 1, 1], rng)


def _sample_groups(counts: Sequence[int], rng: np.random.Generator) -> Description:
    """Groups with these counts. Among three related objects at most one is large; more would not fit."""
    relations = [RELATIONS[rng.integers(2)]]
    while len(relations) < len(counts) - 1:  # around a corner: three in one line would not fit
        relations.append(RELATIONS[1 - RELATIONS.index(relations[-1])])
    while True:
        kinds = tuple(_KINDS[rng.integers(2)][rng.integers(6)][rng.integers(3)] for _ in counts)
        num_large = sum(count for kind, count in zip(kinds, counts, strict=True) if kind.size == "large")
        can_fit = num_large <= 1 if sum(counts) > 2 and len(counts) > 1 else num_large <= 3
        if can_fit and len(set(kinds)) == len(kinds):
            return Description(kinds, tuple(counts), tuple(relations[: len(counts) - 1]))


_KINDS = [[[SceneObject(size, colour, shape) for shape in SHAPES] for colour in COLOURS] for size in SIZES]


def _sample_centres(description: Description, rng: np.random.Generator, shift: float) -> Centres | None:
    """A placement sampled uniformly from the valid ones. None when none is found."""
    boxes = tuple([BOXES[item.size, item.shape] for item in description.objects])
    first, choices = _grid(boxes, shift)
    for tries in (160, 512, 1664):  # nine of ten descriptions fit in the first 160, two large objects in a row rarely
        steps = (first + np.floor(rng.random((tries, 2 * len(boxes))) * choices)).T  # (2 K, T)
        valid = _find_valid(description, steps, boxes)  # (T,)
        chosen = int(valid.argmax())
        if valid[chosen]:
            x_and_y = [shift + GRID_STEP * step for step in steps[:, chosen].tolist()]
            centres = list(zip(x_and_y[::2], x_and_y[1::2], strict=True))
            # Equal objects are sorted: equal images are equal scenes.
            return tuple([centre for group in description.groups for centre in sorted(centres[group])])
    return None


@lru_cache(maxsize=4096)
def _grid(boxes: Boxes, shift: float) -> tuple[np.ndarray, np.ndarray]:
    """For the x and y of each centre: its first step on the grid, and its number of steps, (2 K,) each."""
    half = np.ravel(boxes) / 2
    first = np.ceil((MARGIN + half - shift) / GRID_STEP)
    return first, np.floor((CANVAS - MARGIN - half - shift) / GRID_STEP) - first + 1


def _find_valid(description: Description, steps: np.ndarray, boxes: Boxes) -> np.ndarray:
    """Which of the placements (2 K, T), in steps of the grid, follow the rules of a scene: (T,) bool."""
    x_and_y = steps[::2], steps[1::2]  # (K, T) each
    valid = np.ones(steps.shape[1], bool)  # (T,)
    numbers = [number for number, count in enumerate(description.counts) for _ in range(count)]  # of the groups
    for i, j in combinations(range(len(boxes)), 2):
        far = [((boxes[i][axis] + boxes[j][axis]) / 2 + GAP) / GRID_STEP for axis in (0, 1)]
        if numbers[j] == numbers[i] + 1:  # related: one before the other
            axis = _AXES[description.relations[numbers[i]]]
            valid &= x_and_y[axis][j] - x_and_y[axis][i] >= far[axis]
        else:
            x, y = (np.abs(coordinate[i] - coordinate[j]) for coordinate in x_and_y)
            valid &= (x >= far[0]) | (y >= far[1])
    groups = description.groups
    for relation, before, after in zip(description.relations, groups, groups[1:], strict=False):
        offset = [_mean(coordinate[after]) - _mean(coordinate[before]) for coordinate in x_and_y]  # (T,) each
        axis = _AXES[relation]
        valid &= offset[axis] >= 2 * np.abs(offset[1 - axis])
    return valid


_AXES = {"above": 1, "left of": 0}  # along which the first object is before the second


def _mean(rows: np.ndarray) -> np.ndarray:
    return rows[0] if len(rows) == 1 else rows.mean(0)
