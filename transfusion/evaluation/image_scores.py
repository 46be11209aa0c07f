"""All that features say of drawn pictures beside real ones, in one call."""

import numpy as np

from transfusion.evaluation.fid import TooFew, fid, kid
from transfusion.evaluation.prdc import NEAR, WIDE, neighbour_scores

REAL, DRAWN = WIDE + 1, NEAR + 1  # pictures that it takes


def image_scores(real: np.ndarray, drawn: np.ndarray, seed: int = 0) -> dict[str, float | int | str]:
    """FID, KID, precision, recall, density and coverage of features (N, F) and (M, F), and of how many pictures they are.

    Without FID where pictures are too few for it: `no_fid` then says why. TooFew as `check_numbers`.
    """
    check_numbers(len(real), len(drawn))
    found: dict[str, float | int | str] = {}
    try:
        found["fid"] = fid(real, drawn)
    except TooFew as error:
        found["no_fid"] = str(error)
    found["kid"], found["kid_deviation"] = kid(real, drawn, seed)
    return found | neighbour_scores(real, drawn) | {"real": len(real), "drawn": len(drawn)}


def check_numbers(real: int, drawn: int) -> None:
    """TooFew when there are fewer than the 6 real or 4 drawn pictures that all but FID need."""
    if real < REAL or drawn < DRAWN:
        raise TooFew(f"at least {REAL} real and {DRAWN} drawn pictures are needed: here are {real} and {drawn}")
