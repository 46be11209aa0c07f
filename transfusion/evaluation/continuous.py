"""The reader of level 3 of `shapes`: shape, hue, size and place of the objects in an image, as numbers.

An object is a connected region with a hue. Its chroma is modelled as coverage x light (`data/built_in/continuous.py`), with
light a linear function of the place. For each shape, centre, size, edge and light are fitted by least squares. likeness =
1 - |chroma - fit|^2 / |chroma|^2, both blurred a little. The shape is clear if its likeness is high, and the error of the
next shape is clearly larger. Made for generated images: noise, blur and faded colours are tolerated.
"""

import colorsys
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial

import numpy as np
from scipy import ndimage, optimize

from transfusion.data.built_in.continuous import EDGES, SATURATION, SIZES, VALUE, ContinuousObject, coverage, parse
from transfusion.data.built_in.outlines import CANVAS, SHAPES, pixel_centres
from transfusion.evaluation.shapes import UNCLEAR, Judgement

MAX_HUE_ERROR = 20.0  # degrees
MAX_PLACE_ERROR = 2.0  # canvas units, between centres
MAX_SIZE_ERROR = 1.5  # canvas units, of the side of a box

MIN_CHROMA = 0.4  # of an object's pixels, as a share of a full colour's
MIN_AREA = 12.0  # of an object, in canvas units squared; the smallest has 40
MIN_HUE_UNITY = 0.93  # length of the mean chroma vector as a share of the mean length; below it an object has no one hue
MIN_LIKENESS = 0.985
MIN_FIT = 0.93  # likeness; below it centre and size are those of the box of the region
MIN_ERROR_RATIO = 1.7  # of the next shape's error to the best one's
MIN_SIZE = SIZES[0] / 2  # of a fit, in canvas units
MIN_EDGE, MAX_EDGE = 0.5, 2 * EDGES[1]  # of a fit, in canvas units
BLUR_SIGMA = 0.7  # of the Gaussian blur before objects are found and compared, in canvas units


@dataclass(frozen=True)
class Reading:
    """An object in an image. Its shape is "unclear" if it is like none, its hue NaN if its pixels have several."""

    object: ContinuousObject
    likeness: float  # of its chroma to the best fit, at most 1
    error_ratio: float  # of the next shape's error to the best one's


@dataclass(frozen=True)
class Errors:
    """Distances between an image's object and its caption; NaN without an object."""

    hue: float  # degrees, from 0 to 180
    place: float  # canvas units, between the centres
    size: float  # canvas units


def judge(caption: str, pixels: np.ndarray) -> tuple[Judgement, Errors]:
    """Compare the largest object of an image (Y, Y, 3) uint8 with its caption: the attributes that are right within
    `MAX_HUE_ERROR`, `MAX_PLACE_ERROR` and `MAX_SIZE_ERROR`, and the errors. ValueError if it is no caption of level 3."""
    wanted = parse(caption)
    if wanted is None:
        raise ValueError(f"not a caption of level 3 of the data set shapes: {caption!r}")
    readings = read_objects(pixels)
    if not readings:
        return Judgement(*[False] * len(fields(Judgement))), Errors(math.nan, math.nan, math.nan)
    return _compare(wanted, readings[0].object, len(readings) == 1)


def judge_caption(reference: str, prediction: str) -> tuple[bool, Errors]:
    """Does a predicted caption say the same as the reference, within the same limits? And the errors."""
    wanted, actual = parse(reference), parse(prediction)
    if wanted is None or actual is None:
        return False, Errors(math.nan, math.nan, math.nan)
    judgement, errors = _compare(wanted, actual, True)
    return judgement.everything, errors


def _compare(wanted: ContinuousObject, actual: ContinuousObject, is_alone: bool) -> tuple[Judgement, Errors]:
    errors = measure_errors(wanted, actual)
    return Judgement(
        count=is_alone, colour=errors.hue <= MAX_HUE_ERROR, shape=actual.shape == wanted.shape,
        size=errors.size <= MAX_SIZE_ERROR, place=errors.place <= MAX_PLACE_ERROR,
    ), errors  # fmt: skip


def mean_errors(errors: Sequence[Errors]) -> dict[str, float]:
    """`hue_error` (degrees), `place_error` and `size_error` (canvas units): means over those that are not NaN, if any."""
    rows = {it.name: [getattr(each, it.name) for each in errors] for it in fields(Errors)}
    return {f"{name}_error": float(np.nanmean(row)) for name, row in rows.items() if not all(map(math.isnan, row))}


def measure_errors(wanted: ContinuousObject, actual: ContinuousObject) -> Errors:
    """The distances of two objects; their shapes do not count."""
    turn = abs(wanted.hue - actual.hue) % 360
    return Errors(min(turn, 360 - turn), math.dist(wanted.centre, actual.centre), abs(wanted.size - actual.size))


def read_objects(pixels: np.ndarray) -> list[Reading]:
    """The objects in an image (Y, Y, 3) uint8, the largest first."""
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape != (len(pixels), len(pixels), 3):
        raise ValueError(f"a scene must be (Y, Y, 3) uint8, not {pixels.shape} {pixels.dtype}")
    chroma = _to_chroma(pixels)  # (Y, X) complex
    masks = sorted(_find_objects(chroma), key=lambda mask: -mask.sum())
    occupied = np.any(masks, axis=0) if masks else None  # (Y, X)
    return [_read_object(pixels, chroma, mask, mask | ~occupied) for mask in masks]


def _to_chroma(pixels: np.ndarray) -> np.ndarray:
    """The part of each colour that is not grey, (Y, X) complex: the angle is about the hue, the length about 1 for a full
    colour. Linear in the pixels, so noise has no bias."""
    weights = np.array([1, -0.5 + 0.75**0.5 * 1j, -0.5 - 0.75**0.5 * 1j])  # red, green and blue, 120 degrees apart
    return pixels @ weights / (255 * SATURATION * VALUE)  # (Y, X)


def _find_objects(chroma: np.ndarray) -> Iterator[np.ndarray]:
    """Connected regions with a hue, as masks (Y, X)."""
    pixel = CANVAS / len(chroma)
    labels, count = ndimage.label(np.abs(ndimage.gaussian_filter(chroma, BLUR_SIGMA / pixel)) >= MIN_CHROMA)
    for number in range(1, count + 1):
        mask = labels == number  # (Y, X)
        if mask.sum() * pixel**2 >= MIN_AREA:
            yield mask


def _read_object(pixels: np.ndarray, chroma: np.ndarray, mask: np.ndarray, is_free: np.ndarray) -> Reading:
    """The object of a mask (Y, X). `is_free`: pixels of no other object."""
    mean = chroma[mask].mean()
    hue = 360 * colorsys.rgb_to_hsv(*pixels[mask].mean(0) / 255)[0]
    unity = abs(mean) / np.abs(chroma[mask]).mean()
    size = len(chroma)
    margin = math.ceil(3 * size / CANVAS)  # pixels around the mask that may hold a soft edge
    near = ndimage.binary_dilation(mask, iterations=margin) & is_free  # (Y, X)
    window = tuple(slice(axis.min(), axis.max() + 1) for axis in np.nonzero(near))
    amount = (chroma * np.conj(mean) / abs(mean)).real  # (Y, X)
    centres = pixel_centres(size)
    x, y, near, amount = centres[window[1]], centres[window[0]][:, None], near[window], amount[window]
    fits = sorted(_fit(shape, amount, near, mask[window], x, y) for shape in SHAPES)
    (error, shape, centre, side), (next_error, *_) = fits[:2]
    ratio, likeness = next_error / max(error, 1e-9), 1 - error
    if likeness < MIN_FIT:
        centre, side = _find_box(mask[window], x, y)
    if likeness < MIN_LIKENESS or ratio < MIN_ERROR_RATIO:
        shape = UNCLEAR
    item = ContinuousObject(shape, hue if unity >= MIN_HUE_UNITY else math.nan, side, centre)
    return Reading(item, likeness, ratio)


def _find_box(mask: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[tuple[float, float], float]:
    """The centre of the box of a mask (Y, X), and its longer side."""
    pixel = float(x[1] - x[0])
    (left, right), (top, bottom) = ((axis.ravel()[where].min(), axis.ravel()[where].max())
                                    for axis, where in ((x, mask.any(0)), (y, mask.any(1))))  # fmt: skip
    centre = float(left + right) / 2, float(top + bottom) / 2
    return centre, float(max(right - left, bottom - top)) + pixel


def _fit(
    shape: str, amount: np.ndarray, near: np.ndarray, mask: np.ndarray, x: np.ndarray, y: np.ndarray
) -> tuple[float, str, tuple[float, float], float]:
    """The best fit of a shape to the chroma `amount` (Y, X) of the pixels `near` with centres x (X,), y (Y, 1): its squared
    error as a share, the shape, its centre and size. Start values are from the box of the mask (Y, X)."""
    blur = partial(ndimage.gaussian_filter, sigma=BLUR_SIGMA / float(x[1] - x[0]))
    target = blur(amount * near)[near]  # (P,)

    def residual(numbers: np.ndarray) -> np.ndarray:
        centre_x, centre_y, size, edge = numbers
        dx, dy = x - centre_x, y - centre_y  # (X,), (Y, 1)
        covered = blur(coverage(shape, max(size, MIN_SIZE), dx, dy, min(max(edge, MIN_EDGE), MAX_EDGE)))  # (Y, X)
        terms = np.stack([covered[near], (covered * dx)[near], (covered * dy)[near]])  # (3, P)
        light = np.linalg.solve(terms @ terms.T + 1e-6 * np.eye(3), terms @ target)  # (3,)
        return light @ terms - target  # (P,)

    centre, side = _find_box(mask, x, y)
    found = optimize.least_squares(residual, [*centre, side, 1.5], method="lm", xtol=1e-2, ftol=1e-2, diff_step=1e-3)
    *centre, size, _ = map(float, found.x)
    return float(2 * found.cost / (target @ target)), shape, tuple(centre), max(size, MIN_SIZE)
