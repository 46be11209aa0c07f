"""Statistics of the tables: Welch's test over seeds, Holm's correction over the claims that are judged, and a bootstrap over
distinct captions.

Welch's interval is for other seeds of the training, with other captions and another starting noise, since these differ by
seed. Two rows of one seed share both, which makes the interval rather too wide. The bootstrap is for other captions and the
same trainings.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

LEVEL = 0.05  # of the judge; the intervals are of 95 %
NUM_RESAMPLES = 2_000  # of the bootstrap
REPRODUCED, PARTLY, NOT_SHOWN, OPPOSITE, OPEN = (
    "reproduced", "partly (not for other captions)", "not (no difference shown)", "not (the opposite)", "open"
)  # fmt: skip

Counts = Mapping[str, tuple[float, float]]  # caption -> (number of images that are right, number of images)


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % interval."""

    estimate: float
    low: float
    high: float


@dataclass(frozen=True)
class Evidence:
    """The advantage of a row over another, above 0 in favour of the claim: over seeds with its two-sided p value, and over
    captions for metrics that count images."""

    seeds: Interval
    p: float
    captions: Interval | None = None


def compare(
    first: Sequence[float], second: Sequence[float], better: Literal["higher", "lower"], margin: float = 0.0,
    first_counts: Sequence[Counts] = (), second_counts: Sequence[Counts] = (),
) -> Evidence:  # fmt: skip
    """The evidence for "first is better than second", from at least two values each. With a margin `first` is compared with
    `second` less that share of it: the claim is then that `first` is not worse by more. `counts`: of each seed."""
    sign = 1 if better == "higher" else -1
    limit = 1 - sign * margin
    seeds, p = welch([sign * value for value in first], [sign * limit * value for value in second])
    captions = bootstrap(first_counts, second_counts, sign, sign * limit) if first_counts and second_counts else None
    return Evidence(seeds, p, captions)


def judge(evidence: Sequence[Evidence | None]) -> list[str]:
    """The verdict on each of a family of claims; None is a claim without its seeds. If all claims are at their limit, where
    the advantage is 0, the probability of any verdict but "no difference shown" is at most 5 %, as far as Welch's test is
    exact (`error_rates`)."""
    adjusted = holm([1.0 if it is None else it.p for it in evidence])
    return [OPEN if it is None else _judge_one(it, p) for it, p in zip(evidence, adjusted, strict=True)]


def _judge_one(evidence: Evidence, adjusted_p: float) -> str:
    if adjusted_p > LEVEL:
        return NOT_SHOWN
    if evidence.seeds.estimate < 0:
        return OPPOSITE
    return PARTLY if evidence.captions is not None and evidence.captions.low <= 0 else REPRODUCED


def welch(first: Sequence[float], second: Sequence[float]) -> tuple[Interval, float]:
    """mean(first) - mean(second) with the 95 % interval and the two-sided p value of Welch's test (unequal variances). For
    two constants the interval is a point, and p is 1 if they are equal, else 0."""
    difference = float(np.mean(first) - np.mean(second))
    if np.ptp(first) == np.ptp(second) == 0:  # the statistic is a division by 0
        return Interval(difference, difference, difference), float(first[0] == second[0])
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # one constant row: its variance is exactly 0
        test = stats.ttest_ind(first, second, equal_var=False)
    bounds = test.confidence_interval(1 - LEVEL)
    return Interval(difference, float(bounds.low), float(bounds.high)), float(test.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values (1979): claims whose value is at most a level are rejected with a probability of any false
    rejection of at most that level. In ascending order, from i = 0: max over j <= i of min(1, (m - j) p_j)."""
    order = np.argsort(p_values, kind="stable")
    adjusted = np.empty(len(order))
    adjusted[order] = np.maximum.accumulate(np.asarray(p_values)[order] * np.arange(len(order), 0, -1)).clip(max=1)
    return adjusted.tolist()


def bootstrap(
    first: Sequence[Counts], second: Sequence[Counts], first_factor: float = 1.0, second_factor: float = 1.0
) -> Interval:
    """first_factor * share(first) - second_factor * share(second), where a share is over the images of all seeds, and its
    percentile interval when the distinct captions are sampled with replacement, the same ones for both rows."""
    names = sorted({name for counts in (*first, *second) for name in counts})
    sums = np.array([np.sum([[counts.get(name, (0, 0)) for name in names] for counts in row], 0) for row in (first, second)])
    weights = np.random.default_rng(0).multinomial(len(names), [1 / len(names)] * len(names), NUM_RESAMPLES)  # (R, U)
    right, count = np.moveaxis(np.concatenate([sums.sum(1, keepdims=True), weights @ sums], 1), 2, 0)  # (2, 1 + R) each
    with np.errstate(invalid="ignore"):  # a sample without images of one row
        advantages = first_factor * (right / count)[0] - second_factor * (right / count)[1]  # (1 + R,)
    low, high = np.nanquantile(advantages[1:], [LEVEL / 2, 1 - LEVEL / 2])
    return Interval(float(advantages[0]), float(low), float(high))
