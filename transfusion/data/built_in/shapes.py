"""`shapes`: a synthetic data set of captioned scenes of coloured objects, whose images can be checked automatically.

A level 0 caption names one object: "a large red circle". Level 1 also names two with a relation: "a small green
triangle left of a large cyan circle". Level 2 adds counts and more objects: "three small red circles", "a large red
circle above two small blue squares", "a small red circle above a large cyan square left of a small blue circle"
(each relation joins its two neighbours). The first object named is the upper or the left one. A single group may be
anywhere.

Lengths are in units of a canvas of 32 x 32, x to the right and y down. Rules of every scene:
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
from itertools import combinations

import numpy as np

from transfusion.data.raw import RawDocument, RawImage, RawText

CANVAS = 32
SIZES = ("small", "large")
SHAPES = ("circle", "square", "triangle")
RELATIONS = ("above", "left of")
COUNTS = ("a", "two", "three", "four")
LEVELS = (0, 1, 2)
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
        ends = np.cumsum(self.counts).tolist()
        return tuple(slice(end - count, end) for end, count in zip(ends, self.counts, strict=True))


@dataclass(frozen=True)
class Scene:
    """A description, and the centre (x, y) of each object's box in units of a 32 x 32 canvas."""

    description: Description
    centres: tuple[tuple[float, float], ...]

    @property
    def objects(self) -> tuple[SceneObject, ...]:
        return self.description.objects


class Shapes:
    """A random-access source of scenes with their captions. No held-out image is a training image for any seeds (see
    `GRID_STEP`). Captions do recur: level 1 has only 2,556. So only the image is held out, not its content, and a very
    similar training image may exist."""

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
        return RawDocument((RawText(caption(scene)), RawImage(render(scene, self.size))), id=i, pairs=True)

    def scene(self, i: int) -> Scene:
        """The scene of document i. IndexError when there is no document i."""
        if not 0 <= i < self.length:
            raise IndexError(f"shapes ({self.split}) has documents 0 to {self.length - 1}, not {i}")
        return sample_scene(self.level, 2 * (self.seed * 2**32 + i) + (self.split == "heldout"))


def sample_scene(level: int, seed: int) -> Scene:
    """A random scene of this level, a pure function of the seed (at least 0). At 32 pixels or more, no image of an even seed
    equals one of an odd seed, at any level."""
    if level not in LEVELS:
        raise ValueError(f"shapes has no level {level}; use one of {LEVELS}")
    rng = np.random.default_rng(seed)
    while True:  # sample the description again when no placement is found
        description = _sample_description(level, rng)
        centres = _sample_centres(description, rng, shift=GRID_STEP / 2 * (seed % 2))
        if centres is not None:
            return Scene(description, tuple((float(x), float(y)) for x, y in centres))


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
    """The image of a scene: (size, size, 3) uint8, anti-aliased, on a plain dark background."""
    image = np.empty((size, size, 3), np.float32)  # (Y, X, 3)
    image[:] = BACKGROUND
    for item, centre in zip(scene.objects, scene.centres, strict=True):
        mask = coverage(item.shape, BOXES[item.size, item.shape], centre, size)  # (Y, X)
        image += mask[..., None] * _COLOUR_OFFSETS[item.colour]
    return (image + 0.5).astype(np.uint8)  # (Y, X, 3)


_COLOUR_OFFSETS = {name: np.float32(np.subtract(colour, BACKGROUND)) for name, colour in COLOURS.items()}


def coverage(shape: str, box: tuple[float, float], centre: tuple[float, float], size: int = CANVAS) -> np.ndarray:
    """Share of each pixel that a shape covers, (size, size) float32 in [0, 1]. Box and centre in canvas units. coverage =
    clip(0.5 - d, 0, 1), d: signed distance in pixels from the pixel's centre to the outline. Exact for edges along the grid,
    close for the others, and many times faster than supersampling."""
    width, height = box
    pixel = CANVAS / size
    x = _pixel_centres(size) - np.float32(centre[0])  # (X,)
    y = _pixel_centres(size)[:, None] - np.float32(centre[1])  # (Y, 1)
    match shape:
        case "circle":
            outside = np.hypot(x, y) - width / 2  # (Y, X)
        case "square":
            outside = np.maximum(np.abs(x) - width / 2, np.abs(y) - height / 2)  # (Y, X)
        case "triangle":  # point up: two slanted sides from (0, -height / 2), and the base
            length = np.hypot(height, width / 2)
            across, down = np.float32(height / length), np.float32(width / 2 / length)
            slanted = np.abs(x) * across - (y + height / 2) * down  # (Y, X)
            outside = np.maximum(slanted, y - height / 2)  # (Y, X)
        case _:
            raise ValueError(f"there is no shape {shape!r}; use one of {SHAPES}")
    return np.clip(0.5 - outside / np.float32(pixel), 0, 1)  # (Y, X)


@lru_cache(maxsize=8)
def _pixel_centres(size: int) -> np.ndarray:
    return ((np.arange(size) + 0.5) * (CANVAS / size)).astype(np.float32)  # (size,)


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
    colours = tuple(COLOURS)
    relations = [RELATIONS[rng.integers(2)]]
    while len(relations) < len(counts) - 1:  # around a corner: three in one line would not fit
        relations.append(RELATIONS[1 - RELATIONS.index(relations[-1])])
    while True:
        kinds = [SceneObject(SIZES[a], colours[b], SHAPES[c]) for a, b, c in rng.integers((2, 6, 3), size=(len(counts), 3))]
        description = Description(tuple(kinds), tuple(counts), tuple(relations[: len(counts) - 1]))
        large = sum(item.size == "large" for item in description.objects)
        can_fit = large <= 1 if sum(counts) > 2 and len(counts) > 1 else large <= 3
        if can_fit and len(set(kinds)) == len(kinds):
            return description


def _sample_centres(description: Description, rng: np.random.Generator, shift: float) -> np.ndarray | None:
    """A placement sampled uniformly from the valid ones: (objects, 2), x and y. None when none is found."""
    half = np.array([BOXES[item.size, item.shape] for item in description.objects]) / 2  # (K, 2)
    first = np.ceil((MARGIN + half - shift) / GRID_STEP)  # (K, 2)
    choices = np.floor((CANVAS - MARGIN - half - shift) / GRID_STEP) - first + 1  # (K, 2)
    for tries in (32, 256, 2048):  # most descriptions fit in the first 32, two large objects in a row rarely
        steps = first + np.floor(rng.random((tries, *half.shape)) * choices)  # (T, K, 2)
        centres = shift + GRID_STEP * steps  # (T, K, 2)
        valid = np.flatnonzero(_find_valid(description, centres, half))
        if len(valid):
            centres = centres[valid[0]]  # (K, 2)
            for group in description.groups:  # equal objects sorted by x: equal images are equal scenes
                centres[group] = centres[group][np.lexsort((centres[group, 1], centres[group, 0]))]
            return centres
    return None


def _find_valid(description: Description, centres: np.ndarray, half: np.ndarray) -> np.ndarray:
    """Which of the placements (T, K, 2) follow the rules of a scene: (T,) bool."""
    valid = np.ones(len(centres), bool)  # (T,)
    for i, j in combinations(range(len(half)), 2):
        valid &= (np.abs(centres[:, i] - centres[:, j]) >= half[i] + half[j] + GAP).any(1)
    groups = description.groups
    for relation, before, after in zip(description.relations, groups, groups[1:], strict=False):
        along, across = (1, 0) if relation == "above" else (0, 1)
        end = (centres[:, before] + half[before])[..., along].max(1)  # (T,)
        begin = (centres[:, after] - half[after])[..., along].min(1)  # (T,)
        offset = centres[:, after].mean(1) - centres[:, before].mean(1)  # (T, 2)
        valid &= (begin - end >= GAP) & (offset[:, along] >= 2 * np.abs(offset[:, across]))
    return valid
