"""All feature-based metrics of drawn images against real ones."""

import numpy as np

from transfusion.evaluation.fid import TooFewImagesError, fid, kid
from transfusion.evaluation.prdc import K_DC, K_PR, compute_prdc

MIN_REAL, MIN_DRAWN = K_DC + 1, K_PR + 1  # images


def image_scores(real: np.ndarray, drawn: np.ndarray, seed: int = 0) -> dict[str, float | int | str]:
    """FID, KID, precision, recall, density and coverage of features (N, F) and (M, F), and the numbers of images. With too
    few images for FID, `no_fid` holds the reason instead. TooFewImagesError as `check_counts`."""
    check_counts(len(real), len(drawn))
    scores: dict[str, float | int | str] = {}
    try:
        scores["fid"] = fid(real, drawn)
    except TooFewImagesError as error:
        scores["no_fid"] = str(error)
    scores["kid"], scores["kid_std"] = kid(real, drawn, seed)
    return scores | compute_prdc(real, drawn) | {"real": len(real), "drawn": len(drawn)}


def check_counts(real: int, drawn: int) -> None:
    """TooFewImagesError with fewer than 6 real or 4 drawn images: all metrics except FID need these."""
    if real < MIN_REAL or drawn < MIN_DRAWN:
        raise TooFewImagesError(f"at least {MIN_REAL} real and {MIN_DRAWN} drawn images are needed, not {real} and {drawn}")
