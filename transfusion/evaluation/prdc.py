"""Are drawn pictures like real ones, and are all kinds of real ones drawn? Four shares, from who is near whom in features.

Precision and recall are those of Kynkaanniemi et al. 2019 (1904.06991), over the 3 nearest; density and coverage those of
Naeem et al. 2020 (2002.09797), over the 5 nearest, as each paper has them. Naeem's own code takes 5 for all four.
"""

from collections.abc import Iterator

import numpy as np

from transfusion.evaluation.fid import TooFew

NEAR, WIDE = 3, 5  # neighbours: for precision and recall; for density and coverage
AT_ONCE = 2**25  # distances held at a time


def neighbour_scores(real: np.ndarray, drawn: np.ndarray, near: int = NEAR, wide: int = WIDE) -> dict[str, float]:
    """Precision, recall, density and coverage of features (N, F) and (M, F).

    Every picture has a ball that reaches to its k-th nearest of its own set, itself not counted, border included.
    precision: the share of drawn pictures in a ball of a real one; recall: of real ones in a ball of a drawn one (k = near).
    density: in how many balls of real pictures a drawn one lies, over k, which may be above 1; coverage: the share of real
    ones whose ball holds a drawn one (k = wide). TooFew when a side has no k-th neighbour.
    """
    if len(real) <= max(near, wide) or len(drawn) <= near:
        raise TooFew(
            f"precision, recall, density and coverage need {max(near, wide) + 1} real and {near + 1} drawn pictures or more:"
            f" here are {len(real)} and {len(drawn)}"
        )
    middle = real.mean(0, dtype=np.float64)  # (F,) distances from there lose least to rounding
    real, drawn = real - middle, drawn - middle
    near_real, wide_real = _radii(real, (near, wide))  # (N,) each
    (near_drawn,) = _radii(drawn, (near,))  # (M,)
    precise, balls = np.zeros(len(drawn), bool), np.zeros(len(drawn), int)  # (M,) each
    recalled, covered = np.zeros(len(real), bool), np.zeros(len(real), bool)  # (N,) each
    for rows, distance in _distances(real, drawn):  # (rows, M)
        inside = distance <= wide_real[rows, None]  # (rows, M)
        covered[rows], balls = inside.any(1), balls + inside.sum(0)
        precise |= (distance <= near_real[rows, None]).any(0)
        recalled[rows] = (distance <= near_drawn).any(1)
    return {
        "precision": float(precise.mean()), "recall": float(recalled.mean()),
        "density": float(balls.mean() / wide), "coverage": float(covered.mean()),
    }  # fmt: skip


def _radii(features: np.ndarray, ks: tuple[int, ...]) -> np.ndarray:
    """Squared distances to the k-th nearest other one, for each of these k, (len(ks), N); a hair longer than they are,
    so that rounding does not decide who lies on a border."""
    radii = np.empty((len(ks), len(features)))
    places = [k - 1 for k in ks]
    for rows, distance in _distances(features, features):
        numbers = np.arange(len(features))[rows]
        distance[numbers - numbers[0], numbers] = np.inf  # itself
        radii[:, rows] = np.partition(distance, places, axis=1)[:, places].T
    return radii + 1e-12 * np.square(features).sum(1).max()


def _distances(one: np.ndarray, other: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Some rows of the first set at a time, and their squared distances to all of the second, (rows, M)."""
    squares, step = np.square(other).sum(1), max(1, AT_ONCE // len(other))
    for first in range(0, len(one), step):
        rows = slice(first, min(first + step, len(one)))
        yield rows, np.square(one[rows]).sum(1)[:, None] + squares - 2 * one[rows] @ other.T
