"""Distances between two sets of image features: FID (Heusel et al. 2017) and KID (Binkowski et al. 2018).

Features are (N, F) outputs of a network (`features.py`); computation is in float64. Compare published figures only if the
network is the same and, for FID, also the number of images: FID decreases with it.
"""

from typing import NamedTuple

import numpy as np

from transfusion.seeding import derive_seed

NUM_SUBSETS, SUBSET_SIZE = 100, 1000  # of KID


class TooFewImagesError(ValueError):
    """A metric needs more images; the message says how many."""


def fid(real: np.ndarray, drawn: np.ndarray) -> float:
    """|m - m'|^2 + tr(S + S' - 2 (S S')^(1/2)): the squared Fréchet distance of Gaussians fitted to (N, F) and (M, F).

    With S = A A^T and S' = B B^T, tr (S S')^(1/2) is the sum of the singular values of A^T B. This needs no root of a
    non-symmetric matrix and is exact for singular S. TooFewImagesError with fewer than F + 1 images on a side: the
    covariance would be singular because of the sample size, and the distance would measure that.
    """
    features, fewest = real.shape[1], min(len(real), len(drawn))
    if fewest <= features:
        raise TooFewImagesError(
            f"FID over {features} features needs at least {features + 1} real and as many drawn images, or the covariances"
            f" are singular: here are {len(real)} and {len(drawn)}"
        )
    (mean, covariance), (drawn_mean, drawn_covariance) = _fit_gaussian(real), _fit_gaussian(drawn)
    trace_root = np.linalg.svd(_root(covariance).T @ _root(drawn_covariance), compute_uv=False).sum()
    difference = mean - drawn_mean
    return max(0.0, float(difference @ difference + np.trace(covariance) + np.trace(drawn_covariance) - 2 * trace_root))


def _fit_gaussian(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N, F) -> mean (F,) and unbiased covariance (F, F)."""
    mean = features.mean(0, dtype=np.float64)
    centred = features - mean
    return mean, centred.T @ centred / (len(features) - 1)


def _root(covariance: np.ndarray) -> np.ndarray:
    """A with A A^T = covariance. Eigenvalues within rounding error of 0 become 0, since their roots would not be small."""
    values, vectors = np.linalg.eigh(covariance)
    rounding = len(values) * np.finfo(np.float64).eps * np.abs(values).max()
    return vectors * np.sqrt(np.where(values > rounding, values, 0))


class MeanStd(NamedTuple):
    """Mean and standard deviation of repeated estimates."""

    mean: float
    std: float


def kid(real: np.ndarray, drawn: np.ndarray, seed: int = 0) -> MeanStd:
    """The squared maximum mean discrepancy of features (N, F) and (M, F), with the kernel (x.y / F + 1)^3.

    It is unbiased: with few images it is less certain but not larger, and it may be negative. Mean and std over 100 random
    subsets of 1,000 images of each side (the usual choice), or of half of the smaller side if that has fewer.
    TooFewImagesError with fewer than 4 images on a side.
    """
    fewest = min(len(real), len(drawn))
    if fewest < 4:
        raise TooFewImagesError(f"KID needs at least 4 real and 4 drawn images, not {len(real)} and {len(drawn)}")
    size = SUBSET_SIZE if fewest >= SUBSET_SIZE else fewest // 2
    rng = np.random.default_rng(derive_seed("kid", seed))
    estimates = []
    for _ in range(NUM_SUBSETS):
        subsets = [side[rng.choice(len(side), size, replace=False)] for side in (real, drawn)]  # (size, F) each
        estimates.append(mmd2(*subsets))
    return MeanStd(float(np.mean(estimates)), float(np.std(estimates)))


def mmd2(a: np.ndarray, b: np.ndarray) -> float:
    """The unbiased squared MMD of two whole sets of features (N, F); pairs of an image with itself are excluded."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    within = [(_kernel(x, x).sum() - _kernel_diagonal(x).sum()) / (len(x) * (len(x) - 1)) for x in (a, b)]
    return float(sum(within) - 2 * _kernel(a, b).mean())


def _kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(N, F), (M, F) -> (N, M)."""
    return (a @ b.T / a.shape[1] + 1) ** 3


def _kernel_diagonal(x: np.ndarray) -> np.ndarray:
    """(N, F) -> (N,): the diagonal of `_kernel(x, x)`."""
    return ((x * x).mean(1) + 1) ** 3
