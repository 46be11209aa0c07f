"""How often the judge of the primary claims errs, on synthetic tables whose truth is known.

    python -m experiments.error_rates

A table has the rows and the claims of `primary.CLAIMS`, five values a row, and is judged by the code that judges the runs.
False verdicts: of tables where each claim is at its limit, the share with any verdict but "no difference shown".
Power: the share of true claims that are found when `first` is better than the limit by 1, 2 or 3 standard deviations over
seeds: in tables where all six are true, and in tables where one is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import tyro

from experiments.judge import NOT_SHOWN, REPRODUCED, compare, judge
from experiments.lab import SEEDS, Claim, Column, format_markdown
from experiments.primary import CLAIMS

Sampler = Callable[[np.random.Generator, int], np.ndarray]  # the values of the first (0) or second (1) row of a claim, less
# their mean, in standard deviations of the first

N = len(SEEDS)
DISTRIBUTIONS: dict[str, Sampler] = {
    "normal": lambda rng, row: rng.normal(size=N),
    "normal, the second row three times as wide": lambda rng, row: (1 + 2 * row) * rng.normal(size=N),
    "exponential": lambda rng, row: rng.exponential(size=N) - 1,
    "shares of 400 images at 97 %": lambda rng, row: (rng.binomial(400, 0.97, size=N) - 388) / (388 * 0.03) ** 0.5,
}
MEAN, DEVIATION = 0.5, 0.02  # of a row
EFFECTS = 1, 2, 3


@dataclass
class Options:
    """Print how often the judge errs."""

    tables: int = 5_000
    """Synthetic tables for each line."""
    seed: int = 0
    """Seed of the random numbers."""


def sample_verdicts(
    rng: np.random.Generator, family: Sequence[tuple[Claim, Column]], sampler: Sampler, effects: Sequence[float]
) -> list[str]:
    """The verdicts on a synthetic table. `effects`: the advantage of each claim, in standard deviations of the first row."""
    first: dict[tuple[str, str], np.ndarray] = {}  # by row and column, since claims share rows
    evidence = []
    for (claim, column), effect in zip(family, effects, strict=True):
        values = first.setdefault((claim.first, claim.column), MEAN + DEVIATION * sampler(rng, 0))
        sign = 1 if column.better == "higher" else -1
        second = (MEAN - sign * effect * DEVIATION + DEVIATION * sampler(rng, 1)) / (1 - sign * claim.margin)
        evidence.append(compare(values, second, column.better, claim.margin))
    return judge(evidence)


def rate_of_false_verdicts(options: Options, sampler: Sampler) -> float:
    """The share of tables of null claims with any verdict but "no difference shown"."""
    family, rng = find_family(), np.random.default_rng(options.seed)
    return float(np.mean([set(sample_verdicts(rng, family, sampler, [0] * len(family))) != {NOT_SHOWN}
                          for _ in range(options.tables)]))  # fmt: skip


def power(options: Options, effect: float) -> tuple[float, float]:
    """The share of true claims that are found when all are true, and when only one is; rows are normal with equal spread."""
    family, rng, sampler = find_family(), np.random.default_rng(options.seed), DISTRIBUTIONS["normal"]
    alone = [effect] + [0] * (len(family) - 1)
    together = [sample_verdicts(rng, family, sampler, [effect] * len(family)) for _ in range(options.tables)]
    single = [sample_verdicts(rng, family, sampler, alone)[0] for _ in range(options.tables)]
    return float(np.mean(np.array(together) == REPRODUCED)), float(np.mean(np.array(single) == REPRODUCED))


def find_family() -> list[tuple[Claim, Column]]:
    """The primary claims with their metrics."""
    found = [primary.find("cpu") for primary in CLAIMS]
    return [(claim, table.columns[claim.column]) for table, claim in found]


def main(options: Options) -> None:
    rows = [[name, f"{rate_of_false_verdicts(options, sampler):.1%}"] for name, sampler in DISTRIBUTIONS.items()]
    print(format_markdown(["values over seeds", "tables with a false verdict"], rows))
    rows = [[str(effect), *(f"{share:.0%}" for share in power(options, effect))] for effect in EFFECTS]
    head = ["advantage in standard deviations", "claims found, all six true", "claims found, one true"]
    print(format_markdown(head, rows), end="")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
