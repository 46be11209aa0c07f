"""The figures of a run on emoji: drawings, captions and the codec, each between a ceiling and a floor.

    python -m experiments.emoji.evaluate emoji data/emoji runs/emoji-judge --out docs/results/emoji.json

Every row is judged by `experiments.emoji.judge`: the run's drawings of training cells, of held-out cells and of held-out
concepts, flags apart; the real pictures of the same cells (the ceiling); the codec's reconstructions of them; and the
nearest mean colours (the floor). `copies` is the share of drawings that are nearer to a training picture than nine tenths of
the real held-out pictures are.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor

from experiments.emoji.judge import (
    Cells,
    Gallery,
    Judge,
    Verdict,
    judge_by_colours,
    judge_pictures,
    open_judge,
    preprocess,
    read_cells,
)  # fmt: skip
from transfusion.codecs.autoencoder import to_uint8
from transfusion.codecs.codec import Codec, encode_many
from transfusion.codecs.vq import VQ
from transfusion.disk import write_json
from transfusion.evaluation.captions import caption_images
from transfusion.inference.engine import Engine, Request, open_run
from transfusion.training.codec import psnr

BATCH = 128  # drawings that are made together
COPY_QUANTILE = 0.1
KINDS = "drawn", "real", "codec", "colours"  # of pictures in a row of the table


@dataclass(frozen=True)
class Options:
    run: tyro.conf.Positional[str]
    """A run or an exported run."""
    data: tyro.conf.Positional[Path] = Path("data/emoji")
    """Folder that `python -m experiments.emoji.dataset` wrote."""
    judge: tyro.conf.Positional[Path] = Path("runs/emoji-judge")
    """Folder of the judge."""
    out: Path | None = None
    """JSON file for the figures; only printed if not set."""
    count: int = 400
    """Largest number of cells in a row of the table."""


def main(options: Options) -> None:
    cells, judge = read_cells(options.data), open_judge(options.judge)
    gallery = Gallery(cells, judge.features(cells.pixels)[0])
    engine = open_run(options.run)
    figures = {"step": engine.opened.step, "parameters": engine.opened.parameters}
    print(f"{'cells':24}  count" + "".join(f"  {kind:7} top-1 top-5 style" for kind in KINDS))
    for name, asked in choose_cells(cells, options.count):
        row = measure_drawings(engine, judge, gallery, asked)
        figures[name] = {kind: asdict(verdict) for kind, verdict in row.items()}
        shares = (f"{' ':9}{row[kind].top1:.3f} {row[kind].top5:.3f} {row[kind].style:.3f}" for kind in KINDS)
        print(f"{name:24}  {len(asked):5}" + " ".join(shares), flush=True)
    heldout = cells.where([kind == "cell" for kind in cells.kinds])
    figures["codec"] = {"psnr": psnr(heldout.pixels, reconstruct(engine.opened.codec, heldout.pixels)).mean().item()}
    figures["captions"] = measure_captions(engine, heldout)
    figures["copies"] = measure_copies(engine, cells, options.count)
    print(json.dumps({name: figures[name] for name in ("codec", "captions", "copies")}))
    if options.out is not None:
        write_json(options.out, figures)
        print(f"wrote {options.out}")


def choose_cells(cells: Cells, count: int) -> Iterator[tuple[str, Cells]]:
    """The rows of the table: at most `count` random cells of each kind, always the same."""
    for kind, title in (("train", "training cells"), ("cell", "held-out cells"), ("concept", "held-out concepts")):
        for flag in (False, True):
            ids = [n for n in range(len(cells)) if cells.kinds[n] == kind and cells.is_flag[n] == flag]
            if ids:
                chosen = set(np.random.default_rng(0).permutation(ids)[:count].tolist())
                yield title + (", flags" if flag else ""), cells.where([n in chosen for n in range(len(cells))])


def measure_drawings(engine: Engine, judge: Judge, gallery: Gallery, asked: Cells) -> dict[str, Verdict]:
    """Drawings of the cells, their real pictures, the codec's reconstructions of these, and the floor."""
    return {
        "drawn": judge_pictures(judge, draw(engine, asked), asked, gallery),
        "real": judge_pictures(judge, asked.pixels, asked, gallery),
        "codec": judge_pictures(judge, reconstruct(engine.opened.codec, asked.pixels), asked, gallery),
        "colours": judge_by_colours(asked.pixels, asked, gallery.cells),
    }


def draw(engine: Engine, asked: Cells, first_seed: int = 0) -> Tensor:
    """One drawing of each cell from its caption by the run's defaults, seeds first_seed, first_seed + 1, ...:
    (N, 3, 32, 32)."""
    requests = [Request(caption, num_images=1, seed=seed) for seed, caption in enumerate(asked.captions, first_seed)]
    return preprocess(generate_images(engine, requests))


def generate_images(engine: Engine, requests: Sequence[Request]) -> list[np.ndarray]:
    """The last picture of each request's first answer, (Y, X, 3) uint8."""
    batches = [requests[first : first + BATCH] for first in range(0, len(requests), BATCH)]
    return [answers[0].parts[-1] for batch in batches for answers in engine.generate(batch)]


def reconstruct(codec: Codec | VQ, pixels: Tensor) -> Tensor:
    """Through the codec and back, (N, 3, 32, 32)."""
    return preprocess([codec.decode(latent) for latent in encode_many(codec, to_images(pixels))])


def to_images(pixels: Tensor) -> list[np.ndarray]:
    """(N, 3, Y, X) between -1 and 1 -> (Y, X, 3) uint8 each."""
    return list(to_uint8(pixels).numpy())


def measure_captions(engine: Engine, cells: Cells) -> dict[str, float]:
    """Greedy captions of pictures: the shares with the exact concept and with the right style."""
    captions = caption_images(engine, to_images(cells.pixels))
    concepts, _, styles = zip(*(caption.rpartition(", ") for caption in captions), strict=True)
    return {"concept": _share_equal(concepts, cells.concepts), "style": _share_equal(styles, cells.styles)}


def _share_equal(a: Sequence[str], b: Sequence[str]) -> float:
    return sum(x == y for x, y in zip(a, b, strict=True)) / len(a)


def measure_copies(engine: Engine, cells: Cells, count: int) -> dict[str, float]:
    """How near drawings of held-out cells are to the nearest training picture, beside the real pictures of these cells: root
    mean square differences, medians. Pixels are between -1 and 1."""
    training = cells.where([kind == "train" for kind in cells.kinds]).pixels.flatten(1)
    heldout = dict(choose_cells(cells, count))["held-out cells"]
    drawn, real = (torch.cdist(pixels.flatten(1), training).amin(1) / training.shape[1] ** 0.5
                   for pixels in (draw(engine, heldout), heldout.pixels))  # fmt: skip
    return {"drawn": drawn.median().item(), "real": real.median().item(),
            "copies": (drawn < real.quantile(COPY_QUANTILE)).float().mean().item()}  # fmt: skip


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
