"""Edits of real pictures of held-out concepts: "in the style of STYLE".

    python -m experiments.emoji.edits runs/emoji/edits runs/emoji/run data/emoji runs/emoji-judge

The first run was fine-tuned on edits, the second one was not. A prompt is a real picture and the instruction; the answer is
judged by `experiments.emoji.judge` as a drawing of the concept in the asked style, and compared with the true picture of
that style. Neither run has seen the concept. Beside it stand the source itself and the true pictures. The scales of guidance
are chosen on other edits: from training pictures to held-out cells.

Fine-tuning follows section 4.5 of the paper: sources without noise and without loss.
"""

from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import tyro
from torch import Tensor

from experiments.emoji.evaluate import generate_images, to_images
from experiments.emoji.judge import Cells, Gallery, Judge, judge_pictures, open_judge, preprocess, read_cells
from transfusion.disk import write_json
from transfusion.inference.engine import Engine, Request, open_run
from transfusion.training.codec import psnr

GUIDANCE = (1.0, 1.0), (2.0, 1.0), (3.0, 1.0), (2.0, 2.0), (3.0, 2.0)  # scales of words and of the picture that are tried
NUM_TRIED = 120  # edits for each of them


@dataclass(frozen=True)
class Options:
    tuned: tyro.conf.Positional[str]
    """The run that was fine-tuned on edits."""
    untuned: tyro.conf.Positional[str]
    """The run that it started from."""
    data: tyro.conf.Positional[Path] = Path("data/emoji")
    """Folder that `python -m experiments.emoji.dataset` wrote."""
    judge: tyro.conf.Positional[Path] = Path("runs/emoji-judge")
    """Folder of the judge."""
    out: Path | None = None
    """JSON file for the figures; only printed if not set."""
    count: int = 400
    """Largest number of edits."""


def main(options: Options) -> None:
    cells, judge = read_cells(options.data), open_judge(options.judge)
    gallery = Gallery(cells, judge.features(cells.pixels)[0])
    sources, targets = pair_styles(cells, "concept", "concept", options.count)
    few = pair_styles(cells, "train", "cell", NUM_TRIED)
    tuned, untuned = open_run(options.tuned), open_run(options.untuned)
    tried = {}
    for scale, image_scale in GUIDANCE:
        drawn = edit(tuned, *few, guidance_scale=scale, image_guidance_scale=image_scale)
        tried[scale, image_scale] = measure(judge, gallery, drawn, few[1])
        report(f"fine-tuned, {scale:g} for words, {image_scale:g} for the picture", tried[scale, image_scale])
    best = max(tried, key=lambda scales: tried[scales]["style"] + tried[scales]["top5"])
    guidance = {"guidance_scale": best[0], "image_guidance_scale": best[1]}
    figures = {
        "fine-tuned": measure(judge, gallery, edit(tuned, sources, targets, **guidance), targets),
        "not fine-tuned": measure(judge, gallery, edit(untuned, sources, targets, **guidance), targets),
        "the source": measure(judge, gallery, sources.pixels, targets),
        "the true picture": measure(judge, gallery, targets.pixels, targets),
    }
    for name, values in figures.items():
        report(name, values)
    figures |= {"guidance": guidance,
                "guidance tried": {f"{a:g}, {b:g}": values for (a, b), values in tried.items()}}  # fmt: skip
    if options.out is not None:
        write_json(options.out, figures)
        print(f"wrote {options.out}")


def pair_styles(cells: Cells, source_kind: str, target_kind: str, count: int) -> tuple[Cells, Cells]:
    """Sources and targets of at most `count` random edits between two styles of a concept, always the same."""
    sources, targets = defaultdict(list), defaultdict(list)  # concept -> numbers of cells
    for numbers, kind in ((sources, source_kind), (targets, target_kind)):
        for n in range(len(cells)):
            if cells.kinds[n] == kind:
                numbers[cells.concepts[n]].append(n)
    pairs = [(a, b) for concept, ids in sources.items() for a in ids for b in targets[concept] if a != b]
    chosen = [pairs[n] for n in np.random.default_rng(0).permutation(len(pairs))[:count]]
    return cells.take([a for a, _ in chosen]), cells.take([b for _, b in chosen])


def edit(engine: Engine, sources: Cells, targets: Cells, **guidance: float) -> Tensor:
    """Each source in the style of its target, seeds 0, 1, ...: (N, 3, 32, 32)."""
    generation = engine.make_generation_config(**guidance)
    images = to_images(sources.pixels)
    return preprocess(generate_images(engine, [
        Request((image, f"in the style of {style}"), num_images=1, seed=n, generation=generation)
        for n, (image, style) in enumerate(zip(images, targets.styles, strict=True))
    ]))  # fmt: skip


def measure(judge: Judge, gallery: Gallery, pictures: Tensor, targets: Cells) -> dict[str, float]:
    """The judge's shares, and the distance to the true pictures in dB."""
    return asdict(judge_pictures(judge, pictures, targets, gallery)) | {"psnr": psnr(pictures, targets.pixels).mean().item()}


def report(name: str, values: dict[str, float]) -> None:
    print(f"{name:50} style {values['style']:.3f}  top-1 {values['top1']:.3f}  top-5 {values['top5']:.3f}  "
          f"PSNR {values['psnr']:.2f} dB  ({values['count']})", flush=True)  # fmt: skip


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
