"""Precision, recall, density and coverage of image features, from nearest neighbours.

Precision and recall: Kynkaanniemi et al. 2019 (1904.06991), k = 3. Density and coverage: Naeem et al. 2020 (2002.09797),
k = 5. Each k is its paper's; Naeem's code uses 5 for all four.
"""

from collections.abc import Iterator

import numpy as np

from transfusion.evaluation.fid import TooFewImagesError

K_PR, K_DC = 3, 5  # nearest neighbours: for precision and recall; for density and coverage
MAX_DISTANCES = 2**25  # in memory at a time


def compute_prdc(real: np.ndarray, drawn: np.ndarray, k_pr: int = K_PR, k_dc: int = K_DC) -> dict[str, float]:
    """Precision, recall, density and coverage of features (N, F) and (M, F).

    The ball of an image has the radius of its k-th nearest neighbour in its own set (itself excluded, border included).
    precision: the share of drawn images in the ball of a real one; recall: of real images in the ball of a drawn one (k_pr).
    density: the mean number of real balls that contain a drawn image, divided by k_dc, which may exceed 1; coverage: the
    share of real images whose ball contains a drawn one (k_dc). TooFewImagesError if a side has no k-th neighbour.
    """
    if len(real) <= max(k_pr, k_dc) or len(drawn) <= k_pr:
        raise TooFewImagesError(
            f"precision, recall, density and coverage need at least {max(k_pr, k_dc) + 1} real and {k_pr + 1} drawn images,"
            f" not {len(real)} and {len(drawn)}"
        )
    center = real.mean(0, dtype=np.float64)  # (F,) centring reduces rounding errors
    real, drawn = real - center, drawn - center
    pr_radii, dc_radii = _radii(real, (k_pr, k_dc))  # (N,) each
    (drawn_radii,) = _radii(drawn, (k_pr,))  # (M,)
    is_precise, num_balls = np.zeros(len(drawn), bool), np.zeros(len(drawn), int)  # (M,) each
    is_recalled, is_covered = np.zeros(len(real), bool), np.zeros(len(real), bool)  # (N,) each
    for rows, distances in _distances(real, drawn):  # (rows, M)
        inside = distances <= dc_radii[rows, None]  # (rows, M)
        is_covered[rows], num_balls = inside.any(1), num_balls + inside.sum(0)
        is_precise |= (distances <= pr_radii[rows, None]).any(0)
        is_recalled[rows] = (distances <= drawn_radii).any(1)
    return {
        "precision": float(is_precise.mean()), "recall": float(is_recalled.mean()),
        "density": float(num_balls.mean() / k_dc), "coverage": float(is_covered.mean()),
    }  # fmt: skip


def _radii(features: np.ndarray, ks: tuple[int, ...]) -> np.ndarray:
    """Squared distances to the k-th nearest neighbour for each k, (len(ks), N), plus a small tolerance: rounding must not
    decide whether an image on the border is inside."""
    radii = np.empty((len(ks), len(features)))
    indices = [k - 1 for k in ks]
    for rows, distances in _distances(features, features):
        numbers = np.arange(len(features))[rows]
        distances[numbers - numbers[0], numbers] = np.inf  # itself
        radii[:, rows] = np.partition(distances, indices, axis=1)[:, indices].T
    return radii + 1e-12 * np.square(features).sum(1).max()


def _distances(a: np.ndarray, b: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Slices of rows of `a` with their squared distances to all of `b`, (rows, M)."""
    squares, step = np.square(b).sum(1), max(1, MAX_DISTANCES // len(b))
    for first in range(0, len(a), step):
        rows = slice(first, min(first + step, len(a)))
        yield rows, np.square(a[rows]).sum(1)[:, None] + squares - 2 * a[rows] @ b.T
