"""Table 3 on scenes of few colours and sizes: Transfusion against Chameleon at three model sizes.

The same on the scenes of the tables on images: six colours, two sizes, plain objects on a plain background. A VQ twin with
512 codes describes these better than the autoencoder, so they say little of the paper's question. No claim is judged here.
The parity ratio is the compute at which Transfusion's power law reaches Chameleon's value at its largest size, as a share of
the compute of that size (`experiments/parity.py`).

    python -m experiments.scaling
"""

import math
import statistics
from collections.abc import Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from experiments import lab, multimodal
from experiments.lab import Claim, Column, Options, Table
from experiments.multimodal import COLUMNS, make_variant, measure
from experiments.parity import Points, fit_line, parity_ratio
from experiments.scenes import PRESETS, SIZES

FAMILIES = {"Transfusion": "transfusion", "Chameleon": "chameleon"}
PAPER = {
    "Transfusion L": {"bits_per_byte": "7.72 (C4, perplexity)", "cider": 0.272, "fid": 16.8},
    "Chameleon L": {"bits_per_byte": "8.41", "cider": 0.18, "fid": 29.6},
}
PAPER_PARITY = {"bits_per_byte": 0.489, "cider": 0.218, "fid": 0.029}  # Table 3
COMPARED = (*PAPER_PARITY, "right", "attributes")  # columns


def build_table(preset: str) -> Table:
    return compare_families("scaling", preset, PRESETS[preset].level, COLUMNS)


def compare_families(name: str, preset: str, level: int, columns: Mapping[str, Column]) -> Table:
    """Transfusion and Chameleon at three sizes, on scenes of this level."""
    return Table(
        name,
        tuple(make_variant(preset, level, f"{title} {size}", family, size, paper=PAPER.get(f"{title} {size}"))
              for title, family in FAMILIES.items() for size in SIZES),
        columns,
        measure(level),
        tuple(Claim(f"Transfusion is better than Chameleon at {size}, by {columns[column].title}", column,
                    f"Transfusion {size}", f"Chameleon {size}") for size in SIZES for column in COMPARED),
        partial(multimodal.prepare, level),
    )  # fmt: skip


def collect_points(options: Options, table: Table, family: str, column: str) -> Points:
    """The mean FLOPs of each size of a family, and the metric of each seed. Old cells, measured differently, only if the
    table has no others."""
    rows = {variant.name: lab.read_cells(options, table, variant) for variant in table.variants}
    has_new = any(row and not lab.is_old(row) for row in rows.values())
    cells = [[cell for cell in row.values() if column in cell] for name, row in rows.items()
             if name.startswith(family) and not (has_new and lab.is_old(row))]  # fmt: skip
    return [(statistics.mean(cell["flops"] for cell in row), [cell[column] for cell in row]) for row in cells if row]


def has_several_sizes(options: Options, table: Table) -> bool:
    """True if both families have runs of at least two sizes."""
    return all(len(collect_points(options, table, family, "fid")) > 1 for family in FAMILIES)


def describe_parity(options: Options, table: Table) -> str:
    """The parity ratios with their intervals, and the paper's, as Markdown."""
    if not has_several_sizes(options, table):
        return "Parity ratios need runs of at least two sizes of both families."
    lines = []
    for column, paper in PAPER_PARITY.items():
        points = [collect_points(options, table, family, column) for family in FAMILIES]
        ratio = parity_ratio(*points, COLUMNS[column].better == "higher")
        if isinstance(ratio, str):
            value = ratio
        else:
            has_interval = not math.isnan(ratio.low)
            bounds = f" [{ratio.low:.3g}, {ratio.high:.3g}]" if has_interval else ", no interval: one seed of each size"
            value = f"**{ratio.estimate:.3g}**{bounds}"
            first, second = (max(flops for flops, _ in row) for row in points)
            value += ", beyond Transfusion's largest run" if ratio.estimate * second > first else ""
        lines.append(f"- parity-FLOP ratio by {COLUMNS[column].title}: {value} (paper {paper})")
    return "\n".join(lines) + "\n"


def plot(options: Options, table: Table, path: Path) -> None:
    """Plot each metric against compute for both families, with the power laws that are fitted to the means of the sizes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    for axes, column in zip(figure.subplots(1, len(PAPER_PARITY)), PAPER_PARITY, strict=True):
        for family, colour in zip(FAMILIES, ("#2c5bcb", "#b0500a"), strict=True):
            points = sorted(collect_points(options, table, family, column))
            line = fit_line(points)
            if line is None:
                continue
            intercept, slope = line
            ends = np.array([points[0][0], points[-1][0]])
            axes.loglog(ends, np.exp(intercept + slope * np.log(ends)), color=colour)
            seeds = [(flops, value) for flops, values in points for value in values]
            axes.loglog(*zip(*seeds, strict=True), "o", color=colour, label=family)
        axes.set(title=f"{COLUMNS[column].title} ({COLUMNS[column].better} is better)", xlabel="FLOPs (6ND)")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.grid(alpha=0.3, which="both")
        if axes.lines:
            axes.legend()
    figure.savefig(path, dpi=120)


def run_table(options: Options, table: Table) -> None:
    """Fill the selected cells, and print the table and the parity ratios."""
    lab.run_table(options, table)
    print(describe_parity(options, table))
    if has_several_sizes(options, table) and find_spec("matplotlib"):
        plot(options, table, lab.table_path(options, table, ".png"))


if __name__ == "__main__":
    options = lab.parse_options(__doc__)
    run_table(options, build_table(options.preset))
