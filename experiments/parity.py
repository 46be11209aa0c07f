"""Parity ratios: with which share of the compute one family of models reaches a metric of another (section 4.2).

For each family a power law, log metric = intercept + slope * log FLOPs, is fitted to the mean over seeds of each size.
The ratio is the compute at which the first family's law reaches the value of the second family's law at its largest size,
divided by the compute of that size. There is no line where a slope is not distinguishable from 0, or of the wrong sign.

The interval is a parametric bootstrap over seeds: each point moves by Student's t times s / sqrt(number of its seeds). s is
the standard deviation of the log metric within a size, pooled over all sizes of both families.
"""

import math
import statistics
from collections.abc import Sequence

import numpy as np

from experiments.judge import LEVEL, NUM_RESAMPLES, Interval

Points = Sequence[tuple[float, Sequence[float]]]  # of each size: the mean FLOPs, and the metric of each seed
NO_FIT, NO_LINE = "no fit possible", "no line: a slope is not distinguishable from 0"


def fit_line(points: Points) -> tuple[float, float] | None:
    """(intercept, slope) of the power law. None with fewer than two sizes, or if a metric is not above 0."""
    if len({x for x, _ in points}) < 2 or any(y <= 0 for _, values in points for y in values):
        return None
    log_flops, log_metrics = _logs(points)
    ((intercept,), (slope,)) = _fit(log_flops, log_metrics[None])
    return float(intercept), float(slope)


def parity_ratio(first: Points, second: Points, is_higher_better: bool) -> Interval | str:
    """The ratio with its 95 % interval, or why there is none. The bounds are NaN if no size has several seeds."""
    if fit_line(first) is None or fit_line(second) is None:
        return NO_FIT
    noise = _sample_noise(first, second)
    (log_flops, log_metrics), (other_flops, other_metrics) = _logs(first), _logs(second)
    first_intercept, first_slope = _fit(log_flops, log_metrics + noise[0])
    second_intercept, second_slope = _fit(other_flops, other_metrics + noise[1])
    for slope in (first_slope, second_slope):
        if np.quantile(slope if is_higher_better else -slope, LEVEL / 2) <= 0:
            return NO_LINE
    largest = math.log(max(x for x, _ in second))
    log_ratio = (second_intercept + second_slope * largest - first_intercept) / first_slope - largest  # (1 + R,)
    ratio = np.exp(np.clip(log_ratio, -700, 700))
    if len(ratio) == 1:
        return Interval(float(ratio[0]), math.nan, math.nan)
    low, high = np.quantile(ratio[1:], [LEVEL / 2, 1 - LEVEL / 2])
    return Interval(float(ratio[0]), float(low), float(high))


def _logs(points: Points) -> tuple[np.ndarray, np.ndarray]:
    """The logarithms of the FLOPs and of the mean metric of each size: (S,) each."""
    return np.log([x for x, _ in points]), np.log([statistics.mean(values) for _, values in points])


def _fit(log_flops: np.ndarray, log_metrics: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least squares for (S,) and (R, S): intercepts and slopes, (R,) each."""
    centred = log_flops - log_flops.mean()
    slopes = log_metrics @ centred / (centred @ centred)
    return log_metrics.mean(1) - slopes * log_flops.mean(), slopes


def _sample_noise(*families: Points) -> list[np.ndarray]:
    """What is added to the log means of each family, (1 + R, S): nothing in row 0, the only one if no size has two seeds."""
    groups = [np.log(values) for points in families for _, values in points]
    degrees = sum(len(values) - 1 for values in groups)
    if not degrees:
        return [np.zeros((1, len(points))) for points in families]
    std = math.sqrt(sum(((values - values.mean()) ** 2).sum() for values in groups) / degrees)
    rng, noise = np.random.default_rng(0), []
    for points in families:
        scale = std / np.sqrt([len(values) for _, values in points])  # (S,)
        samples = scale * rng.standard_t(degrees, (NUM_RESAMPLES, len(points)))
        noise.append(np.concatenate([np.zeros((1, len(points))), samples]))
    return noise
