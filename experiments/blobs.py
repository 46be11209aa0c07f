"""Random one-piece objects that are none of the three shapes of `shapes`: blobs, mounds, peaks, half discs and stars."""

from collections.abc import Iterator

import numpy as np
from scipy import ndimage

from transfusion.data.built_in.shapes import BACKGROUND, CANVAS, COLOURS, SHAPES, coverage

SAMPLES = 8  # per pixel and axis
AREAS = 43.0, 169.0  # of the valid objects
X, Y = (np.arange(CANVAS * SAMPLES) + 0.5)[None] / SAMPLES, (np.arange(CANVAS * SAMPLES) + 0.5)[:, None] / SAMPLES


def sample_blobs(kind: str, count: int, max_overlap: float, seed: int = 0) -> Iterator[np.ndarray]:
    """Images (32, 32, 3) uint8 of one object in a random colour. `kind` is a key of `KINDS`. Objects are left out that are
    nearly a circle, a square or a triangle: whose `overlap` is larger than `max_overlap`."""
    rng = np.random.default_rng(seed)
    colours = list(COLOURS.values())
    while count:
        inside = KINDS[kind](rng)  # (Y, X) in samples
        mask = inside.reshape(CANVAS, SAMPLES, CANVAS, SAMPLES).mean((1, 3))  # (Y, X)
        touches_border = mask[[0, -1]].any() or mask[:, [0, -1]].any()
        if not touches_border and AREAS[0] <= mask.sum() <= AREAS[1] and overlap(mask) <= max_overlap:
            offset = np.subtract(colours[rng.integers(len(colours))], BACKGROUND)
            yield (BACKGROUND + mask[..., None] * offset).round().astype(np.uint8)
            count -= 1


def overlap(mask: np.ndarray) -> float:
    """The largest intersection over union of a coverage (Y, X) with a circle, a square and a triangle of its area and centre
    of mass."""
    area, x, y = mask.sum(), (mask * (np.arange(CANVAS) + 0.5)).sum(), (mask.T * (np.arange(CANVAS) + 0.5)).sum()
    overlaps = []
    for shape in SHAPES:
        side = np.sqrt(area / {"circle": np.pi / 4, "square": 1, "triangle": 0.5}[shape])
        centre = x / area, y / area - (side / 6 if shape == "triangle" else 0)
        ideal = coverage(shape, (side, side), centre)  # (Y, X)
        overlaps.append(np.minimum(mask, ideal).sum() / np.maximum(mask, ideal).sum())
    return max(overlaps)


def blob(rng: np.random.Generator) -> np.ndarray:
    """The part around the maximum of a smooth random field."""
    field = ndimage.gaussian_filter(rng.normal(size=(2 * CANVAS, 2 * CANVAS)), rng.uniform(3, 6))
    area = rng.uniform(*AREAS)
    low, high = field.min(), field.max()
    for _ in range(12):  # bisection for the level at which the part has the area
        level = (low + high) / 2
        low, high = (level, high) if _part(field, level).sum() / 4 > area else (low, level)
    return _part(ndimage.zoom(field, SAMPLES / 2, order=1), level)


def _part(field: np.ndarray, level: float) -> np.ndarray:
    """The connected part above a level that has the maximum."""
    labels, _ = ndimage.label(field > level)
    return (labels == labels.flat[field.argmax()]) & (field > level)


def mound(rng: np.random.Generator) -> np.ndarray:
    """Flat below, round above: height 1 - |u|^p above the base."""
    u, v = _box(rng, rng.uniform(9, 16), rng.uniform(0.55, 0.95))
    return (v > 0) & (v < 1 - np.minimum(np.abs(u), 1) ** rng.uniform(2, 4))


def peak(rng: np.random.Generator) -> np.ndarray:
    """Flat below, with hollow sides up to a point."""
    u, v = _box(rng, rng.uniform(12, 24), rng.uniform(0.7, 1.1))
    return (v > 0) & (v < np.maximum(1 - np.abs(u), 0) ** rng.uniform(1.7, 3))


def half_disc(rng: np.random.Generator) -> np.ndarray:
    u, v = _box(rng, rng.uniform(11, 20), 0.5)
    inside = (v > 0) & (u**2 + v**2 < 1)
    return np.rot90(inside, rng.integers(4))


def star(rng: np.random.Generator) -> np.ndarray:
    """Four to seven points; the inner radius is a third to a half of the outer."""
    points, radius, inner = rng.integers(4, 8), rng.uniform(6, 11), rng.uniform(0.33, 0.5)
    x, y = X - rng.uniform(radius, CANVAS - radius), Y - rng.uniform(radius, CANVAS - radius)
    step = np.pi / points
    angle = (np.arctan2(y, x) + rng.uniform(0, 2 * np.pi)) % (2 * step)
    angle = np.minimum(angle, 2 * step - angle)  # from the nearest point
    edge = radius * inner * np.sin(step) / (np.sin(angle) + inner * np.sin(step - angle))  # the line from point to notch
    return np.hypot(x, y) < edge


def _box(rng: np.random.Generator, width: float, aspect: float) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates in a random box: u from -1 to 1, v from 0 at the base to 1 at the top."""
    height = width * aspect
    x, base = rng.uniform(width / 2, CANVAS - width / 2), rng.uniform(height, CANVAS)
    return (X - x) / (width / 2), (base - Y) / height


KINDS = {"blob": blob, "mound": mound, "peak": peak, "half disc": half_disc, "star": star}
