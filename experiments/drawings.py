"""Plot images drawn by the runs of the tables: the same held-out captions and seeds for every row, not selected.

    python -m experiments.drawings

writes docs/drawings.png and, of continuous scenes, docs/drawings-continuous.png (--preset gpu: drawings-gpu.png, ...) from
the runs of the first of `--seeds` that still exist.
"""

import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from experiments import attention, continuous, lab, noise, patches, scaling
from experiments.lab import DOCS, Options
from experiments.multimodal import JUDGED_LEVEL
from experiments.scenes import PRESETS
from transfusion.data.built_in.shapes import Shapes
from transfusion.evaluation.scenes import draw_scenes
from transfusion.inference.engine import open_run

FIGURES = {"drawings": (scaling, attention, patches, noise), "drawings-continuous": (continuous,)}  # by name: the tables
IMAGES_PER_ROW = 12
Drawing = tuple[str, np.ndarray, bool]  # caption, pixels (Y, X, 3) uint8, is it correct?


def figure_name(preset: str, figure: str) -> str:
    """The name of the file of a figure."""
    return f"{figure}{'' if preset == 'cpu' else f'-{preset}'}.png"


def draw_rows(options: Options, figure: str) -> dict[str, list[Drawing]]:
    """Images of each variant that has a run, by name. A run that tables share is drawn once, for the first of them."""
    level = JUDGED_LEVEL if continuous in FIGURES[figure] else PRESETS[options.preset].level
    source = Shapes(level, split="heldout")
    rows, done = {}, set()
    for module in FIGURES[figure]:
        table = module.build_table(options.preset)
        for variant in table.variants:
            folder = lab.find_cell(options, table, variant, options.seeds[0])
            if folder is None or folder in done or not (folder / "checkpoints").exists():
                continue
            done.add(folder)
            print(variant.name, flush=True)
            _, rows[variant.name] = draw_scenes(open_run(folder, device=options.device), source, IMAGES_PER_ROW)
    return rows


def plot_rows(rows: Mapping[str, list[Drawing]], path: Path) -> None:
    """Plot one row of images for each variant. A red frame marks an incorrect image."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2 + 0.7 * IMAGES_PER_ROW, 0.6 + 0.7 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), IMAGES_PER_ROW, squeeze=False, gridspec_kw={"wspace": 0.02, "hspace": 0.02})
    for (name, drawings), axes_row in zip(rows.items(), grid, strict=True):
        for axes, (_, pixels, is_correct) in zip(axes_row, drawings, strict=True):
            axes.imshow(pixels)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set(visible=not is_correct, color="#c02020", linewidth=2.5)
        axes_row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    for axes, (caption, *_) in zip(grid[0], next(iter(rows.values())), strict=True):
        axes.set_title(textwrap.fill(caption, 11), fontsize=7)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    options = lab.parse_options(__doc__)
    rows = {figure: drawings for figure in FIGURES if (drawings := draw_rows(options, figure))}
    if not rows:
        sys.exit(f"--out {options.out}: there are no runs of any table; run a table first, e.g. python -m experiments.noise")
    for figure, drawings in rows.items():
        path = DOCS / figure_name(options.preset, figure)
        plot_rows(drawings, path)
        print(f"wrote {path}")
