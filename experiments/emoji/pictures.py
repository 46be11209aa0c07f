"""The pictures of README and docs: what the model in the package draws, none of it selected.

    python -m experiments.emoji.pictures data/emoji

writes docs/emoji-styles.png (training captions: 12 concepts in four styles), docs/emoji.png (48 held-out cells, the real
picture above the drawing), docs/interleaved.png (documents that the run continues) and, with --edits RUN, a run that was
fine-tuned on edits, docs/edits.png (pictures of held-out concepts in the other styles). Concepts come from a shuffled list,
drawings have the seeds 0, 1, ... in reading order.
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from experiments.emoji.edits import edit, pair_styles
from experiments.emoji.evaluate import choose_cells, draw, to_images
from experiments.emoji.interleaved import captioned, continue_freely
from experiments.emoji.judge import Cells, read_cells
from experiments.emoji.packages import STYLES
from experiments.lab import DOCS
from transfusion.inference.engine import Engine, open_run

COLUMNS = 12
NUM_HELDOUT = 48
NUM_EDITS = 6  # held-out concepts
NUM_DOCUMENTS = 6
EDIT_GUIDANCE = {"guidance_scale": 3.0, "image_guidance_scale": 2.0}  # the best that `edits` tried
Tile = tuple[np.ndarray | None, str]  # (Y, X, 3) uint8, and the text above it


@dataclass(frozen=True)
class Options:
    data: tyro.conf.Positional[Path] = Path("data/emoji")
    """Folder that `python -m experiments.emoji.dataset` wrote."""
    run: str = "emoji"
    """A run or an exported run."""
    edits: str | None = None
    """The run that was fine-tuned on edits; no docs/edits.png if not set."""
    out: Path = DOCS
    """Folder for the pictures."""


def main(options: Options) -> None:
    cells, engine = read_cells(options.data), open_run(options.run)
    plot(styles_grid(engine, cells), options.out / "emoji-styles.png", row_titles=STYLES)
    plot(heldout_grid(engine, cells), options.out / "emoji.png", row_titles=("real", "drawn") * (NUM_HELDOUT // COLUMNS))
    plot(documents_grid(engine, cells), options.out / "interleaved.png")
    if options.edits is not None:
        plot(edits_grid(open_run(options.edits), cells), options.out / "edits.png")


def styles_grid(engine: Engine, cells: Cells) -> list[list[Tile]]:
    """Twelve concepts whose four styles are all in the training data, one row for each style."""
    trained = {style: {} for style in STYLES}  # style -> concept -> number of its cell
    for n in range(len(cells)):
        if cells.kinds[n] == "train" and not cells.is_flag[n]:
            trained[cells.styles[n]][cells.concepts[n]] = n
    concepts = sorted(set.intersection(*map(set, trained.values())))
    chosen = np.random.default_rng(0).permutation(concepts)[:COLUMNS]
    asked = cells.take([trained[style][concept] for style in STYLES for concept in chosen])
    images = to_images(draw(engine, asked))
    titles = [*chosen, *[""] * (len(images) - len(chosen))]
    return in_rows(list(zip(images, titles, strict=True)), len(chosen))


def heldout_grid(engine: Engine, cells: Cells) -> list[list[Tile]]:
    """48 held-out cells without flags: a row of real pictures, then a row of drawings, and so on."""
    asked = dict(choose_cells(cells, NUM_HELDOUT))["held-out cells"]
    captions = [f"{concept},\n{style}" for concept, style in zip(asked.concepts, asked.styles, strict=True)]
    real, drawn = (in_rows([(image, text) for image, text in zip(to_images(pixels), texts, strict=True)])
                   for pixels, texts in ((asked.pixels, captions), (draw(engine, asked), [""] * len(asked))))  # fmt: skip
    return [row for pair in zip(real, drawn, strict=True) for row in pair]


def edits_grid(engine: Engine, cells: Cells) -> list[list[Tile]]:
    """A held-out concept in each row: the source, then drawn and true in each other style."""
    sources, targets = pair_styles(cells, "concept", "concept", len(cells))
    rows = {}
    for n, concept in enumerate(sources.concepts):
        first = rows.setdefault(concept, [n])[0]
        if n != first and sources.styles[n] == sources.styles[first]:
            rows[concept].append(n)
    chosen = [ids for ids in rows.values() if len(ids) == len(STYLES) - 1][:NUM_EDITS]
    ids = [n for row in chosen for n in row]
    drawn = to_images(edit(engine, sources.take(ids), targets.take(ids), **EDIT_GUIDANCE))
    true, given = to_images(targets.take(ids).pixels), to_images(sources.take(ids).pixels)
    grid = []
    for first in range(0, len(ids), len(STYLES) - 1):
        n = ids[first]
        row: list[Tile] = [(given[first], f"{sources.concepts[n]},\n{sources.styles[n]}"), (None, "")]
        for m in range(first, first + len(STYLES) - 1):
            row += [(drawn[m], f"in the style of\n{targets.styles[ids[m]]}"), (true[m], "true")]
        grid.append(row)
    return grid


def documents_grid(engine: Engine, cells: Cells) -> list[list[Tile]]:
    """A document in each row: two captions with their real pictures, then what the run writes and draws."""
    first, second = pair_styles(cells, "train", "train", NUM_DOCUMENTS)
    answers = continue_freely(engine, first, second)
    grid = []
    for (caption, image), (other, other_image), answer in zip(captioned(first), captioned(second), answers, strict=True):
        texts = [part for part in answer.parts if isinstance(part, str)]
        images = [part for part in answer.parts if not isinstance(part, str)]
        drawn = zip(images[:2], [*texts[:2], "", ""], strict=False)
        tiles = [(image, caption), (other_image, other), (None, "continued with:"), *drawn]
        grid.append([(picture, text.replace(", ", ",\n")) for picture, text in tiles])
    return grid


def in_rows(tiles: Sequence[Tile], columns: int = COLUMNS) -> list[list[Tile]]:
    return [list(tiles[first : first + columns]) for first in range(0, len(tiles), columns)]


def plot(grid: Sequence[Sequence[Tile]], path: Path, row_titles: Sequence[str] = ()) -> None:
    """The tiles with the text above each, and the titles at the left."""
    from matplotlib.figure import Figure

    columns = max(map(len, grid))
    figure = Figure(figsize=(0.95 * columns + 0.8, 1.02 * len(grid) + 0.35), layout="constrained", facecolor="white")
    axes = figure.subplots(len(grid), columns, squeeze=False, gridspec_kw={"wspace": 0.02, "hspace": 0.02})
    for axis in axes.flat:
        axis.axis("off")
    for row, axes_row in zip(grid, axes, strict=True):
        for (image, text), axis in zip(row, axes_row, strict=False):
            if image is not None:
                axis.imshow(image, interpolation="nearest")
            axis.set_title("\n".join(textwrap.fill(line, 16) for line in text.split("\n")), fontsize=6.5, pad=2)
    for title, axis in zip(row_titles, axes[:, 0], strict=False):
        axis.text(-0.12, 0.5, title, transform=axis.transAxes, ha="right", va="center", fontsize=8)
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
