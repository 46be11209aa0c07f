"""What the runs of the tables draw: of every row the same held-out captions, none picked, from the same seeds.

    python -m experiments.drawings

writes docs/drawings.png (--scale gpu: drawings-gpu.png) from the runs of one seed, `--seeds`, that are still there.
"""

import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from experiments import attention, lab, noise, patches, scaling
from experiments.lab import DOCS, Options
from experiments.scenes import SCALES
from transfusion.data.built_in.shapes import Shapes
from transfusion.evaluation.scenes import draw_scenes
from transfusion.inference.engine import open_run

TABLES = (scaling, attention, patches, noise)
COUNT = 12  # drawings of each row
NAMES = {"cpu": "drawings.png", "gpu": "drawings-gpu.png"}
Drawing = tuple[str, np.ndarray, bool]  # caption, pixels (Y, X, 3) uint8, is it right?


def draw(asked: Options) -> dict[str, list[Drawing]]:
    """Of each row that has a run, by its name in the first table that holds it; a run that tables share is drawn once."""
    source = Shapes(SCALES[asked.scale].level, split="heldout")
    found, known = {}, set()
    for module in TABLES:
        for variant in module.table(asked.scale).variants:
            folder = lab.cell(asked, variant, asked.seeds[0])
            if folder in known or not (folder / "checkpoints").exists() or not (folder / "measured.json").exists():
                continue
            known.add(folder)
            print(variant.name, flush=True)
            _, found[variant.name] = draw_scenes(open_run(folder, asked.device), source, COUNT)
    return found


def picture(found: Mapping[str, list[Drawing]], path: Path) -> None:
    """A row for each; what the checker finds wrong is framed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2 + 0.7 * COUNT, 0.6 + 0.7 * len(found)), layout="constrained")
    grid = figure.subplots(len(found), COUNT, squeeze=False, gridspec_kw={"wspace": 0.02, "hspace": 0.02})
    for (name, drawings), row in zip(found.items(), grid, strict=True):
        for axes, (_, pixels, right) in zip(row, drawings, strict=True):
            axes.imshow(pixels)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set(visible=not right, color="#c02020", linewidth=2.5)
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    for axes, (caption, *_) in zip(grid[0], next(iter(found.values())), strict=True):
        axes.set_title(textwrap.fill(caption, 11), fontsize=7)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    asked = lab.options(__doc__)
    found = draw(asked)
    if not found:
        sys.exit(f"there is no run of any table in {asked.out}")
    picture(found, DOCS / NAMES[asked.scale])
    print(f"wrote {DOCS / NAMES[asked.scale]}")
