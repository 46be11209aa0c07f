"""The made world `shapes`: captioned scenes of coloured things, endless, and checkable from the pixels alone.

A level 0 caption names one thing: "a large red circle". Level 1 also names two in a relation: "a small green
triangle left of a large cyan circle". Level 2 adds counts and more things: "three small red circles", "a large red circle
above two small blue squares", "a small red circle above a large cyan square left of a small blue circle"
(each relation joins its two neighbours). The first named is the upper or the left one. A single group may
stand anywhere.

Lengths are in units of a canvas of 32 x 32, x to the right and y down. What a scene promises: the boxes of
any two things lie at least `GAP` apart in x or in y, and none comes closer to the border than `MARGIN`; in "A
above B" every box of A ends at least `GAP` before every box of B begins, and the way from the middle of A to
the middle of B leads at least twice as far down as sideways ("left of" likewise). The groups of a scene
differ in size, colour or shape. So of all captions that are drawn one alone is true of a picture.
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
MOST = 4  # things in a scene

COLOURS = {"red": (235, 60, 60), "green": (45, 190, 75), "blue": (50, 85, 245),
           "yellow": (250, 220, 60), "purple": (185, 70, 225), "cyan": (70, 225, 235)}  # fmt: skip
BACKGROUND = (24, 26, 34)
BOXES = {
    ("small", "circle"): (8.0, 8.0), ("small", "square"): (8.0, 8.0), ("small", "triangle"): (9.5, 9.0),
    ("large", "circle"): (13.0, 13.0), ("large", "square"): (13.0, 13.0), ("large", "triangle"): (13.5, 13.0),
}  # (width, height); areas are 43 to 64 and 88 to 169, so that a size is hard to mistake  # fmt: skip
GAP = 3.0
MARGIN = 0.5
STEP = 0.25  # centres lie on a grid this fine; that of odd seeds is half a step off: they share no picture


@dataclass(frozen=True)
class Thing:
    """One thing as a caption names it."""

    size: str
    colour: str
    shape: str


@dataclass(frozen=True)
class Description:
    """What a caption says: `counts[g]` things like `kinds[g]`, `relations[g]` between groups g and g + 1."""

    kinds: tuple[Thing, ...]
    counts: tuple[int, ...]
    relations: tuple[str, ...] = ()

    @property
    def things(self) -> tuple[Thing, ...]:
        return tuple(kind for kind, count in zip(self.kinds, self.counts, strict=True) for _ in range(count))

    @property
    def groups(self) -> tuple[slice, ...]:
        """Where each group's things stand among `things`."""
        ends = np.cumsum(self.counts).tolist()
        return tuple(slice(end - count, end) for end, count in zip(ends, self.counts, strict=True))


@dataclass(frozen=True)
class Scene:
    """A description, and the centre (x, y) of the box of each of its things, in units of a 32 x 32 canvas."""

    description: Description
    centres: tuple[tuple[float, float], ...]

    @property
    def things(self) -> tuple[Thing, ...]:
        return self.description.things


class Shapes:
    """A random-access source of scenes with their captions.

    No held-out picture is a training picture, whatever the seeds (see `STEP`), but captions recur: level 1
    has only 2,556. What is held out is the picture, not the idea, and a training picture very like it may
    well exist.
    """

    name = "shapes"

    def __init__(self, level: int = 1, size: int = CANVAS, split: str = "train", seed: int = 0):
        lengths = {"train": 1_000_000, "heldout": 2_000}
        if level not in LEVELS or split not in lengths or seed < 0 or size < 1:
            raise ValueError(f"no such shapes: level {level} of {LEVELS}, split {split!r} of {[*lengths]}, "
                             f"size {size} (at least 1), seed {seed} (at least 0)")  # fmt: skip
        self.level, self.size, self.split, self.seed = level, size, split, seed
        self.length = lengths[split]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> RawDocument:
        scene = self.scene(i)
        return RawDocument((RawText(caption(scene)), RawImage(render(scene, self.size))), id=i, pairs=True)

    def scene(self, i: int) -> Scene:
        """The scene of document i. IndexError beyond the end."""
        if not 0 <= i < self.length:
            raise IndexError(f"shapes ({self.split}) has documents 0 to {self.length - 1}, not {i}")
        return draw_scene(self.level, 2 * (self.seed * 2**32 + i) + (self.split == "heldout"))


def draw_scene(level: int, seed: int) -> Scene:
    """A scene of this level, all chance from the seed, which is at least 0.

    From 32 pixels up, no picture of an even seed, of whichever level, equals one of an odd seed.
    """
    if level not in LEVELS:
        raise ValueError(f"no level {level}: {LEVELS}")
    chance = np.random.default_rng(seed)
    while True:  # a description that finds no place is drawn anew
        description = _draw_description(level, chance)
        centres = _draw_centres(description, chance, shift=STEP / 2 * (seed % 2))
        if centres is not None:
            return Scene(description, tuple((float(x), float(y)) for x, y in centres))


def caption(scene: Scene | Description) -> str:
    """The one caption of a scene."""
    description = scene.description if isinstance(scene, Scene) else scene
    words = [f"{COUNTS[count - 1]} {kind.size} {kind.colour} {kind.shape}{'s' if count > 1 else ''}"
             for kind, count in zip(description.kinds, description.counts, strict=True)]  # fmt: skip
    joined = zip(description.relations, words[1:], strict=True)
    return words[0] + "".join(f" {relation} {word}" for relation, word in joined)


def parse(caption: str) -> Description | None:
    """What a caption says: the inverse of `caption`. None when the string is not a caption of the world.

    The grammar is a little wider than what is drawn (of at most `MOST` things): it knows "four large red
    circles" (for which there is hardly room) and "a small red circle above a small red circle" (the same kind
    twice).
    """
    parts = _RELATION.split(caption)
    groups = [_GROUP.fullmatch(part) for part in parts[::2]]
    if not all(groups):
        return None
    counts = tuple(COUNTS.index(group[1]) + 1 for group in groups)
    if sum(counts) > MOST or any((n > 1) != bool(group[5]) for n, group in zip(counts, groups, strict=True)):
        return None
    return Description(tuple(Thing(*group.group(2, 3, 4)) for group in groups), counts, tuple(parts[1::2]))


_GROUP = re.compile(" ".join(f"({'|'.join(words)})" for words in (COUNTS, SIZES, COLOURS, SHAPES)) + "(s?)")
_RELATION = re.compile(rf" ({'|'.join(RELATIONS)}) ")


def render(scene: Scene, size: int = CANVAS) -> np.ndarray:
    """The picture of a scene: (size, size, 3) uint8, edges smoothed, on a plain dark ground."""
    picture = np.empty((size, size, 3), np.float32)  # (Y, X, 3)
    picture[:] = BACKGROUND
    for thing, centre in zip(scene.things, scene.centres, strict=True):
        cover = coverage(thing.shape, BOXES[thing.size, thing.shape], centre, size)  # (Y, X)
        picture += cover[..., None] * _COLOUR_STEPS[thing.colour]
    return (picture + 0.5).astype(np.uint8)  # (Y, X, 3)


_COLOUR_STEPS = {name: np.float32(np.subtract(colour, BACKGROUND)) for name, colour in COLOURS.items()}


def coverage(
    shape: str, box: tuple[float, float], centre: tuple[float, float], size: int = CANVAS
) -> np.ndarray:
    """How much of each pixel a shape covers, (size, size) float32 in [0, 1]. Box and centre in canvas units.

    It is the distance from a pixel's middle to the outline, cut at half a pixel on either side: exact for an
    edge along the grid, close for the others, and many times faster than counting finer pixels.
    """
    width, height = box
    pixel = CANVAS / size
    x = _middles(size) - np.float32(centre[0])  # (X,)
    y = _middles(size)[:, None] - np.float32(centre[1])  # (Y, 1)
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
            raise ValueError(f"no shape {shape!r}: {SHAPES}")
    return np.clip(0.5 - outside / np.float32(pixel), 0, 1)  # (Y, X)


@lru_cache(maxsize=8)
def _middles(size: int) -> np.ndarray:
    return ((np.arange(size) + 0.5) * (CANVAS / size)).astype(np.float32)  # (size,)


def _draw_description(level: int, chance: np.random.Generator) -> Description:
    """Level 0: single things. Level 1: a quarter of those, the rest pairs. Level 2: a quarter each of level 1, a counted
    group, two groups with counts, three things around a corner (but what finds no place drops out)."""
    form = chance.integers(4)
    if level == 0:
        return _draw_groups([1], chance)
    if level == 1:
        return _draw_groups([1] if form == 0 else [1, 1], chance)
    match form:
        case 0:
            return _draw_description(1, chance)
        case 1:
            return _draw_groups([int(chance.integers(2, 5))], chance)
        case 2:
            return _draw_groups([(1, 2), (2, 1), (2, 2)][chance.integers(3)], chance)
        case _:
            return _draw_groups([1, 1, 1], chance)


def _draw_groups(counts: Sequence[int], chance: np.random.Generator) -> Description:
    """Groups of so many things. Of three things in relations one at most is large: else there is no room."""
    colours = tuple(COLOURS)
    relations = [RELATIONS[chance.integers(2)]]
    while len(relations) < len(counts) - 1:  # around a corner: three in one line would have no room
        relations.append(RELATIONS[1 - RELATIONS.index(relations[-1])])
    while True:
        kinds = [Thing(SIZES[a], colours[b], SHAPES[c])
                 for a, b, c in chance.integers((2, 6, 3), size=(len(counts), 3))]  # fmt: skip
        description = Description(tuple(kinds), tuple(counts), tuple(relations[: len(counts) - 1]))
        large = sum(thing.size == "large" for thing in description.things)
        room = large <= 1 if sum(counts) > 2 and len(counts) > 1 else large <= 3
        if room and len(set(kinds)) == len(kinds):
            return description


def _draw_centres(description: Description, chance: np.random.Generator, shift: float) -> np.ndarray | None:
    """Any allowed placement, each as likely as any other: (things, 2), x and y. None when none is found."""
    half = np.array([BOXES[thing.size, thing.shape] for thing in description.things]) / 2  # (K, 2)
    first = np.ceil((MARGIN + half - shift) / STEP)  # (K, 2)
    choices = np.floor((CANVAS - MARGIN - half - shift) / STEP) - first + 1  # (K, 2)
    for tries in (32, 256, 2048):  # most descriptions fit at once, two large things in a row rarely
        steps = first + np.floor(chance.random((tries, *half.shape)) * choices)  # (T, K, 2)
        centres = shift + STEP * steps  # (T, K, 2)
        allowed = np.flatnonzero(_is_allowed(description, centres, half))
        if len(allowed):
            centres = centres[allowed[0]]  # (K, 2)
            for group in description.groups:  # like things from the left: equal pictures are equal scenes
                centres[group] = centres[group][np.lexsort((centres[group, 1], centres[group, 0]))]
            return centres
    return None


def _is_allowed(description: Description, centres: np.ndarray, half: np.ndarray) -> np.ndarray:
    """Which of the placements (T, K, 2) keep what a scene promises: (T,) booleans."""
    allowed = np.ones(len(centres), bool)  # (T,)
    for i, j in combinations(range(len(half)), 2):
        allowed &= (np.abs(centres[:, i] - centres[:, j]) >= half[i] + half[j] + GAP).any(1)
    groups = description.groups
    for relation, before, after in zip(description.relations, groups, groups[1:], strict=False):
        along, across = (1, 0) if relation == "above" else (0, 1)
        end = (centres[:, before] + half[before])[..., along].max(1)  # (T,)
        begin = (centres[:, after] - half[after])[..., along].min(1)  # (T,)
        way = centres[:, after].mean(1) - centres[:, before].mean(1)  # (T, 2)
        allowed &= (begin - end >= GAP) & (way[:, along] >= 2 * np.abs(way[:, across]))
    return allowed
