"""All that features say of drawn pictures beside real ones, in one call."""

import numpy as np

from transfusion.evaluation.fid import TooFew, fid, kid
from transfusion.evaluation.neighbours import neighbour_scores


def image_scores(real: np.ndarray, drawn: np.ndarray, seed: int = 0) -> dict[str, float | int | str]:
    """FID, KID, precision, recall, density and coverage of features (N, F) and (M, F), and of how many pictures they are.

    Without FID where pictures are too few for it: `no_fid` then says why. TooFew when a side has fewer than the
    6 real or 4 drawn pictures that the others need.
    """
    found: dict[str, float | int | str] = {}
    try:
        found["fid"] = fid(real, drawn)
    except TooFew as error:
        found["no_fid"] = str(error)
    found["kid"], found["kid_deviation"] = kid(real, drawn, seed)
    return found | neighbour_scores(real, drawn) | {"real": len(real), "drawn": len(drawn)}
