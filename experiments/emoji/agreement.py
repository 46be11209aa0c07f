"""Does the judge agree with readers? 200 pictures of mixed quality, labelled by two, who see no source and no verdict.

    python -m experiments.emoji.agreement sheets runs/emoji/run data/emoji --early RUN --out runs/emoji-readers
    python -m experiments.emoji.agreement compare runs/emoji/run data/emoji runs/emoji-judge --out runs/emoji-readers

`sheets` writes contact sheets of shuffled pictures: real ones, drawings of held-out cells, drawings of an early run (trained
for minutes), and drawings with the name of another concept. A reader answers for each number: does the picture show what the
name says? The answers are in OUT/NAME.json, a JSON object {"1": true, ...}. `compare` prints how often the readers agree
with each other and with the judge (a picture is right for it if the concept is in the top 5), and Cohen's kappa.
"""

import json
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from sklearn.metrics import cohen_kappa_score

from experiments.emoji.evaluate import choose_cells, draw, to_images
from experiments.emoji.judge import Cells, Gallery, open_judge, rank_concepts, read_cells
from experiments.readers import write_sheets
from transfusion.inference.engine import open_run

KINDS = {"real": 40, "drawn": 80, "early": 40, "other caption": 40}
SIDE = 128  # of a picture on the sheets


@dataclass(frozen=True)
class Options:
    action: tyro.conf.Positional[Literal["sheets", "compare"]]
    """Write the sheets, or compare the labels."""
    run: tyro.conf.Positional[str]
    """A run or an exported run."""
    data: tyro.conf.Positional[Path] = Path("data/emoji")
    """Folder that `python -m experiments.emoji.dataset` wrote."""
    judge: tyro.conf.Positional[Path] = Path("runs/emoji-judge")
    """Folder of the judge."""
    early: str | None = None
    """A run that trained for minutes, for sheets."""
    out: Path = Path("runs/emoji-readers")
    """Folder of the sheets and of the labels."""


def main(options: Options) -> None:
    cells = read_cells(options.data)
    if options.action == "sheets":
        write_pictures(cells, options)
    else:
        compare(cells, options)


def write_pictures(cells: Cells, options: Options) -> None:
    """pictures.pt with the shuffled pictures and captions, and the sheets, without their kinds."""
    asked = dict(choose_cells(cells, sum(KINDS.values())))["held-out cells"]
    asked = asked.take(np.random.default_rng(1).permutation(len(asked)))
    groups, first = {}, 0
    for kind, count in KINDS.items():
        groups[kind] = asked.take(range(first, first + count))
        first += count
    engine, early = open_run(options.run), open_run(options.early)
    other = groups["other caption"]
    pixels = {"real": groups["real"].pixels, "drawn": draw(engine, groups["drawn"]), "early": draw(early, groups["early"]),
              "other caption": draw(engine, other)}  # fmt: skip
    groups["other caption"] = replace(other, concepts=[*other.concepts[1:], other.concepts[0]])
    order = np.random.default_rng(2).permutation(first)
    kinds = [kind for kind, count in KINDS.items() for _ in range(count)]
    concepts, styles = ([value for group in groups.values() for value in getattr(group, name)]
                        for name in ("concepts", "styles"))  # fmt: skip
    shuffled = {
        "pixels": torch.cat(list(pixels.values()))[order], "kinds": [kinds[n] for n in order],
        "concepts": [concepts[n] for n in order], "styles": [styles[n] for n in order],
    }  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    torch.save(shuffled, options.out / "pictures.pt")
    titles = [textwrap.shorten(f"{n}: {name}", 26, placeholder="...") for n, name in enumerate(shuffled["concepts"], 1)]
    write_sheets(to_images(shuffled["pixels"]), titles, options.out, SIDE)


def compare(cells: Cells, options: Options) -> None:
    shuffled, judge = torch.load(options.out / "pictures.pt"), open_judge(options.judge)
    count = len(shuffled["kinds"])
    asked = Cells(shuffled["pixels"], shuffled["concepts"], shuffled["styles"], ["cell"] * count, [False] * count)
    vectors, _ = judge.features(asked.pixels)
    labels = {"judge": rank_concepts(vectors, asked, Gallery(cells, judge.features(cells.pixels)[0])) < 5}
    for path in sorted(options.out.glob("*.json")):
        answers = json.loads(path.read_text(encoding="utf-8"))
        labels[path.stem] = np.array([answers[str(n + 1)] for n in range(count)])
    for name, values in labels.items():
        shares = (f"{kind} {values[[k == kind for k in shuffled['kinds']]].mean():.2f}" for kind in KINDS)
        print(f"{name}: right {', '.join(shares)}")
    names = list(labels)
    for n, a in enumerate(names):
        for b in names[n + 1 :]:
            kappa = cohen_kappa_score(labels[a], labels[b])
            print(f"{a} and {b}: equal {np.mean(labels[a] == labels[b]):.3f}, kappa {kappa:.3f}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
