"""The picture at the top of the README: what the model of `make demo` draws and captions, mistakes in their true share.

    python -m experiments.demo

writes docs/demo.png from the run of `make demo`, in runs/digits.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from experiments.lab import DOCS
from transfusion.data.built_in.digits import NAMES
from transfusion.data.sources import open_raw
from transfusion.evaluation.captions import caption_images
from transfusion.inference.engine import Request, open_run
from transfusion.report.drawings import denoising_frames

COLUMNS = 12
NUM_CAPTIONS = 2 * COLUMNS
PROMPT = "three"  # of the denoising steps


@dataclass(frozen=True)
class Options:
    run: Path = Path("runs/digits")
    """The folder of a run on digits."""
    out: Path = DOCS / "demo.png"
    """The file to write."""
    seed: int = 0
    """Selects the held-out scans."""
    device: str = "auto"
    """auto, cpu or cuda."""


@dataclass(frozen=True)
class Row:
    title: str
    images: list[np.ndarray]
    captions: list[str]  # below each image
    is_wrong: list[bool]


def main(options: Options) -> None:
    engine = open_run(options.run, device=options.device)
    answers = engine.generate([Request(parts=(name,), num_images=1) for name in NAMES])
    frames = denoising_frames(engine, PROMPT)
    (source,) = (candidate for candidate in open_raw(engine.run.data, "heldout") if candidate.name == "digits")
    captions, scans = zip(*(source[n].pair for n in range(len(source))), strict=True)
    predictions = caption_images(engine, scans)
    is_wrong = np.array([predicted != actual for predicted, actual in zip(predictions, captions, strict=True)])
    chosen = sample_in_true_share(is_wrong, np.random.default_rng(options.seed))
    below = [captions[n] if not is_wrong[n] else f"predicted {predictions[n]},\nactual {captions[n]}" for n in chosen]
    steps = [f"step {frame.step}" for frame in frames]
    title = f"Captions of {NUM_CAPTIONS}\nheld-out scans; wrong\nones in their true share"
    draw([
        Row("Drawn from\nthe word below", [answer.parts[0] for (answer,) in answers], list(NAMES), []),
        Row(f"Drawing “{PROMPT}”:\nnoisy image x_t", [frame.x_t for frame in frames], [], []),
        Row("predicted\nimage x0", [frame.x0 for frame in frames], steps, []),
        *(Row(title if part.start == 0 else "", [scans[n] for n in chosen[part]], below[part], list(is_wrong[chosen[part]]))
          for part in (slice(0, COLUMNS), slice(COLUMNS, NUM_CAPTIONS))),
    ], options.out)  # fmt: skip
    print(f"wrote {options.out}")


def sample_in_true_share(is_wrong: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(N,) bool -> `NUM_CAPTIONS` random indices, as many of them wrong as the overall share gives."""
    num_wrong = round(NUM_CAPTIONS * is_wrong.mean())
    wrong = rng.choice(np.flatnonzero(is_wrong), num_wrong, replace=False)
    right = rng.choice(np.flatnonzero(~is_wrong), NUM_CAPTIONS - num_wrong, replace=False)
    return rng.permutation(np.concatenate([wrong, right]))


def draw(rows: list[Row], path: Path) -> None:
    """One line of images for each row, its title at the left; wrong captions are framed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.5, 6.6), layout="constrained", facecolor="#faf9f6")
    grid = figure.subplots(len(rows), COLUMNS, squeeze=False, gridspec_kw={"wspace": 0.06, "hspace": 0.04})
    for row, cells in zip(rows, grid, strict=True):
        for n, axes in enumerate(cells):
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set(visible=n < len(row.is_wrong) and row.is_wrong[n], color="#bf2635", linewidth=3)
            if n >= len(row.images):
                axes.set_facecolor("none")
                continue
            axes.imshow(row.images[n].squeeze(), cmap="gray", vmin=0, vmax=255)
            axes.set_xlabel(row.captions[n] if row.captions else "", fontsize=9)
        cells[0].set_ylabel(row.title, rotation=0, ha="right", va="center", fontsize=10, fontweight="bold", labelpad=8)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
