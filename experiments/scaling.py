"""Table 3 and Figure 5 at small scale: Transfusion against Chameleon at three model sizes.

Claim (section 4.2): Transfusion scales better on every metric, and equals the largest Chameleon with a fraction of its
compute: 0.49 of it for text, 0.22 for captions, 0.03 for images (FID).

Compute is 6 ND: parameters times positions. For each family a power law is fitted (a line in log-log space). The parity
ratio is the compute at which Transfusion's fit reaches the value of Chameleon's fit at its largest run, divided by the
compute of that run.

Partly reproduced (one seed, three of Transfusion M). Text is better at each size, with half of the compute. Captions are
better overall, but vary from 71 to 86 % exact between seeds of M. Images are not better: a codebook of 512 describes flat
shapes on a plain background almost without loss. (6, 9 and 14 minutes of one core for S, M and L, as many for Chameleon, and
20 for each codec.)

    python -m experiments.scaling
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from experiments import lab, multimodal
from experiments.lab import Claim, Options, Table, read_cells
from experiments.multimodal import COLUMNS, make_variant, measure
from experiments.scenes import SIZES

FAMILIES = {"Transfusion": "transfusion", "Chameleon": "chameleon"}
PAPER = {
    "Transfusion L": {"bits_per_byte": "7.72 (C4, perplexity)", "cider": 0.272, "fid": 16.8},
    "Chameleon L": {"bits_per_byte": "8.41", "cider": 0.18, "fid": 29.6},
}
PAPER_PARITY = {"bits_per_byte": 0.489, "cider": 0.218, "fid": 0.029}  # Table 3
MAX_LOG_FLOPS = math.log(1e30)


def build_table(preset: str) -> Table:
    return Table(
        "scaling",
        tuple(make_variant(preset, f"{name} {size}", family, size, paper=PAPER.get(f"{name} {size}"))
              for name, family in FAMILIES.items() for size in SIZES),
        COLUMNS,
        measure(preset),
        tuple(Claim(f"Transfusion is better than Chameleon at {size}, by {COLUMNS[column].title}", column,
                    f"Transfusion {size}", f"Chameleon {size}") for size in SIZES for column in PAPER_PARITY),
        multimodal.prepare,
    )  # fmt: skip


@dataclass(frozen=True)
class PowerLaw:
    """log metric = intercept + slope * log FLOPs."""

    intercept: float
    slope: float

    @classmethod
    def fit(cls, points: Sequence[tuple[float, float]]) -> "PowerLaw | None":
        """Least squares in log-log space for points (FLOPs, metric). None if metrics above 0 have fewer than two sizes."""
        logs = [(math.log(x), math.log(y)) for x, y in points if y > 0]
        if len({x for x, _ in logs}) < 2:
            return None
        slope, intercept = statistics.linear_regression(*zip(*logs, strict=True))
        return cls(intercept, slope)

    def predict(self, flops: float) -> float:
        return math.exp(self.intercept + self.slope * math.log(flops))

    def invert(self, metric: float) -> float | None:
        """The FLOPs at which the law predicts this metric. None if they are outside 1e-30 to 1e30."""
        log_flops = (math.log(metric) - self.intercept) / self.slope if self.slope else math.inf
        return math.exp(log_flops) if abs(log_flops) < MAX_LOG_FLOPS else None


def collect_points(options: Options, family: str, column: str) -> list[tuple[float, float]]:
    """(FLOPs, metric) of every run of a family."""
    table = build_table(options.preset)
    variants = [variant for variant in table.variants if variant.name.startswith(family)]
    cells = [cell for variant in variants for cell in read_cells(options, table, variant).values() if column in cell]
    return [(6 * cell["parameters"] * cell["positions"], cell[column]) for cell in cells]


def parity_ratio(options: Options, column: str) -> float | None:
    """Transfusion's compute for the metric of the largest Chameleon, divided by that Chameleon's compute.

    None if a fit is not possible, or if Transfusion does not improve with size.
    """
    transfusion, chameleon = (collect_points(options, family, column) for family in FAMILIES)
    transfusion_law, chameleon_law = PowerLaw.fit(transfusion), PowerLaw.fit(chameleon)
    if transfusion_law is None or chameleon_law is None:
        return None
    if (transfusion_law.slope > 0) != (COLUMNS[column].better == "higher"):
        return None
    largest = max(x for x, _ in chameleon)
    flops = transfusion_law.invert(chameleon_law.predict(largest))
    return None if flops is None else flops / largest


def _max_flops(options: Options, family: str) -> float:
    return max(x for x, _ in collect_points(options, family, "fid"))


def has_several_sizes(options: Options) -> bool:
    """True if both families have runs of at least two sizes."""
    return all(len({x for x, _ in collect_points(options, family, "fid")}) > 1 for family in FAMILIES)


def describe_parity(options: Options) -> str:
    """The parity ratios and the paper's, as Markdown."""
    if not has_several_sizes(options):
        return "Parity ratios need runs of at least two sizes of both families."
    lines = []
    for column, paper in PAPER_PARITY.items():
        ratio = parity_ratio(options, column)
        value = "no fit possible" if ratio is None else f"**{ratio:.3g}**"
        if ratio is not None and ratio * _max_flops(options, "Chameleon") > _max_flops(options, "Transfusion"):
            value += ", beyond Transfusion's largest run"
        lines.append(f"- parity-FLOP ratio by {COLUMNS[column].title}: {value} (paper {paper})")
    return "\n".join(lines) + "\n"


def plot(options: Options, path: Path) -> None:
    """Plot each metric against compute for both families, with the fitted power laws."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    for axes, column in zip(figure.subplots(1, len(PAPER_PARITY)), PAPER_PARITY, strict=True):
        for family, colour in zip(FAMILIES, ("#2c5bcb", "#b0500a"), strict=True):
            points = sorted(collect_points(options, family, column))
            if not points or min(y for _, y in points) <= 0:
                continue
            axes.loglog(*zip(*points, strict=True), "o", color=colour, label=family)
            power_law = PowerLaw.fit(points)
            if power_law is not None:
                ends = [points[0][0], points[-1][0]]
                axes.loglog(ends, [power_law.predict(x) for x in ends], color=colour)
        axes.set(title=f"{COLUMNS[column].title} ({COLUMNS[column].better} is better)", xlabel="FLOPs (6ND)")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.grid(alpha=0.3, which="both")
        if axes.lines:
            axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    options = lab.parse_options(__doc__)
    lab.run_table(options, build_table(options.preset))
    print(multimodal.describe_codecs(options), describe_parity(options), sep="\n")
    if has_several_sizes(options) and find_spec("matplotlib"):
        plot(options, options.out / "scaling.png")
