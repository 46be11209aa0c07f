"""Interleaved documents: after a caption and its picture the run writes the next caption and draws its picture.

    python -m experiments.emoji.interleaved emoji data/emoji runs/emoji-judge

Two prompts. "After another style": a concept in one style, its picture, and the caption of the same concept in a held-out
style; the run draws. Beside it stands the drawing from that caption alone: does the picture help? "On its own": two captions
with their pictures; the run continues freely, with text, and a picture where it wants one.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import tyro
from torch import Tensor

from experiments.emoji.edits import pair_styles
from experiments.emoji.evaluate import draw, generate_images, to_images
from experiments.emoji.judge import Cells, Gallery, Judge, judge_pictures, open_judge, preprocess, read_cells
from experiments.emoji.packages import STYLES
from transfusion.disk import write_json
from transfusion.inference.engine import Answer, Engine, Request, open_run


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
    count: int = 300
    """Largest number of documents of each kind."""


def main(options: Options) -> None:
    cells, judge = read_cells(options.data), open_judge(options.judge)
    gallery = Gallery(cells, judge.features(cells.pixels)[0])
    engine = open_run(options.run)
    figures = {}
    for name, kinds in (("held-out cells", ("train", "cell")), ("held-out concepts", ("concept", "concept"))):
        given, asked = pair_styles(cells, *kinds, options.count)
        figures[name] = {
            "after another style": asdict(judge_pictures(judge, draw_after(engine, given, asked), asked, gallery)),
            "from the caption alone": asdict(judge_pictures(judge, draw(engine, asked), asked, gallery)),
            "the real picture": asdict(judge_pictures(judge, asked.pixels, asked, gallery)),
        }
        for prompt, values in figures[name].items():
            shares = "  ".join(f"{key} {values[key]:.3f}" for key in ("style", "top1", "top5"))
            print(f"{name:18} {prompt:24} {shares}  ({values['count']})", flush=True)
    prompts = pair_styles(cells, "train", "train", options.count)
    figures["on its own"] = measure_continued(judge, gallery, prompts, continue_freely(engine, *prompts))
    print("on its own:", figures["on its own"])
    if options.out is not None:
        write_json(options.out, figures)
        print(f"wrote {options.out}")


def captioned(cells: Cells) -> list[tuple[str, np.ndarray]]:
    """Each cell as the parts of a prompt: its caption and its picture."""
    return list(zip(cells.captions, to_images(cells.pixels), strict=True))


def draw_after(engine: Engine, given: Cells, asked: Cells) -> Tensor:
    """Drawings (N, 3, 32, 32) of the cells `asked`, each after the caption and the real picture of a cell `given`."""
    prompts = zip(captioned(given), asked.captions, strict=True)
    requests = [Request((*parts, caption), num_images=1, seed=n) for n, (parts, caption) in enumerate(prompts)]
    return preprocess(generate_images(engine, requests))


def continue_freely(engine: Engine, first: Cells, second: Cells) -> list[Answer]:
    """What the run writes and draws after the captions and pictures of two cells of a concept; text is greedy."""
    greedy = replace(engine.run.generation, temperature=0.0, max_tokens=24)
    requests = [Request((*a, *b), seed=n, generation=greedy)
                for n, (a, b) in enumerate(zip(captioned(first), captioned(second), strict=True))]  # fmt: skip
    return [answers[0] for answers in engine.generate(requests)]


def first_pair(answer: Answer) -> tuple[str, np.ndarray] | None:
    """The first caption of an answer and the picture after it; None without one."""
    for text, image in zip(answer.parts, answer.parts[1:], strict=False):
        if isinstance(text, str) and isinstance(image, np.ndarray):
            return text, image
    return None


def measure_continued(
    judge: Judge, gallery: Gallery, prompts: tuple[Cells, Cells], answers: Sequence[Answer]
) -> dict[str, float]:
    """Shares of the answers that go on with a caption and its picture (pairs), and with the same concept in a third style
    (captions); and the judge's shares of the pictures of these."""
    first, second = prompts
    ids, styles, images = [], [], []
    pairs = [first_pair(answer) for answer in answers]
    for n, (caption, image) in ((n, pair) for n, pair in enumerate(pairs) if pair is not None):
        concept, _, style = caption.rpartition(", ")
        if concept == first.concepts[n] and style in {*STYLES} - {first.styles[n], second.styles[n]}:
            ids.append(n)
            styles.append(style)
            images.append(image)
    shares = {"pairs": sum(pair is not None for pair in pairs) / len(pairs), "captions": len(ids) / len(pairs)}
    if not ids:
        return shares
    return shares | asdict(judge_pictures(judge, preprocess(images), replace(first.take(ids), styles=styles), gallery))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
