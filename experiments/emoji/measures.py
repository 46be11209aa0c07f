"""What the table of `experiments.emoji.families` measures of a run. The code of this file and of all that it imports is
part of the key of a cell; rows, columns and claims are in the other file, and are not.

The data set, the judge and the prepared data are in one folder, the lab's.
"""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from experiments.code_hash import hash_code
from experiments.emoji import dataset, judge
from experiments.emoji.evaluate import draw, measure_captions
from experiments.emoji.judge import Cells, Gallery, Judge, judge_pictures
from experiments.emoji.packages import STYLES
from transfusion.inference.engine import Engine
from transfusion.seeding import uniform_from

NUM_CONCEPTS = 150
HELDOUT, TRAINING = "cell", "train"  # kinds of cells, as in the data set
NUM_DRAWINGS = 240  # of each kind
DRAWINGS_PER_HELDOUT_CELL = 4


def pictures_folder(lab: Path) -> Path:
    """The folder of the data set in the lab, of this code."""
    return lab / f"emoji-{hash_code(dataset.__name__)}"


def judge_folder(lab: Path) -> Path:
    """The folder of the judge in the lab, of this code."""
    return lab / f"emoji-judge-{hash_code(dataset.__name__, judge.__name__)}"


def choose_concepts(cells: Cells) -> set[str]:
    """NUM_CONCEPTS random concepts, always the same, of those that all styles draw: no flags, and none that is held out in
    all styles."""
    styles: dict[str, set[str]] = {}
    for concept, style, kind, is_flag in zip(cells.concepts, cells.styles, cells.kinds, cells.is_flag, strict=True):
        if kind in (HELDOUT, TRAINING) and not is_flag:
            styles.setdefault(concept, set()).add(style)
    whole = (concept for concept, drawn in styles.items() if len(drawn) == len(STYLES))
    return {*sorted(whole, key=lambda concept: uniform_from("emoji of Table 3", concept))[:NUM_CONCEPTS]}


def take_cells(cells: Cells, kind: str, concepts: set[str]) -> Cells:
    """The cells of these concepts that are of this kind."""
    return cells.where([it in concepts and of == kind for it, of in zip(cells.concepts, cells.kinds, strict=True)])


@cache
def open_lab(lab: Path) -> tuple[Judge, Gallery]:
    """The judge of a lab, and the real pictures of all concepts, among which it looks drawings up."""
    opened, cells = judge.open_judge(judge_folder(lab)), judge.read_cells(pictures_folder(lab))
    return opened, Gallery(cells, opened.features(cells.pixels)[0])


def measure_emoji(engine: Engine) -> dict[str, Any]:
    """The judge's shares of drawings of held-out cells and of training cells, and the shares of exact concepts and right
    styles among the greedy captions of held-out pictures.

    Every held-out cell of the table's concepts is drawn several times; training cells and starting noise are a function of
    the run's seed, and the same for all variants.
    """
    opened, gallery = open_lab(Path(engine.run.data.prepared[0]).parent)
    concepts, seed = choose_concepts(gallery.cells), engine.run.training.seed
    heldout, training = (take_cells(gallery.cells, kind, concepts) for kind in (HELDOUT, TRAINING))
    values: dict[str, Any] = {f"captions_{name}": share for name, share in measure_captions(engine, heldout).items()}
    order = np.random.default_rng(seed).permutation(len(training))
    asked = {HELDOUT: heldout.take([*range(len(heldout))] * DRAWINGS_PER_HELDOUT_CELL), TRAINING: training.take(order)}
    for kind, cells in asked.items():
        cells = cells.take(range(min(len(cells), NUM_DRAWINGS)))
        verdict = judge_pictures(opened, draw(engine, cells, seed * NUM_DRAWINGS), cells, gallery)
        values |= {f"{kind}_{name}": getattr(verdict, name) for name in ("top1", "top5", "style", "count")}
    return values

