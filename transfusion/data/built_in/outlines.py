"""The canvas and the outlines of the objects of `shapes`: how far a point is inside or outside."""

import math
from functools import lru_cache

import numpy as np

CANVAS = 32  # side of the canvas; lengths of scenes are in this unit, x to the right and y down
SHAPES = ("circle", "square", "triangle")


def signed_distance(shape: str, box: tuple[float, float], x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance of points to the outline of a shape in a box (width, height), (Y, X): negative inside. x (X,) and
    y (Y, 1) are relative to the box's centre, in the unit of the box. Exact inside and beside an edge; beyond a corner it is
    the distance to the nearest edge's line. ValueError for an unknown shape."""
    width, height = box
    match shape:
        case "circle":
            return np.hypot(x, y) - width / 2  # (Y, X)
        case "square":
            return np.maximum(np.abs(x) - width / 2, np.abs(y) - height / 2)  # (Y, X)
        case "triangle":  # point up: two slanted sides from (0, -height / 2), and the base
            length = math.hypot(height, width / 2)
            across, down = np.float32(height / length), np.float32(width / 2 / length)
            slanted = np.abs(x) * across - (y + height / 2) * down  # (Y, X)
            return np.maximum(slanted, y - height / 2)  # (Y, X)
        case _:
            raise ValueError(f"there is no shape {shape!r}; use one of {SHAPES}")


@lru_cache(maxsize=8)
def pixel_centres(size: int) -> np.ndarray:
    """The centres of the pixels along one side of an image, in canvas units: (size,) float32."""
    return ((np.arange(size) + 0.5) * (CANVAS / size)).astype(np.float32)  # (size,)
