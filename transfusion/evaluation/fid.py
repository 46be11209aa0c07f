"""How far drawn pictures are from real ones, as sets of features: FID (Heusel et al. 2017) and KID (Binkowski et al. 2018).

Features are (N, F) numbers of a network that looks at pictures (`features.py`); all else is computed in float64. Published
figures are comparable only with features of the same network, and FID only with as many pictures: it falls as they grow.
"""

from typing import NamedTuple

import numpy as np

from transfusion.seeding import derive_seed

SUBSETS, SUBSET = 100, 1000  # KID's: how many, of how many pictures each


class TooFew(ValueError):
    """A measure needs more pictures than there are; the message says how many."""


def fid(real: np.ndarray, drawn: np.ndarray) -> float:
    """|mean - mean'|^2 + tr(S + S' - 2 (S S')^(1/2)): the squared distance of the Gaussians of features (N, F) and (M, F).

    With S = A A^T and S' = B B^T the last trace is the sum of the singular values of A^T B, which does without the root of a
    matrix that is not symmetric, and loses nothing where S is singular. TooFew with fewer pictures than features + 1:
    their covariance would be singular only because they are few, and the distance would measure that.
    """
    features, fewest = real.shape[1], min(len(real), len(drawn))
    if fewest <= features:
        raise TooFew(
            f"FID over {features} features needs at least {features + 1} pictures on both sides, real and drawn,"
            f" or their covariances are singular: here are {len(real)} and {len(drawn)}"
        )
    (mean, one), (other_mean, other) = _gaussian(real), _gaussian(drawn)
    shared = np.linalg.svd(_root(one).T @ _root(other), compute_uv=False).sum()
    moved = mean - other_mean
    return max(0.0, float(moved @ moved + np.trace(one) + np.trace(other) - 2 * shared))


def _gaussian(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N, F) -> mean (F,) and covariance (F, F), unbiased."""
    mean = features.mean(0, dtype=np.float64)
    centred = features - mean
    return mean, centred.T @ centred / (len(features) - 1)


def _root(covariance: np.ndarray) -> np.ndarray:
    """A with A A^T = covariance. An eigenvalue that is only rounding counts as 0: its root would not be small."""
    values, vectors = np.linalg.eigh(covariance)
    rounding = len(values) * np.finfo(np.float64).eps * np.abs(values).max()
    return vectors * np.sqrt(np.where(values > rounding, values, 0))


class MeanStd(NamedTuple):
    """A figure that was estimated several times."""

    mean: float
    std: float


def kid(real: np.ndarray, drawn: np.ndarray, seed: int = 0) -> MeanStd:
    """The squared maximum mean discrepancy of features (N, F) and (M, F), whose kernel is (x.y / F + 1)^3. It is
    unbiased: few pictures make it uncertain but not larger, and it may fall below 0.

    Mean and std over 100 random subsets of 1,000 pictures of each side, as is usual, or of half of the smaller side
    where it has fewer. TooFew with fewer than 4 pictures.
    """
    fewest = min(len(real), len(drawn))
    if fewest < 4:
        raise TooFew(f"KID needs at least 4 pictures on both sides, real and drawn: here are {len(real)} and {len(drawn)}")
    size = SUBSET if fewest >= SUBSET else fewest // 2
    chance = np.random.default_rng(derive_seed("kid", seed))
    found = []
    for _ in range(SUBSETS):
        one, other = (side[chance.choice(len(side), size, replace=False)] for side in (real, drawn))  # (size, F) each
        found.append(mmd2(one, other))
    return MeanStd(float(np.mean(found)), float(np.std(found)))


def mmd2(one: np.ndarray, other: np.ndarray) -> float:
    """KID of two sets of features (N, F) as they are; a picture is not compared with itself."""
    one, other = one.astype(np.float64), other.astype(np.float64)
    within = [(_kernel(x, x).sum() - _kernel_of_itself(x).sum()) / (len(x) * (len(x) - 1)) for x in (one, other)]
    return float(sum(within) - 2 * _kernel(one, other).mean())


def _kernel(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(N, F), (M, F) -> (N, M)."""
    return (one @ other.T / one.shape[1] + 1) ** 3


def _kernel_of_itself(one: np.ndarray) -> np.ndarray:
    """(N, F) -> (N,)."""
    return ((one * one).mean(1) + 1) ** 3
