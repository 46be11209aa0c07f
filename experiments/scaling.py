"""Table 3 and Figure 5 in miniature: Transfusion against Chameleon, at three sizes.

Claim (section 4.2): Transfusion scales better in everything, and needs a fraction of the compute to do as well as Chameleon
at its largest: 0.49 of it for text, 0.22 for captions, 0.03 for images (FID).

Compute is 6 ND: parameters by positions. For each family a line is fitted to the logarithms of both; the parity ratio is the
compute at which Transfusion's line reaches what Chameleon's says at its largest, by that largest compute.

By half it comes out (one seed, three of Transfusion M): text is better at each size, for half of the compute; captions on
the whole, though from 71 to 86 % of M's are right by its seed. Images are not: a codebook of 512 describes flat shapes on
plain ground almost without loss. (6, 9 and 14 minutes of one core for S, M and L, as many for Chameleon, and 20 for each
codec.)

    python -m experiments.scaling
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from experiments import both, lab
from experiments.both import COLUMNS, measure, variant
from experiments.lab import Claim, Options, Table, measured
from experiments.scenes import SIZES

FAMILIES = {"Transfusion": "transfusion", "Chameleon": "chameleon"}
PAPER = {
    "Transfusion L": {"bits_per_byte": "7.72 (C4, perplexity)", "cider": 0.272, "fid": 16.8},
    "Chameleon L": {"bits_per_byte": "8.41", "cider": 0.18, "fid": 29.6},
}
PARITY = {"bits_per_byte": 0.489, "cider": 0.218, "fid": 0.029}  # Table 3


def table(scale: str) -> Table:
    return Table(
        "scaling",
        tuple(variant(scale, f"{name} {size}", family, size, paper=PAPER.get(f"{name} {size}"))
              for name, family in FAMILIES.items() for size in SIZES),
        COLUMNS,
        tuple(Claim(f"Transfusion beats Chameleon at {size}, by {column.replace('_', ' ')}", column, f"Transfusion {size}",
                    f"Chameleon {size}") for size in SIZES for column in PARITY),
    )  # fmt: skip


FARTHEST = math.log(1e30)  # FLOPs


@dataclass(frozen=True)
class PowerLaw:
    """log metric = intercept + slope log FLOPs, fitted to some runs."""

    intercept: float
    slope: float

    @classmethod
    def of(cls, points: Sequence[tuple[float, float]]) -> "PowerLaw | None":
        """Through points (FLOPs, metric); None where fewer than two sizes have one above 0."""
        logs = [(math.log(x), math.log(y)) for x, y in points if y > 0]
        if len({x for x, _ in logs}) < 2:
            return None
        slope, intercept = statistics.linear_regression(*zip(*logs, strict=True))
        return cls(intercept, slope)

    def at(self, flops: float) -> float:
        return math.exp(self.intercept + self.slope * math.log(flops))

    def reaches(self, metric: float) -> float | None:
        """The FLOPs at which it says this; None where that is farther off than anything can be foretold."""
        exponent = (math.log(metric) - self.intercept) / self.slope if self.slope else math.inf
        return math.exp(exponent) if abs(exponent) < FARTHEST else None


def points(asked: Options, family: str, column: str) -> list[tuple[float, float]]:
    """(FLOPs, metric) of every run of a family."""
    runs = [one for row in table(asked.scale).variants if row.name.startswith(family) for one in measured(asked, row)]
    return [(6 * one["parameters"] * one["positions"], one[column]) for one in runs if column in one]


def parity(asked: Options, column: str) -> float | None:
    """The share of Chameleon's largest compute that Transfusion needs to do as well; None where no line can be drawn, or
    where Transfusion does not get better with size, or hardly."""
    ours, theirs = (points(asked, family, column) for family in FAMILIES)
    our_law, their_law = PowerLaw.of(ours), PowerLaw.of(theirs)
    if our_law is None or their_law is None:
        return None
    if (our_law.slope > 0) != (COLUMNS[column].better == "higher"):
        return None
    largest = max(x for x, _ in theirs)
    reached = our_law.reaches(their_law.at(largest))
    return None if reached is None else reached / largest


def _largest(asked: Options, family: str) -> float:
    """FLOPs of its largest run."""
    return max(x for x, _ in points(asked, family, "fid"))


def is_known(asked: Options) -> bool:
    """Are there runs of several sizes of both families?"""
    return all(len({x for x, _ in points(asked, family, "fid")}) > 1 for family in FAMILIES)


def tell(asked: Options) -> str:
    """The parity ratios, beside the paper's."""
    if not is_known(asked):
        return "For lines and parity ratios it takes several sizes of both."
    lines = []
    for column, papers in PARITY.items():
        ratio = parity(asked, column)
        found = "no line can be drawn" if ratio is None else f"**{ratio:.3g}**"
        if ratio is not None and ratio * _largest(asked, "Chameleon") > _largest(asked, "Transfusion"):
            found += ", beyond its largest run"
        lines.append(f"- parity-FLOP ratio by {column.replace('_', ' ')}: {found} (paper {papers})")
    return "\n".join(lines) + "\n"


def plot(asked: Options, path: Path) -> None:
    """Each metric over compute, both families, with their fitted lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    for axes, column in zip(figure.subplots(1, len(PARITY)), PARITY, strict=True):
        for family, colour in zip(FAMILIES, ("#2c5bcb", "#b0500a"), strict=True):
            found = sorted(points(asked, family, column))
            if not found or min(y for _, y in found) <= 0:
                continue
            axes.loglog(*zip(*found, strict=True), "o", color=colour, label=family)
            law = PowerLaw.of(found)
            if law is not None:
                ends = [found[0][0], found[-1][0]]
                axes.loglog(ends, [law.at(x) for x in ends], color=colour)
        axes.set(title=f"{column.replace('_', ' ')} ({COLUMNS[column].better} is better)", xlabel="FLOPs (6ND)")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.grid(alpha=0.3, which="both")
        if axes.lines:
            axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    asked = lab.options(__doc__)
    lab.make(asked, table(asked.scale), partial(measure, asked.scale), both.prepare)
    print(both.codec_quality(asked), tell(asked), sep="\n")
    if is_known(asked) and find_spec("matplotlib"):
        plot(asked, asked.out / "scaling.png")
